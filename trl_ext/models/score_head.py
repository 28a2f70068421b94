"""A reward model's scores of every prefix of a text, which transformers cuts down to the last one's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def has_score_head(model: nn.Module) -> bool:
    """Whether it is one of transformers' causal models that score texts, those with a `score` head."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return isinstance(base, PreTrainedModel) and "score" in base._modules


@contextmanager
def scores_of_all_tokens(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within the context the `logits` of `model`'s outputs are those of all tokens, `(B, L, 1)`, not of the last."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    logits = []

    def keep(module, args, output):
        logits.append(output)

    def put(module, args, output):
        output["logits"] = logits.pop()

    hooks = [base.get_submodule("score").register_forward_hook(keep), model.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def scores_of_tokens(model: PreTrainedModel | PeftModel, sequences: list[list[int]]) -> torch.Tensor:
    """`(N, L)`, float32: a causal reward model's score of the text that each token ends; anything after its end."""
    pad_token_id = model.config.get_text_config().pad_token_id
    rows = [torch.tensor(sequence) for sequence in sequences]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(input_ids.size(1)) < lengths.unsqueeze(1)).long()
    with scores_of_all_tokens(model):
        outputs = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    return outputs.logits.squeeze(-1).float()


def prefix_scores(
    model: PreTrainedModel | PeftModel, prompt_ids: list[list[int]], completion_ids: list[list[int]]
) -> list[torch.Tensor]:
    """
    A causal reward model's score of the prompt and of each prefix that a token of the completion ends, in one forward.

    Args:
        model: A sequence classification model with one label.
        prompt_ids, completion_ids (`list[list[int]]`): N of each, in the model's own vocabulary.

    Returns:
        `list[torch.Tensor]`: N of shape `(1 + T_n,)`, float32.
    """
    scores = scores_of_tokens(model, [prompt + ids for prompt, ids in zip(prompt_ids, completion_ids, strict=True)])
    return [
        row[len(prompt) - 1 : len(prompt) + len(ids)]
        for row, prompt, ids in zip(scores, prompt_ids, completion_ids, strict=True)
    ]


def scores_of_prefixes_and_whole(
    model: PreTrainedModel | PeftModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    whole_ids: list[list[int]],
    max_length: int | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    [`prefix_scores`], and the scores of the whole texts as the model is asked about them otherwise. Those may hold more
    than the policy's own tokens (what a chat template puts after a turn, an end that the policy has not reached) or
    less; where one is the beginning of the other, both are read off one row.

    Args:
        model, prompt_ids, completion_ids: As [`prefix_scores`] takes them.
        whole_ids (`list[list[int]]`): N, what the model reads of prompt and completion.
        max_length (`int`, *optional*): So many tokens of each are run at most; the scores of longer ones mean nothing.

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor]`: N of shape `(1 + T_n,)`, and `(N,)`; float32.
    """
    pad_token_id = model.config.get_text_config().pad_token_id
    own = [prompt + ids for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
    rows, row_of_whole = list(own), []
    for n, (ids, whole) in enumerate(zip(own, whole_ids, strict=True)):
        if all(own == read for own, read in zip(ids, whole, strict=False)):
            rows[n] = max(ids, whole, key=len)
            row_of_whole.append(n)
        else:
            row_of_whole.append(len(rows))
            rows.append(whole)
    scores = scores_of_tokens(model, [row[:max_length] for row in rows])
    prefixes = [
        row[len(prompt) - 1 : len(prompt) + len(ids)]
        for row, prompt, ids in zip(scores, prompt_ids, completion_ids, strict=False)
    ]
    ends = [last_real_token(whole, pad_token_id) for whole in whole_ids]
    return prefixes, scores[row_of_whole, torch.tensor(ends).clamp(max=scores.size(1) - 1)]


def last_real_token(ids: list[int], pad_token_id: int) -> int:
    """Where the last token is that is no padding, whose state scores a text on transformers' classifiers."""
    return max((t for t, token in enumerate(ids) if token != pad_token_id), default=0)
