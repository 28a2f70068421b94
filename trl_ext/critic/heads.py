r"""
The critic's heads, which read values off the hidden state h(s) of a trunk.

    V(s)    = m + d (w . h(s) + b)                      [`ValueHead`]
    Q(s, a) = m + d (w . h(s) + b + (U h(s)) . E_a)     [`ActionValueHead`], with U of shape (R, H) and E of (V, R)

with m and d the mean and the deviation of returns so far, so that what is learned is of the size of 1 whatever rewards
are. Both compute in float32 outside autocast, whatever the trunk's dtype.

Reference: van Hasselt et al. 2016, Learning values across many orders of magnitude (PopArt),
https://huggingface.co/papers/1602.07714.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.lm_head import mean_over_actions


@dataclass
class Decisions:
    """
    The policy's choice in some states.

    Args:
        policy (`PreTrainedModel`): The policy.
        hidden_states (`torch.Tensor` of shape `(B, S, H)`): Hidden states of its trunk.
        actions (`torch.Tensor` of shape `(B, S)`): The token that followed each; any id where none did.
        mask (`torch.Tensor` of shape `(B, S)`, bool): True at states that are real.
    """

    policy: PreTrainedModel
    hidden_states: torch.Tensor
    actions: torch.Tensor
    mask: torch.Tensor

    def mean(self, table: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """Returns sum_a pi(a|s) table_a, `(B, S, R)`, of a table `(V, R)`; 0 where there is no state."""
        means = mean_over_actions(self.policy, self.hidden_states[self.mask], table, temperature)
        return means.new_zeros(*self.mask.shape, table.size(1)).masked_scatter(self.mask.unsqueeze(-1), means)


FORGETTING = 0.1  # share by which a rollout replaces those before it in what is remembered of them
UNITS = {"mean": 0.0, "std": 1.0, "num_rollouts": 0.0}  # before the first


class Units(nn.Module):
    """
    A head whose values are in units of the returns: their `mean` and deviation `std`, over `num_rollouts` so far.

    A subclass names in `_scaled` the parameters that its values are proportional to, and in `_shifted` its biases.
    """

    _scaled: tuple[str, ...] = ("weight", "bias")
    _shifted: tuple[str, ...] = ("bias",)

    def __init__(self):
        super().__init__()
        # Not part of `state_dict`: FSDP2 takes whatever is there for weights that it shards
        for name, value in UNITS.items():
            self.register_buffer(name, torch.tensor(value), persistent=False)

    @property
    def units(self) -> dict[str, torch.Tensor]:
        """Returns the units by name, scalars."""
        return {name: getattr(self, name) for name in UNITS}

    @units.setter
    def units(self, units: dict[str, torch.Tensor]) -> None:
        for name, value in units.items():
            getattr(self, name).copy_(value)

    @property
    def has_units(self) -> bool:
        """True once it has taken any."""
        return self.num_rollouts.item() > 0

    @torch.no_grad()
    def take_units(self, mean: torch.Tensor, var: torch.Tensor) -> bool:
        """
        Moves the units towards a rollout's. All values stay what they are, but at first: a head that says 0 of
        everything says the mean from then on.

        Args:
            mean, var (`torch.Tensor`): Of the rollout's returns, scalars; without variance they have no units.

        Returns:
            `bool`: True at first.
        """
        begins = not self.has_units
        share = max(FORGETTING, 1 / (self.num_rollouts.item() + 1))
        old_mean, old_std = self.mean.clone(), self.std.clone()
        self.mean.lerp_(mean.to(self.mean), share)
        if var > 0:
            self.std.copy_(self.std.square().lerp(var.to(self.std), share).sqrt())
        if not begins:
            for name in self._scaled:
                getattr(self, name).mul_((old_std / self.std).item())
            for name in self._shifted:
                getattr(self, name).add_(((old_mean - self.mean) / self.std).item())
        if var > 0:
            self.num_rollouts.add_(1)
        return begins


class ValueHead(Units):
    """
    V(s) = m + d (w . h(s) + b).

    Starts at the mean return: a random head would be noise in the first advantages (Huang et al. 2022, The 37
    implementation details of PPO). Drawing no random numbers also leaves the rollouts those of a run without a critic.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, decisions: Decisions | None = None) -> torch.Tensor:
        """Returns `(B, S)` of states `(B, S, H)`, whose value does not depend on what is done in them."""
        return self.mean + self.std * state_value(hidden_states, self.weight, self.bias)

    def take_up(self, weight: torch.Tensor) -> None:
        """Starts from the `weight` `(1, H)` of a head of plain rewards, in whose units the values are at first."""
        self.weight.copy_(weight)
        self.num_rollouts.fill_(1)


