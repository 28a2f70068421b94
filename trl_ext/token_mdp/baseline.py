r"""
Baselines: the return that a token is compared with, from the critic and from other completions.

    b_t = m + sum_k w_k (x_kt - m_k)

with m the mean return, and m_k the mean of x_k, over the chosen tokens of all *other* completions, so that no completion
is compared with itself. The x_k are what may be known before token t is chosen: the mean return of the other completions
of its prompt, that of the others at the same step, and the critic's V(s_t). The weights w minimise the variance of
G_t - b_t over past rollouts (least squares): a critic that says nothing gets no weight, however loudly it says so.

The policy gradient stays unbiased, since neither m, nor x_kt, nor w depends on token t or on what follows it; and what
is added to every return is added to m alone, so that advantages stay as they are.

Reference: Williams 1992, https://doi.org/10.1007/BF00992696 (baselines); Kool et al. 2019, Buy 4 REINFORCE samples, get
a baseline for free (the mean of the others); Greensmith, Bartlett & Baxter 2004, Variance reduction techniques for
gradient estimates in reinforcement learning (weights of control variates). A gate between critic and mean by the
variance that each leaves is EVPO's, https://huggingface.co/papers/2604.19485.
"""

import itertools

import torch

from .returns import check_same_shape


RIDGE = 1e-2


