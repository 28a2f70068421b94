"""Reward models score without padding, and each prompt once, what they score text by text."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import PROMPTS, build_reward_model, settings
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    MistralConfig,
    Qwen3Config,
)

import trl_ext
from trl_ext import PPOConfig, PPOTrainer
from trl_ext.packing.check import PrefixCheck
from trl_ext.packing.reward_scoring import RewardScoring


TEXTS = [  # prompt and completion; two prompts in turn, so that what belongs together does not lie together
    ("the film was a", " good and great story"),
    ("it", " is bad"),
    ("the film was a", " bad"),
    ("it", " is"),
    ("the film was a", " good and"),
    ("it", ""),
    ("the film was a", " good and great story"),
]


def check_of(model, mode="auto"):
    args = SimpleNamespace(shared_prefix=mode, bf16=False, fp16=False)
    return PrefixCheck(args, Accelerator(cpu=True), model)


def one_by_one(model, tokenizer, texts=TEXTS):
    with torch.inference_mode():
        return torch.cat([model(**tokenize(tokenizer, [text])).logits for text in texts])


def tokenize(tokenizer, texts):
    texts = ["".join(text) for text in texts]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)


def score(model, tokenizer, batch_size, check=None, texts=TEXTS):
    with torch.inference_mode():
        scoring = RewardScoring(model, batch_size, [prompt for prompt, _ in texts], check)
        return scoring(**tokenize(tokenizer, texts)).logits


def shapes_run(model):
    """Returns a list that takes the shapes of the model's inputs, from now on."""
    shapes = []
    trunk = model.base_model if not hasattr(model, "peft_config") else model.get_base_model().base_model
    trunk.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple((args + (kwargs.get("input_ids"),))[0].shape)),
        with_kwargs=True,
    )
    return shapes


def build(kind, tokenizer):
    """A classifier with weights large enough for its scores to tell texts apart."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    more = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    configs = {
        "qwen3": lambda: Qwen3Config(**sizes, **ends, **more),
        "window": lambda: MistralConfig(**sizes, **ends, **more, sliding_window=3),
        "gpt2": lambda: GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, **ends),
        "bert": lambda: BertConfig(**sizes, **ends, intermediate_size=32),
    }
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(configs[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("kind", ["qwen3", "window", "gpt2", "bert"])
def test_scores_are_those_of_each_text_alone(tokenizer, kind, batch_size):
    model = build(kind, tokenizer)
    expected = one_by_one(model, tokenizer)
    assert expected.std() > 0.1  # so that an exchange of two would show
    for check in (None, check_of(model)):
        if kind == "bert" and check is not None:
            continue  # it has no check, see below
        torch.testing.assert_close(score(model, tokenizer, batch_size, check), expected, atol=2e-5, rtol=1e-4)


def test_an_adapter_scores_the_same(tokenizer):
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(build_reward_model(tokenizer), config).eval()
    check = check_of(model, "always")
    torch.testing.assert_close(score(model, tokenizer, 4, check), one_by_one(model, tokenizer), atol=2e-5, rtol=1e-4)
    assert check.verdict is True


def test_a_prompt_is_run_once_and_padding_is_not(tokenizer):
    model = build_reward_model(tokenizer).eval()
    shapes = shapes_run(model)
    lengths = [len(ids) for ids in tokenize(tokenizer, TEXTS)["input_ids"]]
    assert lengths == [8] * 7
    score(model, tokenizer, 4)
    assert shapes == [(4, 8), (3, 3)]  # the four of the first prompt, and of the second

    check = check_of(model)
    score(model, tokenizer, 4, check)  # compares
    shapes.clear()
    score(model, tokenizer, 4, check)
    # 4 tokens of the prompt and 4 + 1 + 2 + 4 after it; the second prompt's one token saves too little to matter
    assert shapes[0] == (1, 4 + 4 + 1 + 2 + 4) and len(shapes) == 2


def test_what_is_less_work_in_rows_is_run_so(tokenizer):
    """Short prompts of completions that differ in length: the attention of a long row would cost more than it saves."""
    model = build_reward_model(tokenizer).eval()
    check, shapes = check_of(model), shapes_run(model)
    texts = [("it", " good" * 12), ("it", " bad" * 12), ("it", " great" * 12)]
    score(model, tokenizer, 3, check, texts)
    assert check.verdict is True and shapes == [(3, 13), (1, 37), (3, 13)]


def test_the_score_is_taken_where_transformers_takes_it(tokenizer):
    """At the last token that is no padding, even if texts end with the padding token."""
    model = build_reward_model(tokenizer).eval()
    pad = tokenizer.pad_token
    texts = [
        ("the film was a", f" good and {pad}{pad}"),
        ("the film was a", f" good {pad}"),
        ("the film was a", " bad"),
    ]
    check = check_of(model, "always")
    torch.testing.assert_close(
        score(model, tokenizer, 3, check, texts), one_by_one(model, tokenizer, texts), atol=2e-5, rtol=1e-4
    )


def test_texts_that_are_equal_score_the_same(tokenizer):
    model = build_reward_model(tokenizer).eval()
    texts = [("the film was a", " good story")] * 3
    check = check_of(model, "always")
    torch.testing.assert_close(
        score(model, tokenizer, 3, check, texts), one_by_one(model, tokenizer, texts), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shared_prefix", ["always", "never"])
def test_a_text_without_tokens_is_one_of_padding(tokenizer, shared_prefix):
    """As an empty completion is of a prompt that the reward model's tokenizer drops."""
    model = build_reward_model(tokenizer).eval()
    texts = [("", " good and great story"), ("", ""), ("", " bad and good"), ("", "")]
    check = check_of(model, shared_prefix)
    expected = one_by_one(model, tokenizer, [(prompt, text or tokenizer.pad_token) for prompt, text in texts])
    for batch_size in (4, 2):
        logits = score(model, tokenizer, batch_size, check, texts)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert check.verdict is (shared_prefix == "always")


