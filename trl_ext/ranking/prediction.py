"""Predictions: how likely a model finds it that one item comes before another, with it or after it."""

import math
from functools import cache

import torch
import torch.nn.functional as F

from .likelihood import checked
from .pairwise import pair_logps


# So many items have 3^10 pairs of a set that is left and a group of that set
MAX_ENUMERATED = 10


def predict_pair(
    score_i: torch.Tensor, score_j: torch.Tensor, model: str = "davidson_luce", log_tie: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Returns the probabilities that i wins, that i and j tie and that i loses.

    Args:
        score_i, score_j (`torch.Tensor`): Log-worths, of shapes that broadcast to one.
        model, log_tie: As for [`ranking_nll`].

    Returns:
        `tuple` of three `torch.Tensor` of that shape; that of ties is 0 for models which give ties no probability.
    """
    score_i, log_tie = checked(score_i, model, log_tie)
    diff = score_i - score_j.to(score_i.dtype)
    win, tie = pair_logps(diff, model, log_tie)
    lose, _ = pair_logps(-diff, model, log_tie)
    return win.exp(), tie.exp(), lose.exp()


def predict_pairs_of_ranking(
    scores: torch.Tensor, model: str = "davidson_luce", log_tie: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Returns the probabilities of [`predict_pair`] for each pair of items that are ranked together with the others.

    They differ from those of two items alone under Davidson-Luce only, which ties two items more or less often
    depending on the others. Its stages are enumerated: all sets of items that may be left, and all groups that may come
    first of each.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): Log-worths; `K <= MAX_ENUMERATED` for `davidson_luce`.
        model, log_tie: As for [`ranking_nll`].

    Returns:
        `tuple` of three `torch.Tensor` of shape `(B, K, K)`: probability that i is placed before j, with it, after it.
    """
    num_items = scores.size(1)
    if model != "davidson_luce" or num_items == 2:
        return predict_pair(scores.unsqueeze(2), scores.unsqueeze(1), model, log_tie)
    scores, log_tie = checked(scores, model, log_tie)
    log_delta = F.pad(torch.cat([log_tie.new_zeros(1), log_tie])[:num_items], (1, 0), value=-math.inf)
    log_delta = F.pad(log_delta, (0, num_items + 1 - len(log_delta)), value=-math.inf)
    member = _members(num_items).to(scores)  # (2^K, K)
    sizes = member.sum(dim=1)
    log_weights = log_delta[sizes.long()] + scores @ member.T / sizes.clamp(min=1)  # (B, 2^K), of each group
    reached = torch.zeros_like(log_weights)  # the probability that a set is left at some stage
    reached[:, -1] = 1
    before = scores.new_zeros(*scores.shape, num_items)
    tied = torch.zeros_like(before)
    for left, groups in _stages(num_items):
        left, groups = left.to(scores.device), groups.to(scores.device)
        rest = left.unsqueeze(1) - groups
        p = (reached[:, left].unsqueeze(2) * log_weights[:, groups].softmax(dim=2)).flatten(1)  # (B, N G)
        reached.index_add_(1, rest.flatten(), p)
        placed, later = member[groups.flatten()].unsqueeze(2), member[rest.flatten()].unsqueeze(1)
        before += (p @ (placed * later).flatten(1)).view_as(before)
        tied += (p @ (placed * placed.mT).flatten(1)).view_as(tied)
    other = ~torch.eye(num_items, dtype=torch.bool, device=scores.device)
    return before, tied * other, before.mT


def _members(num_items: int) -> torch.Tensor:
    """Returns the members of all sets of items, `(2^K, K)` bool: item i is in set s if the bit i of s is set."""
    return (torch.arange(2**num_items).unsqueeze(1) >> torch.arange(num_items)) & 1 > 0


@cache
def _stages(num_items: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Returns, for K, K - 1, ..., 2 items, the numbers of all sets of so many, `(N,)`, and of all groups that may come
    first of each, `(N, G)`.
    """
    member = _members(num_items)
    bits = 2 ** torch.arange(num_items)
    stages = []
    for size in range(num_items, 1, -1):
        left = (member.sum(dim=1) == size).nonzero().flatten()
        items = bits.expand(len(left), -1)[member[left]].view(-1, size)
        stages.append((left, items @ _members(size)[1:].long().T))
    return stages
