"""Answers of two models to the same prompts, and what judges and a reward model say of them."""

import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from collecting.judges import reward_model_scores
from collecting.text import as_text
from trl_ext.data.collection import all_judgements
from trl_ext.data.items import Item, read_items
from trl_ext.data.records import read_lines


@dataclass
class Answers:
    """Answers of both models to a prompt, first the baseline's, with the reward and the length in tokens of each."""

    prompt: str | list[dict]
    texts: tuple[list, list]
    outcomes: list[int]  # of each judged pair: 1 where the second model is better, 0 for a tie, -1
    rewards: tuple[list[float], list[float]] = ((), ())
    lengths: tuple[list[int], list[int]] = ((), ())


def read_answers(folder: Path) -> tuple[list[str], list[str], list[Answers]]:
    """
    Returns the models' names, the judges' names, and the answers to all prompts that were judged.

    Raises:
        ValueError: if there are not two models, or nothing was judged.
    """
    models = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["model_name_or_path"]
    if len(models) != 2:
        raise ValueError(f"{folder} has completions of {len(models)} models. Sample from two.")
    samples = [{key(row["prompt"]): row for row in read_lines(folder / f"samples-{i}.jsonl")} for i in range(2)]
    judges = all_judgements(folder)
    ranks = ranks_by_prompt(folder, judges)
    answers = []
    for prompt, row in samples[0].items():
        texts = row["completions"], samples[1][prompt]["completions"]
        outcomes = compare(*texts, ranks[prompt])
        if outcomes:
            answers.append(Answers(row["prompt"], texts, outcomes))
    if not answers:
        raise ValueError(f"Nothing was judged in {folder} yet. Start judge_completions.py or rank_completions.py.")
    return [Path(name).name for name in models], [judge.annotator for judge in judges], answers


def key(message) -> str:
    return json.dumps(message, sort_keys=True)


def ranks_by_prompt(folder: Path, judges: list) -> dict[str, list[dict[str, int | None]]]:
    """Returns for each prompt the rankings of its judges, as the rank of each text."""
    ranks = defaultdict(list)
    for item in read_items(folder):
        for judge in judges:
            if item in judge and judge[item.id]["ranks"] is not None:
                texts = map(key, item.completions)
                ranks[key(item.prompt)].append(dict(zip(texts, judge[item.id]["ranks"], strict=True)))
    return ranks


def compare(baseline: list, other: list, rankings: list[dict[str, int | None]]) -> list[int]:
    """Returns the outcome of each pair by each judge; two equal texts are tied, and nobody is asked about them."""
    outcomes = []
    for first, second in ((key(a), key(b)) for a in baseline for b in other):
        if first == second:
            outcomes.append(0)
            continue
        for ranks in rankings:
            a, b = ranks.get(first), ranks.get(second)
            if a is not None and b is not None:
                outcomes.append((a > b) - (a < b))
    return outcomes


def add_rewards_and_lengths(answers: list[Answers], reward_model: str) -> None:
    """Fills in rewards and lengths. Raises a ValueError for an answer that is too long for the reward model."""
    score = reward_model_scores(reward_model, [row.prompt for row in answers])
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for row in answers:
        row.rewards = tuple(score(Item("", row.prompt, texts, [])) for texts in row.texts)
        if None in itertools.chain(*row.rewards):
            raise ValueError(
                f"{reward_model} has too few positions for an answer to {as_text(row.prompt)!r:.80}. Evaluate by another."
            )
        row.lengths = tuple([num_tokens(tokenizer, text) for text in texts] for texts in row.texts)


def num_tokens(tokenizer, completion: str | list[dict]) -> int:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
