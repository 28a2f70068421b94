"""Tie rates: how many ties rankings hold, and the tie parameters that fit them if all items are of equal worth."""

import math
from collections import Counter

import torch

from .likelihood import check_model


def max_tie_order(ranks: list[list[int | None]]) -> int:
    """Returns the size of the largest tied group."""
    return max((max(_group_sizes(row), default=1) for row in ranks), default=1)


def initial_log_tie(ranks: list[list[int | None]], model: str, max_order: int | None = None) -> list[float]:
    r"""
    Fits the tie parameters as if all items were of equal worth, for learning to start from.

    With a share p of all pairs tied, theta = (1 + p) / (1 - p) (Rao-Kupper) and nu = 2 p / (1 - p) (Davidson). For
    Davidson-Luce, delta_n solves

        delta_n = (number of groups of n) / sum_stages [C(m, n) / sum_k delta_k C(m, k)]        with m = |A|

    Outcomes that were never seen count half a time, which keeps every parameter finite; the groups that are then
    expected are in the ratio of these counts.

    Long rankings may be few, and all of them begin with large ties: where no smaller group was picked though there was
    room for one of t, the data put no bound on delta_t, delta_{t+1}, ... These maximise the likelihood times a prior,

        log delta_n ~ N(min_k [log delta_k + min(0, log C(m, k) - log C(m, n))], 1)        over the k < t

    with m the size of the shortest such stage: a group of n is no likelier than the rarest of the smaller ones, until
    many rankings say that it is. Orders beyond the length of every ranking take the smallest delta.

    Args:
        ranks (`list[list[int | None]]`): One list for each prompt; None or -1 is absent.
        model (`str`): One of `RANKING_MODELS`.
        max_order (`int`, *optional*): D, at least the largest group; that by default.

    Returns:
        `list[float]`: One log theta or log nu, or log delta_2 to log delta_D; empty for models without ties.

    Raises:
        ValueError: For an unknown `model`, or a tie larger than `max_order`.
    """
    check_model(model)
    groups = [_group_sizes(row) for row in ranks]
    if model in ("rao_kupper", "davidson"):
        num_ties = sum(math.comb(n, 2) for sizes in groups for n in sizes)
        num_pairs = sum(math.comb(sum(sizes), 2) for sizes in groups)
        p = max(num_ties, 0.5) / (max(num_ties, 0.5) + max(num_pairs - num_ties, 0.5))
        return [math.log((1 + p) / (1 - p))] if model == "rao_kupper" else [math.log(2 * p / (1 - p))]
    if model != "davidson_luce":
        return []
    largest = max((max(sizes, default=1) for sizes in groups), default=1)
    max_order = max_order or largest
    if max_order < largest:
        raise ValueError(f"`max_order` is {max_order}, but a tie of {largest} items was found.")
    # A last item leaves no choice
    stages = Counter((sum(sizes[j:]), n) for sizes in groups for j, n in enumerate(sizes) if sum(sizes[j:]) > 1)
    stages = stages or Counter({(2, 1): 1})
    possible = min(max_order, max(m for m, _ in stages))
    num_bounded = _num_bounded(stages, possible)
    log_delta = _fit_log_delta(stages, torch.zeros(1).double(), num_bounded, prior=None)
    if num_bounded < possible:
        shortest = {n: min(m for m, _ in stages if m >= n) for n in range(num_bounded + 1, possible + 1)}
        rates = [_log_comb(m, num_bounded) - _log_comb(m, possible)[n - 1] for n, m in shortest.items()]
        prior = torch.stack([(log_delta + rate.clamp(max=0)).min() for rate in rates])
        log_delta = _fit_log_delta(stages, log_delta, possible, prior)
    log_delta = log_delta.tolist()
    return (log_delta + [min(log_delta)] * (max_order - possible))[1:]


def _num_bounded(stages: Counter, possible: int) -> int:
    """
    Returns the largest order whose delta is bounded by the stages, (number of items, size of the group picked) -> count.
    Orders that are possible in all stages are, as those below them count half a time at least.
    """
    for order in range(min(m for m, _ in stages) + 1, possible + 1):
        counts = [sum(count for (_, n), count in stages.items() if n == k) for k in range(order, possible + 1)]
        if sum(max(count, 0.5) for count in counts) >= sum(count for (m, _), count in stages.items() if m >= order):
            return order - 1
    return possible


def _fit_log_delta(stages: Counter, fixed: torch.Tensor, max_order: int, prior: torch.Tensor | None) -> torch.Tensor:
    """
    Fits log delta_1, ..., log delta_{max_order}, `(max_order,)`, of which the first are `fixed`, by Newton's method in
    steps that cannot overshoot. Stages that picked a larger group say nothing of these. `prior` holds the means of the
    others; without a prior, orders that were never picked count half a time.
    """
    stages = {(m, n): count for (m, n), count in stages.items() if n <= max_order}
    if max_order == len(fixed) or not stages:
        return fixed
    log_combinations = torch.stack([_log_comb(m, max_order) for m, _ in stages])  # (S, D)
    times = torch.tensor(list(stages.values())).double()
    counts = torch.tensor([sum(count for (_, n), count in stages.items() if n == k + 1) for k in range(max_order)])
    counts = counts.double() if prior is not None else counts.double().clamp(min=0.5)
    scale = 1 if prior is not None else counts.sum() / times.sum()
    start = prior if prior is not None else -log_combinations.logsumexp(dim=0)[len(fixed) :] + math.log(len(stages))
    log_delta = torch.cat([fixed, start])
    free = slice(len(fixed), None)
    for _ in range(1000):
        p = (log_delta + log_combinations).softmax(dim=1)
        gradient = counts - scale * (times @ p)
        curvature = scale * (torch.diag(times @ p) - p.T @ (times.unsqueeze(1) * p))
        gradient, curvature = gradient[free], curvature[free, free]
        if prior is not None:
            gradient, curvature = gradient - (log_delta[free] - prior), curvature + torch.eye(len(prior)).double()
        step = torch.linalg.solve(curvature, gradient)
        step = step / step.abs().max().clamp(min=1)
        log_delta[free] += step
        if step.abs().max() < 1e-10:
            break
    return log_delta


def _log_comb(num_items: int, max_order: int) -> torch.Tensor:
    """Returns log C(num_items, n) for n = 1 to `max_order`, `(max_order,)`; -inf for n above `num_items`."""
    orders = torch.arange(1, max_order + 1).double()
    m = torch.tensor(float(num_items)).double()
    log_comb = torch.lgamma(m + 1) - torch.lgamma(orders + 1) - torch.lgamma((m - orders).clamp(min=0) + 1)
    return log_comb.masked_fill(orders > m, -math.inf)


def _group_sizes(ranks: list[int | None]) -> list[int]:
    """Returns the sizes of the tied groups, best first."""
    ranked = [rank for rank in ranks if rank is not None and rank >= 0]
    return [ranked.count(rank) for rank in sorted(set(ranked))]
