"""The KL divergence of the policy from its reference: estimates, the penalty, and the control of its coefficient."""

from dataclasses import dataclass

import torch


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    r"""
    Estimates KL(pi || pi_ref) per token from tokens sampled from pi, with d = log pi - log pi_ref.

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
    dtype = torch.promote_types(torch.promote_types(logps.dtype, ref_logps.dtype), torch.float32)
    difference = logps.to(dtype) - ref_logps.to(dtype)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"`estimator` must be 'k1', 'k2' or 'k3', got {estimator!r}.")


def kl_estimates(logps: torch.Tensor, ref_logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns every [`kl_estimate`], `(B, T)`, by its name."""
    return {name: kl_estimate(logps, ref_logps, name) for name in ("k1", "k2", "k3")}


def kl_penalized(
    rewards: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor, coef: float
) -> torch.Tensor:
    r"""
    Takes the KL to the reference off the rewards: r_t - coef k1_t at the chosen tokens, 0 elsewhere.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): r_t.
        logps (`torch.Tensor` of shape `(B, T)`): log pi(a_t|s_t) of the policy that sampled the tokens.
        ref_logps (`torch.Tensor` of shape `(B, T)`): log pi_ref(a_t|s_t).
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.
        coef (`float`): Reward per nat.

    Returns:
        `torch.Tensor` of shape `(B, T)`.

    Reference: Ziegler et al. 2019, https://huggingface.co/papers/1909.08593, eq. 2.
    """
    return torch.where(mask.bool(), rewards - coef * kl_estimate(logps, ref_logps, "k1"), 0)


@dataclass
class KLController:
    r"""
    A proportional controller of the KL coefficient.

        e    = clip(KL / target - 1, -0.2, 0.2)
        beta <- beta (1 + e min(n / horizon, 1))

    with n the number of completions seen since the last update; the `min` keeps beta positive however large a batch
    is. Without a `target`, beta stays what it is.

    Args:
        coef (`float`): beta, the present coefficient.
        target (`float`, *optional*): Wanted KL per completion (summed over its tokens), in nats.
        horizon (`int`, *optional*, defaults to `10000`): Completions over which beta can change by a fifth.
        kl_sum (`float`, *optional*, defaults to `0.0`): KL of the completions seen since the last update, in nats.
        num_completions (`int`, *optional*, defaults to `0`): n, how many these are.

    Reference: Ziegler et al. 2019, https://huggingface.co/papers/1909.08593, section 2.2.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000
    kl_sum: float = 0.0
    num_completions: int = 0

    def observe(self, kl_sum: float, num_completions: int) -> None:
        """Records completions whose KL (nats, summed over tokens and completions) is `kl_sum`."""
        self.kl_sum += kl_sum
        self.num_completions += num_completions

    def update(self) -> None:
        """Moves `coef` by the KL observed since the last update, and forgets that KL."""
        if self.target is not None and self.num_completions > 0:
            error = self.kl_sum / self.num_completions / self.target - 1
            self.coef *= 1 + max(-0.2, min(0.2, error)) * min(self.num_completions / self.horizon, 1)
        self.kl_sum, self.num_completions = 0.0, 0
