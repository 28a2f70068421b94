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

from .. import token_mdp
from ..compat import strip_images_from_messages
from ..data.rollouts import FOLDER, NUMBERS_OF_TOKENS, files_of


def rollout_features(row: dict[str, Any]) -> Features:
    """Of a row, whose prompt and completion are texts or lists of messages."""
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


class Recording:
    """The rows of what one process sampled at once, until all is known of them and they are written to `file`."""

    def __init__(self, file: Path, rows: list[dict[str, Any]]):
        self.file, self.rows = file, rows

    def add(self, indices: torch.Tensor, **columns: torch.Tensor | None) -> None:
        """What is now known of the rows `indices` `(B,)`: columns `(B,)`, or `(B, T)` of which each keeps its tokens."""
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

    @property
    def is_complete(self) -> bool:
        return all("logps" in row for row in self.rows)

    def write(self) -> None:
        features = rollout_features(self.rows[0])
        rows = [_encoded({name: row[name] for name in features}) for row in self.rows]
        table = Dataset.from_list(rows, features=features).data.table
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".tmp")
        pq.write_table(table, unfinished)
        os.replace(unfinished, self.file)


def _encoded(row: dict[str, Any]) -> dict[str, Any]:
    """With messages as JSON, which `datasets` would write with numbers rounded to 10 digits."""
    texts = {name: row[name] for name in ("prompt", "completion") if not isinstance(row[name], str)}
    return row | {name: [json.dumps(m, ensure_ascii=False) for m in messages] for name, messages in texts.items()}


class RecordingMixin:
    """
    With `save_rollouts`, keeps of each rollout what the reward functions, the estimator and the policy say of it, and
    writes it when the last of them has: within the optimizer step that follows, whatever is trained on it afterwards.
    """

    _recording = None  # of the rollout under way, until it is written
    _evaluated = "eval"  # the split of the evaluation under way
    _batches = {}  # of each split: the step of its last batch, and how many it had at this step

    def _begin_recording(self, step: int) -> None:
        """Before training from `step` on. What an earlier training left of it and of later steps goes aside."""
        self._recording, self._batches = None, {}
        if self.args.save_rollouts and self.args.should_save:
            # Other processes write their first file after a reward that they gather with this one
            set_aside(Path(self.args.output_dir) / FOLDER, step)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        name = re.sub(r"\W", "_", metric_key_prefix)
        self._evaluated = name if name.startswith("eval") else f"eval_{name}"
        self._batches = self._batches | {self._evaluated: (None, 0)}
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    def _next_file(self) -> Path:
        split, step = "train" if self.model.training else self._evaluated, self.state.global_step
        last_step, count = self._batches.get(split, (None, 0))
        number = count if last_step == step else 0
        self._batches = self._batches | {split: (step, number + 1)}
        name = f"step-{step:08d}-batch-{number:05d}-process-{self.accelerator.process_index:05d}.parquet"
        return Path(self.args.output_dir) / FOLDER / split / name

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.args.save_rollouts:
            rewards = self._own_rewards(rewards_per_func)
            rows = [
                {
                    "step": self.state.global_step,
                    "prompt": strip_images_from_messages(prompt),
                    "completion": strip_images_from_messages(completion),
                    "completion_ids": ids,
                    "tokens": self._tokenizer.convert_ids_to_tokens(ids),
                    **own,
                }
                for prompt, completion, ids, own in zip(
                    prompts, completions, completion_ids_list, rewards, strict=True
                )
            ]
            self._recording = Recording(self._next_file(), rows)
        return rewards_per_func

    def _record_credit(self, batch, mask: torch.Tensor, logps: torch.Tensor | None, **columns) -> None:
        """What the estimator took and gave, `(B, T)` each."""
        if self._recording is None:
            return
        columns = {name: None if x is None else torch.where(mask, x, 0) for name, x in columns.items()}
        self._recording.add(batch["completion_index"], own=mask, terminated=batch["terminated"], **columns)
        if logps is not None:
            self._record_logps(batch, mask, logps)

    def _record_logps(self, batch, mask: torch.Tensor, logps: torch.Tensor) -> None:
        kl = None
        if batch.get("ref_per_token_logps") is not None:
            kl = torch.where(mask, token_mdp.kl_estimate(logps, batch["ref_per_token_logps"], "k1"), 0)
        self._recording.add(batch["completion_index"], logps=torch.where(mask, logps, 0), kl=kl)
        if self._recording.is_complete:
            self._recording.write()
            self._recording = None

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self._recording is not None:  # where no estimator needs them, the training forward is the first to know
            self._record_logps(inputs, self._own_tokens(inputs), self._passes[-1][0])
        return loss


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
