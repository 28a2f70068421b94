"""
The protocol of what trains with a model without being of it: a critic, the tie parameters of a likelihood.

Such a companion is a child module of the model, so that one optimizer, one gradient clipping and one distributed
wrapper hold both. It is put aside where the model is saved, loaded or served, so that what is on disk stays the plain
model. [`TrainerBase`] does that for every trainer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


OF_COMPANION = "of_companion"  # True in the optimizer's groups that hold weights of one


class Companion(nn.Module):
    """A module that trains as a child of a model and is saved beside it. A subclass says how in the hooks below."""

    child_name: str  # attribute of the model, prefix of the parameters
    hooks: list[RemovableHandle] = []  # on the model

    def attach_to(self, model: PreTrainedModel | PeftModel) -> None:
        """Makes this a child of `model`, which runs it in its own forward."""
        self.to_device(model.device)
        model.add_module(self.child_name, self)
        self.hooks = self.hooks_on(model)
        keep_out_of_saves(model, self.child_name)

    @classmethod
    def detach_from(cls, model: PreTrainedModel | PeftModel) -> None:
        """Undoes [`attach_to`], if it was ever done."""
        child = model._modules.pop(cls.child_name, None)
        for hook in () if child is None else child.hooks:
            hook.remove()

    def to_device(self, device: torch.device) -> "Companion":
        """Moves what is not on the model's device already."""
        return self.to(device)

    def hooks_on(self, model: PreTrainedModel | PeftModel) -> list[RemovableHandle]:
        """Registers the hooks through which the model runs this in its forward."""
        raise NotImplementedError

    def own_parameters(self) -> Iterable[nn.Parameter]:
        """Returns what trains with this only, and with settings of its own in the optimizer."""
        return self.parameters()

    def save(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """
        Writes files beside the model's. There are none of a companion that the model's config tells all about.

        Args:
            folder (`str` or `Path`): The folder that the model is saved to.
            state_dict (`dict[str, torch.Tensor]`, *optional*): The gathered weights, where they are sharded.
        """

    def restore(self, folder: str | Path) -> None:
        """Fills this with what was saved with the model in `folder`."""
        raise NotImplementedError


def keep_out_of_saves(model: nn.Module, name: str) -> None:
    """Leaves the child `name` out of the `save_pretrained` of users who save the model themselves."""
    keys = {f"{name}.{key}" for key in model.get_submodule(name).state_dict()}
    model._keys_to_ignore_on_save = keys | set(model._keys_to_ignore_on_save or ())


@contextmanager
def without_child(model: nn.Module, name: str) -> Iterator[None]:
    """Takes the child of that name out of `model` within the context."""
    child = model._modules.pop(name)
    try:
        yield
    finally:
        model.add_module(name, child)


def split_state_dict(
    state_dict: dict[str, torch.Tensor], name: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the model's own weights, and those of its child `name` under the child's own names."""
    prefix = f"{name}."
    of_model = {key: weight for key, weight in state_dict.items() if not key.startswith(prefix)}
    return of_model, {key.removeprefix(prefix): weight for key, weight in state_dict.items() if key not in of_model}


def give_settings(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], settings: dict) -> None:
    """Moves `parameters` into groups of the optimizer of their own, with these settings, such as `lr`."""
    ids = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in ids]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        if moved:
            optimizer.add_param_group({**group, "params": moved, OF_COMPANION: True, **settings})
