r"""
Q actor-critic: the critic values every token in its state, Q(s, a), and the actor follows what it says.

    q:            grad J = E[ sum_t grad log pi(a_t|s_t) Q(s_t, a_t) ]
    advantage:    grad J = E[ sum_t grad log pi(a_t|s_t) (Q(s_t, a_t) - V(s_t)) ],   V(s) = sum_a pi(a|s) Q(s, a)
    all_actions:  grad J = E[ sum_t sum_a grad pi(a|s_t) Q(s_t, a) ]

The critic is fitted to the lambda-return, with Q' and V' of a target head that moves slowly after it:

    sarsa:           G_t = r_t + gamma [ (1 - lambda) Q'(s_{t+1}, a_{t+1}) + lambda G_{t+1} ]
    expected_sarsa:  G_t = r_t + gamma [ (1 - lambda) V'(s_{t+1}) + lambda G_{t+1} ]

Unlike that of generalized advantage estimation, this credit holds nothing of what was sampled after the token: less
noise, for whatever the critic gets wrong.

References: Sutton et al. 1999, Policy gradient methods for reinforcement learning with function approximation, theorem
1; Sutton & Barto 2018, eq. 12.19-12.20 (the returns); Asadi et al. 2017, https://huggingface.co/papers/1709.00503
(all actions).
"""

import textwrap
from dataclasses import dataclass, field, replace

import torch
from transformers import TrainerCallback

from .. import token_mdp
from ..actor_critic.config import ActorCriticConfig
from ..actor_critic.trainer import ActorCriticTrainer
from ..critic.heads import ActionValueHead, Estimate
from ..training.arguments import document_fields


