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


def parse_judge() -> None:
    function = judge_completions.parse_args().reward_func
    if function is not None:
        actor_critic.import_reward(function)


PARSERS = {  # all of which read `sys.argv`
    "rlhf_prompts.py": rlhf_prompts.parse_args,
    "rlhf_reviews.py": rlhf_reviews.parse_args,
    "sft.py": lambda: sft.parse(sys.argv[1:]),
    "merge.py": lambda: merge.parse(sys.argv[1:]),
    "sample_completions.py": sample_completions.parse_args,
    "judge_completions.py": parse_judge,
    "ranking_reward.py": lambda: ranking_reward.parse(sys.argv[1:]),
    "actor_critic.py": lambda: actor_critic.parse(sys.argv[1:]),
    "rlhf_evaluate.py": rlhf_evaluate.parse_args,
}


def check(script: str, arguments: list[str]) -> None:
    """Raises a ValueError, or exits as `argparse` does."""
    sys.argv = [script, *arguments]
    PARSERS[script]()


def main() -> None:
    for script, arguments in json.load(sys.stdin):
        try:
            check(script, arguments)
        except ValueError as error:
            sys.exit(f"{script}: {error}")


if __name__ == "__main__":
    main()
