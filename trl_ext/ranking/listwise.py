"""Listwise models: an order comes about stage by stage, each picking the next group of the items that are left."""

import math

import torch
import torch.nn.functional as F


LISTWISE_MODELS = (
    "plackett_luce",
    "plackett_luce_marginal",
    "plackett_luce_efron",
    "plackett_luce_breslow",
    "davidson_luce",
)


def tie_sizes(ranks: torch.Tensor) -> torch.Tensor:
    """Returns the size of the tied group of each item, itself included, `(B, K)`."""
    return (ranks.unsqueeze(2) == ranks.unsqueeze(1)).sum(dim=2)


def plackett_luce_nll(scores: torch.Tensor, ranks: torch.Tensor, efron: bool = False) -> torch.Tensor:
    r"""
    Returns the negative log-likelihood of Plackett-Luce, with ties treated as Breslow's or Efron's approximation does.

        L = sum_i [log sum_{j: r_j >= r_i} w_ij exp(s_j) - s_i]

    The items placed with i are still to be placed when it is: all of each (Breslow, w = 1), or, for the k-th of a group
    of m (k = 0, 1, ...), the share w = 1 - k/m of each (Efron).

    Args:
        scores, ranks (`torch.Tensor` of shape `(B, K)`): As for [`ranking_nll`], with scores 0 for absent items.
        efron (`bool`, *optional*, defaults to `False`): True for Efron's approximation.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    present = ranks >= 0
    tied = ranks.unsqueeze(2) == ranks.unsqueeze(1)
    remaining = (ranks.unsqueeze(1) >= ranks.unsqueeze(2)) & present.unsqueeze(1) | ~present.unsqueeze(2)
    log_weights = torch.zeros_like(scores).unsqueeze(1).expand_as(tied)
    if efron:
        placed_before = tied.tril(diagonal=-1).sum(dim=2, keepdim=True).to(scores.dtype)
        share = 1 - placed_before / tied.sum(dim=2, keepdim=True)
        log_weights = torch.where(tied, share.log(), 0)
    log_total = (scores.unsqueeze(1) + log_weights).masked_fill(~remaining, -math.inf).logsumexp(dim=2)
    return torch.where(present, log_total - scores, 0).sum(dim=1)


def plackett_luce_marginal_nll(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    r"""
    Returns the negative log of Plackett-Luce's probability, summed over all orders of the items within each tie.

    Let item i arrive at a time of rate exp(s_i); Plackett-Luce is the order of arrival. A tied group C comes before the
    rest, with total rate b, in any order, with probability

        P = int_0^inf b e^{-b t} prod_{i in C} (1 - e^{-exp(s_i) t}) dt

    which the trapezoid rule in log t gives to 12 digits. It runs in fp64. The last group has nothing to come before,
    and a group of one the closed form exp(s_i) / (exp(s_i) + b).

    Args:
        scores, ranks (`torch.Tensor` of shape `(B, K)`): As for [`ranking_nll`], with scores 0 for absent items.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    present = ranks >= 0
    s = scores.double()
    below = (ranks.unsqueeze(1) > ranks.unsqueeze(2)) & present.unsqueeze(2)  # [b, i, j]: j is worse than i
    has_below = below.any(dim=2)
    log_b = s.unsqueeze(1).masked_fill(~below, -math.inf)
    log_b = torch.where(has_below.unsqueeze(2), log_b, 0).logsumexp(dim=2)
    log_rate = torch.where(has_below, s - log_b, 0)  # in units of b

    spacing = 0.1
    end = math.log(scores.size(1) + 1) + 3.8
    log_t = torch.arange(-38, end, spacing, dtype=s.dtype, device=s.device)
    log_arrived = _log1mexp(log_rate.unsqueeze(2) + log_t)  # (B, K, Q)
    tied = (ranks.unsqueeze(2) == ranks.unsqueeze(1)) & present.unsqueeze(2)
    log_integrand = log_t - log_t.exp() + tied.to(s.dtype) @ log_arrived  # (B, K, Q), the same for a group's items
    log_p = math.log(spacing) + log_integrand.logsumexp(dim=2)

    sizes = torch.where(present, tie_sizes(ranks), 1)
    log_p = torch.where(sizes == 1, F.logsigmoid(log_rate), log_p)
    return -torch.where(has_below, log_p / sizes, 0).sum(dim=1).to(scores.dtype)


