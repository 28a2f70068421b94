"""The likelihood of rankings and of judgements of pairs, under each of the models."""

import math

import torch

from .listwise import (
    LISTWISE_MODELS,
    check_tie_orders,
    davidson_luce_nll,
    plackett_luce_marginal_nll,
    plackett_luce_nll,
    tie_sizes,
)
from .pairwise import PAIRWISE_MODELS, judged_items, pairwise_nll, wins_and_ties


RANKING_MODELS = (*PAIRWISE_MODELS, *LISTWISE_MODELS)


def ranking_nll(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    model: str = "davidson_luce",
    log_tie: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Returns the negative log-likelihood of each prompt's ranking, in nats, summed over its pairs (pairwise models) or
    stages (listwise ones); 0 where fewer than two items are ranked.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): Log-worths. Half precision is raised to fp32.
        ranks (`torch.Tensor` of shape `(B, K)`, int): Lower is better, equal is tied, -1 is absent.
        model (`str`, *optional*, defaults to `"davidson_luce"`): One of `RANKING_MODELS`.
        log_tie (`torch.Tensor`, *optional*): Scalar log theta > 0 for `rao_kupper`, scalar log nu for `davidson`,
            `(D-1,)` log delta_2 to log delta_D for `davidson_luce`, where -inf rules out ties of that order and none at
            all rules out every tie.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: For a ranking which the model gives no probability, a score of a ranked item that is not finite, or a
            `log_tie` that does not fit the model.
    """
    scores, log_tie = checked(scores, model, log_tie)
    ranks = ranks.long()
    present = ranks >= 0
    if ranks.shape != scores.shape:
        raise ValueError(f"`ranks` must have the shape of `scores`, {tuple(scores.shape)}, got {tuple(ranks.shape)}.")
    if not scores[present].isfinite().all():
        raise ValueError("`scores` holds NaN or infinity for a ranked item.")
    if ranks.size(1) == 0:
        return scores.sum(dim=1)
    scores = torch.where(present, scores, 0)  # whatever padding holds reaches neither loss nor gradient
    if model in PAIRWISE_MODELS:
        return pairwise_nll(scores, *wins_and_ties(ranks), model, log_tie)
    sizes = torch.where(present, tie_sizes(ranks), 0)
    if model == "davidson_luce":
        check_tie_orders(sizes, log_tie)
        return davidson_luce_nll(scores, ranks, log_tie)
    if model == "plackett_luce" and (sizes > 1).any():
        raise ValueError("`ranks` holds a tie, which 'plackett_luce' gives no probability. Use a model with ties.")
    if model == "plackett_luce_marginal":
        return plackett_luce_marginal_nll(scores, ranks)
    return plackett_luce_nll(scores, ranks, efron=model == "plackett_luce_efron")


def judgements_nll(
    scores: torch.Tensor,
    wins: torch.Tensor,
    ties: torch.Tensor,
    model: str = "davidson",
    log_tie: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Returns the negative log-likelihood of judgements of pairs, in nats. They need not agree with any order.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): Log-worths.
        wins (`torch.Tensor` of shape `(B, K, K)`): How often i was judged better than j.
        ties (`torch.Tensor` of shape `(B, K, K)`, symmetric): How often i and j were judged equal.
        model (`str`, *optional*, defaults to `"davidson"`): One of `PAIRWISE_MODELS`.
        log_tie (`torch.Tensor`, *optional*): As for [`ranking_nll`].

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        ValueError: For a listwise model, a score of a judged item that is not finite, or a `log_tie` that does not fit
            the model.
    """
    if model not in PAIRWISE_MODELS:
        raise ValueError(f"Judgements of pairs need a pairwise `model`, one of {PAIRWISE_MODELS}, got {model!r}.")
    scores, log_tie = checked(scores, model, log_tie)
    judged = judged_items(wins, ties)
    if not scores[judged].isfinite().all():
        raise ValueError("`scores` holds NaN or infinity for a judged item.")
    return pairwise_nll(torch.where(judged, scores, 0), wins, ties, model, log_tie)


def check_model(model: str) -> None:
    """Refuses a `model` that is none of `RANKING_MODELS`."""
    if model not in RANKING_MODELS:
        raise ValueError(f"`model` must be one of {RANKING_MODELS}, got {model!r}.")


def checked(
    scores: torch.Tensor, model: str, log_tie: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns `scores` and `log_tie` in fp32 or better. Refuses a `log_tie` that does not fit the model."""
    check_model(model)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if model == "davidson_luce":
        log_tie = scores.new_zeros(0) if log_tie is None else log_tie
        if log_tie.dim() != 1 or log_tie.isnan().any() or (log_tie == math.inf).any():
            raise ValueError(
                f"'davidson_luce' takes `log_tie` of shape (D-1,), finite or -inf, got {log_tie.tolist()}."
            )
    elif model in ("rao_kupper", "davidson"):
        if log_tie is None or log_tie.numel() != 1:
            raise ValueError(f"'{model}' takes one number as `log_tie`.")
        log_tie = log_tie.reshape(())
        if not log_tie.isfinite():
            raise ValueError(f"'{model}' takes a finite `log_tie`, got {log_tie.item()}.")
        if model == "rao_kupper" and log_tie <= 0:
            raise ValueError(f"'rao_kupper' takes `log_tie` = log theta > 0, got {log_tie.item()}.")
    elif log_tie is not None:
        raise ValueError(f"'{model}' has no tie parameter: leave out `log_tie`.")
    return scores, None if log_tie is None else log_tie.to(scores)
