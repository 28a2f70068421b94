"""
The only module that imports or names what TRL and transformers keep private. `tests/contract/test_compat.py` checks each entry,
so that a release which moves one fails there, by name.

Hooks of `GRPOTrainer` that are overridden elsewhere in the package, each calling `super()`:

| hook | relied on for |
| --- | --- |
| `_tokenize_prompts(prompts)` | returns the prompts' token ids first |
| `_generate(prompts)` | sends the model's weights to the generation engine nowhere else |
| `_generate_single_turn(...)` | returns the completions' token ids first |
| `_calculate_rewards(...)` | returns `(N, n_funcs)` gathered over processes, NaN for None |
| `_generate_and_score_completions(inputs)` | returns the batch as a dict |
| `_get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, ...)` | log-probs come first |
| `_compute_loss(model, inputs)` | reads `inputs["advantages"]`, `(B, T)` allowed, after the forward pass |
| `_step`, `_buffered_inputs` | the position within, and the content of, the rollout buffer |
| `_metrics`, `_logs` | metrics per mode; the completions table |
| `_environment_pool` | a list of environments for each factory; the first is there from the start |

of `RewardTrainer` and `DPOTrainer`:

| hook | relied on for |
| --- | --- |
| `_prepare_dataset(dataset, processing_class, args, dataset_name)` | tokenizes; called again by `evaluate` |
| `_set_signature_columns_if_needed` | fills `_signature_columns`, a list |
| `compute_loss(model, inputs, return_outputs, num_items_in_batch)` | is the only place that knows of pairs |
| `data_collator` | not used before `__init__` has returned |
| `_metrics`, `_total_train_tokens`, `_tp_size` | metrics per mode; the count of tokens |
| `beta`, `ref_model`, `aux_loss_enabled`, `router_aux_loss_coef` of `DPOTrainer` | what its loss is made of |

of all of them, for their model cards: `create_model_card`, `_template_file`, `_name`, `_paper`, `_tag_names`;

and of `transformers.Trainer`: `_save_checkpoint`, `_save`, `_load_from_checkpoint`, `_load_best_model`,
`_save_rng_state`, `_load_rng_state`, and of its pushing `init_hf_repo`, `push_to_hub`, `_push_from_checkpoint`,
`_finish_current_push` (the last step of `push_to_hub` before it uploads), `hub_model_id` (None until there is a repository, and in processes that do not push) and `push_in_progress.jobs` (of the
model, then the checkpoint).

of adapters: `add_adapter("ref", ...)` of the one called `default`, and `lm_head.bias`, in `__init__` and the fused forward.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from logging import LogRecord, getLogger

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.utils import is_bitsandbytes_available, logging
from trl import BEMACallback, SyncRefModelCallback
from trl.data_utils import _tokenize as tokenize
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (
    FusedCausalLMOutput,
    create_model_from_path,
    get_comet_experiment_url,
    get_config_model_id,
    get_trackio_space_url,
    global_then_local_main_first,
    is_async_callable,
    pad,
    strip_images_from_messages,
    use_adapter,
)


def has_transformers_adapter(model) -> bool:
    """Returns True if transformers put an adapter into the model (`model.add_adapter`), without PEFT's wrapper."""
    return getattr(model, "_hf_peft_config_loaded", False)


def enable_checkpointing(model: nn.Module, args) -> None:
    """Lets `model`, or the model under an adapter, recompute activations in the backward pass as `args` say."""
    model.activation_checkpointing_enable(args.gradient_checkpointing_kwargs)
    model.enable_input_require_grads()


def take_newer_names(args) -> None:
    """Gives arguments of TRL their newer names, in place of those that transformers 5.23 deprecates, even as defaults."""
    for name in ("checkpointing", "checkpointing_kwargs"):
        if getattr(args, f"activation_{name}") is None:
            setattr(args, f"activation_{name}", getattr(args, f"gradient_{name}"))


def cache_argument(model) -> str | None:
    """
    The name by which a model's forward takes, and its output gives, the states of the tokens read so far; None where
    there is none.

    `past_key_values` and, of state-space models, `cache_params` became `cache` in transformers 5.24; models whose code
    comes from the Hub keep the older names.
    """
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), None)


def attention_of(config) -> str:
    """The implementation of attention that a model of this config runs."""
    return config._attn_implementation


def has_states(model) -> bool:
    """Returns True if some layers are no attention but carry a state; transformers calls such a model stateful."""
    return model._is_stateful


def has_states_alone(model) -> bool:
    """Returns True if no layer is attention, so that no token attends to others and none needs a position."""
    return has_states(model) and "position_ids" not in inspect.signature(model.forward).parameters


def paying_environments(trainer) -> list[type]:
    """The classes of environments whose `get_reward` a trainer of TRL has appended to its `reward_funcs`, in order."""
    if trainer.environment_factories is None:
        return []
    classes = dict.fromkeys(type(pool[0]) for pool in trainer._environment_pool.values())
    return [cls for cls in classes if inspect.isfunction(getattr(cls, "get_reward", None))]


__all__ = [
    "MULTIMODAL_KEYS",
    "FusedCausalLMOutput",
    "OneGeneration",
    "REFERENCE",
    "adapter_kept",
    "attention_of",
    "create_model_from_path",
    "cache_argument",
    "disable_gradient_checkpointing",
    "enable_checkpointing",
    "get_comet_experiment_url",
    "get_config_model_id",
    "get_trackio_space_url",
    "global_then_local_main_first",
    "has_states",
    "has_states_alone",
    "has_transformers_adapter",
    "is_async_callable",
    "keep_4bit_unpacked",
    "pad",
    "parallel_walks_within",
    "paying_environments",
    "requires_grad_kept",
    "stop_repacking",
    "strip_images_from_messages",
    "take_newer_names",
    "tokenize",
    "use_adapter",
    "without_loading_report",
    "without_loading_warnings",
    "scoring_answered",
]