def _log1mexp(log_a: torch.Tensor) -> torch.Tensor:
    """Returns `log(1 - exp(-exp(log_a)))` without loss of digits; beyond `log_a = 5` that is 0 to 64 digits."""
    is_small, is_tiny = log_a < math.log(math.log(2)), log_a < -30
    a = log_a.clamp(min=-30, max=5).exp()
    # Each branch sees harmless values where the other is taken: a NaN would spoil the gradient of both
    small = torch.expm1(-torch.where(is_small, a, 0.5)).neg().log()
    large = torch.log1p(-torch.exp(-torch.where(is_small, 1.0, a)))
    return torch.where(is_tiny, log_a, torch.where(is_small, small, large))


def davidson_luce_nll(scores: torch.Tensor, ranks: torch.Tensor, log_tie: torch.Tensor) -> torch.Tensor:
    r"""
    Returns the negative log-likelihood of Davidson-Luce, where a stage picks a group of tied items by its geometric
    mean worth and how likely its size is.

        P(C | A) = delta_|C| exp(mean_C s) / sum_{n <= D} delta_n e_n({exp(s_i / n): i in A})

    with delta_1 = 1 and e_n the elementary symmetric polynomial of order n, the sum over all groups of n items. The
    sets A of the stages are nested, so one sweep from the worst item to the best gives the polynomials of all of them,
    O(K D^2):

        e_k <- e_k + exp(s_i / n) e_{k-1}        for every n

    Args:
        scores, ranks (`torch.Tensor` of shape `(B, K)`): As for [`ranking_nll`], with scores 0 for absent items.
        log_tie (`torch.Tensor` of shape `(D-1,)`): log delta_2, ..., log delta_D.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    present = ranks >= 0
    max_order = log_tie.numel() + 1
    log_delta = torch.cat([log_tie.new_zeros(1), log_tie])
    # Worst first and absent ones last, so that each prompt's t-th item enters at step t
    order = torch.where(present, -ranks, 1).argsort(dim=1, stable=True)
    sorted_ranks = ranks.gather(1, order)
    next_ranks = F.pad(sorted_ranks[:, 1:], (0, 1), value=-1)
    closes_group = (sorted_ranks >= 0) & (next_ranks != sorted_ranks)

    orders = torch.arange(1, max_order + 1, device=scores.device, dtype=scores.dtype)
    steps = scores.gather(1, order).unsqueeze(2) / orders  # (B, K, D)
    # log e_k, for k up to the number of items so far. The polynomials beyond are 0, whose logarithm has no gradient, so
    # the table grows with the items instead of holding them
    log_e = torch.zeros_like(steps[:, 0]).unsqueeze(2)  # (B, D, 1)
    log_totals = []
    for step in steps.unbind(dim=1):
        with_item = log_e + step.unsqueeze(2)  # of order k + 1
        # Not torch.logaddexp, whose second derivative overflows where the two are far apart
        both = torch.stack([log_e[:, :, 1:], with_item[:, :, :-1]]).logsumexp(dim=0)
        log_e = torch.cat([log_e[:, :, :1], both, with_item[:, :, -1:]], dim=2)[:, :, : max_order + 1]
        log_e_n = log_e.diagonal(offset=1, dim1=1, dim2=2)  # order n from the n-th row
        log_totals.append((log_delta[: log_e_n.size(1)] + log_e_n).logsumexp(dim=1))
    log_total = torch.stack(log_totals, dim=1)  # (B, K), that of A = the items up to here

    sizes = torch.where(present, tie_sizes(ranks), 1)
    log_delta_of_item = log_delta[(sizes - 1).clamp(max=max_order - 1)]
    of_group = torch.where(present, (scores + log_delta_of_item) / sizes, 0)
    return torch.where(closes_group, log_total, 0).sum(dim=1) - of_group.sum(dim=1)


def check_tie_orders(sizes: torch.Tensor, log_tie: torch.Tensor) -> None:
    """Refuses rankings with tied groups of `sizes` that `log_tie` gives no probability."""
    largest = sizes.max().item() if sizes.numel() else 1
    if largest > log_tie.numel() + 1:
        raise ValueError(
            f"`ranks` holds a tie of {largest} items, and `log_tie` allows for {log_tie.numel() + 1} at most (D). "
            "Give log delta_n for more orders."
        )
    if any((sizes == n + 2).any() for n in (log_tie == -math.inf).nonzero().flatten().tolist()):
        raise ValueError("`ranks` holds a tie of a size whose `log_tie` is -inf, which rules it out.")
