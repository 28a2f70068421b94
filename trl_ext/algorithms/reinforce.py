r"""
REINFORCE on the token MDP: the Monte-Carlo policy gradient.

    grad J = E[ sum_t grad log pi(a_t|s_t) (G_t - b) ]

with G_t the discounted return from token t on, or (`one_step_mdp`) the reward of the whole completion taken as one
action. The baseline b is 0, the mean return of other completions, or that and a value function
([`~trl_ext.token_mdp.baseline`]).

Reference: Williams 1992, https://doi.org/10.1007/BF00992696; Sutton & Barto 2018, section 13.3-13.4.
"""

import textwrap
from dataclasses import dataclass, field

import torch

from .. import token_mdp
from ..actor_critic.config import ActorCriticConfig, check_on_policy
from ..actor_critic.trainer import ActorCriticTrainer
from ..training.arguments import document_fields


ONLY_WITH_CRITIC = ["critic_model_name_or_path", "critic_detach", "critic_warmup_steps", "cliprange_value"]


@document_fields
@dataclass
class ReinforceConfig(ActorCriticConfig):
    """Configuration of [`ReinforceTrainer`]."""

    one_step_mdp: bool = field(
        default=False,
        metadata={
            "help": "The bandit formulation: the whole completion is one action and every token shares its reward."
        },
    )
    baseline: str = field(
        default="batch_mean",
        metadata={
            "help": "What is subtracted from the returns: `'none'`, `'batch_mean'` (of the other completions of the global "
            "generation batch, and of the prompt) or `'value'` (the critic, too, of the prompt with `one_step_mdp`). "
            "Without `'value'` there is no critic.",
            "choices": ["none", "batch_mean", "value"],
        },
    )

    def __post_init__(self):
        super().__post_init__()
        check_on_policy(self, "REINFORCE")
        unused = [name for name in ONLY_WITH_CRITIC if getattr(self, name) != self.__dataclass_fields__[name].default]
        if self.baseline != "value" and unused:
            raise ValueError(
                f"`baseline={self.baseline!r}` has no critic, so {', '.join(unused)} would do nothing. Remove them, or "
                "set `baseline='value'`."
            )
        for name, needs_critic in (
            ("truncation", self.truncation == "bootstrap"),
            ("critic", self.critic != "shared"),
        ):
            if self.baseline != "value" and needs_critic:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` needs a critic, and `baseline={self.baseline!r}` has none. Set "
                    "`baseline='value'`."
                )


class ReinforceTrainer(ActorCriticTrainer):
    """
    [`ActorCriticTrainer`] with Monte-Carlo returns less a baseline as advantages; the critic is there only as baseline.
    """

    _tag_names = ["trl", "trl_ext", "reinforce"]
    _name = "REINFORCE"
    _paper = {
        "title": "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        "citation": textwrap.dedent("""\
            @article{williams1992reinforce,
                title   = {{Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning}},
                author  = {Ronald J. Williams},
                journal = {Machine Learning},
                volume  = 8,
                pages   = {229--256},
                year    = 1992,
            }"""),
    }
    _method = (
        "Advantages are Monte-Carlo returns, of each token or (`one_step_mdp`) of the whole completion, less a "
        "`baseline`."
    )
    config_class = ReinforceConfig

    @property
    def _has_critic(self):
        return self.args.baseline == "value"

    @property
    def _has_baseline(self):
        return self.args.baseline == "batch_mean" or (self.args.baseline == "value" and super()._has_baseline)

    def returns_of(self, rewards, mask, bootstrap):
        if self.args.one_step_mdp:
            return token_mdp.one_step_returns(rewards, mask, bootstrap)
        return super().returns_of(rewards, mask, bootstrap)

    def _baseline_of(self, rollout, rewards, values, bootstrap):
        if values is not None and self.args.one_step_mdp:  # the value of the prompt is that of the one action
            values = token_mdp.first_own_token(values, rollout.chosen).unsqueeze(1).expand_as(values)
        return super()._baseline_of(rollout, rewards, values, bootstrap)

    def compute_advantages(self, rewards, values, mask, bootstrap):
        returns = self.returns_of(rewards, mask, bootstrap)
        return torch.where(mask, returns if values is None else returns - values, 0), returns
