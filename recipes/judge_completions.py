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
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from actor_critic import import_reward
from rank_completions import as_text, check_export, export
from sample_completions import context_of, load_model, num_tokens, sample
from tqdm import tqdm
from transformers import set_seed

from trl_ext.adapters.reward_models import RewardModel, load_reward_model
from trl_ext.data.collection import agreement
from trl_ext.data.items import Item, read_items
from trl_ext.data.judgements import Judgements
from trl_ext.data.rows import located, ranks_of_scores


logger = get_logger(__name__)

QUESTION = """{rubric}

Question:
{prompt}

Answer:
{completion}

Grade the answer from 1 (worst) to 10 (best). Reply with the number alone."""


def parse_args() -> argparse.Namespace:
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
    args = parser.parse_args()
    if args.tie_threshold < 0:
        parser.error("--tie_threshold must not be negative.")
    return args


Scores = list[float | None]


def reward_model_scores(path: str, prompts: list) -> Callable[[Item], Scores]:
    """
    The reward model's score of prompt and completion, read as in its training; None where they are too long for it.

    Args:
        path (`str`): Folder or Hub id.
        prompts (`list`): All that it shall score completions of.
    """
    model, tokenizer = load_reward_model(path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    reward_model = RewardModel(model, tokenizer, path)
    for is_chat in {not isinstance(prompt, str) for prompt in prompts}:
        reward_model.check(is_chat)

    def score(item):
        return reward_model.score([reward_model.input_ids(item.prompt, completion) for completion in item.completions])

    return score


def function_scores(path: str) -> Callable[[Item], Scores]:
    reward = import_reward(path)

    def score(item):
        scores = reward(prompts=[item.prompt] * len(item.completions), completions=item.completions)
        try:
            numbers = [None if s is None else float(s) for s in scores]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(item.completions):
            raise ValueError(
                f"{path} returned {scores!r:.80} for {len(item.completions)} completions. Return a list with a number, or "
                "None, for each."
            )
        return numbers

    return score


def grades(path: str, rubric: str) -> Callable[[Item], Scores]:
    """The grade that a language model gives, greedily; None where it gives none, or the question is too long for it."""
    model, tokenizer = load_model(path, "auto")
    greedy = argparse.Namespace(temperature=1e-6, top_p=1.0, max_completion_length=8)
    context = context_of(model.config)
    PartialState()  # the logger asks it which process this is

    def fits(question):
        if context is None or num_tokens(tokenizer, question) + greedy.max_completion_length <= context:
            return True
        logger.warning_once(
            f"{path} has a context of {context} tokens, and some questions are longer. Their answers have no grade. Rank "
            "shorter ones, or ask another model."
        )
        return False

    def score(item):
        questions = [
            QUESTION.format(rubric=rubric, prompt=as_text(item.prompt), completion=as_text(completion))
            for completion in item.completions
        ]
        if tokenizer.chat_template is not None:
            questions = [[{"role": "user", "content": question}] for question in questions]
        set_seed(0)
        fit = [fits(question) for question in questions]
        asked = [question for question, is_asked in zip(questions, fit, strict=True) if is_asked]
        replies = [as_text(reply) for (reply,) in sample(model, tokenizer, asked, 1, greedy)] if asked else []
        numbers = (re.search(r"\b(10|[1-9])\b", reply) for reply in replies)
        given = [float(number[0]) if number else None for number in numbers]
        return [given.pop(0) if is_asked else None for is_asked in fit]

    return score


def main() -> None:
    args = parse_args()
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
