"""Decoding that reads prompts once and drops what has ended gives what `generate` gives."""

import copy
from unittest.mock import patch

import pytest
import torch
from helpers import build_policy, count_good, settings, tiny_settings
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from trl_ext import NLPOConfig, NLPOTrainer, ReinforceConfig, ReinforceTrainer
from trl_ext.models import decoding
from trl_ext.models.decoding import decode, settings_of, why_not_decode


@pytest.mark.parametrize("shards", [None, "is_fsdp_enabled", "is_deepspeed_enabled"])
def test_processes_that_shard_weights_generate_as_trl_does(policy_path, prompts, tmp_path, shards):
    """Each forward gathers weights from all: one that has no rows left must still take part."""
    trainer = ReinforceTrainer(policy_path, count_good, ReinforceConfig(**settings(tmp_path)), prompts)
    if shards is not None:
        setattr(trainer, shards, True)
        trainer._set_up_rollouts()
    with trainer.generation.compact():
        assert ("generate" in vars(trainer._model)) is (shards is None)
    assert "generate" not in vars(trainer._model)


def batch_of(tokenizer, prompts):
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)


def config_of(tokenizer, **options):
    own = {"max_new_tokens": 12, "pad_token_id": tokenizer.pad_token_id, "top_k": 0}
    return GenerationConfig(**{"eos_token_id": [tokenizer.eos_token_id, 9]} | own | options)


PROMPTS = ["the film was dull but", "the film was dull but", "it", "it", "it", "a slow plot", "it"]


def families(tokenizer):
    common = tiny_settings(tokenizer)
    size = len(tokenizer)
    return {
        "llama": lambda: build_policy(tokenizer),
        "sliding": lambda: MistralForCausalLM(MistralConfig(**common, sliding_window=4, initializer_range=0.3)),
        "hybrid": lambda: Gemma2ForCausalLM(
            Gemma2Config(**common, sliding_window=4, head_dim=8, query_pre_attn_scalar=8, initializer_range=0.3)
        ),
        "absolute positions": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=size, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
        ),
    }


@pytest.mark.parametrize("family", ["llama", "sliding", "hybrid", "absolute positions"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_completions_are_those_of_generate(tokenizer, family, penalty):
    torch.manual_seed(0)
    model = families(tokenizer)[family]().eval()
    batch = batch_of(tokenizer, PROMPTS)
    config = config_of(tokenizer, do_sample=False, repetition_penalty=penalty)
    expected = model.generate(**batch, generation_config=config)
    options = settings_of(model, config)
    assert why_not_decode(model, options, batch) is None
    actual = decode(model, **batch, settings=options)
    assert actual.tolist() == expected.tolist()
    lengths = (actual[:, batch["input_ids"].size(1) :] != tokenizer.pad_token_id).sum(dim=1)
    assert family != "llama" or len(set(lengths.tolist())) > 1  # some ended before others


def test_greedy_completions_of_adapters_are_those_of_generate(tokenizer):
    model = get_peft_model(build_policy(tokenizer), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    batch, config = batch_of(tokenizer, PROMPTS), config_of(tokenizer, do_sample=False)
    expected = model.eval().generate(**batch, generation_config=config)
    assert decode(model, **batch, settings=settings_of(model, config)).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.2}, {"repetition_penalty": 2.0}]
)
def test_samples_have_the_distribution_of_generate(tokenizer, options):
    """Every possible completion of two tokens, against its probability by `generate`'s own scores."""
    model = build_policy(tokenizer).eval()
    config = config_of(tokenizer, do_sample=True, max_new_tokens=2, **options)
    prompt = batch_of(tokenizer, ["it was"])
    scored = copy.deepcopy(config)
    scored.update(output_scores=True, return_dict_in_generate=True)
    first = model.generate(**prompt, generation_config=scored)
    probs = first.scores[0].softmax(dim=-1).squeeze(0)
    many = {name: tensor.repeat(20_000, 1) for name, tensor in prompt.items()}
    torch.manual_seed(0)
    drawn = decode(model, **many, settings=settings_of(model, config))[:, prompt["input_ids"].size(1) :]
    shares = torch.bincount(drawn[:, 0], minlength=len(tokenizer)) / len(drawn)
    assert shares[probs == 0].sum() == 0
    assert (shares - probs).abs().max() < 4 * (0.25 / len(drawn)) ** 0.5
    # The second token, after the commonest first one that does not end it
    ends = [tokenizer.eos_token_id, 9]
    token = max((i for i in range(len(tokenizer)) if i not in ends), key=lambda i: shares[i])
    longer = {
        "input_ids": torch.cat([prompt["input_ids"], torch.tensor([[token]])], dim=1),
        "attention_mask": torch.ones(1, prompt["input_ids"].size(1) + 1, dtype=torch.long),
    }
    second = model.generate(**longer, generation_config=scored)
    probs = second.scores[0].softmax(dim=-1).squeeze(0)
    following = drawn[drawn[:, 0] == token, 1]
    shares = torch.bincount(following, minlength=len(tokenizer)) / len(following)
    assert (shares - probs).abs().max() < 4 * (0.25 / len(following)) ** 0.5
    # What has ended stays ended
    assert (drawn[torch.isin(drawn[:, 0], torch.tensor(ends)), 1] == tokenizer.pad_token_id).all()


