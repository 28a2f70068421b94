"""
What trains with a model without being of it: a critic, the tie parameters of a likelihood. Each is a child module, so
that one optimizer, one gradient clipping and one distributed wrapper hold both, and is put aside where the model is
saved, loaded or served, so that what is on disk stays the plain model.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainerCallback
from trl import BEMACallback, SyncRefModelCallback


def keep_out_of_saves(model: nn.Module, name: str) -> None:
    """For users who save the model themselves: leave the child `name` out of its `save_pretrained`."""
    keys = {f"{name}.{key}" for key in model.get_submodule(name).state_dict()}
    model._keys_to_ignore_on_save = keys | set(model._keys_to_ignore_on_save or ())


@contextmanager
def without_child(model: nn.Module, name: str) -> Iterator[None]:
    """Within the context `model` has no child of that name."""
    child = model._modules.pop(name)
    try:
        yield
    finally:
        model.add_module(name, child)


def split_state_dict(
    state_dict: dict[str, torch.Tensor], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's own weights, and those of its child `name` under the child's own names."""
    prefix = f"{name}."
    own = {key: weight for key, weight in state_dict.items() if not key.startswith(prefix)}
    return own, {key.removeprefix(prefix): state_dict[key] for key in state_dict.keys() - own.keys()}


def give_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], learning_rate: float, **settings
) -> None:
    """Move `parameters` into groups of the optimizer of their own, with this learning rate (and other settings)."""
    ids = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in ids]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate, **settings})


class SyncReferenceCallback(SyncRefModelCallback):
    """
    TRL's `sync_ref_model`, which walks the parameters of model and reference in parallel, without the child `name`.
    """

    def __init__(self, ref_model, accelerator, name: str):
        super().__init__(ref_model, accelerator)
        self.name = name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with without_child(self.accelerator.unwrap_model(model), self.name):
            super().on_step_end(args, state, control, model=model, **kwargs)


@contextmanager
def averaged_without_child(callbacks: list[TrainerCallback], accelerator, name: str) -> Iterator[None]:
    """
    Within the context TRL's `BEMACallback`, which makes another model of the same class as training begins and averages
    into it, does so of the model without the child `name`.
    """

    def without(on_train_begin: Callable) -> Callable:
        def begin(args, state, control, model=None, **kwargs):
            with without_child(accelerator.unwrap_model(model), name):
                return on_train_begin(args, state, control, model=model, **kwargs)

        return begin

    averaging = [callback for callback in callbacks if isinstance(callback, BEMACallback)]
    for callback in averaging:
        callback.on_train_begin = without(callback.on_train_begin)
    try:
        yield
    finally:
        for callback in averaging:
            del callback.on_train_begin
