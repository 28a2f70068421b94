"""Stages of a loop, and the commands that they run."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


RECIPES = Path(__file__).parents[1]
INDENT = "      "


class LoopError(Exception):
    """An error that the user has to mend."""


@dataclass(frozen=True)
class Command:
    """
    A recipe and its arguments.

    Args:
        script (`str`): File in the folder of recipes.
        arguments (`dict`): By name, without dashes. Those that are None are left out; an empty list is the name alone.
        trains_in (`Path`, *optional*): The folder of its checkpoints, for a stage that `accelerate launch` runs.
        creates (`Path`, *optional*): A folder which may not exist before.
    """

    script: str
    arguments: dict[str, Any]
    trains_in: Path | None = None
    creates: Path | None = None

    def line(self, launcher: list[str]) -> list[str]:
        launch = ["-m", "accelerate.commands.launch", *launcher] if self.trains_in else []
        return [sys.executable, *launch, str(RECIPES / self.script), *flags(self.arguments)]


@dataclass(frozen=True)
class Stage:
    """
    A part of the loop, which is remembered when it is done.

    Args:
        name (`str`): A word.
        about (`str`): A few words on what it does.
        commands (`list[Command]`): Each of which can be run again if it was stopped.
        judged_by_people (`Path`, *optional*): Folder in which people must have judged enough before it may begin.
        shown (`tuple[str, ...]`): The logged metrics to show.
    """

    name: str
    about: str
    commands: list[Command]
    judged_by_people: Path | None = None
    shown: tuple[str, ...] = ()

    @property
    def settings(self) -> list[dict]:
        return [
            {"script": c.script, "arguments": {name: v for name, v in c.arguments.items() if v is not None}}
            for c in self.commands
        ]


def flags(arguments: dict[str, Any]) -> list[str]:
    """Returns arguments for a command line, with a dict as JSON."""
    line = []
    for name, value in arguments.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        line += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return line