def test_prompts_are_read_once_and_ended_rows_not_at_all(tokenizer):
    model = build_policy(tokenizer).eval()
    batch, config = batch_of(tokenizer, PROMPTS), config_of(tokenizer, do_sample=False)
    with patch.object(decoding, "next_logits", wraps=decoding.next_logits) as forward:
        completions = decode(model, **batch, settings=settings_of(model, config))[:, batch["input_ids"].size(1) :]
    rows = [len(call.args[1]) for call in forward.call_args_list]
    assert rows[0] == 4  # runs of equal prompts: twice, thrice, once, once
    lengths = (completions != tokenizer.pad_token_id).sum(dim=1)
    assert rows[1:] == [int((lengths > t).sum()) for t in range(1, int(lengths.max()))] and rows[-1] < rows[1]


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 3},
        {"suppress_tokens": [5]},
        {"typical_p": 0.5},
        {"stop_strings": ["good"]},
        {"renormalize_logits": True},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
    ],
)
def test_what_is_not_handled_is_left_to_generate(tokenizer, option):
    model = build_policy(tokenizer)
    batch = batch_of(tokenizer, PROMPTS)
    assert why_not_decode(model, settings_of(model, config_of(tokenizer)), batch) is None
    assert why_not_decode(model, settings_of(model, config_of(tokenizer, **option)), batch) is not None


def test_models_that_generate_in_their_own_way_are_left_to_it(tokenizer):
    config, batch = config_of(tokenizer), batch_of(tokenizer, PROMPTS)
    prompted = get_peft_model(build_policy(tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert why_not_decode(prompted, settings_of(prompted, config), batch) is not None
    model = build_policy(tokenizer)
    assert why_not_decode(model, settings_of(model, config), {**batch, "pixel_values": None}) is not None
    for method in ("generate", "prepare_inputs_for_generation"):  # the latter as Phi-3 does
        own = type("Own", (type(model),), {method: lambda self: None})(model.config)
        assert why_not_decode(own, settings_of(model, config), batch) is not None
    linear = Qwen3NextForCausalLM(
        Qwen3NextConfig(**tiny_settings(tokenizer), layer_types=["linear_attention", "full_attention"], head_dim=8)
    )
    assert why_not_decode(linear, settings_of(linear, config), batch) is not None


def test_what_the_model_says_of_generation_holds_where_the_call_is_silent(tokenizer):
    model = build_policy(tokenizer)
    config = GenerationConfig(max_new_tokens=3, top_p=0.9)
    model.generation_config.update(top_k=7, top_p=0.2, no_repeat_ngram_size=2)
    settings = settings_of(model, config)
    assert (settings["top_k"], settings["top_p"], settings["eos_token_id"]) == (7, 0.9, tokenizer.eos_token_id)
    assert why_not_decode(model, settings, batch_of(tokenizer, PROMPTS)) is not None
    model.generation_config.no_repeat_ngram_size = None
    assert why_not_decode(model, settings_of(model, config), batch_of(tokenizer, PROMPTS)) is None
    model.generation_config.eos_token_id = None
    assert why_not_decode(model, settings_of(model, config), batch_of(tokenizer, PROMPTS)) is not None


# --- In a trainer ---


def rollout_of(trainer_class, args, policy_path, prompts):
    trainer = trainer_class(policy_path, count_good, args, prompts)
    with patch.object(decoding, "next_logits", wraps=decoding.next_logits) as forward:
        trainer.train()
    return trainer, forward


def test_the_trainer_decodes_for_itself(policy_path, prompts, tmp_path):
    args = ReinforceConfig(**settings(tmp_path, num_generations=4, max_steps=1))
    _, forward = rollout_of(ReinforceTrainer, args, policy_path, prompts)
    assert len(forward.call_args_list[0].args[1]) == 1  # four completions of one prompt


@pytest.mark.parametrize("option", [{"compact_generation": False}, {"generation_kwargs": {"num_beams": 2}}])
def test_generate_is_there_for_the_rest(policy_path, prompts, tmp_path, option):
    args = ReinforceConfig(**settings(tmp_path, max_steps=1, **option))
    trainer, forward = rollout_of(ReinforceTrainer, args, policy_path, prompts)
    assert not forward.called and trainer.state.global_step == 1


def test_nlpo_samples_within_its_mask_by_generate(policy_path, prompts, tmp_path):
    args = NLPOConfig(**settings(tmp_path, max_steps=1, top_p_mask=0.5))
    _, forward = rollout_of(NLPOTrainer, args, policy_path, prompts)
    assert not forward.called


def test_a_generate_of_the_users_is_used(policy_path, prompts, tmp_path):
    args = ReinforceConfig(**settings(tmp_path, max_steps=1))
    trainer = ReinforceTrainer(policy_path, count_good, args, prompts)

    def always_good(input_ids, **kwargs):
        return torch.cat([input_ids, torch.full((len(input_ids), 2), 14)], dim=1)

    with patch.object(trainer.model, "generate", side_effect=always_good) as generate:
        trainer.train()
    assert generate.called


def test_a_generate_put_on_the_class_is_used(policy_path, prompts, tmp_path):
    args = ReinforceConfig(**settings(tmp_path, max_steps=1))
    with patch("transformers.generation.utils.GenerationMixin.generate") as generate:
        generate.side_effect = lambda input_ids, **kwargs: torch.cat([input_ids, input_ids[:, -1:]], dim=1)
        _, forward = rollout_of(ReinforceTrainer, args, policy_path, prompts)
    assert generate.called and not forward.called


def test_the_policy_keeps_its_own_generate(policy_path, prompts, tmp_path):
    args = ReinforceConfig(**settings(tmp_path, max_steps=1))
    trainer, _ = rollout_of(ReinforceTrainer, args, policy_path, prompts)
    assert "generate" not in vars(trainer.model)
