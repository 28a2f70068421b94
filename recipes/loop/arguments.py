"""
A program that asks recipes if they understand their arguments, before hours are spent on the stages before.

Reads `[[script, [argument, ...]], ...]` as JSON from its input, and exits with an error at the first that fails.
"""

import json
import runpy
import sys
from pathlib import Path


RECIPES = Path(__file__).parents[1]


def check(script: str, arguments: list[str]) -> None:
    """Lets a recipe parse its arguments. Raises a ValueError, or exits as `argparse` does."""
    sys.argv = [script, *arguments]  # for the program's name in errors
    args = runpy.run_path(str(RECIPES / script))["parse"](arguments)
    if script == "judge_completions.py" and args.reward_func is not None:
        from shared.rewards import import_reward

        import_reward(args.reward_func)


def main() -> None:
    sys.path[0] = str(RECIPES)  # as when a recipe is started
    for script, arguments in json.load(sys.stdin):
        try:
            check(script, arguments)
        except ValueError as error:
            sys.exit(f"{script}: {error}")


if __name__ == "__main__":
    main()
