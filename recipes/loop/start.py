"""The start of a loop: what it goes on from, and how its programs are launched."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from .plan import LEAVES, stages_left
from .records import record_of, set_aside, write_record
from .stages import INDENT, RECIPES, LoopError, Stage, flags


NOT_CONFIGURED = ("rank_completions.py", "rlhf_publish.py")  # have no section
WAITS_FOR_PEOPLE = 3  # exit status
ON_CPU = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def folder_of(output_dir: str) -> Path:
    """Returns the same folder however it was written."""
    folder, here = Path(os.path.abspath(output_dir)), Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) and folder != here else folder


def position_of(redo: str | None, stages: list[Stage]) -> int:
    """Returns the position of the first stage that is done again; the number of stages where none is."""
    names = [stage.name for stage in stages]
    if redo is not None and redo not in names:
        raise LoopError(f"--redo {redo}: there is no such stage. The stages are {', '.join(names)}.")
    return len(names) if redo is None else names.index(redo)


def begin_again(folder: Path, name: str) -> None:
    """Sets aside all that a stage and those after it left."""
    records = [pattern for n in stages_left(name) for pattern in (*LEAVES[n], f"stages/{n}.json", f"logs/{n}.log")]
    kept = set_aside(folder, records)
    if kept is not None:
        print(f"What {name} and the stages after it left is kept in {kept}.")


def check_arguments(folder: Path, stages: list[Stage], environment: dict[str, str]) -> None:
    """
    Asks the recipes if they understand the configuration, unless they were asked before.

    Raises:
        LoopError: with the words of the first that does not.
    """
    configured = [c for stage in stages for c in stage.commands if c.script not in NOT_CONFIGURED]
    everything = Stage("arguments", "", configured)
    record = record_of(folder, everything.name)
    if record is not None and record["settings"] == everything.settings:
        return
    program = [sys.executable, str(RECIPES / "loop" / "arguments.py")]
    commands = json.dumps([[c.script, flags(c.arguments)] for c in configured])
    asked = subprocess.run(program, input=commands, env=environment, capture_output=True, text=True)
    if asked.returncode != 0:
        raise LoopError(f"The configuration is not understood. {asked.stderr.strip().splitlines()[-1]}")
    write_record(folder, everything, [program], is_finished=True)


def make_environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of the programs."""
    # For a model this small a second thread costs more than it gives, and bars of a blink say nothing
    tiny = {"OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # What TRL's and transformers' own code sets off in a newer transformers
    names = ("gradient_checkpointing", "is_gradient_checkpointing")
    quiet = {"PYTHONWARNINGS": ",".join(f"ignore:`{name}` is deprecated:FutureWarning" for name in names)}
    return quiet | (tiny if args.model_name_or_path is None else {}) | os.environ


def choose_launcher(args: argparse.Namespace) -> list[str]:
    """Returns the arguments of `accelerate launch`."""
    if args.config_file:
        return ["--config_file", args.config_file]
    if args.model_name_or_path is None:
        return ON_CPU
    import torch

    has_gpu = torch.cuda.is_available()
    return ["--config_file", str(RECIPES / "accelerate_configs" / "single_gpu.yaml")] if has_gpu else ON_CPU


def wait_for_people(folder: Path, enough: float) -> None:
    """Ends the program, with the command that opens the page, unless they have judged enough."""
    from trl_ext.data.collection import all_judgements
    from trl_ext.data.items import read_items

    items, everybody = read_items(folder), all_judgements(folder)
    done = sum(any(item in theirs for theirs in everybody) for item in items)
    if done >= enough * len(items):
        print(f"{INDENT}people have judged {done} of {len(items)}", flush=True)
        return
    share = "" if enough == 1 else f" ({enough:.0%} are enough)"
    print(f"{INDENT}people have judged {done} of {len(items)}{share}. To judge, open the page of\n")
    print(shlex.join(["python", str(RECIPES / "rank_completions.py"), "--folder", str(folder)]), end="\n\n")
    print(f"{INDENT}and then go on with\n\n{again()}")
    sys.exit(WAITS_FOR_PEOPLE)


def again() -> str:
    """Returns the command that goes on: this one, but for what it does again."""
    command = shlex.join(["python", *sys.argv])
    return re.sub(r" --redo[ =]\S+", "", command)
