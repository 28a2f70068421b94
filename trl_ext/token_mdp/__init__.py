r"""
Language generation as a token MDP, as pure functions.

The MDP is <S, A, T, R, gamma, K>:

- state s_t: the prompt and the tokens so far; action a_t: the next token; transition: append it (deterministic);
- reward r_t = R(s_t, a_t), discount gamma per own token, horizon K: the longest completion.

A batch holds one episode per row, tensors of shape `(B, T)`:

- `mask[b, t]` is 1 where the policy chose token t. Every other position (padding, the text of a tool or of an
  environment) is *not a time step*: functions step over it, so whatever it holds and however many there are changes
  nothing at the policy's own tokens.
- `rewards[b, t]` is r_t, earned by emitting token t.
- `values[b, t]` is V(s_t): the value of the prefix that token t was drawn from, before it was drawn.
- `bootstrap[b]` is the value of the state after the row's last own token: 0 where the episode ended there, V of that
  state where it was merely cut.

All results are float32, or float64 when an input is.
"""

import torch


def _promote(*tensors: torch.Tensor) -> torch.dtype:
    """The widest dtype among `tensors` and float32: half precision never reaches the recursions."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_same_shape(**tensors: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"Expected tensors of one shape (B, T), got {shapes}.")


def generalized_advantage_estimate(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 0.95,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Generalized advantage estimation over a row's own tokens.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lam A_{t+1}
        G_t     = A_t + V(s_t)                        (the lambda-return, what V is trained towards)

    where t+1 is the next *own* token, V = `bootstrap` and A = 0 past the last one. lam=0 is the one-step temporal
    difference; lam=1 is the discounted return minus V.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        values (`torch.Tensor` of shape `(B, T)`): V(s_t); no gradient flows through it.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the policy's own tokens.
        gamma (`float`, *optional*, defaults to `1.0`): Discount per own token.
        lam (`float` or `torch.Tensor` of shape `(B,)`, *optional*, defaults to `0.95`): The trace decay lambda.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): Value of the state after the last own token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages A and returns G, `(B, T)` each, 0 where `mask` is 0.

    Raises:
        ValueError: when `rewards`, `values` and `mask` differ in shape.

    Reference: Schulman et al. 2016, https://huggingface.co/papers/1506.02438, eq. 16.
    """
    _check_same_shape(rewards=rewards, values=values, mask=mask)
    dtype = _promote(rewards, values) if bootstrap is None else _promote(rewards, values, bootstrap)
    own = mask.bool()
    # `where`, not a product: a masked position may hold inf or nan
    rewards = torch.where(own, rewards, 0).to(dtype)
    values = torch.where(own, values, 0).detach().to(dtype)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.detach().to(dtype)
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(own[:, t], advantage, next_advantage)
        next_value = torch.where(own[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(own[:, t], advantage, 0)
    return advantages, advantages + values


def decoupled_advantage_estimate(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam_policy: float | torch.Tensor = 0.95,
    lam_value: float | torch.Tensor = 1.0,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    [`generalized_advantage_estimate`] with one lambda for the policy's advantages A and another for the critic's
    targets G: a long-sighted critic (lam_value = 1 is unbiased) need not mean noisy advantages.

    Arguments, shapes and errors are those of [`generalized_advantage_estimate`].

    Reference: VC-PPO, Yuan et al. 2025, https://huggingface.co/papers/2503.01491, section 4.2.
    """
    advantages, returns = generalized_advantage_estimate(rewards, values, mask, gamma, lam_policy, bootstrap)
    if lam_value is not lam_policy and not (isinstance(lam_policy, float) and lam_value == lam_policy):
        _, returns = generalized_advantage_estimate(rewards, values, mask, gamma, lam_value, bootstrap)
    return advantages, returns


def discounted_returns(
    rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, bootstrap: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Monte-Carlo returns over a row's own tokens: G_t = r_t + gamma G_{t+1}, with G = `bootstrap` past the last one.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the policy's own tokens.
        gamma (`float`, *optional*, defaults to `1.0`): Discount per own token.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): Value of the state after the last own token.

    Returns:
        `torch.Tensor` of shape `(B, T)`: G_t, 0 where `mask` is 0.

    Raises:
        ValueError: when `rewards` and `mask` differ in shape.

    Reference: Sutton & Barto 2018, Reinforcement Learning: An Introduction, eq. 3.9.
    """
    return generalized_advantage_estimate(rewards, torch.zeros_like(rewards), mask, gamma, 1.0, bootstrap)[1]


def one_step_returns(rewards: torch.Tensor, mask: torch.Tensor, bootstrap: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    The one-step (bandit) view: the whole completion is one action, so every own token carries its whole reward,
    G_t = sum_k r_k (+ `bootstrap`), whatever came before token t.

    Since log pi(y|x) = sum_t log pi(a_t|s_t), the gradient of a completion's log-probability times this return is the
    bandit policy gradient.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the policy's own tokens.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): Value of the state after the last own token.

    Returns:
        `torch.Tensor` of shape `(B, T)`: the completion's reward at each own token, 0 where `mask` is 0.

    Reference: Williams 1992, https://doi.org/10.1007/BF00992696, with one action per episode.
    """
    _check_same_shape(rewards=rewards, mask=mask)
    own = mask.bool()
    total = torch.where(own, rewards, 0).to(_promote(rewards)).sum(dim=1)
    if bootstrap is not None:
        total = total + bootstrap.detach()
    return torch.where(own, total.unsqueeze(1), 0)


def first_own_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The entry of `values` at each row's first own token, `(B, T)` -> `(B,)`: V(s_0), the bandit's baseline. Rows
    without an own token give 0.
    """
    _check_same_shape(values=values, mask=mask)
    own = mask.bool()
    is_first = own & (own.long().cumsum(dim=1) == 1)
    return torch.where(is_first, values, 0).to(_promote(values)).sum(dim=1)


def length_adaptive_lambda(lengths: torch.Tensor, alpha: float = 0.05) -> torch.Tensor:
    r"""
    lambda = 1 - 1 / (alpha l), for a completion of l own tokens: the longer it is, the further credit travels.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`): Number of own tokens.
        alpha (`float`, *optional*, defaults to `0.05`): Larger moves lambda towards 1.

    Returns:
        `torch.Tensor` of shape `(B,)`, in [0, 1): clipped at 0 where `alpha * l < 1`.

    Reference: VAPO, Yue et al. 2025, https://huggingface.co/papers/2504.05118, eq. 9.
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1).to(_promote(lengths)))).clamp(min=0)


def place_on_last_token(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    The holistic reward: r_t = R(x, y) at the row's last own token, 0 before it and everywhere else.

    Args:
        scores (`torch.Tensor` of shape `(B,)`): R(x, y), one score per completion.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the policy's own tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`. A row without an own token gets no reward.

    Raises:
        ValueError: when there is not one score per row.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"Expected scores of shape {tuple(mask.shape[:1])}, one per row, got {tuple(scores.shape)}.")
    own = mask.bool()
    remaining = own.long().flip(1).cumsum(dim=1).flip(1)  # own tokens from t on, t included
    return torch.where(own & (remaining == 1), scores.unsqueeze(1), 0).to(_promote(scores))


def carry_to_own_token(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Rewards between the policy's own tokens as rewards of what led to them: each is carried back to the last own token
    before it (or on to the first, if there is none). The text of an environment or a tool is no time step, but what it
    pays is earned by the turn before it.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): Of any token.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the policy's own tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is 0. Each row sums to what it did, if it has an own token.

    Raises:
        ValueError: when the two differ in shape.
    """
    _check_same_shape(rewards=rewards, mask=mask)
    own = mask.bool()
    # The number of own tokens up to each token tells which it is carried to
    number = (own.long().cumsum(dim=1) - 1).clamp(min=0)
    of_own = torch.zeros_like(rewards, dtype=_promote(rewards)).scatter_add(1, number, rewards.to(_promote(rewards)))
    return torch.where(own, of_own.gather(1, number), 0)


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    r"""
    Per-token estimate of KL(pi || pi_ref) from tokens sampled from pi, with d = log pi - log pi_ref:

        k1 = d                       unbiased, any sign; the one that belongs in the reward
        k2 = d^2 / 2                 biased, non-negative
        k3 = exp(-d) - 1 + d         unbiased, non-negative

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log pi(a_t|s_t) of the sampled tokens.
        ref_logps (`torch.Tensor` of shape `(B, T)`): log pi_ref(a_t|s_t) of the same tokens.
        estimator (`str`, *optional*, defaults to `"k1"`): `"k1"`, `"k2"` or `"k3"`.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in nats.

    Raises:
        ValueError: for an unknown estimator.

    Reference: Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html.
    """
    difference = logps.to(_promote(logps)) - ref_logps.to(_promote(ref_logps))
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"`estimator` must be 'k1', 'k2' or 'k3', got {estimator!r}.")


def kl_penalized(
    rewards: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor, coef: float
) -> torch.Tensor:
    r"""
    Rewards with the KL to the reference taken off per token: r_t - coef k1_t at the own tokens, 0 elsewhere.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        logps (`torch.Tensor` of shape `(B, T)`): log pi(a_t|s_t) of the policy that sampled the tokens.
        ref_logps (`torch.Tensor` of shape `(B, T)`): log pi_ref(a_t|s_t).
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the policy's own tokens.
        coef (`float`): Reward per nat.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Reference: Ziegler et al. 2019, https://huggingface.co/papers/1909.08593, eq. 2.
    """
    return torch.where(mask.bool(), rewards - coef * kl_estimate(logps, ref_logps, "k1"), 0)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `x` over the positions where `mask` is 1, a scalar; 0 when there is none."""
    own = mask.bool()
    return torch.where(own, x, 0).to(_promote(x)).sum() / own.sum().clamp(min=1)


def masked_var(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Unbiased variance (divisor n - 1) of `x` where `mask` is 1, a scalar; 0 for fewer than two positions."""
    _, _, var = combine_moments(masked_moments(x, mask).unsqueeze(0))
    return var


def masked_moments(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`(3,)`: count, mean and sum of squared deviations of `x` where `mask` is 1; what `combine_moments` takes."""
    own = mask.bool()
    count = own.sum()
    mean = masked_mean(x, mask)
    deviation = torch.where(own, x.to(mean.dtype) - mean, 0)
    return torch.stack([count.to(mean.dtype), mean, deviation.square().sum()])


def combine_moments(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Count, mean and unbiased variance of a whole from the moments of its parts, exactly, whatever the partition.

        n = sum n_i,   mean = sum n_i mean_i / n,   M2 = sum M2_i + sum n_i (mean_i - mean)^2,   var = M2 / (n - 1)

    Args:
        moments (`torch.Tensor` of shape `(N, 3)`): One row of [`masked_moments`] per part (e.g. per process).

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: count, mean, variance, scalars.

    Reference: Chan, Golub & LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """
    counts, means, squares = moments.unbind(dim=1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    var = (squares.sum() + (counts * (means - mean).square()).sum()) / (count - 1).clamp(min=1)
    return count, mean, var


def masked_whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    mean: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
    eps: float = 1e-8,
) -> torch.Tensor:
    """
    `(x - mean) / sqrt(var + eps)` where `mask` is 1 and 0 elsewhere, `(B, T)`.

    `mean` and `var` (scalars) default to those of `x` itself; give those of the global batch when `x` is a part of it.
    """
    mean = masked_mean(x, mask) if mean is None else mean
    var = masked_var(x, mask) if var is None else var
    return torch.where(mask.bool(), (x.to(_promote(x)) - mean) * torch.rsqrt(var + eps), 0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    1 - Var[G - V] / Var[G] over the own tokens, a scalar: 1 for a perfect critic, 0 for one that knows no more than a
    constant, negative for a worse one. nan where the returns do not vary.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): V(s_t).
        returns (`torch.Tensor` of shape `(B, T)`): G_t.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the policy's own tokens.
    """
    _, mean, var_returns = combine_moments(masked_moments(returns, mask).unsqueeze(0))
    return explained_share(masked_var(returns.to(_promote(returns)) - values, mask), var_returns, mean)


def explained_share(var_errors: torch.Tensor, var_returns: torch.Tensor, mean_returns: torch.Tensor) -> torch.Tensor:
    """1 - Var[G - V] / Var[G] from the moments themselves (of a global batch, say); nan if Var[G] is rounding error."""
    rounding = 8 * torch.finfo(var_returns.dtype).eps * mean_returns
    varies = var_returns > rounding.square()
    return torch.where(varies, 1 - var_errors / var_returns, torch.nan)
