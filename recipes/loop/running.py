"""Stages are run as programs, whose output is shown and kept."""

import ast
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from .records import last_checkpoint, set_aside, write_record
from .stages import INDENT, LoopError, Stage


def run_stage(folder: Path, stage: Stage, launcher: list[str], environment: dict[str, str]) -> float:
    """Runs a stage, and returns the seconds it took. Raises [`LoopError`] if one of its commands fails."""
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
    """Runs a program, shows its output and keeps it in `log`; returns its exit status. If we are ended, so is it."""
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
    """Shows a line of a program; one that ends in a return, a bar to be written over, only on a terminal."""
    if text.endswith("\n"):
        text = shortened(text.rstrip(), shown)
        is_spare = not text and shown  # between bars and metrics
        text = "" if is_spare else f"{INDENT}{text}".rstrip() + "\n"
    else:
        text = INDENT + text if sys.stdout.isatty() else ""
    sys.stdout.write(text)
    sys.stdout.flush()


def shortened(text: str, shown: tuple[str, ...]) -> str:
    """Returns the shown ones of the metrics that a trainer logs as a dict, and any other text as it is."""
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