def test_what_is_of_one_prompt_is_scored_together(tokenizer):
    """The lengths of its texts do not matter."""
    model = build_reward_model(tokenizer).eval()
    prompts = ["the film was a good and great story and", "it is a bad and dull plot but the actor is"]
    texts = [(prompts[row % 2], " good" * number) for row, number in enumerate((6, 5, 1, 2))]
    check = check_of(model)
    score(model, tokenizer, 2, check, texts)
    shapes = shapes_run(model)
    logits = score(model, tokenizer, 2, check, texts)
    assert [rows for rows, _ in shapes] == [1, 1]
    torch.testing.assert_close(logits, one_by_one(model, tokenizer, texts), atol=2e-5, rtol=1e-4)


def test_prompts_of_one_text_each_show_nothing(tokenizer):
    model = build_reward_model(tokenizer).eval()
    check = check_of(model)
    score(model, tokenizer, 4, check, [("the film was a", " bad"), ("it", " is bad")])
    assert check.verdict is None
    score(model, tokenizer, 4, check)
    assert check.verdict is True


def test_four_texts_are_compared(tokenizer):
    model = build_reward_model(tokenizer).eval()
    shapes = shapes_run(model)
    score(model, tokenizer, 7, check_of(model))
    assert shapes[0][0] == 4 and len(shapes) == 3


def test_messages_are_prompts_too(tokenizer):
    model = build_reward_model(tokenizer).eval()
    expected = one_by_one(model, tokenizer)
    check = check_of(model, "always")
    with torch.inference_mode():
        prompts = [[{"role": "user", "content": prompt}] for prompt, _ in TEXTS]
        logits = RewardScoring(model, 7, prompts, check)(**tokenize(tokenizer, TEXTS)).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


# --- In a training ---


def rewards_of(reward_model, tokenizer, policy_path, folder, **overrides):
    """Returns the rewards of two rollouts, and whether the model was found able to share prompts."""
    seen = []

    class Keep(PPOTrainer):
        def _calculate_rewards(self, *args):
            rewards = super()._calculate_rewards(*args)
            seen.append(rewards.clone())
            return rewards

    own = {"per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
    args = PPOConfig(**settings(folder, **own) | overrides)
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    trainer = Keep(policy_path, reward_model, args, prompts, reward_processing_classes=tokenizer)
    trainer.train()
    return torch.cat(seen), [check.verdict for check in trainer.rewards.prefix_checks.values()]


def test_a_training_has_the_rewards_of_the_model(policy_path, tokenizer, tmp_path):
    model = build_reward_model(tokenizer)
    plain, verdicts = rewards_of(model, tokenizer, policy_path, tmp_path / "a", length_batches=False)
    assert verdicts == []
    packed, verdicts = rewards_of(model, tokenizer, policy_path, tmp_path / "b", shared_prefix="always")
    assert verdicts == [True]
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=1e-4)
    assert plain.std() > 0.01


def test_each_reward_model_is_compared_once(policy_path, tokenizer, tmp_path):
    models = [build_reward_model(tokenizer, seed) for seed in (0, 1)]
    shapes = [shapes_run(model) for model in models]
    _, verdicts = rewards_of(models, [tokenizer] * 2, policy_path, tmp_path, max_steps=4, num_iterations=1)
    assert verdicts == [True, True]
    # Four in rows and packed, then both batches of four rollouts
    assert [[rows for rows, _ in of_model] for of_model in shapes] == [[4] + [1] * 9] * 2


def test_a_model_that_reads_both_ways_scores_in_rows(policy_path, tokenizer, tmp_path):
    model = build("bert", tokenizer)
    rewards, verdicts = rewards_of(model, tokenizer, policy_path, tmp_path, shared_prefix="always")
    assert verdicts == [] and rewards.isfinite().all()


def test_a_model_that_scores_otherwise_after_a_shared_prefix_is_found_out(
    policy_path, tokenizer, tmp_path, monkeypatch, caplog
):
    """As one would whose layers take no mask of blocks: here all see everything before them."""
    plain, _ = rewards_of(build_reward_model(tokenizer), tokenizer, policy_path, tmp_path, length_batches=False)

    def causal(model, input_ids, positions, segments):
        seen = torch.ones(segments.size(1), segments.size(1), dtype=torch.bool).tril().expand(len(segments), 1, -1, -1)
        return {"input_ids": input_ids, "attention_mask": seen, "position_ids": positions}

    monkeypatch.setattr(trl_ext.packing.reward_scoring, "packed_inputs", causal)
    rewards, verdicts = rewards_of(build_reward_model(tokenizer), tokenizer, policy_path, tmp_path)
    assert verdicts == [False]
    torch.testing.assert_close(rewards, plain, atol=2e-5, rtol=1e-4)
    (message,) = [r.getMessage() for r in caplog.records if "after a shared prefix" in r.getMessage()]
    assert message.startswith("[RANK 0] The reward model LlamaFor") and "scores differ by" in message
    with pytest.raises(ValueError, match="cannot run completions after a shared prefix"):
        rewards_of(build_reward_model(tokenizer), tokenizer, policy_path, tmp_path, shared_prefix="always")
