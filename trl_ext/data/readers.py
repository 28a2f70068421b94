"""
Readers of the columns of public datasets: each takes a row and returns what the column holds, or refuses the row.

A path `a.b` is the field `b` of the dict, or of each dict in the list, in column `a`.
"""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

from .rows import NUMBER, get, ranks_of_scores, require


Row = dict[str, Any]
Messages = list[dict[str, str]]
Reader = Callable[[Row], Any]


def column(path: str, kind: type | tuple[type, ...] = str) -> Reader:
    """Reads one value."""
    outer, _, inner = path.partition(".")
    return lambda row: get(get(row, outer, dict) if inner else row, path, kind)


def columns(*names: str, kind: type | tuple[type, ...] = str) -> Reader:
    """Reads a list of one value from each column."""
    return lambda row: [get(row, name, kind) for name in names]


def each(path: str, kind: type | tuple[type, ...] = str) -> Reader:
    """Reads a list of one value from each dict in a column."""
    outer, _, _ = path.partition(".")
    return lambda row: [get(record, path, kind) for record in get(row, outer, list)]


def messages(name: str) -> Reader:
    """Reads a list of messages."""
    keys = ("role", "content")
    return lambda row: [{key: get(turn, f"{name}.{key}", str) for key in keys} for turn in get(row, name, list)]


def replies(texts: Reader) -> Reader:
    """Reads texts as replies, lists of one message of the assistant each."""
    return lambda row: [reply(text) for text in texts(row)]


def by_score(scores: Reader) -> Reader:
    """Reads ranks from scores, higher for better."""
    return lambda row: ranks_of_scores(scores(row))


def by_place(places: Reader) -> Reader:
    """Reads ranks from places, lower for better."""
    return lambda row: ranks_of_scores([-place for place in places(row)])


def by_strength(name: str) -> Reader:
    """Reads ranks of two completions from a number of -3 to 3, negative if the first is better."""

    def read(row: Row) -> list[int]:
        strength = get(row, name, NUMBER)
        require(-3 <= strength <= 3, f"column `{name}`: must be from -3 to 3, got {strength}.")
        return ranks_of_scores([-strength, strength])

    return read


# --- Conversations ---


def reply(text: str) -> Messages:
    """Returns a completion of one message."""
    return [{"role": "assistant", "content": text}]


def nectar_prompt(row: Row) -> Messages:
    """Reads the `prompt` of Nectar, one text of all turns."""
    prompt = get(row, "prompt", str)
    before, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
    names, texts = turns[::2], [text.strip() for text in turns[1::2]]
    is_valid = turns and not before and names[0] == "Human" and names[-1] == "Assistant" and not texts[-1]
    expected = r"must begin with '\n\nHuman: ' and end with '\n\nAssistant: '"
    require(is_valid, f"column `prompt`: {expected}, got {prompt!r:.80}.")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": text} for name, text in zip(names[:-1], texts[:-1], strict=True)]


def oasst1_message(row: Row) -> dict[str, str]:
    """Reads a message of oasst1."""
    roles = {"prompter": "user", "assistant": "assistant"}
    require(row["role"] in roles, f"column `role`: must be one of {list(roles)}, got {row['role']!r}.")
    return {"role": roles[row["role"]], "content": get(row, "text", str)}


def oasst1_thread(rows: dict[str, Row], message_id: str | None) -> Messages:
    """Reads a message of oasst1 and all before it, from the rows of whole trees by `message_id`."""
    thread = []
    while message_id is not None:
        require(message_id in rows, f"column `parent_id`: {message_id!r} is in no row. Convert whole trees.")
        thread.append(oasst1_message(rows[message_id]))
        message_id = rows[message_id]["parent_id"]
    return thread[::-1]


def arena_55k_messages(row: Row, name: str) -> Messages:
    """Reads a conversation of the Arena's 55k: the turns of `prompt`, and those of the column `name` between them."""
    prompts, answers = _json_turns(row, "prompt"), _json_turns(row, name)
    require(len(prompts) == len(answers), f"column `{name}`: must have {len(prompts)} turns, got {len(answers)}.")
    turns = zip(prompts, answers, strict=True)
    return [message for prompt, answer in turns for message in ({"role": "user", "content": prompt}, *reply(answer))]


def _json_turns(row: Row, name: str) -> list[str]:
    """Reads a list of texts in JSON, with null for an empty one."""
    text = get(row, name, str)
    try:
        turns = json.loads(text)
    except json.JSONDecodeError:
        turns = None
    is_valid = isinstance(turns, list) and turns and all(turn is None or isinstance(turn, str) for turn in turns)
    require(is_valid, f"column `{name}`: must be a list of texts in JSON, got {text!r:.80}.")
    return [turn or "" for turn in turns]


def split_conversations(a: Messages, b: Messages) -> dict[str, Any]:
    """
    Splits two conversations into the `prompt`, the turns that both share, and two `completions`.

    The last turn belongs to the completion even if both share it: a completion has one turn at least.
    """
    shared = list(itertools.takewhile(lambda turns: turns[0] == turns[1], zip(a[:-1], b[:-1], strict=False)))
    users = [[turn for turn in conversation if turn["role"] == "user"] for conversation in (a, b)]
    require(
        shared and users[0] == users[1] and a[-1]["role"] == b[-1]["role"] == "assistant",
        "columns `conversation_a` and `conversation_b`: must share the user turns and end in a reply. Remove the row.",
    )
    return {"prompt": a[: len(shared)], "completions": [a[len(shared) :], b[len(shared) :]]}
