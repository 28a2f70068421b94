"""Returns and advantages: what each chosen token led to, from the rewards and the critic's values."""

import torch


def generalized_advantage_estimate(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 0.95,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Estimates advantages over a row's chosen tokens (generalized advantage estimation).

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lam A_{t+1}
        G_t     = A_t + V(s_t)                        (the lambda-return, what V is trained towards)

    where t+1 is the next *chosen* token, V = `bootstrap` and A = 0 past the last one. lam=0 is the one-step temporal
    difference; lam=1 is the discounted return minus V.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        values (`torch.Tensor` of shape `(B, T)`): V(s_t); no gradient flows through it.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.
        gamma (`float`, *optional*, defaults to `1.0`): Discount per chosen token.
        lam (`float` or `torch.Tensor` of shape `(B,)`, *optional*, defaults to `0.95`): The trace decay lambda.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): Value of the state after the last chosen token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages A and returns G, `(B, T)` each, 0 where `mask` is 0.

    Raises:
        ValueError: when `rewards`, `values` and `mask` differ in shape.

    Reference: Schulman et al. 2016, https://huggingface.co/papers/1506.02438, eq. 16.
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    dtype = wide_dtype(rewards, values) if bootstrap is None else wide_dtype(rewards, values, bootstrap)
    chosen = mask.bool()
    # `where`, not a product: a masked position may hold inf or nan
    rewards = torch.where(chosen, rewards, 0).to(dtype)
    values = torch.where(chosen, values, 0).detach().to(dtype)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.detach().to(dtype)
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(chosen[:, t], advantage, next_advantage)
        next_value = torch.where(chosen[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(chosen[:, t], advantage, 0)
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
    Estimates the policy's advantages A with one lambda and the critic's targets G with another.

        A_t = sum_k (gamma lam_policy)^k delta_{t+k}
        G_t = sum_k (gamma lam_value)^k delta_{t+k} + V(s_t)        (delta as in generalized advantage estimation)

    So a long-sighted critic (lam_value = 1 is unbiased) need not mean noisy advantages.

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
    Returns what was earned from each chosen token on (Monte Carlo).

        G_t = r_t + gamma G_{t+1}

    where t+1 is the next *chosen* token, and G = `bootstrap` past the last one.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.
        gamma (`float`, *optional*, defaults to `1.0`): Discount per chosen token.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): Value of the state after the last chosen token.

    Returns:
        `torch.Tensor` of shape `(B, T)`: G_t, 0 where `mask` is 0.

    Raises:
        ValueError: when `rewards` and `mask` differ in shape.

    Reference: Sutton & Barto 2018, Reinforcement Learning: An Introduction, eq. 3.9.
    """
    return generalized_advantage_estimate(rewards, torch.zeros_like(rewards), mask, gamma, 1.0, bootstrap)[1]


def action_value_targets(
    rewards: torch.Tensor,
    values: torch.Tensor,
    prices: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 0.95,
    bootstrap: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Returns the targets of a critic of actions that need not learn what is known of them: the price c_t of a token, such
    as that of its KL, which the policy itself gives for any token and which changes with every update.

        G_t = r_t + c_t + gamma [ (1 - lambda) (X_{t+1} - c_{t+1}) + lambda (G_{t+1} - c_{t+1}) ]

    with r_t after prices, and X any estimate of the value of the next state (or of the token sampled in it) before them.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t, with the prices taken off.
        values (`torch.Tensor` of shape `(B, T)`): X_t.
        prices (`torch.Tensor` of shape `(B, T)`): c_t, in units of the reward.
        mask, gamma, lam, bootstrap: As [`generalized_advantage_estimate`] takes them.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is 0.

    Reference: Sutton & Barto 2018, eq. 12.19-12.20, without prices.
    """
    _, returns = generalized_advantage_estimate(rewards, values - prices, mask, gamma, lam, bootstrap)
    return torch.where(mask.bool(), returns + prices, 0)


def one_step_returns(rewards: torch.Tensor, mask: torch.Tensor, bootstrap: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Returns the whole reward at each chosen token, as if the completion were one action (a bandit's).

        G_t = sum_k r_k + bootstrap             over all chosen tokens k, those before t too

    Since log pi(y|x) = sum_t log pi(a_t|s_t), the gradient of a completion's log-probability times this return is the
    bandit policy gradient.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.
        bootstrap (`torch.Tensor` of shape `(B,)`, *optional*): Value of the state after the last chosen token.

    Returns:
        `torch.Tensor` of shape `(B, T)`: the completion's reward at each chosen token, 0 where `mask` is 0.

    Reference: Williams 1992, https://doi.org/10.1007/BF00992696, with one action per episode.
    """
    check_same_shape(rewards=rewards, mask=mask)
    chosen = mask.bool()
    total = torch.where(chosen, rewards, 0).to(wide_dtype(rewards)).sum(dim=1)
    if bootstrap is not None:
        total = total + bootstrap.detach()
    return torch.where(chosen, total.unsqueeze(1), 0)


def first_own_token(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Returns V(s_0), the entry of `values` at each row's first chosen token, which is a bandit's baseline.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): V(s_t).
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.

    Returns:
        `torch.Tensor` of shape `(B,)`: 0 for a row without a chosen token.
    """
    check_same_shape(values=values, mask=mask)
    chosen = mask.bool()
    is_first = chosen & (chosen.long().cumsum(dim=1) == 1)
    return torch.where(is_first, values, 0).to(wide_dtype(values)).sum(dim=1)


def length_adaptive_lambda(lengths: torch.Tensor, alpha: float = 0.05) -> torch.Tensor:
    r"""
    Returns a lambda for each completion: the longer it is, the further credit travels.

        lambda = max(0, 1 - 1 / (alpha l))        with l the number of its chosen tokens

    Args:
        lengths (`torch.Tensor` of shape `(B,)`): Number of chosen tokens.
        alpha (`float`, *optional*, defaults to `0.05`): Larger moves lambda towards 1.

    Returns:
        `torch.Tensor` of shape `(B,)`, in [0, 1).

    Reference: VAPO, Yue et al. 2025, https://huggingface.co/papers/2504.05118, eq. 9.
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1).to(wide_dtype(lengths)))).clamp(min=0)


def wide_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Returns the widest dtype among `tensors` and float32, so that half precision never reaches the recursions."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def check_same_shape(**tensors: torch.Tensor) -> None:
    """Refuses tensors, given by name, that are not of one shape `(B, T)`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"Expected tensors of one shape (B, T), got {shapes}.")
