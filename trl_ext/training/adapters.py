"""
Adapters on their way into a trainer: of the right task type, in full precision, on a base that stays as it is, and never
without the head that goes with them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters.new_layers import new_layers, save_whole, unquantized
from ..adapters.precision import keep_trainables_in_fp32, trainable_weights
from ..adapters.shared_base import MAIN, is_adapter
from ..adapters.start import copy_to_reference, say_that_head_has_no_bias, take_up_adapter
from ..compat import (
    REFERENCE,
    adapter_kept,
    has_transformers_adapter,
    keep_4bit_unpacked,
    without_loading_warnings,
)
from ..critic.files import CRITIC_NAME
from ..models.quantization import is_quantized
from ..models.tie_parameters import TIE_PARAMETERS_NAME


COMPANIONS = {CRITIC_NAME, TIE_PARAMETERS_NAME}  # children of a model, which are not of it


@dataclass
class Start:
    """
    A model on its way into a TRL trainer.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The model as TRL is given it.
        is_new (`bool`): True if TRL makes an adapter on it, by a `peft_config`.
        is_taken_up (`bool`): True if it was loaded here, from an adapter's folder.
        new_layers (`list[str]`): Layers of a classifier that were drawn anew when it was loaded.
        weights (`dict[str, torch.Tensor]`): Copies of those that train, before TRL casts them.
        has_reference (`bool`): True if it comes with the adapter that is its reference.
    """

    model: object
    is_new: bool
    is_taken_up: bool
    new_layers: list[str]
    weights: dict[str, torch.Tensor]
    has_reference: bool

    @contextmanager
    def into_trainer(self, trl_class: type, peft_config: PeftConfig | None) -> Iterator[None]:
        """Keeps the adapter as it is while `trl_class` makes a trainer of the model, and explains PEFT's error."""
        loading = without_loading_warnings(trl_class) if self.is_taken_up else nullcontext()
        try:
            with loading, adapter_kept(self.model):
                yield
        except RuntimeError as error:
            if "floating point" in str(error) and peft_config is not None and peft_config.modules_to_save:
                raise ValueError(
                    f"A module of `modules_to_save={peft_config.modules_to_save}` is quantized, and cannot be trained. "
                    "Remove it from there (`target_modules` can have it), or load the model with it in "
                    "`llm_int8_skip_modules` of the `BitsAndBytesConfig`."
                ) from error
            raise

    def mend(self, model: nn.Module) -> None:
        """Undoes what TRL has done to the adapter in `model`, which is the trainer's."""
        say_that_head_has_no_bias(model)
        if is_quantized(model):
            check_biases(model)
            keep_trainables_in_fp32(model, self.weights, is_new=self.is_new)
            keep_4bit_unpacked(model)
        if has_reference(self.model) and not self.has_reference:
            copy_to_reference(self.model)


def prepare_start(given: dict, task_type: str, task_type_of: Callable[[PeftConfig, object], str | None]) -> Start:
    """
    Checks the model that a trainer is given, and completes what goes with it.

    Args:
        given (`dict`): The arguments of TRL's `__init__`, changed in place.
        task_type (`str`): The trainer's, of PEFT.
        task_type_of (`Callable`): Returns the one of a new adapter, from its config and the training data.
    """
    check_one_adapter(given["model"], given.get("peft_config"))
    is_taken_up = isinstance(given["model"], str) and is_adapter(given["model"])
    if is_taken_up:
        given["model"], processing_class = take_up_adapter(
            given["model"], given["args"], task_type, given.get("quantization_config")
        )
        given["quantization_config"] = None
        given["processing_class"] = given.get("processing_class") or processing_class
    model, peft_config = given["model"], given.get("peft_config")
    check_trainable(model, given.get("quantization_config"), peft_config)
    check_savable(model)
    check_head(model, task_type)
    layers = []
    if isinstance(peft_config, PeftConfig):
        peft_config = given["peft_config"] = copy.deepcopy(peft_config)
        revision = revision_of(model, given.get("args"), peft_config)
        if peft_config.task_type != task_type:
            peft_config.task_type = task_type_of(peft_config, given.get("train_dataset"))
        peft_config.revision = revision
    if task_type == "SEQ_CLS" and (isinstance(peft_config, PeftConfig) or isinstance(model, PeftModel)):
        layers = prepare_new_layers(given, task_type)
    return Start(
        model=model,
        is_new=peft_config is not None,
        is_taken_up=is_taken_up,
        new_layers=layers,
        weights=trainable_weights(model),
        has_reference=has_reference(model),
    )


def prepare_new_layers(given: dict, task_type: str) -> list[str]:
    """Returns the layers of a classifier that are drawn anew, to be trained and saved whole and never quantized."""
    init_kwargs = given["args"].model_init_kwargs or {}
    layers = new_layers(given["model"], init_kwargs)
    check_not_quantized(given["model"], layers)
    peft_config = given.get("peft_config")
    if peft_config is not None and peft_config.task_type == task_type:
        save_whole(peft_config, layers)
    for holder in (given, init_kwargs):  # TRL takes it from either
        if holder.get("quantization_config") is not None:
            holder["quantization_config"] = unquantized(holder["quantization_config"], layers)
    return layers


