"""The first row of a dataset, as its card shows it: JSON of limited length."""

import dataclasses
import datetime
import json
import math
from typing import Any

from datasets import Dataset, Json, LargeList, List


SHOWN_ENTRIES = 8  # of each list
SHOWN_CHARACTERS = 500  # of each text
SHOWN_IN_ALL = 20_000  # characters


def first_row(split: Dataset, indent: int | None = None) -> dict[str, Any]:
    """Returns the first row as JSON, a line for each column, and the limits of what is shown if that is not all."""
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
    """Returns a row as JSON; without `indent` a line for each column."""
    if indent is not None:
        return json.dumps(row, ensure_ascii=False, indent=indent)
    lines = [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in row.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def raw_row(split: Dataset) -> dict[str, Any]:
    """Returns the first row as it is stored, with images, sounds and films as their bytes or paths."""
    table = split.select([0]).with_format("arrow")[:1]
    return undecoded(split.features).decode_example(table.to_pylist()[0])


def undecoded(feature: Any) -> Any:
    """Returns the feature without the decoders of media, which may not be installed."""
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
    Returns a value as JSON has it.

    Args:
        value (`Any`): Value of a row; types that JSON does not know, such as dates and decimals, become text.
        entries (`int`, *optional*): Number of entries of each list that are kept; by default all.
        characters (`int`, *optional*): Number of characters of each text that are kept; by default all.
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