def state_value(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns w . h(s) + b, `(B, S)`, float32, of hidden states `(B, S, H)`."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return nn.functional.linear(hidden_states.float(), weight.float(), bias.float()).squeeze(-1)


class Estimate(IntEnum):
    """The entries of [`ActionValueHead`]'s output."""

    Q = 0  # Q(s, a) of the action that followed; the only one with gradients of the critic
    V = 1  # sum_a pi(a|s) Q(s, a), with gradients of pi if `all_actions`
    TARGET_Q = 2  # the same two of the target head
    TARGET_V = 3


class ActionValueHead(Units):
    r"""
    Q(s, a) = m + d (w . h(s) + b + (U h(s)) . E_a) for all of a vocabulary, from R numbers per token: what depends on the
    action is of low rank, so that sum_a pi(a|s) Q(s, a) = m + d (w . h(s) + b + (U h(s)) . sum_a pi(a|s) E_a) never
    needs Q of all actions.

    Starts at Q = V of `value_head` (E = 0). The target head is a moving average of this one, and is saved with it.

    Args:
        value_head ([`ValueHead`]): The start of w and b.
        vocab_size (`int`): V, the number of actions.
        rank (`int`): R.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature of the policy.

    Reference: the split into a state's value and what the action adds, Wang et al. 2016,
    https://huggingface.co/papers/1511.06581; the moving target, Lillicrap et al. 2016,
    https://huggingface.co/papers/1509.02971.
    """

    _scaled = ("weight", "bias", "embedding", "target_weight", "target_bias", "target_embedding")
    _shifted = ("bias", "target_bias")

    def __init__(self, value_head: ValueHead, vocab_size: int, rank: int, temperature: float = 1.0):
        super().__init__()
        hidden_size = value_head.weight.size(1)
        self.weight = nn.Parameter(value_head.weight.detach().clone())
        self.bias = nn.Parameter(value_head.bias.detach().clone())
        self.units = value_head.units
        # From numbers of its own: the rollouts stay those of a run without a critic
        random = torch.randn(rank, hidden_size, generator=torch.Generator().manual_seed(0))
        self.projection = nn.Parameter(random.to(self.weight.device) / hidden_size**0.5)
        self.embedding = nn.Parameter(torch.zeros(vocab_size, rank, device=self.weight.device))
        # Buffers, so that what walks over parameters trains none of them
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"target_{name}", parameter.detach().clone())
        self.register_buffer("temperature", torch.tensor(float(temperature), device=self.weight.device))
        self.all_actions = False  # True to let gradients of pi flow through V

    def forward(self, hidden_states: torch.Tensor, decisions: Decisions) -> torch.Tensor:
        """Returns the [`Estimate`]s `(B, S, 4)`, float32, of states `(B, S, H)`."""
        rank = self.embedding.size(1)
        tables = torch.cat([self.embedding, self.target_embedding], dim=1).detach()
        with torch.set_grad_enabled(self.all_actions and torch.is_grad_enabled()):
            mean, target_mean = decisions.mean(tables, self.temperature).split(rank, dim=-1)
        q, v = self._values(hidden_states, decisions, mean, "")
        with torch.no_grad():
            target_q, target_v = self._values(hidden_states, decisions, target_mean, "target_")
        return self.mean + self.std * torch.stack([q, v, target_q, target_v], dim=-1)

    def _values(self, hidden_states, decisions, mean_embedding, prefix):
        """Returns Q of the actions and V, `(B, S)` each, by the weights whose names begin with `prefix`."""
        weight, bias, projection, embedding = (
            getattr(self, prefix + name) for name in ("weight", "bias", "projection", "embedding")
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            base = state_value(hidden_states, weight, bias)
            features = nn.functional.linear(hidden_states.float(), projection.float())
            action_embedding = nn.functional.embedding(decisions.actions, embedding.float())
            q = base + (features * action_embedding).sum(dim=-1)
            v = base.detach() + (features.detach() * mean_embedding).sum(dim=-1)
        return q, v

    @torch.no_grad()
    def update_target(self, rate: float) -> None:
        """Moves the target: target <- target + rate (head - target)."""
        for name, parameter in self.named_parameters():
            getattr(self, f"target_{name}").lerp_(parameter, rate)
