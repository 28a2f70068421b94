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


# TRL's callbacks that walk the model's parameters in parallel with those of another, plain model, and when they do
WALKING = {BEMACallback: "on_train_begin", SyncRefModelCallback: "on_step_end"}


@contextmanager
def walked_without_child(callbacks: list[TrainerCallback], accelerator, name: str) -> Iterator[None]:
    """
    Within the context the callbacks of `sync_ref_model` and of averaging, the trainer's own and a user's, find the
    model without the child `name`: the reference and the average have none.
    """

    def without(event: Callable) -> Callable:
        def call(args, state, control, model=None, **kwargs):
            with without_child(accelerator.unwrap_model(model), name):
                return event(args, state, control, model=model, **kwargs)

        return call

    walking = [(c, event) for c in callbacks for kind, event in WALKING.items() if isinstance(c, kind)]
    for callback, event in walking:
        setattr(callback, event, without(getattr(callback, event)))
    try:
        yield
    finally:
        for callback, event in walking:
            delattr(callback, event)
