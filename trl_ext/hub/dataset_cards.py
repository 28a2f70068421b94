"""Descriptions of published datasets for their cards: counts, means, columns and a first row, from the data itself."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, LargeList, List, Value

from ..data.rankings import is_ranking, prepare_rankings
from ..data.rollouts import ROLLOUT_COLUMNS
from ..ranking.agreement import ranking_agreement
from .first_row import first_row
from .model_card import cell


RANKING_COLUMNS = {
    "prompt": "what was answered",
    "completions": "the answers",
    "ranks": "one for each completion: lower is better, equal is tied, null was not ranked",
    "pairs": "judgements `[i, j, v]` of two completions: v = 1 if i is better, 2 if j is, 0 for neither",
    "ranking": "the same as text",
    "id": "of the prompt with its completions; rows of several annotators share it",
    "annotator": "who ranked",
    "sources": "who wrote each completion",
    "seconds": "how long it took",
    "flag": "what the annotator thought wrong with the item",
}
JUDGED = ("prompt", "completions", "ranks", "pairs", "ranking")
SAMPLE_COLUMNS = {
    "round": "of sampling and learning, from 1 on",
    "prompt_index": "rows with the same are completions of the same prompt",
    "prompt": "what was completed: a text, or a list of messages",
    "completion": "of the same kind",
    "score": "weighted sum of the rewards; null where none applies",
}


def describe_rankings(splits: DatasetDict) -> dict[str, Any]:
    """
    Describes rankings: counts, ties, shapes, agreement, columns, the first row.

    Raises:
        ValueError: for rankings that could not be trained on.
    """
    first = next(iter(splits.values()))
    judged = [name for name in JUDGED if name in first.column_names]  # other columns may hold media without a decoder
    prepared = [
        row
        for name, split in splits.items()
        for row in prepare_rankings(split.select_columns(judged) if is_ranking(judged) else split, dataset_name=name)
    ]
    return {
        "num_rows": len(prepared),
        "num_prompts": _num_different(row["prompt"] for row in prepared),
        "num_completions": sum(len(row["completions"]) for row in prepared),
        "sizes": sorted(Counter(len(row["completions"]) for row in prepared).items()),
        "splits": [(name, len(split)) for name, split in splits.items()],
        "columns": _columns(first, RANKING_COLUMNS),
        **_outcomes(prepared),
        **_annotators(splits),
        **first_row(first, indent=2),
    }


def _outcomes(prepared: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts judged pairs and ties, and the most frequent shapes of rankings: `1223` has a tie in second place."""
    shapes, is_tied = Counter(), []
    for row in prepared:
        ranks = [rank for rank in row["ranks"] or [] if rank is not None and rank >= 0]
        if ranks:
            is_tied += [a == b for a, b in itertools.combinations(ranks, 2)]
            levels = sorted(set(ranks))
            shapes["".join(str(1 + levels.index(rank)) for rank in sorted(ranks))] += 1
        else:
            is_tied += [value == 0 for _, _, value in row["pairs"]]
    rate = sum(is_tied) / len(is_tied)
    return {"num_pairs": len(is_tied), "tie_rate": f"{rate:.1%}", "shapes": shapes.most_common(5)}


def _annotators(splits: DatasetDict) -> dict[str, Any]:
    """Counts the annotators, if the data names them, and says how far they agree about the same item."""
    columns, by_item = next(iter(splits.values())).column_names, defaultdict(list)
    if "annotator" not in columns:
        return {"annotators": None, "agreement": None}
    if {"id", "ranks"} <= set(columns):
        for split in splits.values():
            for row in split.select_columns(["id", "ranks"]):
                if row["ranks"] is not None:
                    by_item[str(row["id"])].append(row["ranks"])
    names = {str(name) for split in splits.values() for name in split["annotator"]}
    return {"annotators": len(names), "agreement": _agreement(list(by_item.values()))}


def _agreement(rankings: list[list[list[int | None]]]) -> dict[str, str] | None:
    """Returns how far annotators agree, in words; None if no two of them ranked the same item."""
    try:
        measured = ranking_agreement(rankings)
    except ValueError:
        return None
    shown = {name: f"{measured[name]:.1%}" for name in ("agreement", "strict_agreement")}
    return shown | {"alpha": f"{measured['alpha']:.2f}"}


def _type_of(feature: Any) -> str:
    """Returns `List(Value('string'))` as `list of string`."""
    if isinstance(feature, Value):
        return feature.dtype
    if isinstance(feature, ClassLabel):
        return f"one of {feature.num_classes} classes"
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{name}: {_type_of(inner)}" for name, inner in feature.items()) + "}"
    if isinstance(feature, list):
        return f"list of {_type_of(feature[0])}"
    if isinstance(feature, List | LargeList):
        return f"list of {_type_of(feature.feature)}"
    return type(feature).__name__.lower()  # json, image, audio, ...


def describe_rollouts(splits: DatasetDict) -> dict[str, Any]:
    """Describes recorded rollouts by split: their number, prompts, steps, mean score and mean length."""
    first = next(iter(splits.values()))
    return {
        "num_completions": sum(len(split) for split in splits.values()),
        "num_prompts": _num_prompts(splits),
        "has_critic": first["values"][0] is not None,
        "has_reference": first["kl"][0] is not None,
        "splits": [
            {
                "name": name,
                "completions": len(split),
                "steps": f"{min(split['step'])} to {max(split['step'])}",
                "score": _mean(split["score"]),
                "length": _mean(len(ids) for ids in split["completion_ids"]),
                "terminated": f"{sum(split['terminated']) / len(split):.1%}",
            }
            for name, split in splits.items()
        ],
        "columns": _columns(first, ROLLOUT_COLUMNS),
        **first_row(first),
    }


def describe_samples(splits: DatasetDict) -> dict[str, Any]:
    """Describes completions that were sampled and filtered, by split: their number, prompts, mean score and length."""
    first = next(iter(splits.values()))
    return {
        "num_prompts": _num_prompts(splits),
        "splits": [
            {
                "name": name,
                "completions": len(split),
                "prompts": _num_prompts({name: split}),
                "score": _mean(split["score"]),
                "length": _mean(_num_characters(completion) for completion in split["completion"]),
            }
            for name, split in splits.items()
        ],
        "columns": _columns(first, SAMPLE_COLUMNS),
        **first_row(first),
    }


def _columns(split: Dataset, meanings: dict[str, str]) -> list[tuple[str, str, str]]:
    """Returns name, type and meaning of each column."""
    rewards = {
        name: f"what the reward function `{name.removeprefix('reward/')}` gave; null where it does not apply"
        for name in split.column_names
        if name.startswith("reward/")
    }
    known = rewards | meanings
    return [(cell(name), cell(_type_of(feature)), known.get(name, "")) for name, feature in split.features.items()]


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return cell(sum(known) / len(known)) if known else "none"


def _num_prompts(splits: dict[str, Dataset]) -> int:
    return _num_different(prompt for split in splits.values() for prompt in split["prompt"])


def _num_different(values: Iterable[Any]) -> int:
    return len({json.dumps(value, default=str) for value in values})


def _num_characters(completion: str | list[dict[str, Any]]) -> int:
    """Counts the characters of a text, or of all messages' texts."""
    texts = [completion] if isinstance(completion, str) else [message.get("content") for message in completion]
    return sum(len(text) for text in texts if isinstance(text, str))
