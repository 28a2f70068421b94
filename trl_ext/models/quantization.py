"""The quantization of a model's weights, as transformers and PEFT tell it."""

from torch import nn


# Attributes by which PEFT tells the quantization of a base
QUANTIZATION_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")


def is_quantized(model: nn.Module) -> bool:
    """
    Returns True if the weights are in few bits, which neither train nor merge. Only transformers' models ever say so.
    """
    return bool(getattr(model, "is_quantized", False))


def quantization_of(model: nn.Module) -> str | None:
    """Names the quantization of a model's weights, or of its base's; None if there is none."""
    quantization = getattr(model.config, "quantization_config", None)  # absent from other models
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    for bits, kind in (("load_in_4bit", settings.get("bnb_4bit_quant_type")), ("load_in_8bit", "int8")):
        if settings.get(bits):
            return f"{bits.removeprefix('load_in_')} ({kind})"
    return str(settings["quant_method"])


def copy_quantization_flags(source: nn.Module, target: nn.Module) -> None:
    """Tells PEFT that the layers of `target`, which are those of `source`, are quantized, if they are."""
    for flag in QUANTIZATION_FLAGS:
        if getattr(source, flag, False):
            setattr(target, flag, True)
