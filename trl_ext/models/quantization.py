"""How a model's weights are quantized, if they are."""

from torch import nn


# Flags by which PEFT tells how the base is quantized
QUANTIZATION_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def is_quantized(model: nn.Module) -> bool:
    """Whether the weights are in few bits, which neither train nor merge. Only transformers' models say that they are."""
    return bool(getattr(model, "is_quantized", False))


def quantization_of(model: nn.Module) -> str | None:
    """How a model's weights, or those of its base, are quantized, in words."""
    quantization = getattr(model.config, "quantization_config", None)  # absent from other models
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    for bits, kind in (("load_in_4bit", settings.get("bnb_4bit_quant_type")), ("load_in_8bit", "int8")):
        if settings.get(bits):
            return f"{bits.removeprefix('load_in_')} ({kind})"
    return str(settings["quant_method"])


def copy_quantization_flags(source: nn.Module, target: nn.Module) -> None:
    """Tell PEFT that the layers of `target`, which are those of `source`, are quantized, if they are."""
    for flag in QUANTIZATION_FLAGS:
        if getattr(source, flag, False):
            setattr(target, flag, True)
