"""
The critic: a head (V(s) or Q(s, a), see [`~trl_ext.critic.heads`]) on a trunk, which is the policy's own (shared), an
adapter of its own on the policy's frozen base (adapter), or another model's (separate).

The critic is a child module of the policy, so that one optimizer, one `zero_grad`, one gradient clipping and one DDP,
FSDP or DeepSpeed wrapper hold both. It runs inside the policy's forward, from two hooks, and its values are part of
that forward's output: distributed wrappers see every parameter used, and a shared trunk is not run twice.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModel, PreTrainedModel

from ..compat import FusedCausalLMOutput
from ..models.companion import Companion, split_state_dict
from ..models.lm_head import base_causal_lm
from ..packing.layout import CURRENT, Layout, last_states
from .files import (
    ADAPTER_NAME,
    CRITIC_NAME,
    VALUE_HEAD_FILE,
    embedding_shape,
    load_adapter_weights,
    load_value_head,
    save_adapter,
    save_value_head,
)
from .heads import ActionValueHead, Decisions, ValueHead


class Critic(Companion):
    """
    A critic that values a sequence's prefixes, by a `value_head` that starts as a [`ValueHead`].

    Args:
        hidden_size (`int`): Width of the trunk's last hidden state.
        trunk (`PreTrainedModel` or `PeftModel`, *optional*): The critic's own trunk; `None` shares the policy's.
        detach (`bool`, *optional*, defaults to `False`): Keep the value gradients off a shared trunk.
    """

    child_name = CRITIC_NAME

    def __init__(self, hidden_size: int, trunk: PreTrainedModel | PeftModel | None = None, detach: bool = False):
        super().__init__()
        self.trunk = trunk
        self.detach = detach
        self.value_head = ValueHead(hidden_size)

    def forward(
        self, policy: PreTrainedModel | PeftModel, hidden_states: torch.Tensor | None, layout: Layout
    ) -> torch.Tensor:
        """
        Returns values of states, i.e. of the prefixes that they end.

        Args:
            policy (`PreTrainedModel` or `PeftModel`): The policy.
            hidden_states (`torch.Tensor` of shape `(R, L, H)`): The last ones of its trunk; None is enough if not `reads_policy`.
            layout ([`Layout`]): Inputs of the policy's forward, and the places of the states in them.

        Returns:
            `torch.Tensor` of shape `(B, S)`, or `(B, S, 4)` of an action-value head, float32.
        """
        decisions = None
        if self.reads_policy:
            hidden_states = layout.states(hidden_states)
        if isinstance(self.value_head, ActionValueHead):
            decisions = Decisions(base_causal_lm(policy), hidden_states, layout.actions, layout.mask)
        if self.trunk is not None:
            hidden_states = self.trunk_states(layout)
        elif self.detach:
            hidden_states = hidden_states.detach()
        return self.value_head(hidden_states, decisions)

    def trunk_states(self, layout: Layout) -> torch.Tensor:
        """Returns `(B, S, H)`, the states of the critic's own trunk."""
        return layout.states(self.trunk(**layout.inputs_of(self.trunk), use_cache=False).last_hidden_state)

    @property
    def reads_policy(self) -> bool:
        """True if the critic needs the hidden states of the policy's trunk."""
        return self.trunk is None or isinstance(self.value_head, ActionValueHead)

    @property
    def is_adapter(self) -> bool:
        """True if the trunk is an adapter on the policy's base."""
        return isinstance(self.trunk, PeftModel)

    # --- Beside the policy ---

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """Returns all parameters but those of a base that the critic shares."""
        return (p for p in self.parameters() if p.requires_grad) if self.is_adapter else self.parameters()

    def to_device(self, device: torch.device) -> "Critic":
        # An adapter's base is there already, and may be too quantized to be moved
        (self.value_head if self.is_adapter else self).to(device)
        return self

    def attach_to(self, model: PreTrainedModel | PeftModel) -> None:
        """Makes this a child of `model` that sees its scoring forwards (those that return log-probabilities)."""
        if isinstance(model, PeftModel) and CRITIC_NAME in model.peft_config:
            raise ValueError(
                f"An adapter is called {CRITIC_NAME!r}, which is the critic's name in the model. Rename it."
            )
        super().attach_to(model)

    def hooks_on(self, model: PreTrainedModel | PeftModel) -> list[RemovableHandle]:
        def add_values(module, args, kwargs, output):
            current = CURRENT.get()
            if current is None or current.values is None:
                return None
            layout = current.layout or last_states(**trunk_inputs(kwargs), num_states=current.num_states)
            values = self(module, current.hidden_states, layout)
            current.values.append(values)
            return ActorCriticOutput(**output, state_values=values)

        hooks = [model.register_forward_hook(add_values, with_kwargs=True)]
        if self.is_adapter:  # which PEFT would take for weights of the policy's
            hooks.append(model.register_state_dict_post_hook(leave_out_critic))
        return hooks

    def save(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the critic beside the policy in `folder`, in the layout that [`files`] describes."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        folder = Path(folder)
        # An earlier run's critic of the other kind must not be taken for this one's
        if self.trunk is None:
            shutil.rmtree(folder / CRITIC_NAME, ignore_errors=True)
        else:
            (folder / VALUE_HEAD_FILE).unlink(missing_ok=True)
            folder = folder / CRITIC_NAME
            if folder.is_dir() and (folder / ADAPTER_NAME).is_dir() != self.is_adapter:
                shutil.rmtree(folder)
            if self.is_adapter:
                save_adapter(self.trunk, folder / ADAPTER_NAME)
            else:
                self.trunk.save_pretrained(folder, state_dict=split_state_dict(state_dict, "trunk")[1])
        save_value_head(self.value_head, split_state_dict(state_dict, "value_head")[1], folder)

    def restore(self, folder: str | Path) -> None:
        """Fills this critic from what one of its kind wrote to `folder`."""
        if self.trunk is None:
            load_value_head(self.value_head, folder)
            return
        folder = Path(folder) / CRITIC_NAME
        if not folder.is_dir() or (folder / ADAPTER_NAME).is_dir() != self.is_adapter:
            kind = "adapter" if self.is_adapter else "separate"
            raise FileNotFoundError(f"No {CRITIC_NAME}/ folder of a critic of kind {kind!r} in {folder.parent}.")
        if self.is_adapter:
            load_adapter_weights(self.trunk, folder / ADAPTER_NAME)
        else:
            trunk = AutoModel.from_pretrained(folder, dtype=self.trunk.dtype)
            self.trunk.load_state_dict(trunk.state_dict())
        load_value_head(self.value_head, folder)

    def take_up_head(self, folder: str | Path) -> None:
        """Replaces the head by the one that is saved in `folder`, of either kind."""
        shape = embedding_shape(folder)
        if shape is not None:
            self.value_head = ActionValueHead(self.value_head, *shape)
        load_value_head(self.value_head, folder)


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """
    The output of a policy's scoring forward with the critic's `state_values` `(B, num_states, ...)`. (Not `values`: outputs are
    dictionaries, and DDP walks theirs by `values()`.)
    """

    state_values: torch.Tensor | None = None


def trunk_inputs(kwargs: dict) -> dict:
    """Returns those arguments of a scoring forward that another trunk takes."""
    return {
        k: v for k, v in kwargs.items() if k not in ("labels", "shift_labels", "fused_lm_head", "output_router_logits")
    }


def leave_out_critic(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Removes the critic's weights from a policy's `state_dict`; a hook after that."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}{CRITIC_NAME}.")]:
        del state_dict[name]


def hidden_size_of(model: PreTrainedModel | PeftModel) -> int:
    """Returns the width of the last hidden state: what the LM head takes, which some models project down to."""
    head = base_causal_lm(model).get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper):  # of a head that is trained whole, or some of its tokens
        head = head.original_module
    return (head.get_base_layer() if isinstance(head, BaseTunerLayer) else head).in_features
