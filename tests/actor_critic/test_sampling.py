"""A warning says which options make the engine sample from something else than what is trained, and only these."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import PROMPTS, build_policy, settings

from trl_ext import CompletionSampler, NLPOConfig, NLPOTrainer, PPOConfig, PPOTrainer, ReinforceConfig
from trl_ext.actor_critic.sampling import altered


def constant(completions, **kwargs):
    return [0.0] * len(completions)


def make(policy, tokenizer, prompts, tmp_path, classes=(PPOTrainer, PPOConfig), **overrides):
    """The trainer, and what it warns of sampling at its start."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = classes[1](**settings(tmp_path, **overrides))
        trainer = classes[0](policy, constant, args, prompts, processing_class=tokenizer)
    return trainer, [str(w.message) for w in caught if "Completions are sampled with" in str(w.message)]


def sample(trainer):
    torch.manual_seed(0)
    return trainer._generate(PROMPTS)[1]


# Each strong enough to show in what is sampled, if it is in use
OPTIONS = {
    "do_sample": False,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.05,
    "epsilon_cutoff": 0.2,
    "eta_cutoff": 0.5,
    "repetition_penalty": 10.0,
    "no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 10.0,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[6], [8]],
    "suppress_tokens": [*range(5, 27)],
    "begin_suppress_tokens": [5, 6, 7, 8, 9, 10, 11, 12],
    "sequence_bias": [[[6], 9.0]],
    "forced_eos_token_id": 1,
    "min_new_tokens": 6,
    "exponential_decay_length_penalty": [1, 9.0],
}


@pytest.fixture(scope="module")
def plain(tokenizer, prompts, tmp_path_factory):
    trainer, said = make(build_policy(tokenizer), tokenizer, prompts, tmp_path_factory.mktemp("plain"))
    assert said == []
    return sample(trainer)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_alters_samples_is_said_and_nothing_else(tokenizer, prompts, tmp_path, plain, name):
    """Options are asked for, or left in the model's generation config, where some are in use and others are not."""
    asked_for, said = make(
        build_policy(tokenizer), tokenizer, prompts, tmp_path, generation_kwargs={name: OPTIONS[name]}
    )
    assert sample(asked_for) != plain
    assert len(said) == 1 and f"sampled with {name}=" in said[0] and "of the model's" not in said[0]
    assert len(said[0]) < 700
    policy = build_policy(tokenizer)
    setattr(policy.generation_config, name, OPTIONS[name])
    inherited, said = make(policy, tokenizer, prompts, tmp_path)
    is_used = sample(inherited) != plain
    assert is_used == (name not in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"))
    assert len(said) == is_used
    if is_used:
        assert f"sampled with {name}=" in said[0] and f"`trainer.model.generation_config.{name} = None`" in said[0]


def test_fields_of_the_config(policy, tokenizer, prompts, tmp_path):
    fields = {"top_p": 0.9, "top_k": 10, "min_p": 0.05, "repetition_penalty": 1.1}
    for classes in ((PPOTrainer, PPOConfig), (NLPOTrainer, NLPOConfig)):
        (said,) = make(policy, tokenizer, prompts, tmp_path, classes, **fields)[1]
        assert all(f"{name}={value}" in said for name, value in fields.items())
        assert all(f"`{mend}`" in said for mend in ("top_p=1.0", "top_k=0", "min_p=0.0", "repetition_penalty=1.0"))
    # Of which the log-probabilities know
    assert make(policy, tokenizer, prompts, tmp_path, temperature=0.5)[1] == []
    # Which trains no log-probabilities
    assert make(policy, tokenizer, prompts, tmp_path, (CompletionSampler, ReinforceConfig), **fields)[1] == []


def test_values_that_change_nothing():
    neutral = {"do_sample": True, "top_p": 1, "top_k": -1, "min_p": None, "bad_words": [], "guidance_scale": 1}
    assert altered(neutral | {"temperature": 0.7, "max_new_tokens": 3}, 0.7) == {}
    assert altered({"temperature": 1.0, "top_p": 0.99}, 0.7) == {"top_p": 0.99, "temperature": 1.0}


@pytest.mark.parametrize("corrects", [False, True])
def test_vllm(policy, tokenizer, prompts, tmp_path, corrects):
    """vLLM asks the model's generation config for end tokens alone."""
    policy.generation_config.min_p = 0.5
    given = {"frequency_penalty": 0.5, "stop_token_ids": [7]}
    trainer, _ = make(policy, tokenizer, prompts, tmp_path, top_p=0.9, generation_kwargs=given)
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, corrects
    trainer.eos_token_ids, trainer.generation_config = [1], SimpleNamespace()
    with pytest.warns(UserWarning, match="sampled with top_p=0.9, frequency_penalty=0.5, and") as caught:
        trainer._set_up_sampling()
    assert len(caught) == 1 and ("is corrected for" in str(caught[0].message)) == corrects
    assert trainer.eos_token_ids == [1, 7]
