"""
Prompts to train on and prompts to be examined on, which have none in common: the first stage of `rlhf.py`.

    python recipes/rlhf_prompts.py --dataset_name trl-lib/ultrafeedback-prompt --output_dir outputs/rlhf/data

writes `prompts.jsonl` and `test_prompts.jsonl`. Without `--test_dataset_name` some of the prompts are held out.
"""

import argparse
import sys
from pathlib import Path

from collecting.prompts import prompts_by_row
from loop.data import divide, write_rows


def parse(args: list[str]) -> argparse.Namespace:
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
    args = parser.parse_args(args)
    if args.num_test < 1:
        parser.error("--num_test must be at least 1: there is nothing to examine the models on.")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    test_args = argparse.Namespace(**{**vars(args), "dataset_name": args.test_dataset_name, "split": args.test_split})
    try:
        test_prompts = [*prompts_by_row(test_args).values()] if args.test_dataset_name else None
        prompts, test_prompts = divide([*prompts_by_row(args).values()], test_prompts, args.num_test, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("prompts", prompts), ("test_prompts", test_prompts)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": prompt} for prompt in part])
    print(f"{len(prompts)} prompts to train on, {len(test_prompts)} held out")


if __name__ == "__main__":
    main()
