"""Texts and conversations, to read."""

import json
from typing import Any


def as_text(message: str | list[dict[str, Any]]) -> str:
    """Returns a text or a conversation as one text."""
    if isinstance(message, str):
        return message
    return "\n\n".join(f"[{turn['role']}] {content_of(turn)}" for turn in message)


def content_of(turn: dict[str, Any]) -> str:
    """Returns the content of a message: a text, the parts of one, or calls of tools."""
    content, calls = turn.get("content") or "", turn.get("tool_calls") or []
    if not isinstance(content, str):
        content = "\n".join(part.get("text") or f"({part.get('type')})" for part in content)
    return "\n".join([content, *map(json.dumps, calls)]) if calls else content
