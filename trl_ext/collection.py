"""
Collecting rankings: what there is to judge, and what was judged, in files that survive whatever happens.

A folder holds

    completions.jsonl            items: `id`, `prompt`, `completions`, and `sources`, who wrote each (a letter)
    judgements-<annotator>.jsonl a line for each thing an annotator did, in order; nothing is ever rewritten

A line is written to disk before the next item is shown, so a process that is killed loses nothing that was answered; a
line that was cut in the middle by a loss of power is not one, and its item is asked again. What counts is the last line
about an item: undoing is a line, too.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from .annotation import ranking_agreement


COMPLETIONS_FILE = "completions.jsonl"


@dataclass(frozen=True)
class Item:
    """A prompt and its completions, to be ranked."""

    id: str
    prompt: str | list[dict[str, Any]]
    completions: list
    sources: list[str]

    def order_for(self, annotator: str) -> list[int]:
        """The order in which this annotator sees the completions: random, and the same each time."""
        seed = hashlib.sha256(f"{self.id}/{annotator}".encode()).hexdigest()
        return random.Random(seed).sample(range(len(self.completions)), len(self.completions))


def item_id(prompt: Any, completions: list) -> str:
    """The same for the same texts."""
    return hashlib.sha256(json.dumps([prompt, completions], sort_keys=True).encode()).hexdigest()[:16]


def read_items(folder: str | Path) -> list[Item]:
    """
    The items of a folder.

    Raises:
        ValueError: where there are none, or a line is not one; it names the line.
    """
    path = Path(folder) / COMPLETIONS_FILE
    if not path.is_file():
        raise ValueError(f"There is no {COMPLETIONS_FILE} in {folder}. Make one with recipes/sample_completions.py.")
    items = {}
    for number, row in enumerate(read_lines(path), start=1):
        completions = row.get("completions")
        if "prompt" not in row or not isinstance(completions, list) or len(completions) < 2:
            raise ValueError(
                f"{path}, line {number}: expected `prompt` and two or more `completions`, got {row!r:.80}."
            )
        key = row.get("id") or item_id(row["prompt"], completions)
        sources = row.get("sources") or [""] * len(completions)
        items[key] = Item(key, row["prompt"], completions, sources)
    return list(items.values())


class Judgements:
    """
    What one annotator said, on disk.

    Args:
        folder (`str` or `Path`): Where the items are.
        annotator (`str`): A name; letters, digits, and `.`, `_`, `-`.
    """

    def __init__(self, folder: str | Path, annotator: str):
        if not re.fullmatch(r"[\w.-]+", annotator):
            raise ValueError(
                f"An annotator's name is part of a file's: letters, digits and . _ - only, got {annotator!r}."
            )
        self.annotator = annotator
        self.file = Path(folder) / f"judgements-{annotator}.jsonl"
        self.reload()

    def reload(self) -> None:
        """Read the file again: the same annotator may have judged in another window."""
        self._records: dict[str, dict[str, Any]] = {}  # by item, in the order of judging
        for record in read_lines(self.file) if self.file.is_file() else ():
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
        if item.id in self._records:
            raise ValueError(f"Item {item.id} was judged already. Undo that first.")
        if ranks is not None:
            is_number = [rank is None or (isinstance(rank, int) and rank >= 0) for rank in ranks]
            if len(ranks) != len(item.completions) or not all(is_number) or len(ranks) - ranks.count(None) < 2:
                raise ValueError(
                    f"Expected {len(item.completions)} ranks (null: unranked), two at least, got {ranks!r}."
                )
        self._write(
            {
                "id": item.id,
                "status": "skipped" if ranks is None else "ranked",
                "ranks": ranks,
                "shown": item.order_for(self.annotator),
                "seconds": round(seconds, 1),
                "flag": flag,
            }
        )

    def undo(self) -> str | None:
        """Take the last judgement back, and return its item's id; None if there is none."""
        self.reload()
        if not self._records:
            return None
        last = next(reversed(self._records))
        self._write({"id": last, "status": "undone"})
        return last

    def _write(self, record: dict[str, Any]) -> None:
        record = {**record, "annotator": self.annotator, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        append_line(self.file, record)
        self.reload()

    def __contains__(self, item: Item) -> bool:
        return item.id in self._records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._records.values())

    def __getitem__(self, item_id: str) -> dict[str, Any]:
        return self._records[item_id]

    @property
    def seconds_per_item(self) -> float | None:
        """The mean time of a ranking."""
        seconds = [record["seconds"] for record in self if record["status"] == "ranked"]
        return sum(seconds) / len(seconds) if seconds else None


def all_judgements(folder: str | Path) -> list[Judgements]:
    """Those of all annotators."""
    prefix = "judgements-"
    names = sorted(path.stem.removeprefix(prefix) for path in Path(folder).glob(f"{prefix}*.jsonl"))
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
    `annotator`, `sources`, `seconds` and `flag`. Skipped ones are left out.

    Raises:
        ValueError: if nothing was ranked yet.
    """
    items = {item.id: item for item in read_items(folder)}
    rows = []
    for judgements in all_judgements(folder):
        for record in judgements:
            item = items.get(record["id"])
            if item is None or record["status"] != "ranked":
                continue
            own = {name: record[name] for name in ("ranks", "id", "annotator", "seconds", "flag")}
            rows.append({"prompt": item.prompt, "completions": item.completions, "sources": item.sources, **own})
    if not rows:
        raise ValueError(f"Nothing was ranked in {folder} yet. Start recipes/rank_completions.py.")
    return Dataset.from_list(rows)


# --- Files of lines ---


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Add a line and return when it is on disk. What a loss of power left of a line before it is cut off."""
    with _locked(file):
        with open(file, "r+b") as opened:
            content = opened.read()
            opened.truncate(content.rfind(b"\n") + 1)
            opened.seek(0, os.SEEK_END)
            opened.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One writer at a time, of this and other processes."""
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """What [`append_line`] wrote, but for a line that was cut."""
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline is nothing, or what was cut
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: is not valid JSON ({error}).") from None
