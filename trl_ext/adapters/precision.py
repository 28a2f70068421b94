"""
The precision of weights that train, which is float32.

Under a quantized base TRL casts adapters and heads to bfloat16, which has 8 bits of mantissa: an update smaller than
1/512 of a weight is rounded away, so with AdamW at a learning rate of 1e-6 nearly none of them moves. Here they stay in
float32, and the forward pass is autocast as TRL's arguments `bf16` and `fp16` say.
"""

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..models.quantization import is_quantized


def trainable_weights(model) -> dict[str, torch.Tensor]:
    """Copies the weights of a `PeftModel` on a quantized base that train, or may with its adapters; none of other models."""
    if not (isinstance(model, PeftModel) and is_quantized(model)):
        return {}
    adapters = [f".{name}." for name in model.peft_config]
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or any(adapter in f"{name}." for adapter in adapters)
    }


def keep_trainables_in_fp32(model: nn.Module, before: dict[str, torch.Tensor], is_new: bool) -> None:
    """
    Undoes TRL's cast to bfloat16 of the weights that train, in place.

    Args:
        model: The model of a trainer whose `__init__` has returned.
        before (`dict[str, torch.Tensor]`): [`trainable_weights`] of the model it was given.
        is_new (`bool`): True if the trainer made the adapter. Its random start is then kept as it was rounded, and
            layers that it trains whole (`modules_to_save`) are taken from the original.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name in before:
            parameter.data = before.get(name, parameter.data).to(parameter.device, torch.float32)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapter]
            if is_new:
                trained.load_state_dict(module.original_module.state_dict())
            trained.register_forward_pre_hook(cast_input)


def cast_input(module: nn.Module, args: tuple) -> tuple:
    """Casts a half-precision base's hidden states for a head in float32, unless something is autocast; a pre-hook."""
    x = args[0]
    if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        return (x.to(next(module.parameters()).dtype), *args[1:])
    return args
