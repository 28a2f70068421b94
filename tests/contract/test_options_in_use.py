"""Options of speed are in use where they should be, and say once, and why, where they are on and cannot be."""

import logging
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from helpers import count_good, ranking_settings, settings, tiny_settings
from peft import LoraConfig, PromptTuningConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from trl_ext import (
    NLPOConfig,
    NLPOTrainer,
    PPOConfig,
    PPOTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
)
from trl_ext.actor_critic import generation


FAMILIES = {
    "llama": lambda common: LlamaConfig(**common),
    "qwen2": lambda common: Qwen2Config(**common),
    "qwen3": lambda common: Qwen3Config(**common, head_dim=8),
    "gpt2": lambda common: GPT2Config(
        **{name: common[name] for name in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")},
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
    ),
    "gemma2": lambda common: Gemma2Config(**common, head_dim=8, sliding_window=8),
    "gemma3": lambda common: Gemma3TextConfig(**common, head_dim=8, sliding_window=8),
    "mistral": lambda common: MistralConfig(**common, sliding_window=8),
    "mamba": lambda common: MambaConfig(**common, state_size=4),
    "mixtral": lambda common: MixtralConfig(**common, num_local_experts=2, output_router_logits=True),
}
NOT_IN_USE = ("is on but not in use", "cannot run completions after a shared prefix", "cannot be merged")


def build(tokenizer, family, auto_class=AutoModelForCausalLM, **overrides):
    torch.manual_seed(0)
    config = FAMILIES[family](tiny_settings(tokenizer))
    for name, value in overrides.items():
        setattr(config, name, value)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture
def prompts():
    rows = [
        "the film was a dull plot and slow but",
        "it was a good movie and bright and warm",
        "a sad ending and a bad actor",
    ]
    return Dataset.from_dict({"prompt": rows})


def make(tokenizer, tmp_path, prompts, policy, trainer_class=PPOTrainer, config_class=PPOConfig, kwargs=None, **own):
    common = {"num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 2, "num_iterations": 1}
    args = config_class(**settings(tmp_path, **common | own))
    rewards = (kwargs or {}).pop("reward_funcs", count_good)
    return trainer_class(policy, rewards, args, prompts, processing_class=tokenizer, **kwargs or {})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral"])
def test_every_option_is_in_use(tokenizer, prompts, tmp_path, caplog, family):
    reward_model = build(tokenizer, "llama", AutoModelForSequenceClassification, num_labels=1)
    policy = build(tokenizer, family)
    if family.startswith("gemma"):  # as their models on the Hub have it
        policy.generation_config.cache_implementation = "hybrid"
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    kwargs = {"reward_funcs": [count_good, reward_model], "reward_processing_classes": [None, tokenizer]}
    kwargs["peft_config"] = lora
    trainer = make(tokenizer, tmp_path, prompts, policy, kwargs=kwargs)
    rows = []
    generates, trunk = type(policy).generate, policy.base_model
    trunk.register_forward_pre_hook(lambda m, a, kw: rows.append(len([*a, kw.get("input_ids")][0])), with_kwargs=True)
    with (
        caplog.at_level(logging.WARNING),
        patch.object(generation, "decode", wraps=generation.decode) as decode,
        patch.object(type(policy), "generate", side_effect=generates, autospec=True) as generate,
        patch("trl_ext.models.decoding.GENERATE", type(policy).generate),
    ):
        trainer.train()
    assert decode.call_count == 2 and not generate.called  # compact_generation, a rollout for each step
    assert trainer.generation.merges is True  # generate_merged
    assert trainer.compact.prefix_check.verdict is True  # shared_prefix, and so compact_scoring
    assert [check.verdict for check in trainer.rewards.prefix_checks.values()] == [True]
    assert rows[-1] == 1  # the last update ran its four completions in one row
    lengths = [batch["completion_mask"].sum(dim=1) for batch in trainer._buffered_inputs]
    widths = [batch["completion_ids"].size(1) for batch in trainer._buffered_inputs]
    assert widths == [max(1, int(length.max())) for length in lengths]  # length_batches
    assert [message for message in caplog.messages if any(part in message for part in NOT_IN_USE)] == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral"])
def test_rankings_share_their_prompt(tokenizer, rankings, tmp_path, caplog, family):
    for trainer_class, config_class, auto_class in (
        (RankingRewardTrainer, RankingRewardConfig, AutoModelForSequenceClassification),
        (RankingDPOTrainer, RankingDPOConfig, AutoModelForCausalLM),
    ):
        models = [build(tokenizer, family, auto_class, num_labels=1) for _ in range(2)]
        models = models if auto_class is AutoModelForCausalLM else models[:1]
        args = config_class(**ranking_settings(tmp_path, max_steps=1))
        trainer = trainer_class(*models, args=args, train_dataset=rankings, processing_class=tokenizer)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert trainer._packs is True
    assert not any("cannot run" in message for message in caplog.messages)


PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize(
    ("option", "family", "own", "peft_config", "reason"),
    [
        ("compact_generation", "llama", {"generation_kwargs": {"num_beams": 2}}, None, "`num_beams=2`"),
        ("compact_generation", "mamba", {}, None, "MambaForCausalLM carry a state"),
        ("compact_generation", "llama", {}, PROMPT_TUNING, "virtual tokens"),
        ("compact_scoring", "llama", {}, PROMPT_TUNING, "virtual tokens"),
        ("shared_prefix", "mixtral", {}, None, "`output_router_logits` of the model"),
        ("length_batches", "llama", {"loss_type": "bnpo"}, None, "means, or quantiles, over the tokens"),
        ("length_batches", "llama", {"pad_to_multiple_of": 8}, None, "`pad_to_multiple_of=8`"),
        ("length_batches", "llama", {"steps_per_generation": 3}, None, "do not divide each other"),
        ("balance_tokens", "llama", {"balance_tokens": True, "top_entropy_quantile": 0.5}, None, "quantiles"),
        ("generate_merged", "llama", {"generate_merged": True}, None, "the policy has no adapter"),
        ("generate_merged", "llama", {"generate_merged": True}, PROMPT_TUNING, "virtual tokens cannot be merged"),
    ],
)
def test_what_is_on_and_not_in_use_says_so_once(
    tokenizer, prompts, tmp_path, caplog, option, family, own, peft_config, reason
):
    kwargs = {"peft_config": peft_config} if peft_config else {}
    trainer = make(tokenizer, tmp_path, prompts, build(tokenizer, family), kwargs=kwargs, **own)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = [message for message in caplog.messages if f"`{option}` is on but not in use" in message]
    assert reason in message and ". So " in message  # why, and what it costs
    assert any(word in message for word in (f"`{option}=False`", "`shared_prefix='never'`", "Leave"))  # what to do


@pytest.mark.parametrize("shards", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_generation_of_sharded_policies_says_so_once(tokenizer, prompts, tmp_path, caplog, shards):
    trainer = make(tokenizer, tmp_path, prompts, build(tokenizer, "llama"))
    setattr(trainer, shards, True)
    trainer._set_up_rollouts()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with trainer.generation.compact():
                pass
    (message,) = [message for message in caplog.messages if "`compact_generation` is on but" in message]
    assert "FSDP or DeepSpeed" in message


def test_what_nlpo_cannot_use_is_off_with_it(tokenizer, prompts, tmp_path, caplog):
    """By default; who asks for it is told."""
    for own, expected in (
        ({}, set()),
        ({"compact_generation": True, "generate_merged": True}, {"compact_generation", "generate_merged"}),
    ):
        caplog.clear()
        kwargs = {"peft_config": LoraConfig(target_modules="all-linear")}
        policy = build(tokenizer, "llama")
        trainer = make(tokenizer, tmp_path, prompts, policy, NLPOTrainer, NLPOConfig, kwargs, max_steps=1, **own)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        said = {message.split("`")[1] for message in caplog.messages if "is on but not in use" in message}
        assert said == expected


def test_a_shared_prefix_that_must_be_and_cannot_is_refused(tokenizer, prompts, tmp_path):
    with pytest.raises(ValueError, match="`shared_prefix='always'` .* virtual tokens .* Set `shared_prefix='auto'`"):
        kwargs = {"peft_config": PROMPT_TUNING}
        make(tokenizer, tmp_path, prompts, build(tokenizer, "llama"), kwargs=kwargs, shared_prefix="always")
