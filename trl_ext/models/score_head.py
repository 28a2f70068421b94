"""Scores of a classifier for every prefix of a text, where transformers' forward gives that of the whole text alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .lm_head import base_causal_lm


def has_score_head(model: nn.Module) -> bool:
    """Returns True for transformers' causal models that score texts, by a head called `score`."""
    base = base_causal_lm(model)
    return isinstance(base, PreTrainedModel) and "score" in base._modules


@contextmanager
def scores_of_all_tokens(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Makes the `logits` of `model`'s outputs within the context those of all tokens, `(B, L, 1)`, not of the last."""
    logits = []

    def keep(module, args, output):
        logits.append(output)

    def put(module, args, output):
        output["logits"] = logits.pop()

    head = base_causal_lm(model).get_submodule("score")
    hooks = [head.register_forward_hook(keep), model.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def padded(ids: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Makes a model's inputs `(B, L)` of token ids, padded on the right."""
    width = max(1, *map(len, ids))
    inputs = {
        "input_ids": [row + [pad_token_id] * (width - len(row)) for row in ids],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in ids],
    }
    return {name: torch.tensor(rows) for name, rows in inputs.items()}


@torch.inference_mode()
def scores_of_tokens(model: PreTrainedModel | PeftModel, sequences: list[list[int]]) -> torch.Tensor:
    """Scores the text `(N, L)`, float32, that each token of N sequences ends, by a causal reward model."""
    inputs = padded(sequences, model.config.get_text_config().pad_token_id)
    with scores_of_all_tokens(model):
        outputs = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}, use_cache=False)
    return outputs.logits.squeeze(-1).float()


def scores_of_prefixes_and_whole(
    model: PreTrainedModel | PeftModel,
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    whole_ids: list[list[int]],
    max_length: int | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """
    Scores the prompt and each prefix that a token of the completion ends, and the whole text as the model is asked
    about it otherwise. That may hold more than the tokens that the policy chose (the end of a turn in a chat template, an end
    that the policy has not reached) or fewer; where one is the beginning of the other, both are read off one row.

    Args:
        model: A sequence classification model with one label on a causal trunk.
        prompt_ids, completion_ids (`list[list[int]]`): N of each, in the model's own vocabulary.
        whole_ids (`list[list[int]]`): N texts as the model reads prompt and completion.
        max_length (`int`, *optional*): So many tokens of each are run at most; the scores of longer ones mean nothing.

    Returns:
        `tuple[list[torch.Tensor], torch.Tensor]`: N of shape `(1 + T_n,)`, and `(N,)`; float32.
    """
    pad_token_id = model.config.get_text_config().pad_token_id
    chosen = [prompt + ids for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
    rows, row_of_whole = list(chosen), []
    for n, (ids, whole) in enumerate(zip(chosen, whole_ids, strict=True)):
        length = min(len(ids), len(whole))
        if ids[:length] == whole[:length]:
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
    """Returns the index of the last token that is no padding; its state scores a text on transformers' classifiers."""
    return max((t for t, token in enumerate(ids) if token != pad_token_id), default=0)
