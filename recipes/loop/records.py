"""
Records of stages that were begun or finished, so that a loop goes on where it stopped.

A folder holds `stages/<name>.json` for each stage that was begun: its commands and settings, and if it is finished. What
is done again is not deleted but goes to `superseded-1` (2, ...).
"""

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from .stages import LoopError, Stage


RECORDS = "stages"
# The loop's own judge, by the names it had when older folders were made
MOVED = {"quickstart_judges.praise": "film_reviews.judges.praise"}


def record_of(folder: Path, name: str) -> dict | None:
    """Returns the record of a stage; None if it was never begun."""
    file = folder / RECORDS / f"{name}.json"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    for former, present in MOVED.items():
        text = text.replace(json.dumps(former), json.dumps(present))
    return json.loads(text)


def is_done(folder: Path, name: str) -> bool:
    record = record_of(folder, name)
    return record is not None and record["is_finished"]


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
    """Moves what matches to a new folder `superseded-<n>`, and returns that; None if there is nothing."""
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
    """Returns the last complete one: a training that is killed may leave one without its last file, the state."""
    numbered = {
        int(path.parent.name.split("-")[1]): path.parent for path in folder.glob("checkpoint-*/trainer_state.json")
    }
    return numbered[max(numbered)] if numbered else None
