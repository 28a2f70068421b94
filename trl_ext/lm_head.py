"""What a policy's LM head says of hidden states, without logits of all tokens in memory at once."""

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


# Tokens whose logits over the vocabulary are held at once
CHUNK_SIZE = 256


def base_causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal language model itself, out of its PEFT wrapper if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def logits_of(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """`(N, V)`, float32, of the trunk's last hidden states `(N, H)`."""
    logits = model.get_output_embeddings()(hidden_states).float()
    config = model.config.get_text_config()
    # Names that only some families' configs have: Cohere's and Gemma's ways to shape logits
    scale, softcap = getattr(config, "logit_scale", None), getattr(config, "final_logit_softcapping", None)
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return logits


def mean_over_actions(
    model: PreTrainedModel, hidden_states: torch.Tensor, table: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    r"""
    sum_a pi(a|s) table_a, some states at a time; the backward pass computes their logits again.

    Args:
        model (`PreTrainedModel`): The policy.
        hidden_states (`torch.Tensor` of shape `(N, H)`): Its trunk's, of the states s.
        table (`torch.Tensor` of shape `(V, R)`): One row for each action.
        temperature (`float`, *optional*, defaults to `1.0`): Of pi.

    Returns:
        `torch.Tensor` of shape `(N, R)`, float32.
    """

    def mean(hidden_states):
        logits = logits_of(model, hidden_states)
        with torch.autocast(logits.device.type, enabled=False):
            return (logits / temperature).softmax(dim=-1) @ table.float()

    return torch.cat([checkpoint(mean, chunk, use_reentrant=False) for chunk in hidden_states.split(CHUNK_SIZE)])
