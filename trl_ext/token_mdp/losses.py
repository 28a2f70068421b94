"""The critic's loss. The policy's surrogate losses are those of TRL."""

import torch


def value_loss(
    values: torch.Tensor,
    returns: torch.Tensor,
    old_values: torch.Tensor | None = None,
    cliprange: float | None = None,
) -> torch.Tensor:
    r"""
    Returns the squared error of the critic per token, optionally without reward for leaving the rollout's estimate.

        L_t = (V_t - G_t)^2 / 2                                                      without `cliprange`
        L_t = max[(V_t - G_t)^2, (clip(V_t, V_t^old - c, V_t^old + c) - G_t)^2] / 2  with it

    Args:
        values (`torch.Tensor` of shape `(B, T)`): V_t, with gradient.
        returns (`torch.Tensor` of shape `(B, T)`): G_t.
        old_values (`torch.Tensor` of shape `(B, T)`, *optional*): V_t at the time of the rollout.
        cliprange (`float`, *optional*): c, in units of the return.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Reference: Schulman et al. 2017, https://huggingface.co/papers/1707.06347, eq. 9 (the error); the clipping is
    OpenAI Baselines', point 9 of https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.
    """
    error = (values - returns).square()
    if cliprange is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
        error = torch.maximum(error, (clipped - returns).square())
    return error / 2
