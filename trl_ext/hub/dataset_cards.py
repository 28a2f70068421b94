"""What the cards of published datasets say: counts, means, columns and a first row, from the data itself."""

import dataclasses
import datetime
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Json, LargeList, List, Value

from ..data.rankings import is_ranking, prepare_rankings
from ..data.rollouts import ROLLOUT_COLUMNS
from ..ranking.agreement import ranking_agreement
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
# Of the first row
SHOWN_ENTRIES = 8  # of each list
SHOWN_CHARACTERS = 500  # of each text
SHOWN_IN_ALL = 20_000  # characters


def describe_rankings(splits: DatasetDict) -> dict[str, Any]:
    """
    What the card says of the data: counts, ties, shapes, agreement, columns, the first row.

    Raises:
        ValueError: for rankings that could not be trained on.
    """
    first = next(iter(splits.values()))
    judged = [name for name in JUDGED if name in first.column_names]  # other columns may hold what cannot be decoded
    prepared = [
        row
        for name, split in splits.items()
        for row in prepare_rankings(split.select_columns(judged) if is_ranking(judged) else split, dataset_name=name)
    ]
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
            for row in split.select_columns(["id", "ranks"]):
                if row["ranks"] is not None:
                    by_item[str(row["id"])].append(row["ranks"])
    annotators = (
        len({str(a) for split in splits.values() for a in split["annotator"]})
        if "annotator" in first.features
        else None
    )
    return {
        "num_rows": len(prepared),
        "num_prompts": _num_different(row["prompt"] for row in prepared),
        "num_completions": sum(len(row["completions"]) for row in prepared),
        "num_pairs": pairs,
        "tie_rate": f"{ties / pairs:.1%}",
        "annotators": annotators,
        "agreement": _agreement(list(by_item.values())),
        "splits": [(name, len(split)) for name, split in splits.items()],
        "columns": _columns(first, RANKING_COLUMNS),
        "sizes": sorted(sizes.items()),
        "shapes": shapes.most_common(5),
        **_first_row(first, indent=2),
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
    """What the card says of recorded rollouts, by split: how many, of how many prompts and steps, how good, how long."""
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
        **_first_row(first),
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
        **_first_row(first),
    }


def _columns(split: Dataset, meanings: dict[str, str]) -> list[tuple[str, str, str]]:
    """Name, type and meaning of each column."""
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
    """Of the text, or of all messages' texts."""
    texts = [completion] if isinstance(completion, str) else [message.get("content") for message in completion]
    return sum(len(text) for text in texts if isinstance(text, str))


# --- The first row ---


def _first_row(split: Dataset, indent: int | None = None) -> dict[str, Any]:
    """The first row as JSON, a line for each column, and how much of it is shown where that is not all."""
    row = raw_row(split)
    whole = plain(row, None, None)
    for entries, characters in ((SHOWN_ENTRIES, SHOWN_CHARACTERS), (SHOWN_ENTRIES // 2, SHOWN_CHARACTERS // 10)):
        shown = plain(row, entries, characters)
        text = _as_json(shown, indent)
        if len(text) <= SHOWN_IN_ALL:
            break
    limits = {"entries": entries, "characters": characters} if shown != whole else None
    return {"first_row": text, "shown_entries": entries, "limits": limits}


def _as_json(row: dict[str, Any], indent: int | None) -> str:
    if indent is not None:
        return json.dumps(row, ensure_ascii=False, indent=indent)
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in row.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def raw_row(split: Dataset) -> dict[str, Any]:
    """The first row as it is stored, with images, sounds and films as their bytes or paths."""
    table = split.select([0]).with_format("arrow")[:1]
    return undecoded(split.features).decode_example(table.to_pylist()[0])


def undecoded(feature: Any) -> Any:
    """The feature without the decoders of media, which may not be installed."""
    if isinstance(feature, dict):
        return type(feature)({name: undecoded(inner) for name, inner in feature.items()})
    if isinstance(feature, list):
        return [undecoded(inner) for inner in feature]
    if isinstance(feature, List | LargeList):
        return dataclasses.replace(feature, feature=undecoded(feature.feature))
    if getattr(feature, "decode", False) and not isinstance(feature, Json):
        return dataclasses.replace(feature, decode=False)
    return feature


def plain(value: Any, entries: int | None, characters: int | None) -> Any:
    """
    The value as JSON has it.

    Args:
        value (`Any`): Of a row; what JSON does not know, such as dates and decimals, becomes text.
        entries (`int`, *optional*): Of each list no more than so many are kept.
        characters (`int`, *optional*): Of each text no more than so many.
    """
    if isinstance(value, dict):
        return {str(name): plain(inner, entries, characters) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, entries, characters) for inner in value[:entries]]
    if value is None or isinstance(value, bool | int) or isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    text = value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be written
    return text if characters is None or len(text) <= characters else f"{text[:characters]} ..."
