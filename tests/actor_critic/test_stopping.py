"""Completions end where the engine ends them, whatever ends them, and padding is nobody's token."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import build_policy, recorded, settings, variety
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ext import NLPOConfig, NLPOTrainer, PPOConfig, PPOTrainer


def rollout(policy, tokenizer, prompts, tmp_path, trainer_class=PPOTrainer, config_class=PPOConfig, **overrides):
    """The trainer, and its first rollout, after one step of training on it."""
    common = {"per_device_train_batch_size": 8, "max_completion_length": 24, "max_steps": 1, "num_iterations": 1}
    args = config_class(**settings(tmp_path, **common | overrides))
    trainer = recorded(trainer_class)(policy, variety, args, prompts, processing_class=tokenizer)
    trainer.train()
    return trainer, trainer.rollouts[0]


def own_ids(batch):
    return [
        ids[mask].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)
    ]


# --- Tokens ---


@pytest.mark.parametrize("ends", [[1, 7, 9], [7, 9], 7])
@pytest.mark.parametrize("by", ["generation_kwargs", "model"])
def test_end_tokens(policy, tokenizer, prompts, tmp_path, ends, by):
    """The last chosen token is the first that ends, and nothing is chosen after it."""
    overrides = {"generation_kwargs": {"eos_token_id": ends}}
    if by == "model":
        policy.generation_config.eos_token_id, overrides = ends, {}
    trainer, batch = rollout(policy, tokenizer, prompts, tmp_path, **overrides)
    # To the model's own the parent adds that of the tokenizer
    stops = {ends} if isinstance(ends, int) else {*ends}
    stops |= {tokenizer.eos_token_id} if by == "model" else set()
    completions = own_ids(batch)
    for ids, terminated in zip(completions, batch["terminated"].tolist(), strict=True):
        assert not stops & {*ids[:-1]} and len(ids) <= 24
        assert terminated == (ids[-1] in stops | {tokenizer.pad_token_id})
        assert terminated or len(ids) == 24
    assert any(ids[-1] in {7, 9} and len(ids) < 24 for ids in completions)
    assert batch["num_items_in_batch"] == sum(map(len, completions))
    logged = trainer.state.log_history[0]
    assert logged["completions/clipped_ratio"] == pytest.approx(1 - batch["terminated"].float().mean().item())


def test_some_token_must_end(tokenizer, prompts, tmp_path):
    """Without an end the parent fails in the first rollout."""
    endless, policy = copy.deepcopy(tokenizer), build_policy(tokenizer, eos_token_id=None)
    endless.eos_token = None
    with pytest.raises(
        ValueError, match="no end-of-sequence token to end completions with. Set `tokenizer.eos_token`"
    ):
        rollout(policy, endless, prompts, tmp_path)
    _, batch = rollout(policy, endless, prompts, tmp_path, generation_kwargs={"eos_token_id": [7, 9]})
    assert {7, 9} & {ids[-1] for ids in own_ids(batch)}


# --- Strings ---


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of bytes and of some pieces of text, whose pad token is its end token."""
    pieces = ["ab", "bc", "cab", "aba"]
    vocab = {piece: i for i, piece in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])}
    merges = [("a", "b"), ("b", "c"), ("c", "ab"), ("ab", "a")]
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", padding_side="left")


STOPS = ["bca", "cc"]


@pytest.fixture
def speller(letters):
    """A policy that says little but a, b and c, alone and in pieces, and now and then the end."""
    model = build_policy(letters)
    wanted = letters.convert_tokens_to_ids(["<eos>", "a", "b", "c", "ab", "bc", "cab", "aba"])
    others = torch.ones(len(letters), dtype=torch.bool)
    others[wanted] = False
    model.generation_config.suppress_tokens = others.nonzero().squeeze(1).tolist()
    return model


PROMPTS = Dataset.from_dict({"prompt": ["ab", "c", "aab", "bb", "xbc", "a", "b", "acab"] * 2})


def text_of(tokenizer, *ids):
    return tokenizer.decode([i for part in ids for i in part], clean_up_tokenization_spaces=False)


def is_ended(letters, prompt, ids):
    """By the text: a stop string lies in it, and lay not in what was there one token earlier."""
    seen = [any(stop in text_of(letters, prompt, ids[:n])[start:] for stop in STOPS)
            for n, start in ((len(ids), 0), (len(ids) - 1, 0))]  # fmt: skip
    return seen == [True, False]


@pytest.mark.parametrize("truncation", ["penalty", "mask"])
@pytest.mark.parametrize("by", ["generation_kwargs", "model", "NLPO"])
def test_stop_strings(speller, letters, tmp_path, caplog, by, truncation):
    sizes = {"per_device_train_batch_size": 16, "max_completion_length": 5}
    overrides = {"generation_kwargs": {"stop_strings": STOPS}, "truncation": truncation, **sizes}
    if by == "model":
        speller.generation_config.stop_strings = STOPS
        del overrides["generation_kwargs"]
    classes = (NLPOTrainer, NLPOConfig) if by == "NLPO" else (PPOTrainer, PPOConfig)
    trainer, batch = rollout(speller, letters, PROMPTS, tmp_path, *classes, **overrides)
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    kinds = set()
    for prompt, ids, all_ids, terminated in zip(
        prompts, own_ids(batch), batch["completion_ids"].tolist(), batch["terminated"].tolist(), strict=True
    ):
        if not ids:  # masked, for it did not end
            kinds.add("masked")
            assert truncation == "mask" and 0 not in all_ids
            continue
        by_text = is_ended(letters, prompt, ids)
        assert not any(is_ended(letters, prompt, ids[:n]) for n in range(1, len(ids)))
        assert 0 not in ids[:-1] and terminated == (by_text or ids[-1] == 0)
        assert terminated or len(ids) == 5
        kinds.add("string" if by_text else "eos" if ids[-1] == 0 else "cut")
    assert {"string", "eos", "masked" if truncation == "mask" else "cut"} <= kinds
    assert batch["num_items_in_batch"] == sum(map(len, own_ids(batch)))
    assert by == "NLPO" or "`stop_strings=['bca', 'cc']`" in caplog.text  # which keep from `compact_generation`
    if truncation == "penalty":
        logs, lengths = trainer.state.log_history[0], batch["completion_mask"].sum(dim=1)[batch["terminated"]].float()
        assert logs["completions/clipped_ratio"] == pytest.approx(1 - len(lengths) / 16)
        for name in ("mean", "min", "max"):
            assert logs[f"completions/{name}_terminated_length"] == pytest.approx(getattr(lengths, name)().item())
