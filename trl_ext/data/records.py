"""Files of JSON objects, one to a line: those of people and other tools, and logs that survive a loss of power."""

import codecs
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Adds a line and returns when that is on disk. Half a line before it, left by a loss of power, is cut off."""
    with _locked(file):
        with open(file, "r+b" if file.is_file() else "w+b") as opened:
            content = opened.read()
            end = content.rfind(b"\n") + 1
            is_whole = _parsed(content[end:]) is not None  # some editors leave out the last newline
            opened.seek(len(content) if is_whole else end)
            opened.truncate()
            line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            opened.write(b"\n" + line if is_whole else line)
            opened.flush()
            os.fsync(opened.fileno())


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds a lock, so that one process writes at a time. It has a file of its own, as Windows reads no locked file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the records that [`append_line`] wrote, without a last one that was cut."""
    return (record for _, record in numbered_lines(file, is_log=True))


def numbered_lines(file: Path, is_log: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yields the records of lines that are not blank, with their numbers from 1; of a log, without a last one that was cut.

    Raises:
        ValueError: for a line that is no JSON object.
    """
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is not None and not _has_key_twice(line):
            yield number, record
        elif line.strip() and not (is_log and number == len(lines) and record is None):
            raise ValueError(
                f"{file}, line {number}: must be one JSON object, in UTF-8, each key once, got {line[:80]!r}. Mend or "
                "remove the line, or write the file again if it was cut."
            )


def _has_key_twice(line: bytes) -> bool:
    """Returns True if a key stands twice, of which the parser would keep the last without a word."""
    found = []
    json.loads(
        line.removeprefix(codecs.BOM_UTF8).decode(),
        object_pairs_hook=lambda pairs: found.append(len(dict(pairs)) < len(pairs)),
    )
    return any(found)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Returns the JSON object in a line, or None if there is none, as in half a line."""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except ValueError:  # decoding and parsing raise it
        return None
    return record if isinstance(record, dict) else None
