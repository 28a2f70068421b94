"""
Settings by which a generation engine samples from another distribution than the one that is trained.

A policy is scored by log softmax(logits / temperature). An engine that cuts or bends this distribution, for a nucleus
or by a penalty on what was said before, samples from another one, and an estimate of the policy's gradient from such
samples is off-policy by a ratio that nobody computes.
"""

import warnings
from typing import Any


# By option of `generate` or of vLLM, the value that changes nothing; None and what is empty never do
UNALTERED = {
    "do_sample": True,
    "num_beams": 1,
    "top_k": 0,
    "top_p": 1.0,
    "top_h": None,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_tokens": 0,
    "bad_words_ids": None,
    "bad_words": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "structured_outputs": None,
    "logits_processors": None,
    "watermarking_config": None,
    "dola_layers": None,
}


def altered(settings: dict[str, Any], temperature: float) -> dict[str, Any]:
    """
    Picks the options that make an engine sample from another distribution than softmax(logits / `temperature`).

    Args:
        settings (`dict`): The engine's options by name. What is missing is taken for a value that changes nothing.
        temperature (`float`): The one in the log-probabilities that are trained.

    Returns:
        `dict`: The options with their values.
    """
    found = {}
    for name, neutral in UNALTERED.items():
        value = settings.get(name)
        is_off = value is None or value == neutral or (name == "top_k" and value == -1)
        if not is_off and value not in ([], {}, ()):
            found[name] = value
    if settings.get("temperature") not in (None, temperature):
        found["temperature"] = settings["temperature"]
    return found


def warn_of_altered(
    settings: dict[str, Any], temperature: float, given: dict[str, Any], use_vllm: bool, is_corrected: bool
) -> None:
    """
    Warns of an engine that samples from another distribution than the one that is trained.

    Args:
        settings (`dict`): The engine's options by name.
        temperature (`float`): The one in the log-probabilities that are trained.
        given (`dict`): What the user has set of them, where the model's generation config has the others.
        use_vllm (`bool`): vLLM samples, which asks no generation config.
        is_corrected (`bool`): True where the engine's log-probabilities of what it sampled are corrected for.
    """
    options = altered(settings, temperature)
    if options:
        inherited = {name for name in options if not use_vllm and given.get(name) is None}
        warnings.warn(warning_of(options, temperature, inherited, is_corrected), stacklevel=5)


def warning_of(options: dict[str, Any], temperature: float, inherited: set[str], is_corrected: bool) -> str:
    """
    Says what [`altered`] options do to training, and the mend.

    Args:
        options (`dict`): From [`altered`].
        temperature (`float`): The one in the log-probabilities that are trained.
        inherited (`set[str]`): Names of those that nobody set, and that the model's generation config has.
        is_corrected (`bool`): True where the engine's log-probabilities of what it sampled are corrected for.
    """
    said = [
        f"{name}={value!r}" + " (of the model's generation config)" * (name in inherited)
        for name, value in options.items()
    ]
    neutral = {name: temperature if name == "temperature" else UNALTERED[name] for name in options}
    mends = [
        f"`trainer.model.generation_config.{name} = None`" if name in inherited else f"`{name}={value!r}`"
        for name, value in neutral.items()
    ]
    cost = (
        "the policy learns nothing of tokens that can never be sampled, though what is sampled is corrected for"
        if is_corrected
        else "every update is off-policy, though the first ratio is 1, and KL and entropy are not those of what is sampled"
    )
    return (
        f"Completions are sampled with {', '.join(said)}, and the log-probabilities that are trained, those of "
        f"softmax(logits / {temperature:g}), know nothing of it: {cost}. To train on what is sampled, set "
        f"{', '.join(mends)}. `NLPOTrainer` has a nucleus (`top_p_mask`) that is in its log-probabilities."
    )


def shortened(text: str, length: int = 60) -> str:
    """Returns the beginning of a text that is longer than `length`, as a list of tokens may be."""
    return text if len(text) <= length else f"{text[:length]}..."
