"""Weights in 4 bits on CPU, which bitsandbytes would repack."""

import warnings

from torch import nn
from transformers.utils import is_bitsandbytes_available


def stop_repacking() -> None:
    """
    Makes bitsandbytes leave the weights of 4-bit layers as they are on CPU, for every layer made from now on.

    On processors with AVX512-BF16 a layer's first forward in evaluation mode repacks its weights for a kernel that is
    faster and rounds to bfloat16 (bitsandbytes 0.49 and later, `Linear4bit.forward`). It fails on a layer whose sizes
    do not fill the kernel's blocks; `train()` does not undo it; no gradient flows back through it; and what is saved
    afterwards has its scales rounded, or in the wrong order. For speed at inference, set `support_avx512bf16_for_cpu`
    of the layers to True.
    """
    if is_bitsandbytes_available():
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False


def keep_4bit_unpacked(model: nn.Module) -> None:
    """Keeps the layers of a model that was loaded before [`stop_repacking`] as they are, and unpacks those that are packed."""
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    packed = [layer for layer in layers if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    for layer in packed:
        scales = layer.weight.quant_state.absmax  # (K / blocksize, N)
        layer.state_dict()  # unpacks the weights in place
        if not layer.weight.quant_state.nested:  # whose scales bitsandbytes 0.50 leaves in their packed order
            layer.weight.quant_state.absmax = scales.T.flatten().float()
    if packed:
        warnings.warn(
            f"bitsandbytes repacked {len(packed)} 4-bit layers of this model when it ran on the CPU, and rounded their "
            "scales to bfloat16, so its weights are now up to 0.4% off. `import trl_ext` before you load the model, "
            "and they stay as they were."
        )
