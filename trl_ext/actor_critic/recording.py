"""
Recording rollouts: every completion with what became of it token by token, as Parquet in `output_dir/rollouts`.

A file holds what one process sampled at once. Its name is the optimizer step before which that was, the number of such
batches at this step, and the process, so a step that is done again after a resume overwrites its own. It appears whole:
a killed run leaves none that cannot be read. What a training in the same folder is about to do again is moved to
`superseded-1` (2, ...) before it begins, so that no two trainings are mixed.
"""

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, Json, List, Value

from ..data.rollouts import FOLDER, NUMBERS_OF_TOKENS, files_of
from ..token_mdp import kl_estimate
from .rollout import Rollout


def rollout_features(row: dict[str, Any]) -> Features:
    """Returns the types of a row's columns, whose prompt and completion are texts or lists of messages."""
    text = Value("string") if isinstance(row["prompt"], str) else List(Json())
    number = Value("float32")
    return Features(
        {
            "step": Value("int64"),
            "prompt": text,
            "completion": text,
            "completion_ids": List(Value("int64")),
            "tokens": List(Value("string")),
            "own": List(Value("bool")),
            "score": number,
            **{name: number for name in row if name.startswith("reward/")},
            "terminated": Value("bool"),
            **{name: List(number) for name in NUMBERS_OF_TOKENS},
        }
    )


class Recorder:
    """
    Keeps of each rollout what the reward functions, the estimator and the policy say of it, and writes it when the last
    of them has: within the optimizer step that follows, whatever is trained on it afterwards.

    Args:
        output_dir (`str`): The folder of the training.
        process_index (`int`): Number of this process.
    """

    def __init__(self, output_dir: str, process_index: int):
        self.folder, self.process_index = Path(output_dir) / FOLDER, process_index
        self.rows: list[dict[str, Any]] = []  # of the rollout under way, until they are written
        self.file: Path | None = None
        self.evaluation = "eval"  # the split of the evaluation under way
        self.batches = {}  # of each split: the step of its last batch, and how many it had at this step

    def begin(self, step: int, moves_files: bool) -> None:
        """Prepares for a training from `step` on; what an earlier one left of it and of later steps is put aside."""
        self.rows, self.batches = [], {}
        if moves_files:  # other processes write their first file after a reward that they gather with this one
            set_aside(self.folder, step)

    def begin_evaluation(self, metric_key_prefix: str) -> None:
        """Names the split of an evaluation after its metrics."""
        name = re.sub(r"\W", "_", metric_key_prefix)
        self.evaluation = name if name.startswith("eval") else f"eval_{name}"
        self.batches[self.evaluation] = (None, 0)

    def begin_rollout(
        self, step: int, is_training: bool, rewards: list[dict[str, float | None]], **columns: list
    ) -> None:
        """Takes a rollout that was sampled at `step`: for each completion its rewards, and an entry in every column."""
        split = "train" if is_training else self.evaluation
        last_step, count = self.batches.get(split, (None, 0))
        number = count if last_step == step else 0
        self.batches[split] = (step, number + 1)
        name = f"step-{step:08d}-batch-{number:05d}-process-{self.process_index:05d}.parquet"
        self.file = self.folder / split / name
        rows = zip(*columns.values(), strict=True)
        self.rows = [
            {"step": step, **dict(zip(columns, row, strict=True)), **paid}
            for row, paid in zip(rows, rewards, strict=True)
        ]

    def add_credit(self, rollout: Rollout, rewards: torch.Tensor) -> None:
        """Adds what the estimator took, `rewards` `(B, T)`, and gave."""
        if self.rows:
            mask, credit = rollout.chosen, rollout.credit
            columns = {"rewards": rewards, "advantages": credit.advantages, "returns": credit.returns}
            columns["values"] = credit.values
            columns = {name: None if x is None else torch.where(mask, x, 0) for name, x in columns.items()}
            self._add(rollout.index, own=mask, terminated=rollout.terminated, **columns)

    def add_logps(self, rollout: Rollout, logps: torch.Tensor) -> None:
        """Adds log-probabilities by the policy that sampled; with those of the last rows, writes the file."""
        if not self.rows:
            return
        mask, kl = rollout.chosen, None
        if rollout.ref_logps is not None:
            kl = torch.where(mask, kl_estimate(logps, rollout.ref_logps, "k1"), 0)
        self._add(rollout.index, logps=torch.where(mask, logps, 0), kl=kl)
        if all("logps" in row for row in self.rows):
            write(self.file, self.rows)
            self.rows = []

    def _add(self, indices: torch.Tensor, **columns: torch.Tensor | None) -> None:
        """Adds columns `(B,)`, or `(B, T)` of which each row keeps its tokens, to the rows `indices` `(B,)`."""
        columns = {name: None if column is None else column.detach().cpu() for name, column in columns.items()}
        for position, index in enumerate(indices.tolist()):
            row = self.rows[index]
            for name, column in columns.items():
                entry = None if column is None else column[position]
                if entry is not None and entry.dim() == 1:
                    length = len(row["completion_ids"])
                    # Tokens that a micro-batch was cut by are masked
                    entry = torch.nn.functional.pad(entry[:length], (0, max(length - len(entry), 0)))
                row[name] = None if entry is None else entry.tolist()


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of a rollout to a file that appears whole."""
    features = rollout_features(rows[0])
    rows = [_encoded({name: row[name] for name in features}) for row in rows]
    table = Dataset.from_list(rows, features=features).data.table
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    pq.write_table(table, unfinished)
    os.replace(unfinished, file)


def _encoded(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with messages as JSON, which `datasets` would write with numbers rounded to 10 digits."""
    texts = {name: row[name] for name in ("prompt", "completion") if not isinstance(row[name], str)}
    return row | {name: [json.dumps(m, ensure_ascii=False) for m in messages] for name, messages in texts.items()}


def set_aside(folder: Path, step: int) -> None:
    """Moves the files of `folder` that training from `step` on will write anew to `superseded-1` (2, ...) in it."""
    # What was evaluated at the step itself was so before training went on from it
    files = [file for file in files_of(folder) if _step_of(file) >= step + (file.parent.name != "train")]
    target = next(t for n in itertools.count(1) if not (t := folder / f"superseded-{n}").exists())
    for file in files:
        moved = target / file.relative_to(folder)
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, moved)


def _step_of(file: Path) -> int:
    return int(file.name.split("-")[1])
