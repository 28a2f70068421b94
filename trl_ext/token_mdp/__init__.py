r"""
Language generation as a token MDP, as pure functions of tensors.

| module | equations |
| --- | --- |
| [`~trl_ext.token_mdp.returns`] | generalized advantage estimation, lambda-returns, Monte-Carlo and one-step returns |
| [`~trl_ext.token_mdp.rewards`] | rewards of a whole, of what an environment pays, of a potential's rise, on tokens |
| [`~trl_ext.token_mdp.baseline`] | what a return is compared with: means of other completions and the critic, by least squares |
| [`~trl_ext.token_mdp.kl`] | estimates of the KL to the reference, the penalty, and the controller of its coefficient |
| [`~trl_ext.token_mdp.losses`] | the critic's loss |
| [`~trl_ext.token_mdp.nucleus`] | the policy on the nucleus of another |
| [`~trl_ext.token_mdp.moments`] | masked means and variances, whitening, explained variance |

The MDP is <S, A, T, R, gamma, K>:

- state s_t: the prompt and the tokens so far; action a_t: the next token; transition: append it (deterministic);
- reward r_t = R(s_t, a_t), discount gamma per chosen token, horizon K: the longest completion.

A batch holds one episode per row, tensors of shape `(B, T)`:

- `mask[b, t]` is 1 where the policy chose token t. Every other position (padding, the text of a tool or of an
  environment) is *not a time step*: functions step over it, so whatever it holds and however many there are changes
  nothing at the chosen tokens.
- `rewards[b, t]` is r_t, earned by emitting token t.
- `values[b, t]` is V(s_t): the value of the prefix that token t was drawn from, before it was drawn.
- `bootstrap[b]` is the value of the state after the row's last chosen token: 0 where the episode ended there, V of that
  state where it was merely cut.

All results are float32, or float64 when an input is.
"""

from .baseline import (
    combine_features,
    explained_by_weights,
    features_of_others,
    least_squares_moments,
    least_squares_weights,
    mean_of_totals,
    means_of_others,
    step_means_of_others,
    step_totals,
    token_totals,
)
from .kl import KLController, kl_estimate, kl_estimates, kl_penalized
from .losses import value_loss
from .moments import (
    combine_moments,
    credit_moments,
    explained_share,
    explained_variance,
    masked_mean,
    masked_moments,
    masked_var,
    masked_whiten,
    moments_of_all,
)
from .nucleus import masked_log_probs
from .returns import (
    action_value_targets,
    decoupled_advantage_estimate,
    discounted_returns,
    first_own_token,
    generalized_advantage_estimate,
    length_adaptive_lambda,
    one_step_returns,
)
from .rewards import (
    carry_to_own_token,
    place_on_last_token,
    rewards_of_completions,
    rewards_of_turns,
    shaped_rewards,
)


__all__ = [
    "KLController",
    "action_value_targets",
    "carry_to_own_token",
    "combine_features",
    "combine_moments",
    "credit_moments",
    "decoupled_advantage_estimate",
    "discounted_returns",
    "explained_by_weights",
    "explained_share",
    "explained_variance",
    "features_of_others",
    "first_own_token",
    "generalized_advantage_estimate",
    "kl_estimate",
    "kl_estimates",
    "kl_penalized",
    "least_squares_moments",
    "least_squares_weights",
    "length_adaptive_lambda",
    "masked_log_probs",
    "masked_mean",
    "masked_moments",
    "masked_var",
    "masked_whiten",
    "mean_of_totals",
    "means_of_others",
    "moments_of_all",
    "one_step_returns",
    "place_on_last_token",
    "rewards_of_completions",
    "rewards_of_turns",
    "shaped_rewards",
    "step_means_of_others",
    "step_totals",
    "token_totals",
    "value_loss",
]
