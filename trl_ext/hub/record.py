"""The record of a training for its model card: its duration, its hardware, its evaluations."""

import math
import os
import time

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class TrainingClock(TrainerCallback, ExportableState):
    """
    Counts the seconds of training up to the last optimizer step.

    A checkpoint keeps them, and a resumed training counts on from there; from a checkpoint without them it counts from
    its own first step, `since_step`.
    """

    def __init__(self):
        self.seconds, self.since_step = 0.0, 0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds": self.seconds, "since_step": self.since_step}}

    def on_train_begin(self, args, state, control, **kwargs):
        name = type(self).__name__
        self.seconds, self.since_step = 0.0, state.global_step
        if state.global_step > 0 and name in state.stateful_callbacks:
            saved = state.stateful_callbacks[name]["attributes"]
            self.seconds, self.since_step = saved["seconds"], saved["since_step"]
        state.stateful_callbacks[name] = self.state()  # a checkpoint cannot be saved where this key is missing
        self._before, self._started = self.seconds, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = self._before + time.monotonic() - self._started

    on_train_end = on_step_end


def duration(seconds: float) -> str:
    """Returns a duration in words: `3 h 25 min`, `2 min 10 s` or `5.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def hardware(model: nn.Module, num_processes: int) -> dict[str, str]:
    """
    Returns the devices of a training, as far as this process knows them.

    Args:
        model (`nn.Module`): The model that this process trains.
        num_processes (`int`): Number of processes of the training.
    """
    devices = {parameter.device for parameter in model.parameters()}
    gpus = sorted((device for device in devices if device.type == "cuda"), key=str)
    names = [torch.cuda.get_device_name(gpu) for gpu in gpus]
    if not gpus:
        cores = f"CPU with {os.cpu_count()} logical cores"
        names = [cores if device.type == "cpu" else device.type for device in sorted(devices, key=str)]
    counted = [f"{names.count(name)} x {name}" if gpus else name for name in dict.fromkeys(names)]
    facts = {"processes": str(num_processes)}
    facts["device" if num_processes == 1 else "device of the main process"] = ", ".join(counted)
    if gpus:
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
        facts["peak GPU memory of the main process"] = f"{peak / 2**30:.1f} GiB"
    return facts


def training_entries(log_history: list[dict]) -> list[dict]:
    """Returns the entries logged while training, without evaluations and the summary at the end."""
    return [entry for entry in log_history if not any(name.endswith("_runtime") for name in entry)]


def evaluations(
    log_history: list[dict], dataset_names: list[str], best_step: int | None = None
) -> dict[str, list[dict]]:
    """
    Returns the entries logged by evaluations, in order, without the prefix `eval_`.

    Args:
        log_history (`list[dict]`): Entries of the trainer's state.
        dataset_names (`list[str]`): Names in an `eval_dataset` that is a dictionary, else none.
        best_step (`int`, *optional*):
            Step of the best checkpoint, if its weights were loaded at the end of training: only entries that measured
            these weights are returned.

    Returns:
        `dict[str, list[dict]]`: Entries by dataset, called "" if it has no name; only datasets with any evaluation.
    """
    ends = [index for index, entry in enumerate(log_history) if "train_runtime" in entry]
    found = {}
    for index, entry in enumerate(log_history):
        name = next((name for name in ["", *dataset_names] if f"{_prefix(name)}runtime" in entry), None)
        is_of_best = best_step is None or entry.get("step") == best_step or (ends and index > ends[-1])
        if name is not None and is_of_best:
            found.setdefault(name, []).append(_without_prefix(entry, _prefix(name)))
    return found


def _prefix(dataset_name: str) -> str:
    return f"eval_{dataset_name}_" if dataset_name else "eval_"


def _without_prefix(entry: dict, prefix: str) -> dict:
    # TRL and this package log their own metrics as `eval_...` under a named dataset, too
    return {name.removeprefix(prefix).removeprefix("eval_"): value for name, value in entry.items()}


def last_values(entries: list[dict]) -> dict:
    """Returns the last value of each metric that has one."""
    last = {}
    for entry in entries:
        last.update({name: value for name, value in entry.items() if value is not None})
    return last


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
