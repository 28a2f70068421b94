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
    sequences = [torch.tensor(prompt + ids) for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]
    pad_token_id = model.config.get_text_config().pad_token_id
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(input_ids.size(1)) < lengths.unsqueeze(1)).long()
    with scores_of_all_tokens(model):
        outputs = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    scores = outputs.logits.squeeze(-1).float()
    return [
        row[len(prompt) - 1 : len(prompt) + len(ids)]
        for row, prompt, ids in zip(scores, prompt_ids, completion_ids, strict=True)
    ]
