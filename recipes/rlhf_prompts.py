"""
Prompts to train on and prompts to be examined on, which have none in common: the first stage of `rlhf.py`.

    python recipes/rlhf_prompts.py --dataset_name trl-lib/ultrafeedback-prompt --output_dir outputs/rlhf/data

writes `prompts.jsonl` and `test_prompts.jsonl`. Without `--test_dataset_name` some of the prompts are held out.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from rlhf_reviews import write_rows
from sample_completions import load_prompts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="prompts: a Hub id, a data file or a folder")
    parser.add_argument("--test_dataset_name", help="prompts that are held out, likewise")
    parser.add_argument("--dataset_config", help="of a dataset on the Hub")
    parser.add_argument("--split", default="train")
    parser.add_argument("--test_split", default="train", help="of --test_dataset_name")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--system_prompt", help="put before conversations; makes conversations of texts")
    parser.add_argument("--max_prompts", type=int, help="only so many of each dataset")
    parser.add_argument(
        "--num_test", type=int, default=200, help="how many to hold out; of --test_dataset_name, how many to use"
    )
    parser.add_argument("--seed", type=int, default=0, help="of which are held out")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    if args.num_test < 1:
        parser.error("--num_test must be at least 1: there is nothing to examine the models on.")
    return args


def divide(prompts: list, test_prompts: list | None, num_test: int, seed: int) -> tuple[list, list]:
    """
    Prompts to train on, and to be examined on.

    Raises:
        ValueError: where there are none to train on.
    """
    if test_prompts is None:
        if len(prompts) <= num_test:
            raise ValueError(
                f"--num_test {num_test} of {len(prompts)} different prompts leaves none to train on. Lower it, or give "
                "more prompts."
            )
        test_prompts = random.Random(seed).sample(prompts, num_test)
    test_prompts = test_prompts[:num_test]
    held_out = {json.dumps(prompt) for prompt in test_prompts}
    rest = [prompt for prompt in prompts if json.dumps(prompt) not in held_out]
    if not rest:
        raise ValueError("All prompts are held-out ones as well, so there are none to train on. Give others.")
    return rest, test_prompts


def main() -> None:
    args = parse_args()
    test_args = argparse.Namespace(**{**vars(args), "dataset_name": args.test_dataset_name, "split": args.test_split})
    try:
        test_prompts = load_prompts(test_args) if args.test_dataset_name else None
        prompts, test_prompts = divide(load_prompts(args), test_prompts, args.num_test, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("prompts", prompts), ("test_prompts", test_prompts)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in part])
    print(f"{len(prompts)} prompts to train on, {len(test_prompts)} held out")


if __name__ == "__main__":
    main()
