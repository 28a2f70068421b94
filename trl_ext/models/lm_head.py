"""Logits, and means over the next token, from hidden states of a policy, a chunk of states at a time."""

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


# Tokens whose logits over the vocabulary are held at once
CHUNK_SIZE = 256


def base_causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Returns the language model, or the classifier on one, out of its PEFT wrapper if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def logits_of(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Returns the logits `(N, V)`, float32, of the trunk's last hidden states `(N, H)`.

    The model's own forward makes them, with the trunk answered: families scale, cap and cut their logits under ever new
    names. The forward is that of the class, since one that was put on the instance (by TRL, by accelerate) stays bound
    to that instance when the model is copied.
    """
    trunk = getattr(model, "base_model", model)
    if trunk is model:  # a model without a trunk of its own has a plain head
        return model.get_output_embeddings()(hidden_states).float()
    name = model.base_model_prefix
    model._modules[name] = AnsweredTrunk(trunk, hidden_states.unsqueeze(0))
    try:
        input_ids = torch.zeros(1, len(hidden_states), dtype=torch.long, device=hidden_states.device)
        return type(model).forward(model, input_ids=input_ids, use_cache=False).logits.squeeze(0).float()
    finally:
        model._modules[name] = trunk


class AnsweredTrunk:
    """
    Stands for a trunk that has run, as have its hooks: the output is known, and attributes are those of the trunk.
    """

    def __init__(self, trunk: torch.nn.Module, hidden_states: torch.Tensor):
        self.trunk, self.hidden_states = trunk, hidden_states

    def __call__(self, *args, **kwargs):
        return TrunkOutput(self.hidden_states)

    def __getattr__(self, name: str):
        attribute = getattr(self.trunk, name)
        # Some models call their trunk's decoder, past the trunk (OPT, BART)
        return AnsweredTrunk(attribute, self.hidden_states) if isinstance(attribute, torch.nn.Module) else attribute


class TrunkOutput(tuple):
    """A trunk's last hidden state, and None for everything else that outputs of trunks hold."""

    def __new__(cls, hidden_states: torch.Tensor):
        return super().__new__(cls, (hidden_states,))

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def mean_over_actions(
    model: PreTrainedModel, hidden_states: torch.Tensor, table: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> torch.Tensor:
    r"""
    Computes sum_a pi(a|s) table_a, some states at a time; the backward pass computes their logits again.

    Args:
        model (`PreTrainedModel`): The policy.
        hidden_states (`torch.Tensor` of shape `(N, H)`): The last ones of its trunk, in the states s.
        table (`torch.Tensor` of shape `(V, R)`): One row for each action.
        temperature (`float`, *optional*, defaults to `1.0`): The temperature of pi.

    Returns:
        `torch.Tensor` of shape `(N, R)`, float32.
    """

    def mean(hidden_states):
        logits = logits_of(model, hidden_states)
        with torch.autocast(logits.device.type, enabled=False):
            return (logits / temperature).softmax(dim=-1) @ table.float()

    return torch.cat([checkpoint(mean, chunk, use_reentrant=False) for chunk in hidden_states.split(CHUNK_SIZE)])
