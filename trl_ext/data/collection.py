"""
Collecting rankings: what there is to judge, and what was judged, in files that survive whatever happens.

A folder holds

    completions.jsonl            items: `prompt`, `completions`, and perhaps `id` (else the texts give one) and
                                 `sources`, who wrote each completion (a letter)
    judgements-<annotator>.jsonl a line for each thing an annotator did, in order; nothing is ever rewritten

A line is written to disk before the next item is shown, so a process that is killed loses nothing that was answered; a
line that was cut in the middle by a loss of power is not one, and its item is asked again. What counts is the last line
about an item: undoing is a line, too. A judgement is of the texts that were shown: where an item has others by now, it
is asked again.
"""

import hashlib
import json
import random
import re
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from ..ranking.agreement import ranking_agreement
from .records import append_line, numbered_lines
from .records import read_lines as read_lines
from .rows import check_texts, located, logger, require


COMPLETIONS_FILE = "completions.jsonl"
NAME = re.compile(r"[\w.-]+")  # of an annotator
STATUSES = ("ranked", "skipped", "undone")


@dataclass(frozen=True)
class Item:
    """A prompt and its completions, to be ranked."""

    id: str | int
    prompt: str | list[dict[str, Any]]
    completions: list
    sources: list[str]

    def order_for(self, annotator: str) -> list[int]:
        """The order in which this annotator sees the completions: random, and the same each time."""
        seed = hashlib.sha256(f"{self.id}/{annotator}".encode()).hexdigest()
        return random.Random(seed).sample(range(len(self.completions)), len(self.completions))

    @cached_property
    def texts(self) -> str:
        """A name for what is shown, whatever the id."""
        return item_id(self.prompt, self.completions)


def item_id(prompt: Any, completions: list) -> str:
    """The same for the same texts."""
    return hashlib.sha256(json.dumps([prompt, completions], sort_keys=True).encode()).hexdigest()[:16]


def read_items(folder: str | Path) -> list[Item]:
    """
    The items of a folder, all of one kind: texts or conversations, with ids that are all texts or all whole numbers.

    Raises:
        ValueError: where there is no file, or a line is not an item; it names line and column.
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
    """The item, and of which kind its columns are."""
    kind = check_texts(row)
    for column in ("prompt", "completions", "id", "sources"):
        _check_characters(f"column `{column}`", row.get(column))
    key = row.get("id")
    if isinstance(key, float) and key.is_integer():  # what pandas makes of whole numbers
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


def _check_characters(where: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: must be whole characters, got half an emoji or the like ({error}).") from None


def _fit_into_a_table(items: list[Item]) -> bool:
    if not items or isinstance(items[0].prompt, str):
        return True
    try:
        Dataset.from_list([{"prompt": item.prompt, "completions": item.completions} for item in items])
    except (ValueError, TypeError, NotImplementedError, OverflowError):  # Arrow's are of these classes
        return False
    return True


class Judgements:
    """
    What one annotator said, on disk.

    Args:
        folder (`str` or `Path`): Where the items are.
        annotator (`str`): A name; letters, digits, and `.`, `_`, `-`.
    """

    def __init__(self, folder: str | Path, annotator: str):
        if not NAME.fullmatch(annotator):
            raise ValueError(
                f"An annotator's name is part of a file's: letters, digits and . _ - only, got {annotator!r}."
            )
        self.annotator = annotator
        self.file = Path(folder) / f"judgements-{annotator}.jsonl"
        self.reload()

    def reload(self) -> None:
        """Read the file again: the same annotator may have judged in another window."""
        self._records: dict[str | int, dict[str, Any]] = {}  # by item, in the order of judging
        for number, record in numbered_lines(self.file, is_log=True) if self.file.is_file() else ():
            record = located(f"{self.file}, line {number}", _checked_record, record)
            self._records.pop(record["id"], None)
            if record["status"] != "undone":
                self._records[record["id"]] = record

    def record(self, item: Item, ranks: list[int | None] | None, seconds: float = 0.0, flag: str = "") -> None:
        """
        Keep a judgement.

        Args:
            item ([`Item`]): Of what.
            ranks (`list[int | None]`, *optional*): One for each completion, in the item's own order; `None` skips.
            seconds (`float`, *optional*): How long it took.
            flag (`str`, *optional*): What is wrong with the item, if anything.

        Raises:
            ValueError: if it was judged already, or there is not one rank for each completion, two of them at least.
        """
        self.reload()
        if item in self:
            raise ValueError(f"Item {item.id} was judged already. Undo that first.")
        if ranks is not None and (len(ranks) != len(item.completions) or not _are_ranks(ranks)):
            raise ValueError(f"Expected {len(item.completions)} ranks (null: unranked), two at least, got {ranks!r}.")
        self._write(
            {
                "id": item.id,
                "texts": item.texts,
                "status": "skipped" if ranks is None else "ranked",
                "ranks": ranks,
                "shown": item.order_for(self.annotator),
                "seconds": round(seconds, 1),
                "flag": flag,
            }
        )

    def undo(self, among: Mapping[str | int, Item] | None = None) -> str | int | None:
        """Take the last judgement (of the items `among`) back, and return its item's id; None if there is none."""
        self.reload()
        last = self.last(among)
        if last is not None:
            self._write({"id": last, "status": "undone"})
        return last

    def last(self, among: Mapping[str | int, Item] | None = None) -> str | int | None:
        """The id of the item that was judged last (of those `among`)."""
        return next((key for key in reversed(self._records) if among is None or among.get(key) in self), None)

    def _write(self, record: dict[str, Any]) -> None:
        record = {**record, "annotator": self.annotator, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        append_line(self.file, record)
        self.reload()

    def __contains__(self, item: Item | None) -> bool:
        """True if these very texts were judged: those that had the item's id at another time may have been others."""
        record = None if item is None else self._records.get(item.id)
        if record is None or record["texts"] not in (None, item.texts):
            return False
        return record["ranks"] is None or len(record["ranks"]) == len(item.completions)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records.values())

    def __getitem__(self, item_id: str | int) -> dict[str, Any]:
        return self._records[item_id]

    @property
    def seconds_per_item(self) -> float | None:
        """The mean time of a ranking."""
        seconds = [record["seconds"] for record in self if record["status"] == "ranked"]
        return sum(seconds) / len(seconds) if seconds else None


