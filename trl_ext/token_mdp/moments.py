"""Moments over chosen tokens: means, variances, whitening, and the share of a variance that the critic explains."""

from collections.abc import Callable

import torch


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean of `x` over the positions where `mask` is 1, a scalar; 0 if there are no such positions."""
    chosen = mask.bool()
    return torch.where(chosen, x, 0).to(torch.promote_types(x.dtype, torch.float32)).sum() / chosen.sum().clamp(min=1)


def masked_var(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the unbiased variance (divisor n - 1) of `x` where `mask` is 1, a scalar; 0 for fewer than two positions."""
    return combine_moments(masked_moments(x, mask).unsqueeze(0))[2]


def masked_moments(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns count, mean and sum of squared deviations of `x` where `mask` is 1, `(3,)`, for [`combine_moments`]."""
    chosen = mask.bool()
    count = chosen.sum()
    mean = masked_mean(x, mask)
    deviation = torch.where(chosen, x.to(mean.dtype) - mean, 0)
    return torch.stack([count.to(mean.dtype), mean, deviation.square().sum()])


def combine_moments(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""
    Combines the moments of parts into those of the whole, exactly, whatever the partition.

        n = sum n_i,   mean = sum n_i mean_i / n,   M2 = sum M2_i + sum n_i (mean_i - mean)^2,   var = M2 / (n - 1)

    Args:
        moments (`torch.Tensor` of shape `(N, 3)`): One row of [`masked_moments`] per part (e.g. per process).

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: count, mean and unbiased variance, scalars.

    Reference: Chan, Golub & LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """
    counts, means, squares = moments.unbind(dim=1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    var = (squares.sum() + (counts * (means - mean).square()).sum()) / (count - 1).clamp(min=1)
    return count, mean, var


def moments_of_all(
    xs: list[torch.Tensor], mask: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    Combines [`masked_moments`] of several tensors over all processes, which are asked once.

    Args:
        xs (`list[torch.Tensor]`): K tensors of shape `(B, T)`.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the positions that count.
        gather (`Callable`, *optional*): Joins `(1, K, 3)` of each process along the first dimension.

    Returns:
        `list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]`: count, mean and unbiased variance of each of the K.
    """
    gathered = gather(torch.stack([masked_moments(x, mask) for x in xs]).unsqueeze(0))
    return [combine_moments(moments) for moments in gathered.unbind(dim=1)]


def credit_moments(
    advantages: torch.Tensor,
    returns: torch.Tensor,
    values: torch.Tensor | None,
    mask: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> dict[str, torch.Tensor]:
    """
    Sums up what was estimated of a batch: means, the deviation of advantages, and [`explained_variance`].

    Args:
        advantages, returns, values (`torch.Tensor` of shape `(B, T)`): A_t, G_t and V(s_t); without a critic there are
            no values.
        mask, gather: As [`moments_of_all`] takes them.

    Returns:
        `dict[str, torch.Tensor]`: Scalars, named as they are logged.
    """
    parts = [advantages, returns] if values is None else [advantages, returns, values, returns - values]
    (_, mean, var), (_, mean_returns, var_returns), *of_values = moments_of_all(parts, mask, gather)
    moments = {"advantages/mean": mean, "advantages/std": var.sqrt(), "returns/mean": mean_returns}
    if of_values:
        (_, mean_values, _), (_, _, var_errors) = of_values
        moments["values/mean"] = mean_values
        moments["explained_variance"] = explained_share(var_errors, var_returns, mean_returns)
    return moments


def masked_whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    mean: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
    eps: float = 1e-8,
) -> torch.Tensor:
    """
    Shifts and scales to mean 0 and variance 1: `(x - mean) / sqrt(var + eps)` where `mask` is 1, and 0 elsewhere.

    Args:
        x (`torch.Tensor` of shape `(B, T)`): For instance advantages.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the positions that count.
        mean, var (`torch.Tensor`, *optional*): Scalars; by default those of `x` itself. Give those of the global batch
            when `x` is a part of it.
        eps (`float`, *optional*, defaults to `1e-8`): Keeps a batch without variance finite.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    mean = masked_mean(x, mask) if mean is None else mean
    var = masked_var(x, mask) if var is None else var
    return torch.where(
        mask.bool(), (x.to(torch.promote_types(x.dtype, torch.float32)) - mean) * torch.rsqrt(var + eps), 0
    )


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""
    Returns the share of the returns' variance that the critic explains, a scalar.

        1 - Var[G - V] / Var[G]

    over the chosen tokens: 1 for a perfect critic, 0 for one that knows no more than a constant, negative for a worse
    one; nan where the returns do not vary.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): V(s_t).
        returns (`torch.Tensor` of shape `(B, T)`): G_t.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.
    """
    _, mean, var_returns = combine_moments(masked_moments(returns, mask).unsqueeze(0))
    return explained_share(
        masked_var(returns.to(torch.promote_types(returns.dtype, torch.float32)) - values, mask), var_returns, mean
    )


def explained_share(var_errors: torch.Tensor, var_returns: torch.Tensor, mean_returns: torch.Tensor) -> torch.Tensor:
    """Returns [`explained_variance`] from the moments (of a global batch, say); nan if Var[G] is rounding error."""
    rounding = 8 * torch.finfo(var_returns.dtype).eps * mean_returns
    varies = var_returns > rounding.square()
    return torch.where(varies, 1 - var_errors / var_returns, torch.nan)
