"""Pairwise models: every pair of a ranking is a judgement of its own."""

import math

import torch
import torch.nn.functional as F


PAIRWISE_MODELS = ("bradley_terry", "soft_bradley_terry", "rao_kupper", "davidson")


def wins_and_ties(ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `(wins, ties)`, `(B, K, K)` bool each: true if i is ranked before j, and true if i and j are tied."""
    present = ranks >= 0
    both = present.unsqueeze(2) & present.unsqueeze(1)
    r_i, r_j = ranks.unsqueeze(2), ranks.unsqueeze(1)
    other = ~torch.eye(ranks.size(1), dtype=torch.bool, device=ranks.device)
    return both & (r_i < r_j), both & other & (r_i == r_j)


def judged_items(wins: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """Marks the items that any judgement is about, `(B, K)` bool."""
    return (wins + wins.mT + ties > 0).any(dim=2)


def pair_logps(diff: torch.Tensor, model: str, log_tie: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Returns `(log P(i > j), log P(i = j))` for d = s_i - s_j, each of its shape; -inf for ties without a probability.

        Bradley-Terry:  P(i > j) = sigmoid(d)
        Rao-Kupper:     P(i > j) = sigmoid(d - log theta),   P(i = j) = (theta^2 - 1) P(i > j) P(j > i)
        Davidson:       P(i > j) ~ e^{d/2},  P(j > i) ~ e^{-d/2},  P(i = j) ~ nu

    Davidson-Luce of two items is Davidson's model with nu = delta_2.
    """
    if model == "rao_kupper":
        win, lose = F.logsigmoid(diff - log_tie), F.logsigmoid(-diff - log_tie)
        # log(theta^2 - 1), which expm1(2 log_tie) would overflow
        return win, 2 * log_tie + torch.log(-torch.expm1(-2 * log_tie)) + win + lose
    if model == "davidson_luce" and log_tie.numel():
        model, log_tie = "davidson", log_tie[0]
    if model == "davidson":
        # Over the geometric mean of the worths all three terms stay in range
        log_total = torch.logsumexp(torch.stack([diff / 2, -diff / 2, log_tie.expand_as(diff)]), dim=0)
        return diff / 2 - log_total, log_tie - log_total
    return F.logsigmoid(diff), torch.full_like(diff, -math.inf)


def pairwise_nll(
    scores: torch.Tensor, wins: torch.Tensor, ties: torch.Tensor, model: str, log_tie: torch.Tensor | None
) -> torch.Tensor:
    r"""
    Sums -log P over pairs, each weighted by how often it was judged so.

        L = - sum_ij wins_ij log P(i > j) - sum_ij ties_ij log P(i = j) / 2        (`ties` hold each pair twice)

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): As for [`ranking_nll`], with scores 0 for absent items.
        wins, ties (`torch.Tensor` of shape `(B, K, K)`): As for [`judgements_nll`].
        model (`str`): One of `PAIRWISE_MODELS`.
        log_tie (`torch.Tensor`, *optional*): As for [`ranking_nll`].

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    diff = scores.unsqueeze(2) - scores.unsqueeze(1)
    win, tie = pair_logps(diff, model, log_tie)
    if model == "soft_bradley_terry":
        tie = (win + F.logsigmoid(-diff)) / 2
    elif model == "bradley_terry":
        tie = torch.zeros_like(diff)
    return -(wins * win + ties * tie / 2).sum(dim=(1, 2))
