"""
Stages of a loop: programs that run one after another, are remembered when they are done, and go on where they stopped.

A folder holds `stages/<name>.json` for each stage that was begun: what it ran, and whether it is finished. What is done
again is not deleted but goes to `superseded-1` (2, ...).
"""

import ast
import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


RECIPES = Path(__file__).parent
RECORDS = "stages"
INDENT = "      "


class LoopError(Exception):
    """What the user has to mend."""


@dataclass(frozen=True)
class Command:
    """
    A recipe and its arguments.

    Args:
        script (`str`): File in this folder.
        arguments (`dict`): By name, without dashes. Those that are None are left out; an empty list is the name alone.
        trains_in (`Path`, *optional*): Where its checkpoints are. It is then run by `accelerate launch`.
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
    Args:
        name (`str`): A word.
        about (`str`): What it does, in a few.
        commands (`list[Command]`): Each of which can be run again if it was stopped.
        judged_by_people (`Path`, *optional*): Folder in which people must have judged enough before it may begin.
        shown (`tuple[str, ...]`): Which of the metrics that are logged to show.
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
    """For a command line; a dict is written as JSON."""
    line = []
    for name, value in arguments.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        line += [f"--{name}", *(json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values)]
    return line


# --- What is done ---


def record_of(folder: Path, name: str) -> dict | None:
    """None of a stage that was never begun."""
    file = folder / RECORDS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write_record(folder: Path, stage: Stage, lines: list[list[str]], **state) -> None:
    file = folder / RECORDS / f"{stage.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"stage": stage.name, **state, "settings": stage.settings, "commands": [*map(shlex.join, lines)]}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def check_unchanged(folder: Path, stages: Iterable[Stage]) -> None:
    """Raises [`LoopError`] at the first stage that was finished, or begun, with other settings than it has now."""
    for stage in stages:
        record = record_of(folder, stage.name)
        if record is not None and record["settings"] != stage.settings:
            state = "finished" if record["is_finished"] else "begun"
            raise LoopError(
                f"The stage {stage.name} was {state} with other settings:\n"
                + "\n".join(f"  {line}" for line in differences(record["settings"], stage.settings))
                + f"\nPass --redo {stage.name} to do it and all that follows again (what is there is kept aside), or the "
                "settings as they were."
            )


def differences(before: list[dict], after: list[dict]) -> Iterator[str]:
    if [c["script"] for c in before] != [c["script"] for c in after]:
        yield f"ran {', '.join(c['script'] for c in before)}, now {', '.join(c['script'] for c in after)}"
        return
    for old, new in zip(before, after, strict=True):
        for name in dict.fromkeys([*old["arguments"], *new["arguments"]]):
            was, now = (settings["arguments"].get(name, "not given") for settings in (old, new))
            if was != now:
                yield f"{old['script']} --{name}: was {was}, now {now}"


def set_aside(folder: Path, patterns: Iterable[str]) -> Path | None:
    """Move what matches to a new folder `superseded-<n>`, and return that; None if there is nothing."""
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not found:
        return None
    number = 1
    while (folder / f"superseded-{number}").exists():
        number += 1
    target = folder / f"superseded-{number}"
    for path in found:
        if path.exists():  # it may be in a folder that was moved
            moved = target / path.relative_to(folder)
            moved.parent.mkdir(parents=True, exist_ok=True)
            path.rename(moved)
    return target


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete one: a training that is killed may leave a checkpoint without its last file, the state."""
    numbered = {
        int(path.parent.name.split("-")[1]): path.parent for path in folder.glob("checkpoint-*/trainer_state.json")
    }
    return numbered[max(numbered)] if numbered else None


# --- Running ---


def run_stage(folder: Path, stage: Stage, launcher: list[str], environment: dict[str, str]) -> float:
    """Returns the seconds it took. Raises [`LoopError`] if one of its commands fails."""
    began = time.monotonic()
    lines = [command.line(launcher) for command in stage.commands]
    write_record(folder, stage, lines, is_finished=False)
    for command, line in zip(stage.commands, lines, strict=True):
        if command.creates is not None:
            set_aside(folder, [str(command.creates.relative_to(folder))])
        checkpoint = last_checkpoint(command.trains_in) if command.trains_in else None
        if checkpoint is not None:
            print(f"{INDENT}goes on from {checkpoint}", flush=True)
            line = [*line, "--resume_from_checkpoint", str(checkpoint)]
        status = run(line, environment, folder / "logs" / f"{stage.name}.log", stage.shown)
        if status != 0:
            raise LoopError(
                f"The stage {stage.name} failed (exit status {status}): see above, or {folder / 'logs' / stage.name}.log."
            )
    seconds = time.monotonic() - began
    write_record(folder, stage, lines, is_finished=True, seconds=round(seconds, 1))
    return seconds


def run(line: list[str], environment: dict[str, str], log: Path, shown: tuple[str, ...]) -> int:
    """Run a program, show what it says and keep it in `log`; returns its exit status. If we are ended, so is it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # with all processes that it starts
    )
    output = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(line)}\n")
            for text in output:
                show(text, shown)
                if text.endswith("\n"):
                    file.write(text)
        return process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise


def show(text: str, shown: tuple[str, ...]) -> None:
    """What ends in a return, a bar that the next one is written over, is only for terminals."""
    if text.endswith("\n"):
        text = shortened(text.rstrip(), shown)
        is_spare = not text and shown  # between bars and metrics
        text = "" if is_spare else f"{INDENT}{text}".rstrip() + "\n"
    else:
        text = INDENT + text if sys.stdout.isatty() else ""
    sys.stdout.write(text)
    sys.stdout.flush()


def shortened(text: str, shown: tuple[str, ...]) -> str:
    """Of the metrics that trainers log as a dict, those that are shown; nothing if it has none of them."""
    try:
        metrics = ast.literal_eval(text) if text.startswith("{'") else None
    except (SyntaxError, ValueError):
        metrics = None
    if not isinstance(metrics, dict):
        return text
    found = [f"{name} {metrics[name]}" for name in shown if name in metrics]
    return f"epoch {metrics.get('epoch')}: {', '.join(found)}" if found else ""


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
