"""The items of a folder of rankings to collect: prompts and their completions, from `completions.jsonl`."""

import hashlib
import json
import random
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from .records import numbered_lines
from .rows import check_texts, located, require


COMPLETIONS_FILE = "completions.jsonl"


@dataclass(frozen=True)
class Item:
    """A prompt and its completions, to be ranked."""

    id: str | int
    prompt: str | list[dict[str, Any]]
    completions: list
    sources: list[str]

    def order_for(self, annotator: str) -> list[int]:
        """Returns the order in which this annotator sees the completions: random, and the same each time."""
        seed = hashlib.sha256(f"{self.id}/{annotator}".encode()).hexdigest()
        return random.Random(seed).sample(range(len(self.completions)), len(self.completions))

    @cached_property
    def texts(self) -> str:
        """The name of the prompt and completions, whatever the id."""
        return item_id(self.prompt, self.completions)


def item_id(prompt: Any, completions: list) -> str:
    """Returns an id of the texts: the same for the same texts."""
    return hashlib.sha256(json.dumps([prompt, completions], sort_keys=True).encode()).hexdigest()[:16]


def read_items(folder: str | Path) -> list[Item]:
    """
    Reads the items of a folder, all of one kind: texts or conversations, with ids that are all texts or whole numbers.

    Raises:
        ValueError: if there is no file, or a line is not an item; it names line and column.
    """
    path = Path(folder) / COMPLETIONS_FILE
    if not path.is_file():
        raise ValueError(f"There is no {COMPLETIONS_FILE} in {folder}. Make one with recipes/sample_completions.py.")
    items, lines, first = {}, {}, None
    for number, row in numbered_lines(path):
        item, kinds = located(f"{path}, line {number}", _item_of, row)
        first = first or (number, kinds)
        for column, kind in kinds.items():
            require(
                kind == first[1][column],
                f"{path}, line {number}, column `{column}`: must be {first[1][column]}, as in line {first[0]}, got "
                f"{kind}. Convert one to the other, or rank them in a folder of their own.",
            )
        require(
            item.id not in items,
            f"{path}, line {number}, column `id`: must differ from row to row, got {item.id!r} again, of line "
            f"{lines.get(item.id)}. Give each row an id of its own, and remove rows that are there twice.",
        )
        items[item.id], lines[item.id] = item, number
    items, lines = list(items.values()), list(lines.values())
    if not _fit_into_a_table(items):
        bad = lines[bisect_left(range(len(items)), True, key=lambda i: not _fit_into_a_table(items[: i + 1]))]
        raise ValueError(
            f"{path}, line {bad}: does not fit into a table with the lines before it, so its ranking could not be "
            "exported. Give the fields of all messages the same types."
        )
    return items


def _item_of(row: dict[str, Any]) -> tuple[Item, dict[str, str]]:
    """Returns the item, and the kinds of its columns. Refuses a row that is none."""
    kind = check_texts(row)
    for column in ("prompt", "completions", "id", "sources"):
        check_characters(f"column `{column}`", row.get(column))
    key = row.get("id")
    if isinstance(key, float) and key.is_integer():  # pandas makes floats of whole numbers beside nulls
        key = int(key)
    is_key = key is None or isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool))
    require(is_key, f"column `id`: must be text or a whole number, got {key!r:.80}. Convert it.")
    is_number = isinstance(key, int)
    require(not is_number or abs(key) < 2**63, f"column `id`: must be a number of 64 bits, got {key}. Make it a text.")
    if key is None or key == "":
        key = item_id(row["prompt"], row["completions"])
    sources, count = row.get("sources"), len(row["completions"])
    if sources is None or sources == []:
        sources = [""] * count
    require(
        isinstance(sources, list) and len(sources) == count and all(isinstance(source, str) for source in sources),
        f"column `sources`: must be {count} texts, one for each completion, got {sources!r:.80}. Leave it out.",
    )
    kinds = {"prompt": f"a {kind}", "id": "a whole number" if is_number else "a text, or absent"}
    return Item(key, row["prompt"], row["completions"], sources), kinds


def check_characters(where: str, value: Any) -> None:
    """Refuses half a character, which no file in UTF-8 can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: must be whole characters, got half an emoji or the like ({error}).") from None


def _fit_into_a_table(items: list[Item]) -> bool:
    """Returns True if all messages have fields of the same types, as the columns of a dataset must."""
    if not items or isinstance(items[0].prompt, str):
        return True
    try:
        Dataset.from_list([{"prompt": item.prompt, "completions": item.completions} for item in items])
    except (ValueError, TypeError, NotImplementedError, OverflowError):  # Arrow raises all of these
        return False
    return True
