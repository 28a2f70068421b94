r"""
Have a judge rank completions, in place of people or beside them: a reward model, a python function, or a language model
with a rubric. What it says goes where the judgements of people go, under the annotator's name `judge-...`.

    python recipes/judge_completions.py --folder outputs/completions --reward_model my-reward-model --tie_threshold 0.1

A function `def reward(completions, **columns) -> list[float]` in my_rewards.py of this folder:

    python recipes/judge_completions.py --folder outputs/completions --reward_func my_rewards.reward

A language model, which is asked for a grade from 1 to 10 of each completion; equal grades are ties:

    python recipes/judge_completions.py --folder outputs/completions --judge_model Qwen/Qwen2.5-7B-Instruct \
        --rubric "Is the answer right, and does it say no more than was asked?"

Then `rank_completions.py --export`, which also says how far judge and people agree.
"""

import argparse
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from collecting.export import check_export, export
from collecting.judges import function_scores, grades, reward_model_scores
from trl_ext.data.collection import agreement
from trl_ext.data.items import read_items
from trl_ext.data.judgements import Judgements
from trl_ext.data.rows import located, ranks_of_scores


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where completions.jsonl is, and judgements go")
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--reward_model", help="a sequence classification model with one label: a folder or Hub id")
    judge.add_argument("--reward_func", help="'module.function', importable from the working directory")
    judge.add_argument("--judge_model", help="a language model to ask: a folder or Hub id")
    parser.add_argument("--rubric", default="How good is this answer?", help="what --judge_model is told")
    parser.add_argument("--name", help="of the judge; by default that of what judges")
    parser.add_argument("--export", metavar="FILE", help="then write all rankings, as rank_completions.py does")
    parser.add_argument("--tie_threshold", type=float, default=0.0, help="scores this near to each other are tied")
    args = parser.parse_args(args)
    if args.tie_threshold < 0:
        parser.error("--tie_threshold must not be negative.")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    source = args.reward_model or args.reward_func or args.judge_model
    try:
        if args.export:
            check_export(args.export)
        items = read_items(args.folder)
        judgements = Judgements(args.folder, "judge-" + (args.name or re.sub(r"[^\w.-]", "-", Path(source).name)))
        if args.reward_model:
            score = reward_model_scores(source, [item.prompt for item in items])
        else:
            score = function_scores(source) if args.reward_func else grades(source, args.rubric)
    except (ValueError, OSError) as error:  # the latter where there is no such model
        sys.exit(f"error: {error}")
    unjudged = 0
    for item in tqdm([item for item in items if item not in judgements], desc="Judging"):
        started = time.monotonic()
        try:
            ranks = ranks_of_scores(located(f"item {item.id!r}", score, item), args.tie_threshold)
        except ValueError as error:
            sys.exit(f"error: {error}")
        if len(ranks) - ranks.count(None) < 2:
            ranks, unjudged = None, unjudged + 1
        judgements.record(item, ranks, time.monotonic() - started, "" if ranks else "no scores")
    print(f"{len(judgements)} items judged by {judgements.annotator}, {unjudged} of them skipped for want of scores")
    if args.export:
        export(args.folder, args.export)
        return
    between = agreement(args.folder)
    if between is not None:
        print(
            f"Annotators agree on {between['agreement']:.1%} of {between['num_pairs']} pairs (alpha {between['alpha']:.3f})"
        )


if __name__ == "__main__":
    main()
