"""Dropout that is disabled is off in whatever way a model has it: each forward in training is that in evaluation."""

import logging

import pytest
import torch
from datasets import Dataset
from helpers import RANKINGS, build_policy, build_reward_model, count_good, ranking_settings, settings, tiny_settings
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    PPOConfig,
    PPOTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
)
from trl_ext.models.dropout import active_dropout, stop_dropout


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
OF_GPT2 = {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
MODELS = {
    "opt": (OPTForCausalLM, OPTConfig, {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5, "ffn_dim": 32}),
    "gpt_bigcode": (GPTBigCodeForCausalLM, GPTBigCodeConfig, OF_GPT2),
    "gpt2": (GPT2LMHeadModel, GPT2Config, OF_GPT2),
    "granite": (GraniteForCausalLM, GraniteConfig, {"attention_dropout": 0.3}),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, {"attention_dropout": 0.3, "residual_dropout": 0.3}),
    # whose layers ask their config
    "falcon": (FalconForCausalLM, FalconConfig, {"attention_dropout": 0.3, "hidden_dropout": 0.3, "alibi": False}),
}
ADAPTERS = {
    "lora": LoraConfig(lora_dropout=0.5, init_lora_weights=False),
    "loha": LoHaConfig(module_dropout=0.5, rank_dropout=0.5, init_weights=False, target_modules=["q_proj"]),
}


def differs_in_training(model, outputs=lambda model: model(input_ids=IDS).logits):
    """Largest deviation, in three forwards, from what it says in evaluation."""
    with torch.no_grad():
        expected = outputs(model.eval())
        return max((outputs(model.train()) - expected).abs().max().item() for _ in range(3))


def build(name, tokenizer, attn_implementation):
    model_class, config_class, dropout = MODELS[name]
    torch.manual_seed(0)
    settings = tiny_settings(tokenizer) | {"word_embed_proj_dim": 16}
    return model_class._from_config(config_class(**settings | dropout), attn_implementation=attn_implementation)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_dropout_is_stopped(tokenizer, name, attn_implementation):
    model = build(name, tokenizer, attn_implementation)
    config = model.config.to_dict()
    assert differs_in_training(model) > 1e-4
    assert all(0 < probability < 1 for probability in active_dropout(model).values()) and active_dropout(model)
    stop_dropout(model)
    assert differs_in_training(model) < 1e-6 and active_dropout(model) == {}
    assert model.config.to_dict() == config  # which is saved


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_dropout_is_stopped(tokenizer, name):
    model = get_peft_model(build_policy(tokenizer), ADAPTERS[name])
    assert differs_in_training(model) > 1e-4
    stop_dropout(model)
    assert differs_in_training(model) < 1e-6


def test_modules_of_torch_are_stopped_and_switches_stay():
    model = nn.ModuleList(
        [
            nn.Dropout1d(0.5),
            nn.AlphaDropout(0.5),
            nn.MultiheadAttention(4, 2, dropout=0.5),
            nn.LSTM(4, 4, 2, dropout=0.5),
        ]
    )
    model[0].token_dropout, model[0].dropout_layers, model[1].attn_pdrop = True, "all", 0.1
    assert sorted(active_dropout(model)) == ["0.p", "1.attn_pdrop", "1.p", "2.dropout", "3.dropout"]
    stop_dropout(model)
    assert active_dropout(model) == {} and model[0].token_dropout is True and model[0].dropout_layers == "all"


@pytest.fixture
def policy_with_dropout(tokenizer, tmp_path):
    path = str(tmp_path / "policy")
    build_policy(tokenizer, attention_dropout=0.5).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_first_update_of_a_policy_with_dropout_starts_from_ratio_1(
    policy_with_dropout, tokenizer, prompts, tmp_path, caplog
):
    """The policy, its reference and its critic; a reward model gives one text one reward."""
    reward_model = build_reward_model(tokenizer, attention_dropout=0.5)
    overrides = {"num_iterations": 2, "kl_in_reward": 0.1, "learning_rate": 0.0}
    overrides |= {"critic": "separate", "critic_model_name_or_path": policy_with_dropout}
    args = PPOConfig(**settings(tmp_path, **overrides))
    trainer = PPOTrainer(policy_with_dropout, reward_model, args, prompts, reward_processing_classes=tokenizer)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["first_step/ratio_deviation"] < 1e-5 and abs(logs["first_step/kl"]) < 1e-9
    assert "Before the first update" not in caplog.text and "disable_dropout" not in caplog.text
    for model in (trainer.model, trainer.ref_model):
        assert differs_in_training(model) < 1e-6
    assert differs_in_training(trainer.critic, lambda critic: critic.trunk(input_ids=IDS).last_hidden_state) < 1e-6
    assert not reward_model.training


def test_dropout_that_stays_is_told_of(policy_with_dropout, prompts, tmp_path, caplog):
    """In a model of which no second forward could show it."""
    with caplog.at_level(logging.WARNING):
        args = A2CConfig(**settings(tmp_path, disable_dropout=False))
        A2CTrainer(policy_with_dropout, count_good, args, prompts)
    assert "`model.layers.0.self_attn.attention_dropout` = 0.5" in caplog.text
    assert "gradients are then of another policy than the one that sampled" in caplog.text


def test_ranking_trainers_stop_it_too(policy_with_dropout, tokenizer, tmp_path):
    data = Dataset.from_dict(RANKINGS)
    args = RankingDPOConfig(**ranking_settings(tmp_path))
    dpo = RankingDPOTrainer(policy_with_dropout, None, args, train_dataset=data)
    reward_args = RankingRewardConfig(**ranking_settings(tmp_path))
    model = build_reward_model(tokenizer, attention_dropout=0.5)
    reward = RankingRewardTrainer(model, reward_args, train_dataset=data, processing_class=tokenizer)
    for model in (dpo.model, dpo.ref_model, reward.model):
        assert active_dropout(model) == {} and differs_in_training(model) < 1e-6
    reward_args.disable_dropout = False
    model = build_reward_model(tokenizer, attention_dropout=0.5)
    reward = RankingRewardTrainer(model, reward_args, train_dataset=data, processing_class=tokenizer)
    assert differs_in_training(reward.model) > 1e-4
