"""Rewards of tokens: where what was paid, for a whole or for a part, falls in the token MDP."""

import torch

from .returns import check_same_shape


def place_on_last_token(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Places the reward of a whole completion: r_t = R(x, y) at the row's last chosen token, 0 everywhere else.

    Args:
        scores (`torch.Tensor` of shape `(B,)`): R(x, y), one reward per completion.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.

    Returns:
        `torch.Tensor` of shape `(B, T)`. A row without a chosen token gets no reward.

    Raises:
        ValueError: when `scores` does not hold one reward per row.
    """
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"Expected scores of shape {tuple(mask.shape[:1])}, one per row, got {tuple(scores.shape)}.")
    chosen = mask.bool()
    remaining = chosen.long().flip(1).cumsum(dim=1).flip(1)  # chosen tokens from t on, t included
    return torch.where(chosen & (remaining == 1), scores.unsqueeze(1), 0).to(
        torch.promote_types(scores.dtype, torch.float32)
    )


def carry_to_own_token(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Carries each reward back to the last chosen token up to it (or on to the first, where none comes before it). The
    text of an environment or a tool is no time step, but what it pays is earned by the turn before it.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): Rewards of any tokens.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is 0. Each row's sum is unchanged, unless it has no chosen token.

    Raises:
        ValueError: when `rewards` and `mask` differ in shape.
    """
    check_same_shape(rewards=rewards, mask=mask)
    chosen = mask.bool()
    # The number of chosen tokens up to a token is the place, among the chosen, of the one that earns its reward
    number = (chosen.long().cumsum(dim=1) - 1).clamp(min=0)
    wide = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    of_chosen = torch.zeros_like(wide).scatter_add(1, number, wide)
    return torch.where(chosen, of_chosen.gather(1, number), 0)


def rewards_of_completions(
    scores: torch.Tensor,
    terminated: torch.Tensor,
    mask: torch.Tensor,
    truncation: str = "penalty",
    missing_eos_penalty: float = 0.0,
    token_rewards: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Places all that a completion is paid on its tokens.

    Args:
        scores (`torch.Tensor` of shape `(B,)`): R(x, y), one reward per completion; nan for none.
        terminated (`torch.Tensor` of shape `(B,)`, bool): True where a completion ended by itself.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.
        truncation (`str`, *optional*, defaults to `"penalty"`): With `"bootstrap"` a completion that was cut earns no
            R(x, y), which the value of its last state stands for; with `"penalty"` it earns `missing_eos_penalty` less.
        missing_eos_penalty (`float`, *optional*, defaults to `0.0`): In units of the reward.
        token_rewards (`torch.Tensor` of shape `(B, T)`, *optional*): Rewards of tokens, see [`carry_to_own_token`].

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is 0.
    """
    scores, cut = scores.nan_to_num(), ~terminated
    if truncation == "bootstrap":
        scores = torch.where(cut, 0, scores)
    elif truncation == "penalty":
        scores = scores - missing_eos_penalty * cut
    rewards = place_on_last_token(scores, mask)
    return rewards if token_rewards is None else rewards + carry_to_own_token(token_rewards, mask)


def shaped_rewards(potentials: torch.Tensor, gamma: float = 1.0, end: torch.Tensor | None = None) -> torch.Tensor:
    r"""
    Pays each token the rise of a potential.

        r_t     = gamma Phi(s_{t+1}) - Phi(s_t)
        r_{T-1} = R - Phi(s_{T-1})                 with `end`: the episode ends, where no potential is left

    With `end` the discounted rewards sum to gamma^{T-1} R - Phi(s_0): to the worth of R on the last token, less a
    constant that no action changes. So the best policy is that for R at the end, and each token learns at once what it
    did. Without `end`, where somebody goes on from s_T, the sum is gamma^T Phi(s_T) - Phi(s_0).

    Args:
        potentials (`torch.Tensor` of shape `(1 + T,)`): Phi of the prompt, and of the prefix up to each token.
        gamma (`float`, *optional*, defaults to `1.0`): The discount of the MDP.
        end (`torch.Tensor` of shape `()`, *optional*): R, the reward of the whole completion.

    Returns:
        `torch.Tensor` of shape `(T,)`.

    Reference: Ng, Harada and Russell 1999, Policy invariance under reward transformations, theorem 1.
    """
    rises = gamma * potentials[1:] - potentials[:-1]
    if end is not None:
        rises[-1] = end - potentials[-2]
    return rises


def rewards_of_turns(totals: list[float | None], tool_mask: list[int]) -> list[float]:
    """
    Pays each turn what it adds to an environment's total, on the last token of that turn.

    Args:
        totals (`list[float | None]`): The total before the first turn and after each turn. The total before
            counts for the first turn; what is added after the policy's last turn counts for that one. None adds
            nothing.
        tool_mask (`list[int]`): 1 at the tokens that the policy chose. A run of them is a turn.

    Returns:
        `list[float]`: One reward per token, which sum to the last total.
    """
    rewards = [0.0] * len(tool_mask)
    ends = [
        t for t, is_chosen in enumerate(tool_mask) if is_chosen and (t + 1 == len(tool_mask) or not tool_mask[t + 1])
    ]
    before = 0.0
    for turn, after in enumerate(totals[1:]):
        if after is not None:
            rewards[ends[min(turn, len(ends) - 1)]] += after - before
            before = after
    return rewards
