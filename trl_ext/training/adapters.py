"""
Adapters in a trainer: of the right task type, in full precision, on a base that stays as it is, and never without the
head that goes with them.
"""

import copy
import inspect
from contextlib import nullcontext

from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from ..adapters.heads import save_heads
from ..adapters.new_layers import new_layers, save_whole, unquantized
from ..adapters.precision import keep_trainables_in_fp32, trainable_weights
from ..adapters.shared_base import MAIN, is_adapter
from ..adapters.start import (
    REFERENCE,
    adapter_kept,
    copy_to_reference,
    requires_grad_kept,
    say_that_head_has_no_bias,
    take_up_adapter,
    without_loading_warnings,
)
from ..compat import has_transformers_adapter, keep_4bit_unpacked, take_newer_names
from ..critic.critic import CRITIC_NAME
from ..models.quantization import is_quantized
from ..models.tie_parameters import TIE_PARAMETERS_NAME


logger = get_logger(__name__)

CHILDREN = {CRITIC_NAME, TIE_PARAMETERS_NAME}  # of a model, which are not of it


class AdapterMixin:
    """
    Comes right before the TRL trainer in a trainer's bases. What it changes for models with adapters:

    - the adapter's task type is that of the model, whatever the `peft_config` says, and it is saved with the revision
      of its base, which whoever loads it needs;
    - an adapter whose folder or Hub id is given as `model` is trained further, and its reference is a copy of its start
      whatever it is called;
    - what trains is what the user left to train, and there has to be something;
    - under a base in 4 or 8 bits, what trains is kept in float32;
    - of a base in 4 bits on CPU, weights are never repacked, which would make gradients wrong;
    - the head of a classifier, and whatever else of it was drawn anew when it was loaded, is trained with the adapter,
      and saved with it even if it is not trained.
    """

    _task_type: str  # of PEFT

    def __init__(self, model, *args, **kwargs):
        trl_class = next(base for base in type(self).__mro__ if base.__module__.startswith("trl."))
        try:
            arguments = inspect.signature(trl_class.__init__).bind(self, model, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__() {error}") from None
        given = arguments.arguments
        peft_config = given.get("peft_config")
        check_one_adapter(model, peft_config)
        loading = nullcontext()
        if isinstance(model, str) and is_adapter(model):
            taken_up = take_up_adapter(model, given["args"], self._task_type, given.get("quantization_config"))
            model, processing_class = taken_up
            given["model"], given["quantization_config"] = model, None
            given["processing_class"] = given.get("processing_class") or processing_class
            loading = without_loading_warnings(trl_class)
        check_trainable(model, given.get("quantization_config"), peft_config)
        check_savable(model)
        check_head(model, self._task_type)
        if isinstance(peft_config, PeftConfig):
            own = given["peft_config"] = copy.deepcopy(peft_config)
            if peft_config.task_type != self._task_type:
                own.task_type = self._task_type_of(peft_config, given.get("train_dataset"))
            own.revision = revision_of(model, given.get("args"), peft_config)
        self._new_layers = []
        if self._task_type == "SEQ_CLS" and (isinstance(peft_config, PeftConfig) or isinstance(model, PeftModel)):
            init_kwargs = given["args"].model_init_kwargs or {}
            self._new_layers = new_layers(model, init_kwargs)
            check_not_quantized(model, self._new_layers)
            if peft_config is not None and own.task_type == self._task_type:
                save_whole(own, self._new_layers)
            for holder in (given, init_kwargs):  # TRL takes it from either
                if holder.get("quantization_config") is not None:
                    holder["quantization_config"] = unquantized(holder["quantization_config"], self._new_layers)
        before = trainable_weights(model)
        has_reference = isinstance(model, PeftModel) and REFERENCE in model.peft_config
        try:
            with loading, adapter_kept(model):
                super().__init__(*arguments.args[1:], **arguments.kwargs)
        except RuntimeError as error:
            if "floating point" in str(error) and peft_config is not None and peft_config.modules_to_save:
                raise ValueError(
                    f"A module of `modules_to_save={peft_config.modules_to_save}` is quantized, and cannot be trained. "
                    "Remove it from there (`target_modules` can have it), or load the model with it in "
                    "`llm_int8_skip_modules` of the `BitsAndBytesConfig`."
                ) from error
            raise
        take_newer_names(self.args)  # TRL sets them by the older ones, under ZeRO-3
        say_that_head_has_no_bias(self.model)
        if is_quantized(self.model):
            check_biases(self.model)
            keep_trainables_in_fp32(self.model, before, is_new=peft_config is not None)
            keep_4bit_unpacked(self.model)
        if isinstance(model, PeftModel) and REFERENCE in model.peft_config and not has_reference:
            copy_to_reference(model)

    def train(self, *args, **kwargs):
        check_something_trains(self.model)
        return super().train(*args, **kwargs)

    # In both the parent may switch to the reference's adapter and back

    def _prepare_inputs(self, inputs):
        with requires_grad_kept(self.accelerator.unwrap_model(self.model)):
            return super()._prepare_inputs(inputs)

    def compute_loss(self, *args, **kwargs):
        with requires_grad_kept(self.accelerator.unwrap_model(self.model)):
            return super().compute_loss(*args, **kwargs)

    def _task_type_of(self, peft_config, train_dataset) -> str | None:
        return self._task_type

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save and isinstance(self.model, PeftModel):
            save_heads(self.model, output_dir or self.args.output_dir, {*SEQ_CLS_HEAD_NAMES, *self._new_layers})


def revision_of(model, args, peft_config: PeftConfig) -> str | None:
    """The base's, if that is not the main one. Of a model that was loaded before only `peft_config` can tell."""
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
    """Refuse a `peft_config` for what is an adapter already: its base alone, to which the new one belongs, has not learned."""
    is_path = isinstance(model, str) and is_adapter(model)
    if peft_config is not None and (is_path or has_transformers_adapter(model)):
        raise ValueError(
            f"`model` {model if is_path else type(model).__name__} is an adapter on its base, and `peft_config` makes "
            "another on the base alone, without what the first has learned. Leave out `peft_config` (in a recipe, "
            "`--use_peft`) and pass the adapter's folder or Hub id to train it further; or merge it into its base first "
            "(`merge_adapter`, `recipes/merge.py`), and pass what that writes."
        )


def check_trainable(model, quantization_config, peft_config) -> None:
    """Refuse quantized weights without an adapter: there would be nothing to train."""
    if peft_config is not None or isinstance(model, PeftModel) or has_transformers_adapter(model):
        return
    if is_quantized(model) if isinstance(model, nn.Module) else quantization_config is not None:
        raise ValueError(
            "The base model is quantized (4 or 8 bits), so its weights cannot be trained, and there is no adapter on "
            "it. Pass a `peft_config` such as `LoraConfig(target_modules='all-linear')`; in a recipe, `--use_peft`."
        )


def check_something_trains(model: nn.Module) -> None:
    """Refuse a model of which nothing trains but what a trainer put into it, a critic or tie parameters."""
    own = [(name, p) for name, p in model.named_parameters() if not {*name.split(".")} & CHILDREN]
    if not any(parameter.requires_grad for _, parameter in own):
        raise ValueError(
            f"None of the {len(own)} weights of `model` train (`requires_grad` is False for all), so it would stay as it "
            "is. `PeftModel.from_pretrained` freezes an adapter unless `is_trainable=True`; what `merge_and_unload()` "
            "returns is frozen until `model.requires_grad_(True)`; and `prepare_model_for_kbit_training` freezes what is "
            "there, for a `peft_config` (or `get_peft_model`) to come after it."
        )


def check_savable(model) -> None:
    """Refuse what would train and then could not be saved: transformers 5.24 wants a PEFT for it that is not out yet."""
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
    """Refuse an adapter on a language model's head, as the parent does, but before that makes a reference of it."""
    if task_type == "CAUSAL_LM" and isinstance(model, PeftModel):
        if isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "Applying a PEFT adapter to `lm_head` is not supported, and `model` has one there: log-probabilities are "
                "computed from the head's own weight, so it would never be trained. Leave `lm_head` out of "
                "`target_modules`, and with an adapter on tied embeddings `ensure_weight_tying=True`, which puts it on "
                "the head, too; or set `modules_to_save` to these."
            )


def check_not_quantized(model, layers: list[str]) -> None:
    """Refuse layers without loaded weights that bitsandbytes was to quantize: it has not, and they fail when they run."""
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
    """Refuse trained biases of quantized layers, which bitsandbytes casts to the precision that it computes in."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("base_layer.bias"):
            raise ValueError(
                f"{name} is trained, but its layer is quantized, and bitsandbytes casts such biases to the dtype that "
                "it computes in. Set `bias='none'` in the `LoraConfig`."
            )


# --- Heads ---


# --- Merging for a while ---