# What a rollout batch may hold beside token ids, and `_get_per_token_logps_and_entropies` takes by the same name.
MULTIMODAL_KEYS = [
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
]


class OneGeneration(int):
    """
    A 1 that answers no to `< 2`, while `GRPOConfig.__post_init__` looks at it: a group of one has no group advantage,
    but with a critic none is needed. Unlike passing 2, this keeps the divisibility checks those of one completion.
    """

    def __new__(cls):
        return super().__new__(cls, 1)

    def __lt__(self, other):
        return False


# --- Swaps: something of TRL's or transformers' that is set for a while, and set back ---


@contextmanager
def _swapped(owner, name: str, value) -> Iterator[None]:
    """Within the context the attribute `name` of the object itself is `value`."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            vars(owner).pop(name, None)


@contextmanager
def scoring_answered(trainer, answer: Callable) -> Iterator[None]:
    """
    Within the context the first scoring pass that TRL's trainer makes is answered by `answer`, which is given the
    arguments of `_get_per_token_logps_and_entropies` and returns what that returns. Other passes are made.

    Raises:
        RuntimeError: if TRL made no pass.
    """
    former, is_asked = trainer._get_per_token_logps_and_entropies, False

    def score(*args, **kwargs):
        nonlocal is_asked
        if is_asked:
            return former(*args, **kwargs)
        is_asked = True
        return answer(*args, **kwargs)

    with _swapped(trainer, "_get_per_token_logps_and_entropies", score):
        yield
    if not is_asked:
        raise RuntimeError("TRL made no scoring pass where one was to be answered: its trainer has changed.")


def generating_by(model, generate: Callable):
    """Within the context `model.generate` is `generate`, which is given the former one and the arguments."""
    former = model.generate
    return _swapped(model, "generate", functools.wraps(former)(functools.partial(generate, former)))


def rewarded_by(trainer, reward_funcs: list):
    """Within the context TRL's trainer asks these functions in place of its own, one for each."""
    return _swapped(trainer, "reward_funcs", reward_funcs)


def without_kl_in_loss(trainer):
    """Within the context TRL's loss has no KL term."""
    return _swapped(trainer, "beta", 0.0)


def without_masking_cut(trainer):
    """Within the context TRL leaves completions that were cut as they are."""
    return _swapped(trainer, "mask_truncated_completions", False)


def with_reference(args):
    """Within the context TRL's trainer, when it is made, prepares a reference if the KL is used anywhere."""
    return _swapped(args, "beta", args.beta or args.kl_in_reward)


# --- 4 bits on CPU ---


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
    """Does as [`stop_repacking`] for the layers of a model that was loaded before it, and unpacks those that are packed."""
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


REFERENCE = "ref"  # TRL's name for the copy of an adapter that the KL is taken to


# --- Swaps: state of TRL's that is another for a while ---

# TRL's callbacks that walk the model's parameters in parallel with those of another, plain model, and when they do
PARALLEL_WALKS = {BEMACallback: "on_train_begin", SyncRefModelCallback: "on_step_end"}


@contextmanager
def parallel_walks_within(
    callbacks: list[TrainerCallback], context: Callable[[nn.Module], AbstractContextManager]
) -> Iterator[None]:
    """
    Has the callbacks of `sync_ref_model` and of averaging, the trainer's own and a user's, walk the model's parameters
    within `context(model)`, which leaves those that the reference and the average have.
    """

    def within(event: Callable) -> Callable:
        def call(args, state, control, model=None, **kwargs):
            with context(model):
                return event(args, state, control, model=model, **kwargs)

        return call

    walking = [(c, event) for c in callbacks for kind, event in PARALLEL_WALKS.items() if isinstance(c, kind)]
    for callback, event in walking:
        setattr(callback, event, within(getattr(callback, event)))
    try:
        yield
    finally:
        for callback, event in walking:
            delattr(callback, event)


@contextmanager
def adapter_kept(model) -> Iterator[None]:
    """
    Keeps the adapters of a `PeftModel` as they were given while TRL makes a trainer of it: the same weights train, and
    the reference, if TRL adds one, is of the active adapter's kind, where TRL takes that of the one called `default`.
    Nothing happens to other models.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    configs, name = model.peft_config, model.active_adapter
    had_default, had_reference = "default" in configs, REFERENCE in configs
    with requires_grad_kept(model):
        try:
            configs.setdefault("default", configs[name])
            yield
        finally:
            if not had_default:
                del configs["default"]
        if name != "default" and had_default and REFERENCE in configs and not had_reference:
            model.delete_adapter(REFERENCE)
            model.add_adapter(REFERENCE, configs[name])


@contextmanager
def without_loading_warnings(trl_class: type) -> Iterator[None]:
    """Keeps TRL from saying that it ignores `model_init_kwargs`, which the model was loaded with."""

    def is_other(record: LogRecord) -> bool:
        return "your model is already instantiated" not in record.getMessage()

    logger = getLogger(trl_class.__module__)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@contextmanager
def requires_grad_kept(model: nn.Module) -> Iterator[None]:
    """
    Has the weights train afterwards that did before. PEFT's ways to add an adapter, and to switch to another and back,
    leave all of the active one's to train, those that were frozen with them, or none.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Keeps transformers from reporting, and showing the progress of, a load that is none."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
