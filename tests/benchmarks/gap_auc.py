"""A metric of the benchmark on human rankings: how well gaps between scores tell ties apart."""

import torch

from trl_ext.ranking.metrics import checked_judgements


def gap_auc(scores: torch.Tensor, wins: torch.Tensor, ties: torch.Tensor) -> float:
    """
    Measures how well the gap |s_i - s_j| tells strict pairs from ties: the probability that a random strict pair has a
    wider gap than a random tied one, equal gaps counting 1/2 (the area under the ROC curve, Hanley and McNeil 1982).
    Chance is 0.5; nan without both kinds. Pairs are compared across prompts: give a whole evaluation at once.
    """
    scores, wins, ties = (x.detach().cpu().double() for x in checked_judgements(scores, wins, ties))
    gaps = (scores.unsqueeze(2) - scores.unsqueeze(1)).abs()
    values, index = gaps.flatten().unique(return_inverse=True)  # ascending
    strict = torch.zeros_like(values).index_add(0, index, wins.flatten())
    tied = torch.zeros_like(values).index_add(0, index, ties.flatten() / 2)
    tied_below = tied.cumsum(0) - tied
    return ((strict * (tied_below + tied / 2)).sum() / (strict.sum() * tied.sum())).item()
