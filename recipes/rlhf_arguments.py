"""
Whether recipes understand their arguments, which `rlhf.py` asks before hours are spent on the stages before.

Reads `[[script, [argument, ...]], ...]` as JSON from its input, and exits with an error at the first that fails.
"""

import json
import sys

import actor_critic
import judge_completions
import merge
import ranking_reward
import rlhf_evaluate
import rlhf_prompts
import rlhf_reviews
import sample_completions
import sft


PARSERS = {
    "sft.py": sft.parse,
    "merge.py": merge.parse,
    "ranking_reward.py": ranking_reward.parse,
    "actor_critic.py": actor_critic.parse,
}
PARSERS |= {
    f"{module.__name__}.py": module.parse_args
    for module in (rlhf_prompts, rlhf_reviews, sample_completions, judge_completions, rlhf_evaluate)
}


def check(script: str, arguments: list[str]) -> None:
    """Raises a ValueError, or exits as `argparse` does."""
    sys.argv = [script, *arguments]
    parser = PARSERS[script]
    parser() if parser.__name__ == "parse_args" else parser(arguments)


def main() -> None:
    for script, arguments in json.load(sys.stdin):
        try:
            check(script, arguments)
        except ValueError as error:
            sys.exit(f"{script}: {error}")


if __name__ == "__main__":
    main()
