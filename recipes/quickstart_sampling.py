"""Samples from the models of the quickstart, and how good they are."""

import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from accelerate import PartialState
from quickstart_data import Task
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from trl_ext.adapters.reward_models import RewardModel


@dataclass
class Samples:
    """Completions as text, and `(B, L)` ids of prompt and completion with masks over them."""

    prompts: list[str]
    completions: list[str]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor  # up to and with the end-of-sequence token
    ended: torch.Tensor  # (B,) bool


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float,
) -> Samples:
    """One completion for each prompt, drawn from all of the model's distribution: no top-k."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=max_new_tokens)
    prompt_length = inputs["input_ids"].size(1)
    completion_ids = ids[:, prompt_length:]
    is_end = completion_ids == tokenizer.eos_token_id
    mask = (is_end.cumsum(dim=1) - is_end.long() == 0).long()
    return Samples(
        prompts=prompts,
        completions=tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
        input_ids=ids,
        attention_mask=torch.cat([inputs["attention_mask"], mask], dim=1),
        completion_mask=mask,
        ended=is_end.any(dim=1),
    )


@torch.no_grad()
def token_logps(model: PreTrainedModel, samples: Samples, temperature: float) -> torch.Tensor:
    """`(B, T)` log-probability of each token of the completions; 0 after their end."""
    num_tokens = samples.completion_mask.size(1)
    positions = (samples.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(samples.input_ids, attention_mask=samples.attention_mask, position_ids=positions).logits
    logps = (logits[:, -num_tokens - 1 : -1].float() / temperature).log_softmax(dim=-1)
    logps = logps.gather(2, samples.input_ids[:, -num_tokens:].unsqueeze(2)).squeeze(2)
    return torch.where(samples.completion_mask.bool(), logps, 0)


def rewards_of(reward_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> torch.Tensor:
    """The reward model's score of prompt and completion, `(B,)`."""
    model = RewardModel(reward_model, tokenizer, "of the quickstart")
    pairs = zip(samples.prompts, samples.completions, strict=True)
    return torch.tensor(model.score([model.input_ids(prompt, completion) for prompt, completion in pairs]))


def commonest_sentence(completions: list[str]) -> float:
    """Share of the completions that hold the sentence which most of them hold: near 1 where a policy collapsed."""
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
    """The table's column for `model`, from which `samples` were drawn."""
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
    """`(samples, measures)` of the language model and of the policy, on the same held-out openings."""
    sft, policy = (load(AutoModelForCausalLM, paths[name]) for name in ("sft", "policy"))
    reward_model = load(AutoModelForSequenceClassification, paths["reward_model"])
    columns = []
    for model in (sft, policy):
        set_seed(seed)
        samples = sample(model, tokenizer, task.test_prompts, task.max_completion_length, task.temperature)
        columns.append((samples, measure(model, sft, reward_model, tokenizer, task, samples)))
    return columns
