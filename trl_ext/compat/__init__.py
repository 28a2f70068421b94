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
`_save_rng_state`, `_load_rng_state`, `_clip_grad_norm` and `_get_grad_norm` (which ask what they are given for its
`parameters()` alone), and of its pushing `init_hf_repo`, `push_to_hub`, `_push_from_checkpoint`,
`_finish_current_push` (the last step of `push_to_hub` before it uploads), `hub_model_id` (None until there is a repository, and in processes that do not push) and `push_in_progress.jobs` (of the
model, then the checkpoint).

of adapters: `add_adapter("ref", ...)` of the one called `default`, and `lm_head.bias`, in `__init__` and the fused forward.
"""

import inspect

from torch import nn
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

from .bitsandbytes import keep_4bit_unpacked, stop_repacking
from .swaps import (
    PARALLEL_WALKS,
    REFERENCE,
    adapter_kept,
    first_scoring_by,
    generating_by,
    parallel_walks_within,
    requires_grad_kept,
    rewarded_by,
    scoring_answered,
    trainables_kept,
    with_reference,
    without_kl_in_loss,
    without_loading_report,
    without_loading_warnings,
    without_masking_cut,
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
    Returns the name by which a model's forward takes, and its output gives, the states of the tokens read so far; None
    where there is none.

    `past_key_values` and, of state-space models, `cache_params` became `cache` in transformers 5.24; models whose code
    comes from the Hub keep the older names.
    """
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), None)


def attention_of(config) -> str:
    """Returns the implementation of attention that a model of this config runs."""
    return config._attn_implementation


def has_states(model) -> bool:
    """Returns True if some layers are no attention but carry a state; transformers calls such a model stateful."""
    return model._is_stateful


def has_states_alone(model) -> bool:
    """Returns True if no layer is attention, so that no token attends to others and none needs a position."""
    return has_states(model) and "position_ids" not in inspect.signature(model.forward).parameters


def paying_environments(trainer) -> list[type]:
    """
    Returns the classes of environments whose `get_reward` a trainer of TRL has appended to its `reward_funcs`, in
    order.
    """
    if trainer.environment_factories is None:
        return []
    classes = dict.fromkeys(type(pool[0]) for pool in trainer._environment_pool.values())
    return [cls for cls in classes if inspect.isfunction(getattr(cls, "get_reward", None))]


__all__ = [
    "MULTIMODAL_KEYS",
    "PARALLEL_WALKS",
    "REFERENCE",
    "adapter_kept",
    "attention_of",
    "cache_argument",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "enable_checkpointing",
    "FusedCausalLMOutput",
    "generating_by",
    "get_comet_experiment_url",
    "get_config_model_id",
    "get_trackio_space_url",
    "global_then_local_main_first",
    "has_states",
    "has_states_alone",
    "has_transformers_adapter",
    "is_async_callable",
    "keep_4bit_unpacked",
    "OneGeneration",
    "pad",
    "parallel_walks_within",
    "paying_environments",
    "requires_grad_kept",
    "rewarded_by",
    "first_scoring_by",
    "scoring_answered",
    "stop_repacking",
    "strip_images_from_messages",
    "take_newer_names",
    "tokenize",
    "trainables_kept",
    "use_adapter",
    "with_reference",
    "without_kl_in_loss",
    "without_loading_report",
    "without_loading_warnings",
    "without_masking_cut",
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
