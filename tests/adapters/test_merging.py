"""Adapters on weights that two modules share or that were resized: merged, loaded on a base of their own, or shared."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import IDS, RANKINGS, build_policy, count_good, ranking_settings, settings, tiny_settings
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)

from trl_ext import (
    PPOConfig,
    PPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    load_critic,
    merge_adapter,
    token_values,
)
from trl_ext.adapters.merging import can_merge, merged
from trl_ext.adapters.reward_adapters import reward_model_of_its_own, reward_model_on_base


def build_tied(architecture, tokenizer):
    if architecture == "llama":
        return build_policy(tokenizer, tie_word_embeddings=True)
    torch.manual_seed(0)
    own = {"head_dim": 8, "tie_word_embeddings": True, "initializer_range": 0.2}
    return Gemma3ForCausalLM(Gemma3TextConfig(**tiny_settings(tokenizer) | own))


@pytest.mark.parametrize(
    "architecture, settings, is_tied",
    [
        ("llama", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ("gemma3", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ("gemma3", {"trainable_token_indices": [5, 6]}, True),
        ("llama", {"modules_to_save": ["embed_tokens"]}, False),
        ("llama", {"modules_to_save": ["lm_head"]}, False),
        ("llama", {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [7, 8]}}, False),
    ],
)
def test_a_merged_model_is_the_adapters_however_its_weights_were_tied(
    tokenizer, tmp_path, architecture, settings, is_tied
):
    """Loaded anew, twice: what is missing from the file would be drawn at random."""
    build_tied(architecture, tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
        expected = model(input_ids=IDS).logits
        if can_merge(model):
            with merged(model, {}):
                torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
            merge_adapter(str(tmp_path / "adapter"), str(tmp_path / dtype), dtype)
            for _ in range(2):
                loaded = AutoModelForCausalLM.from_pretrained(tmp_path / dtype).eval()
                logits = loaded(input_ids=IDS).logits.float()
                torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) is is_tied


# --- Resized embeddings ---


@pytest.fixture(scope="module")
def tokenizer_with_more(tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<a new pad>"})
    return larger


@pytest.fixture(scope="module")
def reward_adapter(policy_path, tokenizer_with_more, tmp_path_factory):
    """Trained on `policy_path` after a pad token was added to it, with rows to spare; and its scores of `IDS`."""
    folder = tmp_path_factory.mktemp("reward_adapter")
    model = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1)
    model.resize_token_embeddings(len(tokenizer_with_more), pad_to_multiple_of=8)
    trainer = RankingRewardTrainer(
        model,
        RankingRewardConfig(**ranking_settings(folder)),
        train_dataset=Dataset.from_dict(RANKINGS),
        processing_class=tokenizer_with_more,
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    trainer.save_model()
    return str(folder), scores(trainer.model)


@torch.no_grad()
def scores(model):
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def test_a_reward_adapter_on_resized_embeddings_is_loaded_and_merged(reward_adapter, tokenizer_with_more, tmp_path):
    folder, expected = reward_adapter
    loaded = reward_model_of_its_own(folder)
    assert loaded.get_input_embeddings().weight.size(0) == 8 * -(-len(tokenizer_with_more) // 8)
    assert torch.equal(scores(loaded), expected)
    merge_adapter(folder, str(tmp_path / "merged"), "float32")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(scores(whole), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("who_has_it", ["base", "adapter"])
def test_a_token_that_the_base_has_no_embedding_of_stays_without(tokenizer, tokenizer_with_more, tmp_path, who_has_it):
    """As `<image_soft_token>` of Gemma 3 1B; not so one that came with the adapter."""
    build_policy(tokenizer).save_pretrained(tmp_path / "base")
    (tokenizer_with_more if who_has_it == "base" else tokenizer).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    tokenizer_with_more.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer if who_has_it == "base" else tokenizer_with_more)


def test_a_reward_adapter_on_resized_embeddings_shares_all_but_them(reward_adapter, policy_path, prompts, tmp_path):
    """With a policy that was not resized, or was to the same size: its embeddings stay its own."""
    folder, expected = reward_adapter
    for num_rows in (None, reward_model_of_its_own(folder).config.vocab_size):
        policy = AutoModelForCausalLM.from_pretrained(policy_path)
        if num_rows is not None:
            policy.resize_token_embeddings(num_rows)
        policy = get_peft_model(policy, LoraConfig(r=4))
        before = policy.get_input_embeddings().weight.clone()
        reward_model = reward_model_on_base(policy, folder)
        assert torch.equal(scores(reward_model), expected)
        assert torch.equal(policy.get_input_embeddings().weight, before)
        layers = [m.get_base_model().model.layers[0].self_attn.o_proj for m in (policy, reward_model)]
        assert layers[0].weight is layers[1].weight
    trainer = PPOTrainer(
        policy_path, folder, PPOConfig(**settings(tmp_path, max_steps=1)), prompts, peft_config=LoraConfig(r=4)
    )
    trainer.train()
    assert torch.equal(scores(trainer.reward_funcs[0]), expected)


def test_a_critics_adapter_is_merged_on_the_embeddings_of_its_policy(
    policy_path, tokenizer_with_more, prompts, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(policy_path)
    model.resize_token_embeddings(len(tokenizer_with_more))
    args = PPOConfig(**settings(tmp_path / "policy", max_steps=1, critic="adapter"))
    kwargs = {"peft_config": LoraConfig(r=4), "processing_class": tokenizer_with_more}
    trainer = PPOTrainer(model, count_good, args, prompts, **kwargs)
    trainer.train()
    trainer.save_model()
    ids = torch.cat([IDS, torch.full((2, 1), tokenizer_with_more.pad_token_id)], dim=1)
    expected = token_values(trainer.model.eval(), trainer.critic.eval(), ids, torch.ones_like(ids))
    merge_adapter(str(tmp_path / "policy"), str(tmp_path / "merged"), "float32")
    assert AutoModel.from_pretrained(tmp_path / "merged" / "critic").config.vocab_size == len(tokenizer_with_more)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    values = token_values(whole, load_critic(whole, str(tmp_path / "merged")), ids, torch.ones_like(ids))
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)