def token_totals(xs: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """
    Sums up each row over its chosen tokens.

    Args:
        xs (`list[torch.Tensor]`): K tensors of shape `(B, T)`.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.

    Returns:
        `torch.Tensor` of shape `(B, 1 + K)`: the number of chosen tokens, and the sum of each x over them.
    """
    check_same_shape(mask=mask, **{f"x{k}": x for k, x in enumerate(xs)})
    chosen = mask.bool()
    sums = [torch.where(chosen, x, 0).to(torch.promote_types(x.dtype, torch.float32)).sum(dim=1) for x in xs]
    return torch.stack([chosen.sum(dim=1).to(sums[0].dtype), *sums], dim=1)


def mean_of_totals(totals: torch.Tensor) -> torch.Tensor:
    """Returns the mean of each x over the chosen tokens of all rows, `(K,)`, of their [`token_totals`] `(N, 1 + K)`."""
    return totals[:, 1:].sum(dim=0) / totals[:, 0].sum().clamp(min=1)


def means_of_others(totals: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """
    Returns for each row the mean over the chosen tokens of the others.

    Args:
        totals (`torch.Tensor` of shape `(N, 1 + K)`): [`token_totals`] of all rows.
        group_size (`int`, *optional*): Others are those of the same group of so many rows; by default, all.

    Returns:
        `torch.Tensor` of shape `(N, K)`: nan where the others have no token.
    """
    group_size = len(totals) if group_size is None else group_size
    groups = totals.view(-1, group_size, totals.size(1))
    others = (groups.sum(dim=1, keepdim=True) - groups).view_as(totals)
    counts = others[:, :1].round()
    return torch.where(counts > 0, others[:, 1:] / counts, torch.nan)


def step_totals(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sums up the rows at each step: the n-th chosen token of a row is at step n, wherever it stands.

    Args:
        x (`torch.Tensor` of shape `(B, T)`): For instance returns.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.

    Returns:
        `torch.Tensor` of shape `(T, 2)`: the number of rows that reach a step, and the sum of x over them.
    """
    check_same_shape(x=x, mask=mask)
    chosen = mask.bool()
    totals = torch.zeros(mask.size(1), 2, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    ones_and_x = torch.stack([torch.ones_like(x), x], dim=-1)[chosen].to(totals.dtype)
    return totals.index_add(0, steps(mask)[chosen], ones_and_x)


def steps(mask: torch.Tensor) -> torch.Tensor:
    """Returns the step of each chosen token, `(B, T)`, counted from 0."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def step_means_of_others(
    x: torch.Tensor, mask: torch.Tensor, totals: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """
    Returns the mean of x over the other rows at the same step, drawn towards the mean over all steps as if one more
    row had it: few rows get far, and the mean of few is mostly noise.

    Args:
        x, mask (`torch.Tensor` of shape `(B, T)`): As [`step_totals`] takes them.
        totals (`torch.Tensor` of shape `(S, 2)`): [`step_totals`] of all rows, S >= T.
        means (`torch.Tensor` of shape `(B,)`): [`means_of_others`], over all steps.

    Returns:
        `torch.Tensor` of shape `(B, T)`: 0 where `mask` is 0.
    """
    count, total = totals[steps(mask)].unbind(dim=-1)
    chosen = mask.bool()
    return torch.where(chosen, (total - x + means.unsqueeze(1)) / count.clamp(min=1), 0)


def features_of_others(
    returns: torch.Tensor,
    values: torch.Tensor | None,
    mask: torch.Tensor,
    totals: torch.Tensor,
    totals_of_steps: torch.Tensor,
    rows: torch.Tensor,
    group_size: int,
    absent: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Returns what a token's return may be compared with: the mean m, and by how much each x_k is off its own.

    Args:
        returns (`torch.Tensor` of shape `(B, T)`): G_t.
        values (`torch.Tensor` of shape `(B, T)`, *optional*): V(s_t), of a critic.
        mask (`torch.Tensor` of shape `(B, T)`, bool): True at the tokens that the policy chose.
        totals (`torch.Tensor` of shape `(N, 1 + K)`): [`token_totals`] of the returns, and the values if there are any, of
            all completions; those of a prompt are neighbours.
        totals_of_steps (`torch.Tensor` of shape `(S, 2)`): [`step_totals`] of the returns of all completions, S >= T.
        rows (`torch.Tensor` of shape `(B,)`): The place of each of the B completions among the N.
        group_size (`int`): Completions of a prompt.
        absent (`torch.Tensor` of shape `(K,)`): The means to take where the others have no token.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: m `(B,)`, and x_k - m_k `(B, T)`, by name: `group` (0 in groups of
        one), `step` and, with values, `critic`.
    """
    means = means_of_others(totals)[rows]
    means = torch.where(means.isnan(), absent, means)
    mean = means[:, :1]
    of_group = means_of_others(totals, group_size)[rows, :1] - mean
    at_step = step_means_of_others(returns, mask, totals_of_steps, means[:, 0])
    features = {"group": of_group.nan_to_num().expand_as(returns), "step": torch.where(mask, at_step - mean, 0)}
    if values is not None:
        features["critic"] = torch.where(mask, values - means[:, 1:], 0)
    return means[:, 0], features


def least_squares_moments(features: list[torch.Tensor], y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Sums up what [`least_squares_weights`] takes.

    Args:
        features (`list[torch.Tensor]`): K tensors of shape `(B, T)`.
        y (`torch.Tensor` of shape `(B, T)`): The one that they are to explain.
        mask (`torch.Tensor` of shape `(B, T)`): 1 (or True) at the tokens that the policy chose.

    Returns:
        `torch.Tensor` of shape `(K + 1, K + 1)`: sums of the products of each two of `[*features, y]` over the chosen tokens.
    """
    columns = torch.stack([*features, y], dim=-1)[mask.bool()]
    return columns.T @ columns


def least_squares_weights(moments: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """
    Returns the weights w_k between 0 and 1 with which sum_k w_k x_k is nearest to y.

    Args:
        moments (`torch.Tensor` of shape `(K + 1, K + 1)`): [`least_squares_moments`].
        ridge (`float`, *optional*, defaults to `0.01`): The mean square of x, as a share of y's, at which a weight is drawn
            half the way to 0: what hardly varies explains nothing, and may be larger the next time.

    Returns:
        `torch.Tensor` of shape `(K,)`: 0 for all if y is 0.

    Reference: Lawson & Hanson 1974, Solving least squares problems, chapter 23 (weights that may not be negative); Hoerl &
    Kennard 1970, Ridge regression: biased estimation for nonorthogonal problems.
    """
    num_features = len(moments) - 1
    products, targets = moments[:-1, :-1], moments[:-1, -1]
    products = products + ridge * moments[-1, -1] * torch.eye(num_features, dtype=moments.dtype, device=moments.device)
    best, least = torch.zeros_like(targets), 0.0
    if moments[-1, -1] <= 0:
        return best
    # Few features have few subsets: the best weights are those of one, with the others at 0
    for size in range(1, num_features + 1):
        for subset in itertools.combinations(range(num_features), size):
            subset = list(subset)
            weights = torch.zeros_like(targets)
            weights[subset] = torch.linalg.solve(products[subset][:, subset], targets[subset]).clamp(0, 1)
            squares = (weights @ products @ weights - 2 * weights @ targets).item()
            if squares < least:
                best, least = weights, squares
    return best


def explained_by_weights(moments: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    Returns the share of y's squares that sum_k w_k x_k explains, `(...)` of moments `(..., K + 1, K + 1)` and weights
    `(..., K)`; 0 if y is 0.
    """
    remainder = torch.cat([-weights, torch.ones_like(weights[..., :1])], dim=-1).unsqueeze(-1)
    left = (remainder.mT @ moments @ remainder)[..., 0, 0]
    total = moments[..., -1, -1]
    return torch.where(total > 0, 1 - left / total.clamp(min=1e-30), 0)


def combine_features(means: torch.Tensor, features: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """
    Returns the baseline b_t = m + sum_k w_k x_kt.

    Args:
        means (`torch.Tensor` of shape `(B,)`): m of each row.
        features (`list[torch.Tensor]`): K tensors of shape `(B, T)`, their means taken off.
        weights (`torch.Tensor` of shape `(K,)`): w.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    baseline = means.unsqueeze(1).expand_as(features[0])
    for weight, feature in zip(weights, features, strict=True):
        baseline = baseline + weight * feature
    return baseline
