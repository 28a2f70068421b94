"""The agreement of people who judge the same completions."""

import itertools
from collections import Counter


def ranking_agreement(rankings: list[list[list[int | None]]]) -> dict[str, float]:
    r"""
    Measures how far annotators agree about rankings with ties, by Krippendorff's alpha of the outcomes of pairs.

    Every two completions of an item that annotators ranked are a unit, with the outcome -1, 0 (tied) or 1 from each of
    them; distances are squared, so opposite orders are four times as far apart as an order and a tie:

        alpha = 1 - D_o / D_e

    with D_o the mean distance within units, and D_e that of any two outcomes. Since which of the two completions comes
    first means nothing, every unit counts in both directions.

    Args:
        rankings (`list[list[list[int | None]]]`): For each item the ranks that each of its annotators gave: lower is
            better, equal is tied, None (or -1) unranked. Items may have any number of annotators.

    Returns:
        `dict[str, float]`: `alpha` (1 is perfect, 0 chance; nan if nobody prefers anything), `agreement` (how often two
        annotators of a pair have the same outcome), `strict_agreement` (the same where neither has a tie) and
        `num_pairs` (of completions with two annotators or more).

    Raises:
        ValueError: if the annotators of an item did not rank the same number of completions, or no pair has two.

    Reference: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, with the interval metric.
    """
    coincidences, num_pairs = Counter(), 0
    for index, item in enumerate(rankings):
        if len({len(ranks) for ranks in item}) > 1:
            raise ValueError(
                f"Item {index} has rankings of {sorted({len(r) for r in item})} completions. Each must rank all."
            )
        for i, j in itertools.combinations(range(len(item[0]) if item else 0), 2):
            ranked = [(r[i], r[j]) for r in item if _is_ranked(r[i]) and _is_ranked(r[j])]
            outcomes = [(a < b) - (a > b) for a, b in ranked]
            if len(outcomes) < 2:
                continue
            num_pairs += 1
            for first, second in itertools.permutations(outcomes, 2):
                weight = 1 / (len(outcomes) - 1)
                coincidences[first, second] += weight
                coincidences[-first, -second] += weight
    if num_pairs == 0:
        raise ValueError("No two completions were ranked by two annotators, so there is no agreement to measure.")
    total = sum(coincidences.values())
    marginals = Counter()
    for (first, _), weight in coincidences.items():
        marginals[first] += weight
    observed = sum(weight * (a - b) ** 2 for (a, b), weight in coincidences.items()) / total
    expected = sum(marginals[a] * marginals[b] * (a - b) ** 2 for a, b in itertools.product(marginals, repeat=2)) / (
        total * (total - 1)
    )
    strict = {pair: weight for pair, weight in coincidences.items() if 0 not in pair}
    return {
        "alpha": 1 - observed / expected if expected else float("nan"),
        "agreement": sum(weight for (a, b), weight in coincidences.items() if a == b) / total,
        "strict_agreement": sum(w for (a, b), w in strict.items() if a == b) / sum(strict.values())
        if strict
        else float("nan"),
        "num_pairs": num_pairs,
    }


def _is_ranked(rank: int | None) -> bool:
    return rank is not None and rank >= 0
