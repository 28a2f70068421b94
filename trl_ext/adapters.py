"""
Adapters in a trainer: of the right task type, in full precision, on a base that stays as it is, and never without the
head that goes with them.

Under a quantized base TRL casts what trains to bfloat16, which has 8 bits of mantissa: an update smaller than 1/512 of
a weight is rounded away, so with AdamW at a learning rate of 1e-6 nearly none of them moves. Here they stay in float32,
and the forward pass is autocast as TRL's arguments `bf16` and `fp16` say.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import is_bitsandbytes_available

from .shared_base import is_quantized


logger = get_logger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
SCORE_HEAD = "score"  # what transformers calls the head of causal sequence classification


class AdapterMixin:
    """
    Comes right before the TRL trainer in a trainer's bases. What it changes for models with adapters:

    - the adapter's task type is that of the model, whatever the `peft_config` says;
    - under a base in 4 or 8 bits, what trains is kept in float32;
    - of a base in 4 bits on CPU, weights are never repacked, which would make gradients wrong;
    - a score head is saved with the adapter even if it is not trained with it.
    """

    _task_type: str  # of PEFT

    def __init__(self, model, *args, **kwargs):
        arguments = inspect.signature(super().__init__).bind(model, *args, **kwargs)
        given = arguments.arguments
        peft_config = given.get("peft_config")
        check_trainable(model, given.get("quantization_config"), peft_config)
        if peft_config is not None and peft_config.task_type != self._task_type:
            given["peft_config"] = copy.deepcopy(peft_config)
            given["peft_config"].task_type = self._task_type_of(peft_config, given.get("train_dataset"))
        before = trainable_weights(model)
        try:
            super().__init__(*arguments.args, **arguments.kwargs)
        except RuntimeError as error:
            if "floating point" in str(error) and peft_config is not None and peft_config.modules_to_save:
                raise ValueError(
                    f"A module of `modules_to_save={peft_config.modules_to_save}` is quantized, and cannot be trained. "
                    "Remove it from there (`target_modules` can have it), or load the model with it in "
                    "`llm_int8_skip_modules` of the `BitsAndBytesConfig`."
                ) from error
            raise
        if is_quantized(self.model):
            keep_trainables_in_fp32(self.model, before)
            keep_4bit_unpacked(self.model)

    def _task_type_of(self, peft_config, train_dataset) -> str | None:
        return self._task_type

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.model, PeftModel):
            save_score_head(self.model, output_dir or self.args.output_dir)


def check_trainable(model, quantization_config, peft_config) -> None:
    """Refuse quantized weights without an adapter: there would be nothing to train."""
    if peft_config is not None or isinstance(model, PeftModel):
        return
    is_instance = isinstance(model, nn.Module)
    if is_quantized(model) if is_instance else quantization_config is not None:
        raise ValueError(
            "The base model is quantized (4 or 8 bits), so its weights cannot be trained, and there is no adapter on "
            "it. Pass a `peft_config` such as `LoraConfig(target_modules='all-linear')`; in a recipe, `--use_peft`."
        )


# --- Precision ---


def trainable_weights(model) -> dict[str, torch.Tensor]:
    """Copies of what trains in a `PeftModel` on a quantized base; nothing of other models."""
    if not (isinstance(model, PeftModel) and is_quantized(model)):
        return {}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def keep_trainables_in_fp32(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """
    Undo TRL's cast of what trains to bfloat16, in place.

    Args:
        model: Of a trainer whose `__init__` has returned.
        before (`dict[str, torch.Tensor]`): [`trainable_weights`] of the model it was given. A new adapter's random
            start is kept as it was rounded; a new copy of a module (`modules_to_save`) is taken from the original.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = before.get(name, parameter.data).to(parameter.device, torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapter]
            if not any(key.startswith(name) for key in before):
                trained.load_state_dict(module.original_module.state_dict())
            trained.register_forward_pre_hook(cast_input)


@contextmanager
def trainables_kept(model: nn.Module) -> Iterator[None]:
    """What trains is afterwards what it was, though the model was cast to another precision meanwhile."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def cast_input(module: nn.Module, args: tuple) -> tuple:
    """A forward pre-hook: hidden states of a half-precision base meet a head in float32, where nothing is autocast."""
    x = args[0]
    if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        return (x.to(next(module.parameters()).dtype), *args[1:])
    return args


def keep_4bit_unpacked(model: nn.Module) -> None:
    """
    Keep bitsandbytes from repacking 4-bit weights on CPU.

    On processors with AVX512-BF16 the first forward in evaluation mode repacks them for a faster kernel, which
    `train()` does not undo and autograd does not know: later gradients are wrong or the layer fails
    (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    if not is_bitsandbytes_available():
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what is packed already, in place


# --- Heads ---


def save_score_head(model: PeftModel, directory: str) -> None:
    """
    Add the score head to a saved adapter that does not hold it, under the name that PEFT reads it back by.

    A reward adapter without its head has random rewards: transformers draws a new head whenever the base is loaded.
    """
    file = Path(directory) / ADAPTER_WEIGHTS
    head = getattr(model.get_base_model(), SCORE_HEAD, None)
    if head is None or isinstance(head, ModulesToSaveWrapper) or not file.is_file():
        return
    weights = load_file(file)
    prefix = f"base_model.model.{SCORE_HEAD}"
    if isinstance(head, BaseTunerLayer):
        # A head with an adapter on it, for `PeftModel`, and the sum of the two for PEFT's classes of classifiers, which
        # put another head in its place
        weights[f"{prefix}.base_layer.weight"] = head.get_base_layer().weight
        with merged(model, {}):
            weights[f"{prefix}.weight"] = head.get_base_layer().weight.clone()
    else:
        weights[f"{prefix}.weight"] = head.weight
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, file, metadata={"format": "pt"})


# --- Merging ---


@contextmanager
def merged(model: PeftModel, backup: dict[str, torch.Tensor]) -> Iterator[None]:
    """
    Within the context the adapter is merged into its base, so that a forward runs no adapter; afterwards the base is
    bit for bit what it was (subtracting what was added would leave rounding errors).

    Args:
        model (`PeftModel`): On a base that is not quantized.
        backup (`dict[str, torch.Tensor]`): Empty at first; filled with the base's weights, on CPU, and to be passed
            again the next time: a frozen base need be copied once.
    """
    weights = {
        f"{name}.{key}": weight
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for key, weight in module.get_base_layer().named_parameters()
    }
    if not backup:
        backup.update({name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()})
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(backup[name])
