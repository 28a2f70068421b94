"""
Dropout of a model, wherever its probability is kept: in modules of all kinds (`nn.Dropout`, PEFT's own), and in numbers
that attention, decoder layers or adapters hand to a function (`attention_dropout`, `attn_pdrop`, `layerdrop`).

TRL's `disable_dropout` knows `nn.Dropout` alone.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel


logger = get_logger(__name__)

NAMES = re.compile(r"dropout|pdrop|layerdrop|drop_prob|drop_path|drop_rate")


def stop_dropout(model: nn.Module) -> None:
    """Sets every probability of dropout in a model to 0. Its config, which is saved with it, stays as it is."""
    for _, holder, key in _probabilities(model):
        holder[key] = 0.0
    for module in model.modules():
        if _reads_config(module):
            module.config = ConfigWithoutDropout(module.config)


def active_dropout(model: nn.Module) -> dict[str, float]:
    """Returns the probabilities of dropout in a model that are not 0, by the place where they are kept."""
    in_config = (
        (f"{name}.config.{key}", module.config.to_dict(), key)
        for name, module in model.named_modules()
        for key in _reads_config(module)
    )
    return {name: holder[key] for name, holder, key in (*_probabilities(model), *in_config)}


def warn_of_dropout(model: nn.Module) -> None:
    """Says what dropout means for policy gradients, if a model has any."""
    if active := active_dropout(model):
        name, probability = next(iter(active.items()))
        logger.warning(
            f"`disable_dropout=False`, and the policy has dropout ({len(active)} probabilities, such as `{name}` = "
            f"{probability}): gradients are then of another policy than the one that sampled, drawn anew in each "
            "forward, and no clipping or correction knows of it. Set `disable_dropout=True`."
        )


def _is_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _probabilities(model: nn.Module) -> Iterator[tuple[str, dict, str]]:
    """Yields the name of each probability that is not 0, with the dict and the key that hold it."""
    for name, module in model.named_modules():
        is_dropout = "Dropout" in type(module).__name__
        for key, value in vars(module).items():
            if not NAMES.search(key) and not (is_dropout and key == "p"):
                continue
            if isinstance(value, dict):  # PEFT's, by adapter
                yield from ((f"{name}.{key}.{k}", value, k) for k, v in value.items() if _is_probability(v))
            elif _is_probability(value):
                yield f"{name}.{key}", vars(module), key


def _reads_config(module: nn.Module) -> list[str]:
    """
    Returns the names of probabilities, not 0, that a layer's forward reads off its config, as Falcon's and Persimmon's
    do.
    """
    if isinstance(module, PreTrainedModel) or "config" not in vars(module):
        return []
    forward = inspect.unwrap(type(module).forward)
    names = set(forward.__code__.co_names) - set(vars(module))
    return [name for name in names if NAMES.search(name) and _is_probability(getattr(module.config, name, None))]


class ConfigWithoutDropout:
    """The config that a layer sees: each probability of dropout is 0, all else is read from, and written to, the real one."""

    def __init__(self, config):
        vars(self)["config"] = config

    def __getattr__(self, name):
        if name == "config":  # not there yet, while this is copied
            raise AttributeError(name)
        value = getattr(self.config, name)
        return 0.0 if NAMES.search(name) and _is_probability(value) else value

    def __setattr__(self, name, value):
        setattr(self.config, name, value)
