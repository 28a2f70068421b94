"""Measures of a policy's samples, before and after."""

import math
import re
from collections import Counter

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from trl_ext.adapters.reward_models import RewardModel

from .samples import Samples, sample, token_logps
from .tasks import Task


def rewards_of(reward_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> torch.Tensor:
    """Returns the reward model's rewards of prompt and completion, `(B,)`."""
    model = RewardModel(reward_model, tokenizer, "of the quickstart")
    pairs = zip(samples.prompts, samples.completions, strict=True)
    return torch.tensor(model.score([model.input_ids(prompt, completion) for prompt, completion in pairs]))


def commonest_sentence(completions: list[str]) -> float:
    """Returns the share of completions with the sentence that most of them have: near 1 where a policy collapsed."""
    sentences = Counter(
        sentence for text in completions for sentence in {part.strip() for part in re.split(r"[.!?;]", text)} - {""}
    )
    return max(sentences.values(), default=0) / len(completions)


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    samples: Samples,
) -> dict[str, float]:
    """Returns the table's column for `model`, from which `samples` were drawn."""
    scores = task.judge.score(samples.completions)
    num_tokens = samples.completion_mask.sum().item()
    logps = token_logps(model, samples, task.temperature).sum().item() / num_tokens
    logps_reference = token_logps(reference, samples, task.temperature).sum().item() / num_tokens
    bigrams = [pair for text in samples.completions for pair in zip(text.split(), text.split()[1:], strict=False)]
    return {
        "judge's score (never trained on)": sum(scores) / len(scores),
        "share the judge finds positive": sum(score > task.judge.neutral for score in scores) / len(scores),
        "reward (the reward model's)": rewards_of(reward_model, tokenizer, samples).mean().item(),
        "KL to the reference, nats per token": logps - logps_reference,
        "perplexity under the reference": math.exp(-logps_reference),
        "tokens per completion": num_tokens / len(samples.prompts),
        "share that ends by itself": samples.ended.float().mean().item(),
        "share of distinct completions": len(set(samples.completions)) / len(samples.completions),
        "share of distinct word pairs": len(set(bigrams)) / max(len(bigrams), 1),
        "share with the commonest sentence": commonest_sentence(samples.completions),
    }


def load(auto_class, path: str) -> PreTrainedModel:
    return auto_class.from_pretrained(path).to(PartialState().device).eval()


def compare(task: Task, paths: dict[str, str], tokenizer: PreTrainedTokenizerBase, seed: int):
    """Returns `(samples, measures)` of the language model and of the policy, on the same held-out openings."""
    sft, policy = (load(AutoModelForCausalLM, paths[name]) for name in ("sft", "policy"))
    reward_model = load(AutoModelForSequenceClassification, paths["reward_model"])
    columns = []
    for model in (sft, policy):
        set_seed(seed)
        samples = sample(model, tokenizer, task.test_prompts, task.max_completion_length, task.temperature)
        columns.append((samples, measure(model, sft, reward_model, tokenizer, task, samples)))
    return columns
