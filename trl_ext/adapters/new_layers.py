"""Layers of a classifier that its checkpoint does not hold, and transformers draws anew at each load."""

import copy

from accelerate.logging import get_logger
from accelerate.utils import patch_environment
from peft import PeftConfig, PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..compat import get_config_model_id, without_loading_report
from ..models.lm_head import base_causal_lm


logger = get_logger(__name__)

# Those of `model_init_kwargs` that say where weights are
WHERE = ("revision", "trust_remote_code", "subfolder", "variant", "token", "cache_dir", "use_safetensors")


def new_layers(model: str | PreTrainedModel | PeftModel, model_init_kwargs: dict) -> list[str]:
    """
    Lists the layers of a sequence classifier that transformers reports as newly initialised: a head, and with some
    encoders a pooler or a dense layer before it. No weights are read.

    Args:
        model: Folder or Hub id of a classifier with one label; or such a classifier, whose config names its origin.
        model_init_kwargs (`dict`): The arguments that the trainer loads the model with.

    Returns:
        `list[str]`: The paths of the largest modules without a loaded weight. Empty where nobody knows: of models that
        were built in memory, and under DeepSpeed ZeRO-3, which has its own way to load.
    """
    if is_deepspeed_zero3_enabled():
        logger.warning(
            f"Under DeepSpeed ZeRO-3 nothing tells which layers of the classifier are new. Its head "
            f"({' or '.join(SEQ_CLS_HEAD_NAMES)}) is saved with the adapter; if transformers has called others newly "
            "initialized (a `pooler`, say), name them in `modules_to_save` of the `peft_config`, or each load of the "
            "adapter draws them anew."
        )
        return []
    if isinstance(model, str):
        source, auto_class = model, AutoModelForSequenceClassification
        kwargs = {"num_labels": 1} | {name: model_init_kwargs[name] for name in WHERE if name in model_init_kwargs}
    else:
        base = base_causal_lm(model)
        source, auto_class = get_config_model_id(base.config), type(base)
        config = copy.deepcopy(base.config)
        config.__dict__.pop("quantization_config", None)
        kwargs = {"config": config, "ignore_mismatched_sizes": True}
    if not source:
        return []
    # Not by the first process alone, which would know more than the others
    with without_loading_report(), patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        try:
            loaded, info = auto_class.from_pretrained(source, device_map="meta", output_loading_info=True, **kwargs)
        except OSError:
            if isinstance(model, str):
                raise
            return []  # it has moved since
    return largest_modules(loaded, set(info["missing_keys"]))


def largest_modules(model: nn.Module, weights: set[str]) -> list[str]:
    """Lists the paths of modules whose parameters are all among `weights`, but of none inside another of them."""
    found = []
    for path, module in model.named_modules():
        held = {f"{path}.{name}" for name, _ in module.named_parameters()}
        is_inside = path.startswith(tuple(f"{other}." for other in found))
        if path and held and not is_inside and held <= weights:
            found.append(path)
    rest = {name.rpartition(".")[0] for name in weights if not name.startswith(tuple(f"{path}." for path in found))}
    return found + sorted(rest - {""})


def save_whole(peft_config: PeftConfig, layers: list[str]) -> None:
    """Makes an adapter train and save `layers` whole, as PEFT does by itself with heads of the usual names."""
    if hasattr(peft_config, "modules_to_save"):  # learned prompts have none
        given = list(peft_config.modules_to_save or [])
        new = [path for path in layers if path not in SEQ_CLS_HEAD_NAMES and path not in given]
        peft_config.modules_to_save = [*given, *new] or None


def unquantized(quantization_config, layers: list[str]):
    """Returns a copy of a `BitsAndBytesConfig` that leaves `layers`, which are to be trained, in full precision."""
    if not layers or not hasattr(quantization_config, "llm_int8_skip_modules"):
        return quantization_config
    copied = copy.deepcopy(quantization_config)
    given = copied.llm_int8_skip_modules or []
    copied.llm_int8_skip_modules = [*given, *(path for path in layers if path not in given)]
    return copied
