"""
The critic: a head ([`value_heads`]: V(s), or Q(s, a)) on a trunk, which is the policy's own (shared), an adapter of its
own on the policy's frozen base (adapter), or another model's (separate).

The critic is a child module of the policy, so that one optimizer, one `zero_grad`, one gradient clipping and one DDP,
FSDP or DeepSpeed wrapper hold both. It runs inside the policy's forward, from two hooks, and its values are part of
that forward's output: distributed wrappers see every parameter used, and a shared trunk is not run twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..compat import FusedCausalLMOutput
from ..models.companion import keep_out_of_saves
from ..models.lm_head import base_causal_lm
from ..packing.layout import Layout, current, last_states
from .heads import ActionValueHead, Decisions, ValueHead


CRITIC_NAME = "critic"  # attribute of the policy, prefix of the critic's parameters, and folder of a separate critic


class Critic(nn.Module):
    """
    Values of a sequence's prefixes, by a `value_head` that starts as a [`ValueHead`].

    Args:
        hidden_size (`int`): Width of the trunk's last hidden state.
        trunk (`PreTrainedModel` or `PeftModel`, *optional*): The critic's own trunk; `None` shares the policy's.
        detach (`bool`, *optional*, defaults to `False`): Keep the value gradients off a shared trunk.
    """

    def __init__(self, hidden_size: int, trunk: PreTrainedModel | PeftModel | None = None, detach: bool = False):
        super().__init__()
        self.trunk = trunk
        self.detach = detach
        self.value_head = ValueHead(hidden_size)
        self._hidden_states: torch.Tensor | None = None
        self._recorded: list[torch.Tensor] | None = None
        self._num_states = 0
        self._hooks = []

    def forward(
        self, policy: PreTrainedModel | PeftModel, hidden_states: torch.Tensor | None, layout: Layout
    ) -> torch.Tensor:
        """
        Values of states, i.e. of the prefixes that they end.

        Args:
            policy (`PreTrainedModel` or `PeftModel`): The policy.
            hidden_states (`torch.Tensor` of shape `(R, L, H)`): Its trunk's; may be `None` if not `reads_policy`.
            layout ([`~layouts.Layout`]): What the policy's forward was given, and where in it the states lie.

        Returns:
            `torch.Tensor` of shape `(B, S)`, or `(B, S, 4)` of an action-value head, float32.
        """
        decisions = None
        if hidden_states is not None:
            hidden_states = layout.states(hidden_states)
            decisions = Decisions(base_causal_lm(policy), hidden_states, layout.actions, layout.mask)
        if self.trunk is not None:
            hidden_states = self.trunk_states(layout)
        elif self.detach:
            hidden_states = hidden_states.detach()
        return self.value_head(hidden_states, decisions)

    def trunk_states(self, layout: Layout) -> torch.Tensor:
        """`(B, S, H)`: the states of the critic's own trunk."""
        return layout.states(self.trunk(**layout.inputs_of(self.trunk), use_cache=False).last_hidden_state)

    @property
    def reads_policy(self) -> bool:
        """Whether it needs the hidden states of the policy's trunk."""
        return self.trunk is None or isinstance(self.value_head, ActionValueHead)

    @property
    def is_adapter(self) -> bool:
        """Whether the trunk is an adapter on the policy's base."""
        return isinstance(self.trunk, PeftModel)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """What trains with the critic only: all but a base that it shares."""
        return (p for p in self.parameters() if p.requires_grad) if self.is_adapter else self.parameters()

    def to_device(self, device: torch.device) -> "Critic":
        """To the policy's device, where an adapter's base is already (and may be too quantized to be moved)."""
        (self.value_head if self.is_adapter else self).to(device)
        return self

    @contextmanager
    def recording(self, num_states: int) -> Iterator[list[torch.Tensor]]:
        """
        Collect the values `(B, num_states, ...)` of every scoring forward of the policy within the context: of the last
        prefixes, where entry i from the end belongs to the sequence less its last i tokens.
        """
        self._recorded, self._num_states = [], num_states
        try:
            yield self._recorded
        finally:
            self._recorded = self._hidden_states = None


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """
    Output of a policy's scoring forward with the critic's `state_values` `(B, num_states, ...)`. (Not `values`: outputs are
    dictionaries, and DDP walks theirs by `values()`.)
    """

    state_values: torch.Tensor | None = None


def trunk_inputs(kwargs: dict) -> dict:
    """What another trunk takes of the arguments of a scoring forward."""
    return {
        k: v for k, v in kwargs.items() if k not in ("labels", "shift_labels", "fused_lm_head", "output_router_logits")
    }


def attach_critic(model: PreTrainedModel | PeftModel, critic: Critic) -> None:
    """Make `critic` a child of `model` that sees its scoring forwards (those that return log-probabilities)."""

    def keep_hidden_states(module, args, output):
        if critic._recorded is not None:
            critic._hidden_states = output.last_hidden_state

    def add_values(module, args, kwargs, output):
        if critic._recorded is None:
            return None
        layout = current() or last_states(**trunk_inputs(kwargs), num_states=critic._num_states)
        values = critic(module, critic._hidden_states, layout)
        critic._recorded.append(values)
        critic._hidden_states = None
        return ActorCriticOutput(**output, state_values=values)

    if isinstance(model, PeftModel) and CRITIC_NAME in model.peft_config:
        raise ValueError(f"An adapter is called {CRITIC_NAME!r}, which is the critic's name in the model. Rename it.")
    critic.to_device(model.device)
    model.add_module(CRITIC_NAME, critic)
    critic._hooks = [
        base_causal_lm(model).base_model.register_forward_hook(keep_hidden_states),
        model.register_forward_hook(add_values, with_kwargs=True),
    ]
    if critic.is_adapter:  # which PEFT would take for weights of the policy's
        critic._hooks.append(model.register_state_dict_post_hook(leave_out_critic))
    keep_out_of_saves(model, CRITIC_NAME)


def leave_out_critic(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """A hook after `state_dict`."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}{CRITIC_NAME}.")]:
        del state_dict[name]


def detach_critic(model: PreTrainedModel | PeftModel) -> None:
    """Undo [`attach_critic`], if it was ever done."""
    critic = model._modules.pop(CRITIC_NAME, None)
    if critic is not None:
        for hook in critic._hooks:
            hook.remove()


def hidden_size_of(model: PreTrainedModel | PeftModel) -> int:
    """Width of the last hidden state: what the LM head takes, which some models project down to."""
    head = base_causal_lm(model).get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper):  # of a head that is trained whole, or some of its tokens
        head = head.original_module
    return (head.get_base_layer() if isinstance(head, BaseTunerLayer) else head).in_features