@document_fields
@dataclass
class QActorCriticConfig(ActorCriticConfig):
    """Configuration of [`QActorCriticTrainer`]."""

    policy_gradient: str = field(
        default="advantage",
        metadata={
            "help": "What the actor follows: `'q'`, the value of the sampled token; `'advantage'`, the same less the mean "
            "over all tokens; `'all_actions'`, the value of every token of the vocabulary, weighted by its "
            "probability.",
            "choices": ["q", "advantage", "all_actions"],
        },
    )
    q_target: str = field(
        default="expected_sarsa",
        metadata={
            "help": "What the critic's target takes for the value of the next state: that of the token sampled in it "
            "('sarsa') or the mean over all tokens ('expected_sarsa').",
            "choices": ["sarsa", "expected_sarsa"],
        },
    )
    q_rank: int = field(
        default=64, metadata={"help": "Numbers per token of the vocabulary by which Q tells tokens apart."}
    )
    target_update_rate: float = field(
        default=0.05,
        metadata={
            "help": "Share by which the target head moves towards the critic's at each optimizer step; 1 is no target head."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.q_rank < 1:
            raise ValueError(f"`q_rank` must be at least 1, got {self.q_rank}.")
        if not 0 < self.target_update_rate <= 1:
            raise ValueError(f"`target_update_rate` must be above 0 and at most 1, got {self.target_update_rate}.")
        for name in ("lam_policy", "length_adaptive_alpha"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` sets how far the actor looks along what was sampled, and the actor of Q actor-critic "
                    "follows the critic alone. Remove it; `lam` is that of the critic's targets."
                )
        if self.policy_gradient == "all_actions" and self.whiten_advantages:
            raise ValueError(
                "`policy_gradient='all_actions'` has no advantages of tokens, so there are none to whiten. Set "
                "`whiten_advantages=False`."
            )


class UpdateTarget(TrainerCallback):
    """Moves the target head after each optimizer step."""

    def __init__(self, head: ActionValueHead):
        self.head = head

    def on_step_end(self, args, state, control, **kwargs):
        self.head.update_target(args.target_update_rate)


class QActorCriticTrainer(ActorCriticTrainer):
    """
    [`ActorCriticTrainer`] whose critic values actions: advantages are Q(s, a) - V(s) as the critic has them, and it is
    fitted to SARSA or expected SARSA targets. With `policy_gradient="all_actions"` the loss of the parent holds no
    advantage (but its KL, if `beta` is not 0), and the mean of -V(s_t) over the tokens is added.
    """

    _tag_names = ["trl", "trl_ext", "q-actor-critic"]
    _name = "Q Actor-Critic"
    _paper = {
        "title": "Policy Gradient Methods for Reinforcement Learning with Function Approximation",
        "citation": textwrap.dedent("""\
            @inproceedings{sutton1999policy,
                title     = {{Policy Gradient Methods for Reinforcement Learning with Function Approximation}},
                author    = {Richard S. Sutton and David McAllester and Satinder Singh and Yishay Mansour},
                booktitle = {Advances in Neural Information Processing Systems},
                volume    = 12,
                year      = 1999,
            }"""),
    }
    _method = (
        "The critic values every token in its state, Q(s, a), and the policy follows what it says (`policy_gradient`), "
        "not what was sampled afterwards."
    )
    config_class = QActorCriticConfig
    _reads_head = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "The target head is a moving average of weights that FSDP and DeepSpeed shard. Use DDP, or `A2CTrainer`."
            )
        self.add_callback(UpdateTarget(self.critic.value_head))

    def _set_head(self, critic):
        vocab_size = self._model.config.get_text_config().vocab_size
        if not isinstance(critic.value_head, ActionValueHead):
            critic.value_head = ActionValueHead(critic.value_head, vocab_size, self.args.q_rank)
        saved, needed = tuple(critic.value_head.embedding.shape), (vocab_size, self.args.q_rank)
        if saved != needed:
            raise ValueError(
                f"`critic_model_name_or_path={self.args.critic_model_name_or_path!r}` tells {saved[0]} tokens apart by "
                f"{saved[1]} numbers, and this training {needed[0]} by {needed[1]}. Set `q_rank={saved[1]}` and use a "
                "policy of the same tokenizer, or leave it unset."
            )
        critic.value_head.temperature.fill_(self.temperature)
        critic.value_head.all_actions = self.args.policy_gradient == "all_actions"

    @staticmethod
    def _state_values(values):
        return values[..., Estimate.TARGET_V]

    @staticmethod
    def _fitted(values):
        return values[..., Estimate.Q]

    def compute_advantages(self, rewards, values, mask, bootstrap):
        """Computes them from `values` `(B, T, 4)`, the [`Estimate`]s; the rest is as in the parent."""
        of_next = Estimate.TARGET_Q if self.args.q_target == "sarsa" else Estimate.TARGET_V
        lam = self.args.lam if self.args.lam_value is None else self.args.lam_value
        # With any X for the values, G_t = r_t + gamma [(1 - lambda) X_{t+1} + lambda G_{t+1}]
        _, returns = token_mdp.generalized_advantage_estimate(
            rewards, values[..., of_next], mask, self.args.gamma, lam, bootstrap
        )
        advantages = values[..., Estimate.Q]
        if self.args.policy_gradient != "q":
            advantages = advantages - values[..., Estimate.V]
        return torch.where(mask, advantages, 0), returns

    def credited(self, rollout, forward):
        rollout = super().credited(rollout, forward)
        if self.args.policy_gradient != "all_actions":
            return rollout
        # Logged, but not followed
        return replace(rollout, credit=replace(rollout.credit, advantages=torch.zeros_like(rollout.credit.advantages)))

    def _with_critic_loss(self, loss, rollout, forward, num_tokens):
        loss, value_losses = super()._with_critic_loss(loss, rollout, forward, num_tokens)
        if self.args.policy_gradient == "all_actions" and not (self._in_critic_warmup and self.model.training):
            values = forward.values[:, :-1, Estimate.V]
            loss = loss - torch.where(rollout.chosen, values, 0).sum() / num_tokens
        return loss, value_losses
