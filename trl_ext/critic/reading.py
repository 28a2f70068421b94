"""Reading a critic: the value of every prefix of a text, and of every token."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..models.lm_head import base_causal_lm
from ..packing.layout import Layout, last_states
from .critic import Critic
from .heads import ActionValueHead, Estimate


def token_values(
    model: PreTrainedModel | PeftModel, critic: Critic, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Returns V of every prefix: entry t is the value of the state in which tokens 0..t have been seen.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy; run only if the critic needs it.
        critic ([`Critic`]): A critic from [`load_critic`], or a trainer's. One of Q gives sum_a pi(a|s) Q(s, a).
        input_ids (`torch.Tensor` of shape `(B, L)`): Prompts and completions.
        attention_mask (`torch.Tensor` of shape `(B, L)`): 1 at real tokens.

    Returns:
        `torch.Tensor` of shape `(B, L)`, float32.
    """
    values = all_estimates(model, critic, input_ids, attention_mask)
    return values if values.dim() == 2 else values[..., Estimate.V]


def token_action_values(
    model: PreTrainedModel | PeftModel, critic: Critic, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Returns Q of every token: entry t is the value of token t after tokens 0..t-1. Less [`token_values`] at t-1 that is
    the token's advantage.

    Args:
        model, input_ids, attention_mask: As [`token_values`] takes them.
        critic ([`Critic`]): A critic of Q, from [`load_critic`] for a policy of [`QActorCriticTrainer`], or that trainer's.

    Returns:
        `torch.Tensor` of shape `(B, L)`, float32; nan at the first token, which has no state before it.

    Raises:
        ValueError: when the critic is one of V.
    """
    if not isinstance(critic.value_head, ActionValueHead):
        raise ValueError(
            "This critic values states, not actions: use `token_values`, or train a `QActorCriticTrainer`."
        )
    q = all_estimates(model, critic, input_ids, attention_mask)[:, :-1, Estimate.Q]
    return nn.functional.pad(q, (1, 0), value=torch.nan)


@torch.no_grad()
def all_estimates(model, critic, input_ids, attention_mask) -> torch.Tensor:
    """Returns the critic's estimates of every prefix, `(B, L)` or `(B, L, 4)`."""
    layout = last_states(input_ids, attention_mask, num_states=input_ids.size(1))
    return critic(model, policy_states(model, critic, layout), layout)


@torch.no_grad()
def policy_states(model: PreTrainedModel | PeftModel, critic: Critic, layout: Layout) -> torch.Tensor | None:
    """Returns the last hidden states `(R, L, H)` of the policy's trunk over the rows of a layout, if the critic needs them."""
    if not critic.reads_policy:
        return None
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "`token_values` and `pretrain_critic` do not see the virtual tokens of a prompt-tuned policy."
        )
    trunk = base_causal_lm(model).base_model
    return trunk(**layout.inputs_of(trunk), use_cache=False).last_hidden_state
