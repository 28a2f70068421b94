r"""
Q actor-critic: the critic values every token in its state, Q(s, a), and the actor follows it as far as it has been right.

    q:            E[ sum_t grad log pi(a_t|s_t) (Q(s_t, a_t) - c_t) ]
    advantage:    E[ sum_t grad log pi(a_t|s_t) ((1 - rho) A_t + rho (Q(s_t, a_t) - V(s_t) - c_t)) ]
    all_actions:  E[ sum_t grad log pi(a_t|s_t) (A_t - w (Q(s_t, a_t) - V(s_t))) + w sum_a grad pi(a|s_t) Q(s_t, a) ]

with V(s) = sum_a pi(a|s) Q(s, a), and

- A_t the advantage that was sampled, the return less its baseline ([`~trl_ext.token_mdp.baseline`]), as in A2C;
- c_t the price of token t: the KL that `kl_in_reward` takes off its reward. The policy itself gives it for any token, and
  it changes with every update, so that Q is the value of a token *before* its own price: there is nothing of it to learn;
- w the weight with which Q - V has best explained A on past rollouts (least squares, between 0 and 1), and rho the share
  of A's squares that Q - V - c, as it stands, has explained there. Both are 0 in the first rollout, and of a critic that
  says nothing; rho is 0 of one that is too loud, too.

All are grad J if Q is true, and the noise of what was sampled after a token is then gone as far as rho or w go. Of a
wrong Q, the first follows it, the second by the share rho, and the third is grad J whatever Q says: what it adds has the
mean of what it takes off (a control variate). Q - V - c is taken less its mean over the batch, an offset that would be a
price of length.

The critic is fitted to the lambda-return, with Q' and V' of a target head that moves slowly after it, and r after prices:

    sarsa:           G_t = r_t + c_t + gamma [ (1 - lambda) Q'(s_{t+1}, a_{t+1}) + lambda G_{t+1} - c_{t+1} ]
    expected_sarsa:  G_t = r_t + c_t + gamma [ (1 - lambda) V'(s_{t+1}) + lambda G_{t+1} - c_{t+1} ]

References: Sutton et al. 1999, Policy gradient methods for reinforcement learning with function approximation, theorem
1; Sutton & Barto 2018, eq. 12.19-12.20 (the returns); Asadi et al. 2017, https://huggingface.co/papers/1709.00503
(all actions); Gu et al. 2017, https://huggingface.co/papers/1611.02247 (a critic as the control variate of what was
sampled, and how far to trust it).
"""

import textwrap
from dataclasses import dataclass, field, replace

import torch
from transformers import TrainerCallback

from .. import token_mdp
from ..actor_critic.baseline import PastRollouts
from ..actor_critic.config import ActorCriticConfig
from ..actor_critic.rollout import Credit
from ..actor_critic.trainer import ActorCriticTrainer
from ..critic.heads import ActionValueHead, Estimate
from ..training.arguments import document_fields


SUMS_OF_TOKENS = ["dapo", "cispo"]  # the losses that are sums over tokens, by the number of tokens of a step


