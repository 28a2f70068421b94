"""The rewards of tokens in a rollout, from which advantages are then estimated."""

import torch

from ..token_mdp import carry_to_own_token, place_on_last_token
from .rollout import Rollout


def token_rewards(rollout: Rollout, truncation: str, missing_eos_penalty: float) -> torch.Tensor:
    """
    Places the rewards of a rollout on its tokens.

    Args:
        rollout ([`Rollout`]): Rewarded completions.
        truncation (`str`): With `"bootstrap"` a completion that was cut earns no reward of the whole, for which the
            value of its last state stands; with `"penalty"` it earns `missing_eos_penalty` less.
        missing_eos_penalty (`float`): In units of the reward.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where the policy did not choose the token.
    """
    mask, rewards, cut = rollout.chosen, rollout.rewards.nan_to_num(), ~rollout.terminated
    if truncation == "bootstrap":
        rewards = torch.where(cut, 0, rewards)
    elif truncation == "penalty":
        rewards = rewards - missing_eos_penalty * cut
    rewards = place_on_last_token(rewards, mask)
    if rollout.token_rewards is not None:
        rewards = rewards + carry_to_own_token(rollout.token_rewards, mask)
    return rewards


def bootstrap_values(rollout: Rollout, state_values: torch.Tensor) -> torch.Tensor:
    """
    Picks what is expected after completions that were cut.

    Args:
        rollout ([`Rollout`]): The completions.
        state_values (`torch.Tensor` of shape `(B, T + 1)`): V before each token, and after the last one.

    Returns:
        `torch.Tensor` of shape `(B,)`: V of the last state; 0 where the completion ended by itself.
    """
    lengths = rollout.completion_mask.sum(dim=1, keepdim=True)
    return torch.where(rollout.terminated, 0, state_values.gather(1, lengths).squeeze(1))