def has_reference(model) -> bool:
    """Returns True if one of the adapters in `model` is the reference that the KL is taken to."""
    return isinstance(model, PeftModel) and REFERENCE in model.peft_config


def revision_of(model, args, peft_config: PeftConfig) -> str | None:
    """Returns the base's revision unless it is the main one. If the model is loaded, only `peft_config` can tell it."""
    given = peft_config.revision or MAIN
    init_kwargs = args.model_init_kwargs if isinstance(model, str) and args is not None else None
    loaded = (init_kwargs or {}).get("revision") or MAIN
    if isinstance(model, str) and given not in (MAIN, loaded):
        raise ValueError(
            f"`peft_config` says that its base is of revision {given!r}, and `model_init_kwargs` loads {loaded!r}. Set "
            "`revision` in `model_init_kwargs`, and leave it out of the `peft_config`."
        )
    revision = loaded if isinstance(model, str) else given
    return None if revision == MAIN else revision


def check_one_adapter(model, peft_config) -> None:
    """Refuses a `peft_config` for an adapter: the base alone, to which the new one would belong, has not learned."""
    is_path = isinstance(model, str) and is_adapter(model)
    if peft_config is not None and (is_path or has_transformers_adapter(model)):
        raise ValueError(
            f"`model` {model if is_path else type(model).__name__} is an adapter on its base, and `peft_config` makes "
            "another on the base alone, without what the first has learned. Leave out `peft_config` (in a recipe, "
            "`--use_peft`) and pass the adapter's folder or Hub id to train it further; or merge it into its base first "
            "(`merge_adapter`, `recipes/merge.py`), and pass what that writes."
        )


def check_trainable(model, quantization_config, peft_config) -> None:
    """Refuses quantized weights without an adapter: there would be nothing to train."""
    if peft_config is not None or isinstance(model, PeftModel) or has_transformers_adapter(model):
        return
    if is_quantized(model) if isinstance(model, nn.Module) else quantization_config is not None:
        raise ValueError(
            "The base model is quantized (4 or 8 bits), so its weights cannot be trained, and there is no adapter on "
            "it. Pass a `peft_config` such as `LoraConfig(target_modules='all-linear')`; in a recipe, `--use_peft`."
        )


def check_something_trains(model: nn.Module) -> None:
    """Refuses a model of which nothing trains but what a trainer put into it, a critic or tie parameters."""
    weights = [p for name, p in model.named_parameters() if not {*name.split(".")} & COMPANIONS]
    if not any(parameter.requires_grad for parameter in weights):
        raise ValueError(
            f"None of the {len(weights)} weights of `model` train (`requires_grad` is False for all), so it would stay as "
            "it is. `PeftModel.from_pretrained` freezes an adapter unless `is_trainable=True`; what `merge_and_unload()` "
            "returns is frozen until `model.requires_grad_(True)`; and `prepare_model_for_kbit_training` freezes what is "
            "there, for a `peft_config` (or `get_peft_model`) to come after it."
        )


def check_savable(model) -> None:
    """Refuses what would train and then could not be saved: transformers 5.24 wants a PEFT for it that is not out yet."""
    if not has_transformers_adapter(model):
        return
    try:
        model.active_adapters()  # asks for the version that saving does
    except ValueError as error:
        raise ValueError(
            f"transformers has loaded the adapter of `model` into its base, and cannot save it ({error}). Load it with "
            "PEFT, `AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True)`, which saves it itself."
        ) from error


def check_head(model, task_type: str) -> None:
    """Refuses an adapter on a language model's head, as the parent does, but before that makes a reference of it."""
    if task_type == "CAUSAL_LM" and isinstance(model, PeftModel):
        if isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "Applying a PEFT adapter to `lm_head` is not supported, and `model` has one there: log-probabilities are "
                "computed from the head's own weight, so it would never be trained. Leave `lm_head` out of "
                "`target_modules`, and with an adapter on tied embeddings `ensure_weight_tying=True`, which puts it on "
                "the head, too; or set `modules_to_save` to these."
            )


def check_not_quantized(model, layers: list[str]) -> None:
    """Refuses layers without loaded weights that bitsandbytes was to quantize: it has not, and they fail when they run."""
    if not isinstance(model, nn.Module):
        return
    modules = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_modules())
    for path in layers:
        if any(type(module).__module__.startswith("bitsandbytes") for module in modules[path].modules()):
            raise ValueError(
                f"The layers {layers} of `model` are new, and were to be quantized, which cannot be done with layers that "
                f"are trained. Load it with `llm_int8_skip_modules={layers}` in the `BitsAndBytesConfig`, or pass its "
                "folder or Hub id and the `quantization_config` to the trainer."
            )


def check_biases(model: nn.Module) -> None:
    """Refuses trained biases of quantized layers, which bitsandbytes casts to the precision that it computes in."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("base_layer.bias"):
            raise ValueError(
                f"{name} is trained, but its layer is quantized, and bitsandbytes casts such biases to the dtype that "
                "it computes in. Set `bias='none'` in the `LoraConfig`."
            )
