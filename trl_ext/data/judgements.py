"""The judgements of one annotator, in `judgements-<annotator>.jsonl`."""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .items import Item, check_characters
from .records import append_line, numbered_lines
from .rows import located, require


NAME = re.compile(r"[\w.-]+")  # of an annotator


STATUSES = ("ranked", "skipped", "undone")


class Judgements:
    """
    The judgements of one annotator, on disk.

    Args:
        folder (`str` or `Path`): Folder of the items.
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
        """Reads the file again, as the same annotator may have judged in another window."""
        self._records: dict[str | int, dict[str, Any]] = {}  # by item, in the order of judging
        for number, record in numbered_lines(self.file, is_log=True) if self.file.is_file() else ():
            record = located(f"{self.file}, line {number}", _checked_record, record)
            self._records.pop(record["id"], None)
            if record["status"] != "undone":
                self._records[record["id"]] = record

    def record(self, item: Item, ranks: list[int | None] | None, seconds: float = 0.0, flag: str = "") -> None:
        """
        Keeps a judgement.

        Args:
            item ([`Item`]): The item that was judged.
            ranks (`list[int | None]`, *optional*): One for each completion, in the item's own order; `None` skips.
            seconds (`float`, *optional*): Duration of the judgement.
            flag (`str`, *optional*): A fault of the item, if it has any.

        Raises:
            ValueError: if the item was judged already, or does not get one rank for each completion, two at least.
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
        """Takes the last judgement (of the items `among`) back, and returns its item's id; None if there is none."""
        self.reload()
        last = self.last(among)
        if last is not None:
            self._write({"id": last, "status": "undone"})
        return last

    def last(self, among: Mapping[str | int, Item] | None = None) -> str | int | None:
        """Returns the id of the item that was judged last (of those `among`); None if there is none."""
        return next((key for key in reversed(self._records) if among is None or among.get(key) in self), None)

    def _write(self, record: dict[str, Any]) -> None:
        record = {**record, "annotator": self.annotator, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        append_line(self.file, record)
        self.reload()

    def __contains__(self, item: Item | None) -> bool:
        """Returns True if these very texts were judged: other texts may have had the item's id at another time."""
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
    """Returns a line of judgements with the fields that it left out. Refuses a malformed one."""
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
    check_characters("field `flag`", record["flag"])
    is_flag = isinstance(record["flag"], str)
    require(is_flag, f"field `flag`: must be text, got {record['flag']!r:.80}. Mend or remove the line.")
    return record


def _are_ranks(ranks: Any) -> bool:
    """Returns True for whole numbers and None, at least two of them numbers."""
    if not isinstance(ranks, list) or len(ranks) - ranks.count(None) < 2:
        return False
    return all(rank is None or (type(rank) is int and rank >= 0) for rank in ranks)
