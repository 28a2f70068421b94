"""Merging an adapter into the weights of its base: for good, or for a while, after which the base is as before, to the bit."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.quantization import is_quantized


logger = get_logger(__name__)


def can_merge(model: PeftModel) -> bool:
    """
    Tells if the merged model is the one that is trained: not where an adapted weight is also another module's
    (embeddings tied to the head), nor with kinds of adapters that cannot be merged, as trying shows.
    """
    if shared_adapted_weights(model):
        return False
    try:
        with merged(model, {}):
            return True
    except (NotImplementedError, RuntimeError, ValueError) as error:
        logger.warning(f"The adapter cannot be merged for generation, and runs at every token: {error}")
        return False


def shared_adapted_weights(model: PeftModel) -> set[int]:
    """Returns the ids of the base's weights that an adapter is on and more than one module holds."""
    layers = (module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer))
    adapted = {id(weight) for layer in layers for weight in layer.parameters()}
    held = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    return {weight for weight in adapted if held[weight] > 1}


@contextmanager
def merged(model: PeftModel, backup: dict[str, torch.Tensor]) -> Iterator[None]:
    """
    Merges the adapter into its base within the context, so that a forward runs no adapter; afterwards the base is the
    same to the bit (subtracting what was added would leave rounding errors).

    Args:
        model (`PeftModel`): The model, on a base that is not quantized.
        backup (`dict[str, torch.Tensor]`): An empty dict at first, which is filled with the base's weights, on CPU. It
            is to be passed again the next time: a frozen base need be copied once.
    """
    if is_quantized(model):
        raise ValueError("A quantized base cannot hold what an adapter adds to it.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    weights = {
        f"{name}.{key}": weight
        for name, module in layers.items()
        for key, weight in module.get_base_layer().named_parameters()
        if not weight.requires_grad  # a bias that trains is not merged into
    }
    if not backup:
        backup.update({name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()})
    try:
        model.merge_adapter()
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(backup[name])
        for module in layers.values():
            module.merged_adapters.clear()


# How far two merged weights may differ, over the largest of their elements, for sums that were formed in other orders
ROUNDING = 1e-6


@torch.no_grad()
def merge(model: PeftModel, dtype: torch.dtype) -> tuple[torch.nn.Module, float]:
    """
    Merges an adapter for good into its base, which is in float32.

    Returns:
        `tuple`: The merged model in `dtype`, and the `precision_loss`, the share of the change that this rounds away.
    """
    tied_configs = part_shared_weights(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    lost = changed = 0.0
    for layer in tqdm(layers, desc="Merging"):
        before = {name: weight.clone() for name, weight in layer.get_base_layer().named_parameters()}
        layer.merge()
        for name, weight in layer.get_base_layer().named_parameters():
            lost += (weight.to(dtype).float() - weight).double().square().sum().item()
            changed += (weight - before[name]).double().square().sum().item()
    loss = (lost / changed) ** 0.5 if changed else 0.0
    merged = model.merge_and_unload()
    is_tied = tie_equal_weights(merged)
    for config in tied_configs:
        config.tie_word_embeddings = is_tied
    return merged.to(dtype), loss


def part_shared_weights(model: PeftModel) -> list[PreTrainedConfig]:
    """
    Gives modules that share a weight which an adapter is on (embeddings tied to the head) a copy each: an adapter adds
    to one layer alone, and several adapters would all add to the same weight.

    Returns:
        `list[PreTrainedConfig]`: The configs that call weights tied.
    """
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    shared = shared_adapted_weights(model)
    seen = set()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in seen:
                module._parameters[name] = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            elif id(weight) in shared:
                seen.add(id(weight))
    configs += [config.get_text_config() for config in configs]
    return [config for config in configs if getattr(config, "tie_word_embeddings", False)]  # others have no embeddings


def tie_equal_weights(model: PreTrainedModel) -> bool:
    """
    Ties again the weights that `model` tied and the merge left equal, but for rounding. If some differ, each gets a
    weight of its own: the config can call all of them tied or none, and a weight that the config calls untied and
    another module holds too would be left out of the saved files, and drawn at random when they are loaded.

    Returns:
        `bool`: True if all are tied.
    """
    ties = model.all_tied_weights_keys.items()
    pairs = [(model.get_parameter(target), model.get_parameter(source)) for target, source in ties]
    is_tied = all((target - source).abs().max() <= ROUNDING * source.abs().max() for target, source in pairs)
    for (path, _), (target, source) in zip(ties, pairs, strict=True):
        module_path, _, name = path.rpartition(".")
        weight = source if is_tied else torch.nn.Parameter(target.detach().clone(), requires_grad=False)
        model.get_submodule(module_path)._parameters[name] = weight
    return is_tied