def _checked_record(record: dict[str, Any]) -> dict[str, Any]:
    """A line of judgements, with all it may leave out."""
    record = {"texts": None, "ranks": None, "seconds": 0.0, "flag": ""} | record
    key, status, ranks, seconds = (record.get(name) for name in ("id", "status", "ranks", "seconds"))
    is_key = isinstance(key, str | int) and not isinstance(key, bool)
    require(is_key, f"field `id`: must be that of an item, got {key!r:.80}. Mend or remove the line.")
    require(
        status in STATUSES, f"field `status`: must be one of {STATUSES}, got {status!r:.80}. Mend or remove the line."
    )
    require(
        _are_ranks(ranks) if status == "ranked" else ranks is None,
        f"field `ranks`: must be a whole number or null for each completion, two numbers at least, or null where the "
        f"`status` is not 'ranked', got {ranks!r:.80}. Mend or remove the line.",
    )
    is_time = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    require(is_time, f"field `seconds`: must be a number, got {seconds!r:.80}. Mend or remove the line.")
    _check_characters("field `flag`", record["flag"])
    is_flag = isinstance(record["flag"], str)
    require(is_flag, f"field `flag`: must be text, got {record['flag']!r:.80}. Mend or remove the line.")
    return record


def _are_ranks(ranks: Any) -> bool:
    if not isinstance(ranks, list) or len(ranks) - ranks.count(None) < 2:
        return False
    return all(rank is None or (type(rank) is int and rank >= 0) for rank in ranks)


def all_judgements(folder: str | Path) -> list[Judgements]:
    """Those of all annotators."""
    prefix = "judgements-"
    files = sorted(Path(folder).glob(f"{prefix}*.jsonl"))
    names = [file.stem.removeprefix(prefix) for file in files]
    for file, name in zip(files, names, strict=True):
        require(
            NAME.fullmatch(name), f"{file}: must have letters, digits and . _ - only, got {name!r}. Rename the file."
        )
    return [Judgements(folder, name) for name in names]


def agreement(folder: str | Path) -> dict[str, float] | None:
    """[`ranking_agreement`] of a folder's annotators; None while no two of them have ranked the same."""
    everybody = all_judgements(folder)
    rankings = []
    for item in read_items(folder):
        ranks = [theirs[item.id]["ranks"] for theirs in everybody if item in theirs]
        rankings.append([r for r in ranks if r is not None])
    try:
        return ranking_agreement(rankings)
    except ValueError:
        return None


def collected_rankings(folder: str | Path) -> Dataset:
    """
    The judgements as a dataset of the `ranking` type, a row for each: `prompt`, `completions`, `ranks`, and `id`,
    `annotator`, `sources`, `seconds` and `flag`. Skipped ones are left out; so are those of items that the folder does
    not have any more, with a warning.

    Raises:
        ValueError: if nothing was ranked yet.
    """
    items = {item.id: item for item in read_items(folder)}
    rows, num_stale = [], 0
    for judgements in all_judgements(folder):
        for record in judgements:
            item = items.get(record["id"])
            if item not in judgements:
                num_stale += record["status"] == "ranked"
            elif record["status"] == "ranked":
                own = {"ranks": record["ranks"], "id": item.id, "annotator": judgements.annotator}
                own |= {"seconds": float(record["seconds"]), "flag": record["flag"]}
                rows.append({"prompt": item.prompt, "completions": item.completions, "sources": item.sources, **own})
    if num_stale:
        PartialState()  # the logger asks it which process this is
        logger.warning(
            f"Left out {num_stale} rankings: {COMPLETIONS_FILE} in {folder} does not have what was ranked, or has other "
            "texts under the same id by now. They stay in the files of judgements; put the old file back to use them."
        )
    if not rows:
        raise ValueError(f"Nothing was ranked in {folder} yet. Start recipes/rank_completions.py.")
    return Dataset.from_list(rows)
