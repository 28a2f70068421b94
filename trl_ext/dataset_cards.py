"""What the cards of published datasets say: counts, means, columns and a first row, from the data itself."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, DatasetDict

from .annotation import ranking_agreement
from .model_card import cell
from .ranking_data import prepare_rankings
from .rollouts import ROLLOUT_COLUMNS


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
SAMPLE_COLUMNS = {
    "round": "of sampling and learning, from 1 on",
    "prompt_index": "rows with the same are completions of the same prompt",
    "prompt": "what was completed: a text, or a list of messages",
    "completion": "of the same kind",
    "score": "weighted sum of the rewards; null where none applies",
}
MESSAGES = ("prompt", "completion")
SHOWN_TOKENS = 8  # of the first row's lists


def describe_rankings(splits: DatasetDict) -> dict[str, Any]:
    """What the card says of the data: counts, ties, shapes, agreement, columns, the first row."""
    first = next(iter(splits.values()))
    prepared = [row for name, split in splits.items() for row in prepare_rankings(split, dataset_name=name)]
    sizes, shapes, ties, pairs = Counter(), Counter(), 0, 0
    for row in prepared:
        sizes[len(row["completions"])] += 1
        ranks = [rank for rank in row["ranks"] or [] if rank is not None and rank >= 0]
        outcomes = (
            [a == b for a, b in itertools.combinations(ranks, 2)]
            if ranks
            else [value == 0 for _, _, value in row["pairs"]]
        )
        ties, pairs = ties + sum(outcomes), pairs + len(outcomes)
        if ranks:
            levels = sorted(set(ranks))
            shapes["".join(str(1 + levels.index(rank)) for rank in sorted(ranks))] += 1
    by_item = defaultdict(list)
    if {"id", "annotator", "ranks"} <= set(first.column_names):
        for split in splits.values():
            for row in split:
                if row["ranks"] is not None:
                    by_item[row["id"]].append(row["ranks"])
    annotators = (
        len({a for split in splits.values() for a in split["annotator"]}) if "annotator" in first.features else None
    )
    return {
        "num_rows": len(prepared),
        "num_prompts": len({json.dumps(row["prompt"]) for row in prepared}),
        "num_completions": sum(len(row["completions"]) for row in prepared),
        "num_pairs": pairs,
        "tie_rate": f"{ties / pairs:.1%}",
        "annotators": annotators,
        "agreement": _agreement(list(by_item.values())),
        "splits": [(name, len(split)) for name, split in splits.items()],
        "columns": _columns(first, RANKING_COLUMNS),
        "sizes": sorted(sizes.items()),
        "shapes": shapes.most_common(5),
        "first_row": json.dumps(first[0], ensure_ascii=False, indent=2),
    }


def _agreement(rankings: list[list[list[int | None]]]) -> dict[str, str] | None:
    """None where no two annotators ranked the same."""
    try:
        measured = ranking_agreement(rankings)
    except ValueError:
        return None
    shown = {name: f"{measured[name]:.1%}" for name in ("agreement", "strict_agreement")}
    return shown | {"alpha": f"{measured['alpha']:.2f}"}


def _type_of(feature: Any) -> str:
    """`List(Value('string'))` as `list of string`."""
    text = str(feature).replace("Json(decode=True)", "json").replace("Value('", "").replace("')", "")
    while "List(" in text:
        text = text.replace("List(", "list of ", 1)
    return text.replace(")", "").replace("|", "\\|")


def describe_rollouts(splits: DatasetDict) -> dict[str, Any]:
    """What the card says of recorded rollouts, by split: how many, of how many prompts and steps, how good, how long."""
    first = next(iter(splits.values()))
    return {
        "num_completions": sum(len(split) for split in splits.values()),
        "num_prompts": _num_prompts(splits),
        "has_critic": first[0]["values"] is not None,
        "has_reference": first[0]["kl"] is not None,
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
        "shown_tokens": SHOWN_TOKENS,
        "first_row": _row(first[0]),
    }


def describe_samples(splits: DatasetDict) -> dict[str, Any]:
    """What the card says of completions that were sampled and filtered, by split: how many, how good, how long."""
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
        "first_row": _row(first[0]),
    }


def _columns(split: Dataset, meanings: dict[str, str]) -> list[tuple[str, str, str]]:
    """Name, type and meaning of each column."""
    rewards = {
        name: f"what the reward function `{name.removeprefix('reward/')}` gave; null where it does not apply"
        for name in split.column_names
        if name.startswith("reward/")
    }
    known = rewards | meanings
    return [(name, _type_of(feature), known.get(name, "")) for name, feature in split.features.items()]


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return cell(sum(known) / len(known)) if known else "none"


def _num_prompts(splits: dict[str, Dataset]) -> int:
    return len({json.dumps(prompt) for split in splits.values() for prompt in split["prompt"]})


def _num_characters(completion: str | list[dict[str, Any]]) -> int:
    """Of the text, or of all messages' texts."""
    texts = [completion] if isinstance(completion, str) else [message.get("content") for message in completion]
    return sum(len(text) for text in texts if isinstance(text, str))


def _row(row: dict[str, Any]) -> str:
    """As JSON, a line for each column; the lists of tokens only begin."""
    lists = {name: value for name, value in row.items() if isinstance(value, list) and name not in MESSAGES}
    row = row | {name: value[:SHOWN_TOKENS] for name, value in lists.items()}
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in row.items()]
    return "{\n" + ",\n".join(lines) + "\n}"
