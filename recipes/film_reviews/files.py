"""Reviews from a file of JSON lines or CSV."""

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path


MAX_WORDS = 30
OPENING_WORDS = 6


def columns(rows: list[dict]) -> tuple[list[str], list[int]]:
    return [row["text"] for row in rows], [row["label"] for row in rows]


def opening(text: str) -> str:
    return " ".join(text.split()[:OPENING_WORDS])


def shortened(text: str) -> str:
    """Returns the text's first sentences, `MAX_WORDS` words at most: so that a small model sees reviews end."""
    words = text.split()
    if len(words) > MAX_WORDS:
        words = words[:MAX_WORDS]
        while words and not re.search(r"[.!?]\W*$", words[-1]):
            words.pop()
    return " ".join(words) if len(words) > OPENING_WORDS else ""


def read_reviews(path: str) -> list[dict]:
    """Returns rows with `text`, `label` and `split`: "test", "judge" or "models"."""
    rows = []
    for line, row in numbered_rows(path):
        for column in ("text", "label"):
            if row.get(column) in (None, ""):
                raise ValueError(
                    f"{path}, line {line}: no `{column}`. Each review needs `text` and `label` (1 positive, "
                    f"0 negative); this row has {', '.join(map(str, row)) or 'nothing'}."
                )
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError(f"{path}, line {line}: `text` must be a text with words in it, got {row['text']!r}.")
        if str(row["label"]) not in ("0", "1"):
            raise ValueError(f"{path}, line {line}: `label` must be 1 (positive) or 0, got {row['label']!r}.")
        rows.append({"text": " ".join(row["text"].split()), "label": int(row["label"]), "split": part_of(row)})
    if not rows:
        raise ValueError(f"{path}: no reviews in it.")
    return rows


def part_of(row: dict) -> str:
    """Chooses a part by hash, so that a text is always in the same one; texts of one `doc`, if that is known, together."""
    number = int(hashlib.sha1(str(row.get("doc") or row["text"]).encode()).hexdigest(), 16) % 100
    is_test = row["split"] == "test" if row.get("split") else number < 10
    return "test" if is_test else "judge" if number < 45 else "models"


def numbered_rows(path: str) -> Iterator[tuple[int, dict]]:
    """Yields `(line, row)` of a file of JSON lines or CSV, gzipped or not."""
    suffixes = Path(path).suffixes
    is_csv = ".csv" in suffixes
    if not Path(path).is_file():
        raise ValueError(f"--reviews: there is no file {path!r}.")
    if not is_csv and not {".jsonl", ".json"} & set(suffixes):
        raise ValueError(f"--reviews: {path!r} must end in .jsonl, .jsonl.gz, .csv or .csv.gz.")
    try:
        with (gzip.open if suffixes[-1] == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            yield from csv_rows(file) if is_csv else json_rows(file, path)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from None


def csv_rows(file) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(file)
    yield from ((reader.line_num, row) for row in reader)


def json_rows(file, path: str) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(file, start=1):
        if content.strip():
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line}: not valid JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: expected an object with `text` and `label`, got {row!r:.60}.")
            yield line, row
