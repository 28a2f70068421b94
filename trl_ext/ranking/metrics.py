r"""
Metrics of how well scores predict judgements of pairs.

The judgements are those of [`wins_and_ties`], or what people said, pair by pair, even against every order:

- `scores` `(B, K)`: log-worths s_i. Half precision is raised to fp32.
- `wins` `(B, K, K)`: how often (or whether) i was judged better than j.
- `ties` `(B, K, K)`, symmetric: how often (or whether) i and j were judged equal.

Every judgement counts once, and items without one (padding, say) do not count, whatever their scores are; scores of
judged items must be finite. The mean over an evaluation is no mean of its batches' means: [`ranking_sums`] gives sums
over batches and processes, and [`means_of_sums`] divides at the end.
"""

import torch
import torch.nn.functional as F

from .likelihood import ranking_nll
from .pairwise import judged_items
from .prediction import MAX_ENUMERATED, predict_pair, predict_pairs_of_ranking


NUM_BINS = 10


@torch.no_grad()
def ranking_sums(
    scores: torch.Tensor,
    wins: torch.Tensor,
    ties: torch.Tensor,
    model: str = "davidson_luce",
    log_tie: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    Sums numerators and denominators of the metrics of [`means_of_sums`].

    The model predicts each pair as two items ranked together with the prompt's others ([`predict_pairs_of_ranking`]).
    Davidson-Luce predicts nothing for prompts with more than `MAX_ENUMERATED` judged items, which would take too long.

    Args:
        scores, wins, ties (`torch.Tensor` of shapes `(B, K)`, `(B, K, K)`, `(B, K, K)`): As above.
        model (`str`, *optional*, defaults to `"davidson_luce"`), log_tie (`torch.Tensor`, *optional*): As for
            [`predict_pair`].

    Returns:
        `dict[str, torch.Tensor]`, scalars, and `(NUM_BINS,)` for the bins:

        - `strict_pairs`, `tied_pairs`: judgements that are no tie, and ties; `pairs`: judgements with a prediction.
        - `pair_correct`: strict ones whose winner has the higher score; equal scores count 1/2.
        - `three_way_correct`: judgements that are the outcome (win, tie, loss) which the model finds most likely;
          equally likely outcomes share the credit.
        - `tie_bin_pairs`, `tie_bin_predicted`, `tie_bin_observed`: judgements, sum of P(tie), and ties, in bins of
          equal width of P(tie).
        - `kendall_tau_b_sum`, `kendall_tau_b_prompts`: sum and number of the [`kendall_tau_b`] that are defined.
        - `log_likelihood`, `log_likelihood_pairs`: of judgements as pairs, in nats, and their number; without the ties
          if the model gives ties no probability.
    """
    scores, wins, ties = checked_judgements(scores, wins, ties)
    diff = scores.unsqueeze(2) - scores.unsqueeze(1)
    outcomes, is_predicted = _predictions(scores, wins, ties, model, log_tie)
    p_tie = outcomes[1]
    is_most_likely = (outcomes >= outcomes.amax(dim=0) - 1e-6).to(scores)  # rounding makes equal ones differ
    win_share, tie_share, _ = is_most_likely / is_most_likely.sum(dim=0)
    once = ties / 2  # `ties` hold each tie in both directions
    strict, once = wins * is_predicted, once * is_predicted
    judgements = strict + once
    in_bin = F.one_hot((p_tie * NUM_BINS).long().clamp(0, NUM_BINS - 1), NUM_BINS)  # (B, K, K, NUM_BINS)
    tau_b = kendall_tau_b(scores, wins, ties)
    has_ties = (p_tie > 0).any()
    # A probability that underflows counts as the smallest number of its type: no mean survives an infinity
    log_outcomes = outcomes.clamp(min=torch.finfo(outcomes.dtype).tiny).log()
    log_p = log_outcomes[0] * strict
    if has_ties:
        log_p = log_p + log_outcomes[1] * once
    return {
        "pairs": judgements.sum(),
        "strict_pairs": wins.sum(),
        "tied_pairs": ties.sum() / 2,
        "pair_correct": (wins * (1 + diff.sign()) / 2).sum(),
        "three_way_correct": (strict * win_share + once * tie_share).sum(),
        "tie_bin_pairs": (judgements.unsqueeze(3) * in_bin).sum(dim=(0, 1, 2)),
        "tie_bin_predicted": ((judgements * p_tie).unsqueeze(3) * in_bin).sum(dim=(0, 1, 2)),
        "tie_bin_observed": (once.unsqueeze(3) * in_bin).sum(dim=(0, 1, 2)),
        "kendall_tau_b_sum": tau_b.nansum(),
        "kendall_tau_b_prompts": (~tau_b.isnan()).sum().to(scores),
        "log_likelihood": log_p.sum(),
        "log_likelihood_pairs": judgements.sum() if has_ties else strict.sum(),
    }


def means_of_sums(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    r"""
    Divides the sums of [`ranking_sums`], or their totals, into metrics; those that are a mean of nothing are left out.

    - `pair_accuracy`: of strict pairs; chance is 0.5.
    - `tie_rate`: share of ties among all pairs.
    - `three_way_accuracy`: of pairs with a prediction, as are the others that concern probabilities.
    - `predicted_tie_rate`: mean P(tie), which is 0 for models without ties.
    - `tie_calibration_error`: sum_b |ties in b - sum of P(tie) in b| / pairs over the bins b, the expected calibration
      error (Guo et al. 2017, https://huggingface.co/papers/1706.04599, eq. 3). By chance a perfect model has one above
      0 too, the less so the more pairs.
    - `kendall_tau_b`: mean over prompts.
    - `pair_log_likelihood`: mean over pairs, in nats; not to be compared between models with ties and without.
    """
    of = {name: value.tolist() for name, value in sums.items()}
    bins = zip(of["tie_bin_observed"], of["tie_bin_predicted"], strict=True)
    ratios = {
        "pair_accuracy": (of["pair_correct"], of["strict_pairs"]),
        "three_way_accuracy": (of["three_way_correct"], of["pairs"]),
        "tie_rate": (of["tied_pairs"], of["strict_pairs"] + of["tied_pairs"]),
        "predicted_tie_rate": (sum(of["tie_bin_predicted"]), of["pairs"]),
        "tie_calibration_error": (sum(abs(observed - predicted) for observed, predicted in bins), of["pairs"]),
        "kendall_tau_b": (of["kendall_tau_b_sum"], of["kendall_tau_b_prompts"]),
        "pair_log_likelihood": (of["log_likelihood"], of["log_likelihood_pairs"]),
    }
    return {name: numerator / denominator for name, (numerator, denominator) in ratios.items() if denominator > 0}


def kendall_tau_b(scores: torch.Tensor, wins: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    r"""
    Returns Kendall's tau-b of each prompt's scores with its judgements, `(B,)`, in [-1, 1].

        tau_b = (concordant - discordant) / sqrt(n_strict n_apart)

    over the pairs that were judged: n_strict times not as a tie, n_apart times with different scores; nan where either
    is 0. For a complete ranking this is Kendall's (1945, https://doi.org/10.1093/biomet/33.3.239).
    """
    scores, wins, ties = checked_judgements(scores, wins, ties)
    order = (scores.unsqueeze(2) - scores.unsqueeze(1)).sign()
    num_strict = wins.sum(dim=(1, 2))
    num_apart = ((wins + ties / 2) * order.abs()).sum(dim=(1, 2))
    return (wins * order).sum(dim=(1, 2)) / (num_strict * num_apart).sqrt()


def baseline_nll(
    ranks: torch.Tensor, model: str = "davidson_luce", log_tie: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns [`ranking_nll`] with all scores 0, `(B,)` in nats: that of a model which knows only how often items tie."""
    dtype = torch.float32 if log_tie is None else torch.promote_types(log_tie.dtype, torch.float32)
    return ranking_nll(torch.zeros(ranks.shape, dtype=dtype, device=ranks.device), ranks, model, log_tie)


def _predictions(scores, wins, ties, model, log_tie) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns probabilities of win, tie and loss, `(3, B, K, K)`, and `(B, 1, 1)`: 1 for prompts with a prediction."""
    if model != "davidson_luce":
        outcomes = predict_pair(scores.unsqueeze(2), scores.unsqueeze(1), model, log_tie)
        return torch.stack(outcomes), torch.ones_like(scores[:, :1, None])
    judged = judged_items(wins, ties)
    num_judged = judged.sum(dim=1)
    outcomes = scores.new_full((3, *wins.shape), 1 / 3)
    for k in set(num_judged.tolist()) & set(range(2, MAX_ENUMERATED + 1)):
        rows = (num_judged == k).nonzero()  # (R, 1)
        items = judged[rows[:, 0]].nonzero()[:, 1].view(-1, k)
        predicted = predict_pairs_of_ranking(scores[rows, items], model, log_tie)
        outcomes[:, rows.unsqueeze(2), items.unsqueeze(2), items.unsqueeze(1)] = torch.stack(predicted)
    return outcomes, (num_judged <= MAX_ENUMERATED).to(scores)[:, None, None]


def checked_judgements(
    scores: torch.Tensor, wins: torch.Tensor, ties: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns all three in fp32 or better, with score 0 for items without a judgement. Refuses shapes that do not fit."""
    if not wins.shape == ties.shape == (*scores.shape, scores.size(-1)):
        shapes = f"{tuple(scores.shape)}, {tuple(wins.shape)} and {tuple(ties.shape)}"
        raise ValueError(f"`scores`, `wins`, `ties` must be of shapes (B, K), (B, K, K) and (B, K, K), got {shapes}.")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    wins, ties = wins.to(scores), ties.to(scores)
    judged = judged_items(wins, ties)
    if not scores[judged].isfinite().all():
        raise ValueError("`scores` must be finite for judged items.")
    return torch.where(judged, scores, 0), wins, ties
