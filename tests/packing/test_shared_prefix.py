"""Completions after a shared prefix against each alone: scores, gradients, what sees what, and the way back."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
import transformers.integrations.flex_attention as flex_integration
from accelerate import Accelerator
from datasets import Dataset
from helpers import RANKINGS, build_encoder, build_reward_model, ranking_settings, tiny_settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask, flex_attention
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import trl_ext.packing.layout
from trl_ext import RankingDPOConfig, RankingDPOTrainer, RankingRewardConfig, RankingRewardTrainer
from trl_ext.packing.check import PrefixCheck
from trl_ext.packing.layout import pack_groups
from trl_ext.packing.prefix import PADDING, attention_mask, common_prefix_length, pack, visible
from trl_ext.preference.collator import DataCollatorForRanking


# All windows are shorter than the sequences, which have 3 to 17 tokens
ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": 8,
            "sliding_window": 3,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": (MistralConfig, {"head_dim": 8, "sliding_window": 3}),
    "gpt2": (GPT2Config, {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}),
    "mixtral": (MixtralConfig, {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None}),
    "mamba": (MambaConfig, {"state_size": 4, "conv_kernel": 2}),
}


def build(name, auto_class, tokenizer, seed=0, attn_implementation="eager", **overrides):
    config_class, own = ARCHITECTURES[name]
    config = config_class(
        **{
            **tiny_settings(tokenizer),
            **({"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}),
        }
        | own
        | overrides
    )
    torch.manual_seed(seed)
    model = auto_class.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():  # far from uniform attention, so that one token more or less shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def reward_trainer(model, tokenizer, tmp_path, dataset, **overrides):
    args = RankingRewardConfig(**ranking_settings(tmp_path, **overrides))
    return RankingRewardTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)


def dpo_trainer(model, reference, tokenizer, tmp_path, dataset, **overrides):
    args = RankingDPOConfig(**ranking_settings(tmp_path, **overrides))
    return RankingDPOTrainer(model, reference, args, train_dataset=dataset, processing_class=tokenizer)


def architecture_trainer(name, task, tokenizer, tmp_path, dataset, attn_implementation="eager", **overrides):
    if task == "reward":
        model = build(name, AutoModelForSequenceClassification, tokenizer, 0, attn_implementation)
        return reward_trainer(model, tokenizer, tmp_path, dataset, **overrides)
    models = [build(name, AutoModelForCausalLM, tokenizer, seed, attn_implementation) for seed in (0, 1)]
    return dpo_trainer(*models, tokenizer, tmp_path, dataset, **overrides)


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def values_and_gradients(trainer, batch, packed):
    """The values of ranked completions, and the gradients of a sum of them that weighs each differently."""
    trainer.model.zero_grad()
    values = trainer._values(trainer.model, batch, packed)[0][batch["ranks"] >= 0]
    (values * torch.linspace(1, 2, len(values))).sum().backward()
    return values.detach(), {
        name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
    }


def assert_packed_equals_unpacked(trainer):
    batch = first_batch(trainer)
    (alone, gradients_alone), (packed, gradients) = (values_and_gradients(trainer, batch, p) for p in (False, True))
    assert alone.std() > 0.1
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == gradients_alone.keys() and len(gradients) > 10
    for name, gradient in gradients_alone.items():
        size = gradient.abs().max().item()
        torch.testing.assert_close(
            gradients[name], gradient, atol=1e-5 * size, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert trainer._use_shared_prefix(trainer.model, batch)


def fallback_messages(caplog):
    return [record.getMessage() for record in caplog.records if "after a shared prefix" in record.getMessage()]


# --- Packed equals unpacked ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize(
    "name, attn_implementation",
    [
        (name, attn)
        for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2")
        for attn in ("eager", "sdpa")
        if (name, attn) != ("gemma2", "sdpa")  # which transformers refuses
    ],
)
def test_packed_equals_unpacked(tokenizer, rankings, tmp_path, name, attn_implementation, task):
    trainer = architecture_trainer(name, task, tokenizer, tmp_path, rankings, attn_implementation)
    kinds = set(getattr(trainer.model.config, "layer_types", None) or [])
    assert (name not in ("qwen2", "gemma2", "gemma3")) or kinds == {"sliding_attention", "full_attention"}
    assert_packed_equals_unpacked(trainer)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_packed_equals_unpacked_where_padding_is_the_end_of_sequence(tokenizer, rankings, tmp_path, task):
    """The token that scores a completion is then the one before its end, as transformers finds it."""
    tokenizer = tokenizer.__class__.from_pretrained(_saved(tokenizer, tmp_path), pad_token="<eos>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert_packed_equals_unpacked(architecture_trainer("llama", task, tokenizer, tmp_path, rankings))


def _saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_packed_equals_unpacked_where_one_sequence_begins_another(tokenizer, tmp_path):
    """Nothing is left of the shorter one but the token that scores it; nothing of equal ones either."""
    dataset = Dataset.from_dict(
        {
            "group_ids": [[[5, 6, 7], [5, 6, 7, 8, 9], [5, 6]], [[9, 8, 7]] * 2, [[5, 0], [5, 0, 0]], [[6], [7]]],
            "ranks": [[1, 2, 2], [1, 1], [1, 2], [1, 2]],
        }
    )
    assert_packed_equals_unpacked(architecture_trainer("llama", "reward", tokenizer, tmp_path, dataset))


@pytest.mark.parametrize("prompt_ids", [[], [5]])
def test_packed_equals_unpacked_with_hardly_a_prompt(tokenizer, tmp_path, prompt_ids):
    """Without a prompt nothing predicts the first token: it counts in neither way."""
    completions = [[7, 8, 9], [7, 8], [6, 6, 6, 6]]
    dataset = Dataset.from_dict(
        {"prompt_ids": [prompt_ids] * 2, "completion_ids": [completions] * 2, "ranks": [[1, 2, 2], [3, 1, 2]]}
    )
    trainer = architecture_trainer("llama", "dpo", tokenizer, tmp_path, dataset)
    assert_packed_equals_unpacked(trainer)
    values = trainer._values(trainer.model, first_batch(trainer), packed=True)[0][0]
    for value, completion in zip(values, completions, strict=True):
        ids = torch.tensor([prompt_ids + completion])
        logps = trainer.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        torch.testing.assert_close(value, logps.sum(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packed_equals_unpacked_with_padding_to_a_multiple(tokenizer, rankings, tmp_path, name, attn_implementation):
    trainer = architecture_trainer(
        name, "reward", tokenizer, tmp_path, rankings, attn_implementation, pad_to_multiple_of=16
    )
    batch = first_batch(trainer)
    assert batch["packed_input_ids"].size(1) % 16 == 0 and batch["input_ids"].size(1) % 16 == 0
    assert_packed_equals_unpacked(trainer)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_training_packed_equals_training_unpacked(tokenizer, rankings, tmp_path, task):
    """Through checkpointing as well, and with the padding of a small last batch."""
    results = []
    for shared_prefix in ("always", "never"):
        trainer = architecture_trainer(
            "gemma3",
            task,
            tokenizer,
            tmp_path,
            rankings,
            shared_prefix=shared_prefix,
            gradient_checkpointing=True,
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            max_steps=4,
        )
        trainer.train()
        assert trainer._packs == (shared_prefix == "always")
        losses = [logs["loss"] for logs in trainer.state.log_history[:-1]]
        results.append((losses, {name: p.detach() for name, p in trainer.model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_flex_attention_gives_what_eager_attention_gives(tokenizer, rankings, tmp_path, monkeypatch, name):
    """Uncompiled, which is what takes long on CPU; it has no backward there."""
    monkeypatch.setattr(
        flex_integration,
        "compile_friendly_flex_attention",
        lambda query, key, value, training=False, **kwargs: flex_attention(query, key, value, **kwargs),
    )
    values = []
    for attn_implementation in ("eager", "flex_attention"):
        trainer = architecture_trainer(name, "reward", tokenizer, tmp_path, rankings, attn_implementation)
        batch = first_batch(trainer)
        with torch.no_grad():
            values.append(trainer._values(trainer.model, batch, packed=True)[0][batch["ranks"] >= 0])
    torch.testing.assert_close(values[1], values[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("bf16", "difference", "verdict"),
    [(False, 5e-4, True), (False, 2e-3, False), (True, 0.04, True), (True, 0.06, False), (False, math.nan, False)],
)
def test_how_exact_a_model_must_be_is_a_matter_of_its_precision(bf16, difference, verdict):
    args = SimpleNamespace(shared_prefix="auto", bf16=bf16, fp16=False)
    rows = torch.tensor([3.0, -4.0, 0.5])  # relative to the largest
    model = torch.nn.Linear(1, 1)
    model.dtype = torch.float32
    check = PrefixCheck(args, Accelerator(cpu=True), model)
    assert check(lambda packed: rows + packed * torch.tensor([0.0, 0.0, 4 * difference])) is verdict


# --- Layout ---


def test_packing_lays_completions_after_the_prefix():
    assert pack([5, 6, 7], [[8, 1], [9, 8, 9, 1]]) == (
        [5, 6, 7, 8, 1, 9, 8, 9, 1],
        [0, 1, 2, 3, 4, 3, 4, 5, 6],
        [0, 0, 0, 1, 1, 2, 2, 2, 2],
        [3, 5],
    )
    assert pack([], [[8], [9]]) == ([8, 9], [0, 0], [1, 2], [0, 1])


def test_groups_are_packed_in_rows_of_one_length():
    """The first of a group shares less than it has in common; the second group lies between its members."""
    packed = pack_groups([[5, 6, 7], [9], [5, 6, 8]], [2, 0, 1], ["a", "b", "a"], pad_token_id=3, pad_to_multiple_of=4)
    assert packed.input_ids.tolist() == [[5, 6, 7, 6, 8, 3, 3, 3], [9, 3, 3, 3, 3, 3, 3, 3]]
    assert packed.positions.tolist() == [[0, 1, 2, 1, 2, 0, 0, 0], [0] * 8]
    assert packed.segments.tolist() == [[0, 1, 1, 2, 2, *[PADDING] * 3], [1, *[PADDING] * 7]]
    assert packed.origins.tolist() == [0, 8, 2]


def test_common_prefix_length():
    assert common_prefix_length([[5, 6, 7], [5, 6, 8], [5, 6]]) == 2
    assert common_prefix_length([[5, 6], [5, 6]]) == 2
    assert common_prefix_length([[5], [6]]) == common_prefix_length([[], [6]]) == 0


prefixes = st.lists(st.integers(0, 3), max_size=5)
suffixes = st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=2, max_size=4)


@given(prefix=prefixes, suffixes=suffixes, window=st.none() | st.integers(1, 6), padding=st.integers(0, 3))
@hypothesis_settings(max_examples=100, deadline=None)
def test_a_token_sees_what_it_sees_where_its_completion_stands_alone(prefix, suffixes, window, padding):
    input_ids, positions, segments, _ = pack(prefix, suffixes)
    num_tokens, length = len(input_ids), len(input_ids) + padding
    assert num_tokens == len(prefix) + sum(map(len, suffixes))
    expected = torch.zeros(length, length, dtype=torch.bool)
    offset = len(prefix)
    for suffix in suffixes:
        row = [*range(len(prefix)), *range(offset, offset + len(suffix))]  # where this completion's tokens lie
        offset += len(suffix)
        assert [input_ids[i] for i in row] == prefix + suffix
        assert [positions[i] for i in row] == list(range(len(row)))
        for place, i in enumerate(row):
            for j in row[: place + 1] if window is None else row[max(0, place + 1 - window) : place + 1]:
                expected[i, j] = True
    expected[num_tokens:, num_tokens:] = True
    padded = [torch.tensor([[*values, *[fill] * padding]]) for values, fill in ((segments, PADDING), (positions, 0))]
    assert torch.equal(visible(*padded, window)[0], expected)


def packed_example():
    _, positions, segments, _ = pack([1, 2, 3], [[4, 5], [6, 7, 8]])
    return torch.tensor([[*segments, PADDING]]), torch.tensor([[*positions, 0]])


@pytest.mark.parametrize("window", [None, 2])
def test_flex_attentions_mask_is_the_same(window):
    segments, positions = packed_example()
    config = MistralConfig(sliding_window=window, attn_implementation="flex_attention")
    block_mask = attention_mask(config, segments, positions, torch.float32)
    dense = create_mask(block_mask.mask_mod, 1, None, 9, 9, device="cpu")
    assert torch.equal(dense[:, 0], visible(segments, positions, window))


def test_the_form_of_the_mask_is_what_the_attention_takes():
    segments, positions = packed_example()
    seen, near = (visible(segments, positions, window).unsqueeze(1) for window in (None, 3))
    config = LlamaConfig(attn_implementation="sdpa")
    assert torch.equal(attention_mask(config, segments, positions, torch.float32), seen)
    mixed = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    masks = attention_mask(Gemma3TextConfig(attn_implementation="eager", **mixed), segments, positions, torch.bfloat16)
    assert masks.keys() == {"sliding_attention", "full_attention"}
    for mask, expected in ((masks["sliding_attention"], near), (masks["full_attention"], seen)):
        assert mask.dtype == torch.bfloat16 and torch.equal(mask == 0, expected) and mask.isfinite().all()
        assert mask[~expected].max() < -1e38


def test_a_batch_holds_each_prompt_once(tokenizer, rankings, tmp_path):
    """P + sum C tokens, and the rows sum (P + C), counted by hand from the words."""
    trainer = architecture_trainer("llama", "reward", tokenizer, tmp_path, rankings, shared_prefix="always")
    batch = first_batch(trainer)
    num_packed, num_alone = [], []
    for prompt, completions, ranks in zip(*RANKINGS.values(), strict=True):
        texts = [(prompt + c).split() for c, rank in zip(completions, ranks, strict=True) if rank is not None]
        shared = 0
        while len({text[shared] if shared < len(text) else None for text in texts}) == 1:
            shared += 1
        num_packed.append(shared + sum(len(text) + 1 - shared for text in texts))  # + 1: the end of sequence
        num_alone.append(sum(len(text) + 1 for text in texts))
    order = [int((batch["ranks"][b] >= 0).sum()) for b in range(4)]
    assert sorted((batch["packed_segments"] >= 0).sum(dim=1).tolist()) == sorted(num_packed)
    assert batch["attention_mask"].sum().item() == sum(num_alone) and sorted(order) == [2, 3, 4, 4]
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] == sum(num_packed) < sum(num_alone)


def test_collated_rows_are_prompt_and_completion():
    collator = DataCollatorForRanking(pad_token_id=0, pair_collator=None)
    batch = collator([{"prompt_ids": [5, 6], "completion_ids": [[7, 1], [9, 9], [8, 8, 1]], "ranks": [2, -1, 1]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 0], [5, 6, 8, 8, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["ranks"].tolist() == [[2, 1]] and batch["rows"].tolist() == [[0, 1]]
    assert batch["wins"].tolist() == [[[0, 0], [1, 0]]] and not batch["ties"].any()
    # The prompt's last token, which predicts a completion's first, goes with each completion
    assert batch["packed_input_ids"].tolist() == [[5, 6, 7, 1, 6, 8, 8, 1]]
    assert batch["packed_positions"].tolist() == [[0, 1, 2, 3, 1, 2, 3, 4]]
    assert batch["packed_segments"].tolist() == [[0, 1, 1, 1, 2, 2, 2, 2]]
    assert batch["packed_completion_mask"].tolist() == [[0, 0, 1, 1, 0, 1, 1, 1]]
    assert batch["ends"].tolist() == [[3, 7]]


# --- Models that do not pack ---


def maskless(tokenizer):
    """A model with an attention of somebody's own, of which nobody knows what masks it takes."""
    ALL_ATTENTION_FUNCTIONS.register("somebodys_own", sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register("somebodys_own", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return build("llama", AutoModelForSequenceClassification, tokenizer, attn_implementation="somebodys_own")


@pytest.mark.parametrize(
    "model, reason",
    [(build_encoder, "has no attribute `score`"), (maskless, "attention by 'somebodys_own' takes no mask")],
)
def test_other_models_are_run_row_by_row(tokenizer, rankings, tmp_path, caplog, model, reason):
    caplog.set_level(logging.INFO, logger="trl_ext")
    trainer = reward_trainer(model(tokenizer), tokenizer, tmp_path, rankings, max_steps=3)
    trainer.train()
    (message,) = fallback_messages(caplog)
    assert reason in message and "the prompt is run again for each." in message
    # and what they are trained on is what they give each row
    model = model(tokenizer).eval()
    trainer = reward_trainer(model, tokenizer, tmp_path, rankings)
    batch = first_batch(trainer)
    scores, _ = trainer._log_worths(model, batch)
    for row, rank in zip(range(len(batch["input_ids"])), batch["ranks"][batch["ranks"] >= 0], strict=True):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(
            scores[batch["ranks"] >= 0][row], model(ids[None]).logits[0, 0].float(), atol=1e-5, rtol=1e-5
        )
        assert rank > 0


@pytest.mark.parametrize("name, reason", [("mamba", "linear_attention"), ("mixtral", "RuntimeError")])
def test_other_language_models_are_run_row_by_row(tokenizer, rankings, tmp_path, caplog, name, reason):
    """A state space has no mask; the load balancing of experts, in the loss, counts each row's tokens."""
    caplog.set_level(logging.INFO, logger="trl_ext")
    architecture_trainer(name, "dpo", tokenizer, tmp_path, rankings).train()
    (message,) = fallback_messages(caplog)
    assert reason in message


def test_experts_pack_without_their_loss(tokenizer, rankings, tmp_path):
    trainer = architecture_trainer("mixtral", "dpo", tokenizer, tmp_path, rankings, router_aux_loss_coef=0.0)
    assert_packed_equals_unpacked(trainer)


def test_always_is_an_error_where_it_cannot_be(tokenizer, rankings, tmp_path):
    trainer = reward_trainer(build_encoder(tokenizer), tokenizer, tmp_path, rankings, shared_prefix="always")
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot.*Set `shared_prefix='auto'`"):
        trainer.train()


def test_never_is_never(tokenizer, rankings, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("A mask of blocks was made.")

    monkeypatch.setattr(trl_ext.packing.layout, "attention_mask", refuse)
    trainer = reward_trainer(build_reward_model(tokenizer), tokenizer, tmp_path, rankings, shared_prefix="never")
    trainer.train()
    assert trainer._packs is False and trainer.state.global_step == 2


# --- The first batch shows what is wrong ---


def causal_only(config, segments, positions, dtype):
    length = segments.size(1)
    return torch.ones(length, length, dtype=torch.bool).tril().expand(len(segments), 1, -1, -1)


def without_window(config, segments, positions, dtype):
    return visible(segments, positions).unsqueeze(1)


def without_prefix(config, segments, positions, dtype):
    seen = (segments.unsqueeze(2) == segments.unsqueeze(1)) & (positions.unsqueeze(1) <= positions.unsqueeze(2))
    return seen.unsqueeze(1)


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("wrong", [causal_only, without_window, without_prefix])
def test_a_wrong_mask_is_found_out(tokenizer, rankings, tmp_path, caplog, monkeypatch, wrong, task):
    caplog.set_level(logging.INFO, logger="trl_ext")
    monkeypatch.setattr(trl_ext.packing.layout, "attention_mask", wrong)
    trainer = architecture_trainer("mistral", task, tokenizer, tmp_path, rankings, "sdpa")
    trainer.train()
    (message,) = fallback_messages(caplog)
    assert "scores differ by" in message and trainer._packs is False


def test_wrong_positions_are_found_out(tokenizer, rankings, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="trl_ext")

    def one_after_another(prefix, suffixes):
        input_ids, _, segments, starts = pack(prefix, suffixes)
        return input_ids, list(range(len(input_ids))), segments, starts

    monkeypatch.setattr(trl_ext.packing.layout, "pack", one_after_another)
    # Nobody sees across completions even so: the second one only lies too far from the prompt
    trainer = architecture_trainer("llama", "reward", tokenizer, tmp_path, rankings)
    trainer.train()
    (message,) = fallback_messages(caplog)
    assert "scores differ by" in message


def test_dropout_is_not_taken_for_a_difference(tokenizer, rankings, tmp_path):
    model = build("gpt2", AutoModelForSequenceClassification, tokenizer, attn_pdrop=0.5, embd_pdrop=0.5)
    trainer = reward_trainer(model, tokenizer, tmp_path, rankings, shared_prefix="always", disable_dropout=False)
    trainer.train()
    assert trainer._packs and trainer.model.training


def test_a_head_of_zeros_packs(tokenizer, rankings, tmp_path):
    """A common start of reward models: all scores are 0, and so are their differences."""
    model = build_reward_model(tokenizer)
    torch.nn.init.zeros_(model.score.weight)
    trainer = reward_trainer(model, tokenizer, tmp_path, rankings, shared_prefix="always")
    trainer.train()
    assert trainer._packs
