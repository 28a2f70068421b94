"""Rows of datasets that become rankings: reading them, and refusing those that are malformed."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value


logger = get_logger(__name__)

NUMBER = (int, float)
KINDS = {str: "text", list: "a list", dict: "a dict", NUMBER: "a number"}

TEXT = {"prompt": Value("string"), "completions": List(Value("string"))}
RANKS = {"ranks": List(Value("int64"))}
PAIRS = {"pairs": List(List(Value("int64")))}


def require(condition: Any, message: str) -> None:
    """
    Raises a ValueError unless the condition holds. Messages are `requirement, got value. Mend.`: dropped rows are
    counted by requirement.

    Example:

    ```python
    >>> require(1 + 1 == 2, "column `ranks`: must be whole numbers, got 1.5. Round them.")
    ```
    """
    if not condition:
        raise ValueError(message)


def get(record: Any, column: str, kind: type | tuple[type, ...]) -> Any:
    """Returns the value of `column`, which a nested record knows by the part after the dot. Refuses another kind."""
    value = record.get(column.rpartition(".")[2]) if isinstance(record, Mapping) else None
    require(isinstance(value, kind), f"column `{column}`: must be {KINDS[kind]}, got {value!r:.80}.")
    return value


def in_row(index: int, function: Callable, *args) -> Any:
    """Returns `function(*args)`, and has its errors say in which row."""
    return located(f"row {index}", function, *args)


def located(where: str, function: Callable, *args) -> Any:
    """Returns `function(*args)`, and has its errors say where."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{where}, {error}") from None


def check_texts(row: dict[str, Any]) -> str:
    """
    Refuses a row without a `prompt` and two or more `completions` of one kind.

    Returns:
        `str`: The kind of all of them, `"text"` or `"conversation"`.

    Raises:
        ValueError: for such a row; it names the column, and says how to mend it.
    """
    for name in ("prompt", "completions"):
        value = row.get(name)
        require(
            value is not None, f"column `{name}`: is missing or null. Fill it, or rename the column that holds it."
        )
    prompt, completions = row["prompt"], row["completions"]
    mend = "Complete or remove the row."
    if isinstance(completions, str):
        mend = "If the data is a .csv file, which has no lists: write it as .jsonl or .parquet."
    require(
        isinstance(completions, list) and len(completions) > 1,
        f"column `completions`: must be a list of two or more, got {completions!r:.80}. {mend}",
    )
    kind = kind_of(prompt, "prompt")
    require(kind, f"column `prompt`: must be text or a list of messages, got {prompt!r:.80}. Convert it.")
    for completion in completions:
        require(
            kind_of(completion, "completions") == kind,
            "column `completions`: must all be of the kind of `prompt`, texts or lists of messages, got "
            f"{completion!r:.80} to a {kind}. Convert one to the other.",
        )
    return kind


def kind_of(value: Any, column: str) -> str | None:
    """Returns `"text"`, `"conversation"`, or None for anything else. Refuses a conversation with malformed messages."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        return None
    for message in value:
        role, content = message.get("role"), message.get("content")
        require(
            isinstance(role, str) and role,
            f"column `{column}`: every message must have a `role`, such as 'user', got {message!r:.80}. Fill it.",
        )
        is_text = isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
        are_parts = isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content)
        require(
            is_text or are_parts,
            f"column `{column}`: every message must have a text as `content`, got {message!r:.80}. Fill it, or remove "
            "the row.",
        )
    return "conversation"


def is_whole(value: Any) -> bool:
    """Returns True for whole numbers, floats among them, which Arrow and pandas make of whole numbers beside nulls."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int or (isinstance(value, float) and value.is_integer())


def report_dropped(errors: list[str | None], dataset_name: str) -> None:
    """Warns of the rows with an error, counted by requirement."""
    dropped = {}
    for row, error in enumerate(errors):
        if error is not None:
            reason = error.partition(", got ")[0]  # the rest differs from row to row
            dropped.setdefault(reason, []).append(row)
    if dropped:
        PartialState()  # the logger asks it which process this is, and there may be no trainer yet
        count = sum(map(len, dropped.values()))
        lines = [f"{len(rows)}, the first of them row {rows[0]}: {reason}" for reason, rows in dropped.items()]
        lines.insert(0, f"Dropped {count} of the {len(errors)} rows of the {dataset_name} dataset:")
        logger.warning("\n- ".join(lines))


def plain(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Returns the dataset with rows of python objects, whatever `with_format` made of them.

    Raises:
        ValueError: for a transform, which would be applied again after each step.
    """
    require(
        not isinstance(dataset, Dataset) or dataset.format["type"] != "custom",
        "The dataset has a transform (`set_transform` or `with_transform`), which would be applied again and again while "
        "it is prepared. Apply it once, by `map`, and drop it, by `with_format(None)`.",
    )
    return dataset.with_format(None)


def first_row(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Returns the first row, of python objects whatever `with_format` made of it; empty for a dataset without rows."""
    is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    return next(iter(dataset if is_transformed else plain(dataset)), {})


def whole(dataset: Dataset) -> Dataset:
    """
    Returns a dataset to convert, with rows of python objects.

    Raises:
        ValueError: for a stream, splits or another type; it says how to make a dataset of them.
    """
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "This takes a whole dataset, got a stream. Load it without `streaming=True`, or make one of its rows: "
            "`Dataset.from_list(list(stream))`."
        )
    if isinstance(dataset, dict):  # splits, streamed or not, are one
        raise ValueError(f"This takes one dataset, got splits. Pass one of them: {', '.join(map(str, dataset))}.")
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"This takes a `datasets.Dataset`, got {type(dataset).__name__}. `Dataset.from_list` makes one."
        )
    return plain(dataset)


def convert_rows(dataset: Dataset, convert: Callable, types: dict[str, Any]) -> Dataset:
    """Replaces each row by `convert(row)`, a dict with columns of `types`."""
    dataset = whole(dataset)
    return dataset.map(
        lambda row, index: in_row(index, convert, row),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features(types),
        desc="Converting to rankings",
    )


def ranks_of_scores(scores: list[float | None], tie_threshold: float = 0.0) -> list[int | None]:
    """Returns ranks from 1 without gaps, None for None and NaN; on the threshold see [`from_scores`]."""
    ranks, rank, previous = {}, 0, math.inf
    for score in sorted({score for score in scores if score is not None and score == score}, reverse=True):
        gap = previous - score
        is_tied = gap <= tie_threshold or math.isclose(gap, tie_threshold)  # 0.4 - 0.3 is a little more than 0.1
        rank += not is_tied
        ranks[score], previous = rank, score
    return [ranks.get(score) for score in scores]
