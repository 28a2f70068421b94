"""Agreement of annotators about rankings, against a reference library and by what must not matter."""

import itertools
import random

import numpy as np
import pytest

from trl_ext.ranking.agreement import ranking_agreement


def random_items(seed=0, num_items=12):
    rng = random.Random(seed)
    items = []
    for _ in range(num_items):
        k = rng.choice([2, 3, 4])
        truth = [rng.random() for _ in range(k)]
        annotators = []
        for _ in range(rng.choice([1, 2, 3])):
            noisy = [round(2 * (t + rng.gauss(0, 0.3))) for t in truth]
            annotators.append([None if rng.random() < 0.1 else x + 10 for x in noisy])
        items.append(annotators)
    return items


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_that_of_the_reference_library(seed):
    krippendorff = pytest.importorskip("krippendorff", reason="the reference library is not installed")
    items = random_items(seed)
    width = max(map(len, items))
    units = []
    for item in items:
        for i, j in itertools.permutations(range(len(item[0])), 2):
            row = [np.nan if None in (r[i], r[j]) else float(np.sign(r[j] - r[i])) for r in item]
            units.append(row + [np.nan] * (width - len(row)))
    expected = krippendorff.alpha(np.array(units).T, level_of_measurement="interval")
    assert ranking_agreement(items)["alpha"] == pytest.approx(expected, abs=1e-10)
    assert expected < 0.99


def test_what_does_not_matter():
    """Neither the order of completions and annotators, nor the numbers that stand for ranks, nor lone annotators."""
    items = random_items(3)
    expected = ranking_agreement(items)
    rng = random.Random(0)
    changed = []
    for item in items:
        order = rng.sample(range(len(item[0])), len(item[0]))
        rows = [[-1 if row[i] is None else 7 * row[i] for i in order] for row in item]
        changed.append(rng.sample(rows, len(rows)))
    assert ranking_agreement([*changed, [[1, 2]]]) == pytest.approx(expected, abs=1e-12)


def test_perfect_opposite_and_half():
    perfect = [[[1, 2, 2], [1, 3, 3]], [[2, 1], [2, 1]]]
    assert ranking_agreement(perfect) == {"alpha": 1, "agreement": 1, "strict_agreement": 1, "num_pairs": 4}
    opposite = ranking_agreement([[[1, 2, 3], [3, 2, 1]]])
    assert opposite["alpha"] < -0.5 and opposite["agreement"] == opposite["strict_agreement"] == 0
    # A tie is half way between two orders
    tied, wrong = (ranking_agreement([*perfect * 5, [[1, 2], other]])["alpha"] for other in ([1, 1], [2, 1]))
    assert wrong < tied < 1


def test_chance_is_zero():
    rng = random.Random(0)
    items = [[[rng.randrange(3) for _ in range(4)] for _ in range(2)] for _ in range(3000)]
    agreement = ranking_agreement(items)
    assert abs(agreement["alpha"]) < 0.02
    # Two of three equal outcomes: 1/3 of ties squared, and twice 1/3 squared
    assert agreement["agreement"] == pytest.approx(1 / 3, abs=0.02)
    assert agreement["strict_agreement"] == pytest.approx(1 / 2, abs=0.02)


def test_nobody_to_agree_with():
    with pytest.raises(ValueError, match="ranked by two annotators"):
        ranking_agreement([[[1, 2]], [[1, None], [None, 1]]])
    with pytest.raises(ValueError, match="Item 1 has rankings of"):
        ranking_agreement([[[1, 2]], [[1, 2], [1, 2, 3]]])
    assert np.isnan(ranking_agreement([[[1, 1], [1, 1]]])["alpha"])
