"""
Sampling that runs a prompt once for all its completions, and runs no completion that has ended.

`generate` reads a prompt as often as it is completed, and steps every row until the last one ends. [`decode`] gives the
same tokens, if greedy, or the same distribution, if not, for the options that reinforcement learning uses;
[`why_not_decode`] gives the reason where it cannot.
"""

import inspect
from collections.abc import Iterable

import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..compat import cache_argument, has_states
from .lm_head import base_causal_lm


# As they were on import: a method that somebody puts in their place does something else than [`decode`]
GENERATE = GenerationMixin.generate
PREPARE_INPUTS = GenerationMixin.prepare_inputs_for_generation

# Transformers takes these where neither the call nor the model's own configuration says anything
DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
HANDLED = {*DEFAULTS, "max_new_tokens", "min_p", "eos_token_id", "pad_token_id"}
# These change nothing at any value, and those of NEUTRAL at the one given
IRRELEVANT = {
    "max_length",  # where `max_new_tokens` is given
    "bos_token_id",
    "transformers_version",
    "_from_model_config",
    "disable_compile",
    "early_stopping",
    "length_penalty",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
}
NEUTRAL = {
    "use_cache": True,
    "cache_implementation": "hybrid",  # of Gemma's models on the Hub, which `generate` has come to ignore
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "renormalize_logits": False,
    "remove_invalid_values": False,
}
NEEDED = {"input_ids", "attention_mask", "position_ids", "logits_to_keep"}


def settings_of(model: PreTrainedModel | PeftModel, generation_config: GenerationConfig) -> dict:
    """Returns the options of a call of `generate`: those of the model, unless the call says something else."""
    configs = (base_causal_lm(model).generation_config, generation_config)
    return {name: value for config in configs for name, value in config.to_dict().items() if value is not None}


def why_not_decode(model: PreTrainedModel | PeftModel, settings: dict, model_inputs: dict) -> str | None:
    """
    Names the reason why [`decode`] would not do the same as `generate`; None if it does.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy.
        settings (`dict`): From [`settings_of`].
        model_inputs (`dict`): The arguments of `generate` beside the configuration.
    """
    base = base_causal_lm(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "a prompt-tuned policy puts virtual tokens before the prompt"
    if has_states(base):
        return f"layers of {type(base).__name__} carry a state, from which no rows can be picked"
    for name, usual in {"generate": GENERATE, "prepare_inputs_for_generation": PREPARE_INPUTS}.items():
        if getattr(type(base), name) is not usual:
            return f"{type(base).__name__} has a method `{name}` of its own"
    missing = {"max_new_tokens", "eos_token_id", "pad_token_id"} - set(settings)
    if missing:
        return f"the generation config has no {named(missing)}"
    others = set(settings) - HANDLED - IRRELEVANT
    unknown = [f"{name}={settings[name]!r}" for name in sorted(others) if NEUTRAL.get(name) != settings[name]]
    if unknown:
        return f"the generation config has {named(unknown)}, which is left to `generate`"
    if set(model_inputs) != {"input_ids", "attention_mask"}:
        return f"`generate` is given {named(set(model_inputs) - {'input_ids', 'attention_mask'})} as well"
    cache_name = cache_argument(base)
    untaken = NEEDED - set(inspect.signature(base.forward).parameters)
    if untaken or cache_name is None:
        return f"the forward of {type(base).__name__} takes no {named(untaken or {'cache'})}"
    layers = {type(layer) for layer in DynamicCache(config=base.config.get_text_config()).layers}
    layers -= {DynamicLayer, DynamicSlidingWindowLayer}
    if layers:
        return f"rows cannot be picked from a cache with {named({layer.__name__ for layer in layers})}"
    return None


def named(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def logits_processors(settings: dict) -> LogitsProcessorList:
    """Makes the processors of logits that the options ask for, in the order of `generate`."""
    options = DEFAULTS | settings
    processors = LogitsProcessorList()
    if options["repetition_penalty"] != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options["do_sample"]:
        if options["temperature"] != 1.0:
            processors.append(TemperatureLogitsWarper(options["temperature"]))
        if options["top_k"] != 0:
            processors.append(TopKLogitsWarper(options["top_k"]))
        if options["top_p"] < 1.0:
            processors.append(TopPLogitsWarper(options["top_p"]))
        if "min_p" in options:
            processors.append(MinPLogitsWarper(options["min_p"]))
    return processors


@torch.no_grad()
def decode(
    model: PreTrainedModel | PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: dict
) -> torch.Tensor:
    """
    Completes prompts.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy.
        input_ids, attention_mask (`torch.Tensor` of shape `(B, P)`): Prompts, padded on the left. Equal rows that
            follow each other are read once.
        settings (`dict`): From [`settings_of`].

    Returns:
        `torch.Tensor` of shape `(B, P + T)`: Prompts and completions, which are padded after their end.
    """
    processors, do_sample = logits_processors(settings), settings.get("do_sample", False)
    ends = torch.as_tensor(settings["eos_token_id"], device=input_ids.device).reshape(-1)
    distinct, rows = torch.stack([input_ids, attention_mask]).unique_consecutive(dim=1, return_inverse=True)
    sequences, mask = input_ids, attention_mask
    cache = DynamicCache(config=base_causal_lm(model).config.get_text_config())
    logits = next_logits(model, distinct[0], distinct[1], cache, distinct.size(2))
    if distinct.size(1) < len(input_ids):
        cache.batch_select_indices(rows)
        logits = logits[rows]

    alive = torch.arange(len(input_ids), device=input_ids.device)  # the rows of what is returned that go on
    completions = torch.full_like(input_ids[:, :1], settings["pad_token_id"]).repeat(1, settings["max_new_tokens"])
    for t in range(settings["max_new_tokens"]):
        logits = processors(sequences, logits.float())
        if do_sample:
            tokens = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        else:
            tokens = logits.argmax(dim=-1, keepdim=True)
        completions[alive, t] = tokens.squeeze(1)
        going_on = ~torch.isin(tokens.squeeze(1), ends)
        sequences = torch.cat([sequences, tokens], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        if not going_on.all():
            kept = going_on.nonzero().squeeze(1)
            if len(kept) == 0:
                break
            alive, sequences, mask = alive[kept], sequences[kept], mask[kept]
            cache.batch_select_indices(kept)
        if t + 1 < settings["max_new_tokens"]:
            logits = next_logits(model, sequences, mask, cache, 1)
    return torch.cat([input_ids, completions[:, : t + 1]], dim=1)


def next_logits(model, sequences, mask, cache: DynamicCache, num_new: int) -> torch.Tensor:
    """Reads the last `num_new` tokens of each row, and returns the logits `(B, V)` of the next."""
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 0)[:, -num_new:]
    base = base_causal_lm(model)
    kwargs = {cache_argument(base): cache}
    if getattr(base.config.get_text_config(), "output_router_logits", False):  # absent where there are no experts
        kwargs["output_router_logits"] = False  # their balance is weighed by the mask of all tokens, not the new ones'
    outputs = model(
        input_ids=sequences[:, -num_new:],
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **kwargs,
    )
    return outputs.logits[:, -1]
