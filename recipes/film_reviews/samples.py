"""Samples from a language model, and their log-probabilities."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    """Draws one completion for each prompt from all of the model's distribution: no top-k."""
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
    """Returns the log-probability of each token of the completions, `(B, T)`; 0 after their end."""
    num_tokens = samples.completion_mask.size(1)
    positions = (samples.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(samples.input_ids, attention_mask=samples.attention_mask, position_ids=positions).logits
    logps = (logits[:, -num_tokens - 1 : -1].float() / temperature).log_softmax(dim=-1)
    logps = logps.gather(2, samples.input_ids[:, -num_tokens:].unsqueeze(2)).squeeze(2)
    return torch.where(samples.completion_mask.bool(), logps, 0)
