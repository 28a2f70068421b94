"""The coefficient of the KL penalty in the reward: fixed, or steered towards a target."""

from dataclasses import dataclass


@dataclass
class KLController:
    r"""
    Proportional controller of the KL coefficient.

        e    = clip(KL / target - 1, -0.2, 0.2)
        beta <- beta (1 + e min(n / horizon, 1))

    with n the number of completions seen since the last update; the `min` keeps beta positive however large a batch
    is. Without a `target`, beta stays what it is.

    Args:
        coef (`float`): beta, the present coefficient.
        target (`float`, *optional*): Wanted KL per completion (summed over its tokens), in nats.
        horizon (`int`, *optional*, defaults to `10000`): Completions over which beta can change by a fifth.

    Reference: Ziegler et al. 2019, https://huggingface.co/papers/1909.08593, section 2.2.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000
    kl_sum: float = 0.0
    num_completions: int = 0

    def observe(self, kl_sum: float, num_completions: int) -> None:
        """Record completions whose KL (nats, summed over tokens and completions) is `kl_sum`."""
        self.kl_sum += kl_sum
        self.num_completions += num_completions

    def update(self) -> None:
        """Move `coef` by what was observed since the last update, and forget it."""
        if self.target is not None and self.num_completions > 0:
            error = self.kl_sum / self.num_completions / self.target - 1
            self.coef *= 1 + max(-0.2, min(0.2, error)) * min(self.num_completions / self.horizon, 1)
        self.kl_sum, self.num_completions = 0.0, 0
