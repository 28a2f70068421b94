"""
Several models on one frozen base: a module tree for each, over the very same weights.

PEFT keeps all adapters of a model in one tree and switches between them, and two things go wrong silently when two of
them are trained together: leaving an adapter's context before the backward pass takes `requires_grad` off its weights,
which then get no gradient; and gradient checkpointing recomputes a layer under whichever adapter is active by then.
Here nothing is switched. [`frozen_base`] copies a model's structure and shares every weight, quantized or not, and an
adapter injected into the copy is out of the other's sight. In memory the copy costs nothing but python objects; for
autograd, distributed wrappers and the optimizer it is a model like any other.
"""

import copy
from dataclasses import replace
from pathlib import Path

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..models.quantization import copy_quantization_flags


MAIN = "main"  # the revision of a model where none is named


def frozen_base(model: PeftModel) -> PreTrainedModel:
    """
    Returns the trunk of `model` (without its head) as it was before any adapter, in a module tree of its own.

    Every parameter and buffer is that of `model`, and moves or changes with it.

    Raises:
        ValueError: if some of these weights are trained with `model`'s adapter, which makes them nobody else's.
    """
    base = model.get_base_model()
    trunk = base.base_model
    shared = {id(tensor): tensor for tensor in [*trunk.parameters(), *trunk.buffers()]}
    for module in trunk.modules():
        if isinstance(module, BaseTunerLayer):
            shared[id(module)] = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            shared[id(module)] = module.original_module
        elif next(module.children(), None) is None and (module._parameters or module._buffers):
            # The module itself, as a quantized one keeps more than its weights. Those without weights are copied:
            # dropout asks its own training mode
            shared[id(module)] = module
    copied = copy.deepcopy(trunk, shared)
    for name, parameter in copied.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"The base's weight {name!r} is trained with the adapter, so no other model can share it. Leave it out "
                "(`bias='none'` in the `LoraConfig`)."
            )
    copy_quantization_flags(base, copied)
    return copied


def adapter_like(source: PeftModel, base: PreTrainedModel) -> PeftModel:
    """
    Makes an adapter on `base`, of the kind, size, scaling and layers that the active one of `source` has in its trunk.

    Args:
        source (`PeftModel`): A model with any head.
        base (`PreTrainedModel`): Such a trunk without adapters, from [`frozen_base`].
    """
    name = source.active_adapter
    config = copy.deepcopy(source.peft_config[name])
    trunk = source.get_base_model().base_model
    within = [f"{path}." for path, module in trunk.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    layers = {
        path: module
        for path, module in trunk.named_modules()
        if isinstance(module, BaseTunerLayer)
        and not isinstance(module, ParamWrapper)  # found by `target_parameters`
        and not path.startswith(tuple(within))
    }
    # Layers go by their names, as the config of `source` may choose them by its whole model. Modules that are saved
    # whole belong to `source`, and special starts, some of which change the base, have been made
    new = {"target_modules": list(layers), "modules_to_save": None, "task_type": None, "init_lora_weights": True}
    new["ensure_weight_tying"] = False  # to a head, which a trunk has not
    new |= dict.fromkeys(["layers_to_transform", "layers_pattern", "exclude_modules", "trainable_token_indices"])
    if isinstance(config, LoraConfig):
        new["rank_pattern"] = {path: layer.r[name] for path, layer in layers.items()}
        new["alpha_pattern"] = {path: layer.lora_alpha[name] for path, layer in layers.items()}
    if isinstance(config, IA3Config):
        new["feedforward_modules"] = [path for path, layer in layers.items() if layer.is_feedforward]
    new["inference_mode"] = False
    given = config.to_dict()
    # Made anew, without what PEFT has noted in it of the weights that it tied
    return get_peft_model(base, replace(config, **{field: value for field, value in new.items() if field in given}))


def is_adapter(path: str) -> bool:
    """Returns True if a folder or Hub repository holds an adapter."""
    return find_adapter_config_file(path) is not None


def base_of_adapter(path: str) -> tuple[str, str]:
    """Names the base model that the adapter in a folder or Hub repository was trained on, and its revision."""
    config = PeftConfig.from_pretrained(path)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter {path} does not say what it was trained on. Set `base_model_name_or_path` in its "
            "adapter_config.json to the folder or Hub id of its base."
        )
    return config.base_model_name_or_path, config.revision or MAIN


def is_same_model(name: str | None, other: str | None) -> bool:
    """Returns True if two names (folders or Hub ids) are of the same model."""
    if not name or not other:
        return False
    return name == other or (Path(name).is_dir() and Path(other).is_dir() and Path(name).samefile(other))
