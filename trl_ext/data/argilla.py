"""
Converters of rankings to and from Argilla's ranking question, as the records that its `to_json` writes and `from_json` reads.

A record has the fields `prompt` and `completion-1` to `completion-K`, and for each annotator a response to the question
`ranking`, whose value is a list of `{"value": "completion-2", "rank": 1}`, with equal ranks for ties.

Argilla's Python client (2.8) sends ranks to its server but leaves them out of what it reads back, where a list of names
is all that remains: the order, without the ties. Such records are read with every completion in a place of its own; the
server's own export has the ranks.
"""

import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .rankings import prepare_rankings
from .rows import in_row, is_whole, require, whole


QUESTION = "ranking"
FIELD = "completion-"


def to_argilla(rankings: Dataset) -> list[dict[str, Any]]:
    """
    Writes a dataset of texts of the `ranking` type as records.

    Args:
        rankings ([`~datasets.Dataset`]): With `ranks`. Rows of one `id` (or, without, of the same texts) are one record
            with a response of each.

    Returns:
        `list[dict]`: For `rg.Record.from_dict`, or as JSON for `records.from_json`. `annotator` is the user's id.

    Raises:
        ValueError: for conversations, judgements of pairs that amount to no order, or an `id` of several texts.
    """
    records = {}
    for index, row in enumerate(prepare_rankings(whole(rankings))):
        in_row(index, _check_texts, row)
        key = row.get("id")
        key = repr((row["prompt"], row["completions"])) if key is None else key
        fields = {"prompt": row["prompt"]} | {
            f"{FIELD}{i}": text for i, text in enumerate(row["completions"], start=1)
        }
        record = records.setdefault(key, {"id": row.get("id"), "fields": fields, "responses": {QUESTION: []}})
        if record["fields"] != fields:
            raise ValueError(
                f"row {index}, column `id`: must be one for each prompt with its completions, got {key!r} again with "
                "other texts. Give each its own."
            )
        value = [
            {"value": f"{FIELD}{i}", "rank": rank}
            for i, rank in enumerate(row["ranks"], start=1)
            if rank is not None and rank >= 0
        ]
        response = {"value": value, "user_id": row.get("annotator"), "status": "submitted"}
        record["responses"][QUESTION].append(response)
    return list(records.values())


def _check_texts(row: dict[str, Any]) -> None:
    """Refuses conversations, and pairs that amount to no order."""
    is_text = isinstance(row["prompt"], str) and all(isinstance(text, str) for text in row["completions"])
    require(is_text, "column `prompt`: Argilla's text fields take texts, got a conversation. Render it first.")
    require(
        row["ranks"] is not None, "column `pairs`: Argilla's question takes an order, and the pairs amount to none."
    )


def from_argilla(records: list[dict[str, Any]], question: str = QUESTION) -> Dataset:
    """
    Reads the rankings that annotators gave in Argilla.

    Args:
        records (`list[dict]`): As `to_json` writes them, or [`to_argilla`]. The fields that rankings name, in this
            record or another, are completions, and those that [`to_argilla`] made; further fields, and optional ones that a
            record leaves null, are none.
        question (`str`, *optional*, defaults to `"ranking"`): The ranking question's name.

    Returns:
        [`~datasets.Dataset`]: A row for each submitted response: `prompt`, `completions`, `ranks`, `id`, `annotator`.

    Raises:
        ValueError: for a record without prompt, or a response that ranks what is no field; it names the record.
    """
    names, fields = set(), set()
    for index, record in enumerate(records):
        names.update(name for ranks, _ in in_row(index, _responses, record, question) for name in ranks)
        fields.update(record.get("fields") or {})
    names.update(name for name in fields if re.fullmatch(rf"{FIELD}\d+", name))
    rows = []
    for index, record in enumerate(records):
        rows += in_row(index, _rows_of, record, question, sorted(names, key=_natural))
    require(rows, f"no record has a submitted response to the question {question!r}.")
    kinds = sorted({type(row["id"]).__name__ for row in rows if row["id"] is not None})
    require(len(kinds) < 2, f"record: must have an `id` of the same type as the others, got {kinds}. Convert some.")
    return Dataset.from_list(rows)


def _responses(record: dict[str, Any], question: str) -> list[tuple[dict[str, int], str | None]]:
    """Reads, for each submitted response, the ranks by field and the annotator."""
    require(isinstance(record, Mapping), f"record: must be a dict with `fields` and `responses`, got {record!r:.80}.")
    given, responses = record.get("responses") or {}, []
    require(isinstance(record.get("fields") or {}, Mapping), f"fields: must be a dict, got {record['fields']!r:.80}.")
    require(isinstance(given, Mapping), f"responses: must be a dict with a list for each question, got {given!r:.80}.")
    for response in given.get(question) or []:
        require(isinstance(response, Mapping), f"question `{question}`: must have responses, got {response!r:.80}.")
        if response.get("status") not in (None, "submitted"):
            continue
        value = response.get("value")
        require(isinstance(value, list) and value, f"question `{question}`: must rank fields, got {value!r:.80}.")
        ranks = {}
        for place, item in enumerate(value, start=1):
            name, rank = (item.get("value"), item.get("rank")) if isinstance(item, Mapping) else (item, None)
            require(isinstance(name, str), f"question `{question}`: must name fields, got {item!r:.80}.")
            require(name not in ranks, f"question `{question}`: must rank each field once, got {name!r} again.")
            rank = place if rank is None else rank
            require(
                is_whole(rank), f"question `{question}`: must have whole numbers for ranks, got {rank!r} for {name!r}."
            )
            ranks[name] = int(rank)
        user = response.get("user_id")
        responses.append((ranks, None if user is None else str(user)))
    return responses


def _rows_of(record: dict[str, Any], question: str, names: list[str]) -> list[dict[str, Any]]:
    """Returns a row for each submitted response, of the fields `names` that the record fills."""
    fields, responses = record.get("fields") or {}, _responses(record, question)
    if not responses:
        return []
    require("prompt" in fields, f"field `prompt`: is missing, got {list(fields)}. Rename yours.")
    for name in (name for ranks, _ in responses for name in ranks):
        require(
            name in fields and name != "prompt",
            f"question `{question}`: ranks {name!r}, which is none of the fields {list(fields)} to rank. Give the record "
            "that field, null if it is optional and empty.",
        )
    # Argilla asks people to rank a field that is empty in this record as well
    names = [
        name
        for name in names
        if fields.get(name) or (fields.get(name) == "" and any(name in ranks for ranks, _ in responses))
    ]
    for name in ("prompt", *names):
        require(isinstance(fields[name], str), f"field `{name}`: must be text, got {fields[name]!r:.80}. Convert it.")
    return [
        {
            "prompt": fields["prompt"],
            "completions": [fields[name] for name in names],
            "ranks": [ranks.get(name) for name in names],
            "id": record.get("id"),
            "annotator": annotator,
        }
        for ranks, annotator in responses
    ]


def _natural(name: str) -> list:
    """Returns a key that sorts `completion-10` after `completion-2`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