@document_fields
@dataclass
class QActorCriticConfig(ActorCriticConfig):
    """Configuration of [`QActorCriticTrainer`]."""

    policy_gradient: str = field(
        default="advantage",
        metadata={
            "help": "What the actor follows: `'q'`, the value of the sampled token; `'advantage'`, the same less the mean "
            "over all tokens, and sampled advantages, each by the share that the critic has explained so far; "
            "`'all_actions'`, sampled advantages and the values of all tokens of the vocabulary, weighted so that both "
            "together are right on average whatever the critic says.",
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
            if self.policy_gradient == "q" and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` sets how far the actor looks along what was sampled, and `policy_gradient='q'` follows "
                    "the critic alone. Remove it; `lam` is that of the critic's targets."
                )
        if self.policy_gradient == "all_actions" and self.loss_type not in SUMS_OF_TOKENS:
            raise ValueError(
                "`policy_gradient='all_actions'` is right on average if sampled tokens weigh as much as sums over all "
                f"tokens, and `loss_type={self.loss_type!r}` weighs them otherwise. Use 'dapo' or 'cispo', or "
                "`policy_gradient='advantage'`."
            )


class UpdateTarget(TrainerCallback):
    """Moves the target head after each optimizer step."""

    def __init__(self, head: ActionValueHead):
        self.head = head

    def on_step_end(self, args, state, control, **kwargs):
        self.head.update_target(args.target_update_rate)


class QActorCriticTrainer(ActorCriticTrainer):
    """
    [`ActorCriticTrainer`] whose critic values actions: advantages are mixed of Q(s, a) - V(s), as the critic has them, and
    of what was sampled, and the critic is fitted to SARSA or expected SARSA targets. With `policy_gradient="all_actions"`
    the mean of -w V(s_t) over the tokens, with its gradient by the policy, is added to the parent's loss.
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
        "The critic values every token in its state, Q(s, a), and the policy follows what it says (`policy_gradient`), as "
        "far as that has explained what was sampled."
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
        self.past_advantages = PastRollouts(self.accelerator)

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

    def begin_training(self, step):
        super().begin_training(step)
        self.past_advantages = PastRollouts(self.accelerator)

    # --- Credit ---

    def _targets_of(self, rewards, mask, kl):
        return super()._targets_of(rewards, mask, kl) + torch.where(mask, self.kl_controller.coef * kl, 0)

    def _estimated(self, rollout, rewards, values, bootstrap):
        mask, args, learns = rollout.chosen, self.args, self.model.training
        prices = torch.where(mask, self._rewards_of(rollout) - rewards, 0)  # of the KL
        of_next = Estimate.TARGET_Q if args.q_target == "sarsa" else Estimate.TARGET_V
        lam = args.lam if args.lam_value is None else args.lam_value
        returns = token_mdp.action_value_targets(
            rewards, values[..., of_next], prices, mask, args.gamma, lam, bootstrap
        )
        q, v = values[..., Estimate.Q], values[..., Estimate.V]
        credit = Credit(torch.where(mask, q - prices, 0), returns, q)
        if args.policy_gradient == "q":
            return credit
        sampled = super()._estimated(rollout, rewards, v, bootstrap).advantages
        if args.policy_gradient == "all_actions":
            # The sum over all actions has the mean of what is taken off here, so that both together are right on average
            estimated = torch.where(mask, q - v, 0)
            (weight,), *_ = self.past_advantages.weigh([estimated], sampled, mask, learns)
            self._log_all({"action_values/weight": weight.item()})
            weights = torch.full_like(rollout.rewards, weight.item())
            return replace(credit, advantages=sampled - weight * estimated, action_weights=weights)
        estimated = torch.where(mask, q - v - prices, 0)
        _, mean, _ = self._global_moments(estimated, mask)  # an offset would be a price of length
        estimated = torch.where(mask, estimated - mean, 0)
        share = self.past_advantages.weigh([estimated], sampled, mask, learns).past_share
        self._log_all({"action_values/weight": share})
        return replace(credit, advantages=(1 - share) * sampled + share * estimated)

    def _with_critic_loss(self, loss, rollout, forward, num_tokens):
        loss, value_losses = super()._with_critic_loss(loss, rollout, forward, num_tokens)
        weights = rollout.credit.action_weights
        if weights is not None and not (self._in_critic_warmup and self.model.training):
            values = weights.unsqueeze(1) * forward.values[:, :-1, Estimate.V]
            loss = loss - torch.where(rollout.chosen, values, 0).sum() / num_tokens
        return loss, value_losses

    # --- Checkpoints ---

    def state_of_rollouts(self):
        return super().state_of_rollouts() | {"past_advantages": self.past_advantages.moments.value}

    def load_state_of_rollouts(self, state):
        super().load_state_of_rollouts(state)
        self.past_advantages.moments.value = state["past_advantages"]
