"""The KL controller as a feedback loop: where it goes, how fast, and what it remembers."""

import math
from dataclasses import asdict

import pytest

from trl_ext.token_mdp.kl import KLController


def step(controller, kl, n=64):
    """One update after `n` completions of mean KL `kl`; the factor by which the coefficient changed."""
    before = controller.coef
    controller.observe(kl * n, n)
    controller.update()
    return controller.coef / before


def test_fixed_without_target():
    controller = KLController(0.05)
    for kl in (0.0, 5.0, 1e6):
        assert step(controller, kl) == 1
    assert controller.coef == 0.05


def test_direction():
    target = 6.0
    assert step(KLController(0.05, target), 6.5) > 1
    assert step(KLController(0.05, target), 5.5) < 1
    assert step(KLController(0.05, target), 6.0) == 1
    # Proportional: twice the error, twice the change
    small, large = (step(KLController(0.05, target), target * (1 + e)) - 1 for e in (0.05, 0.1))
    assert large == pytest.approx(2 * small, rel=1e-9)
    assert step(KLController(0.05, target), target * 0.9) - 1 == pytest.approx(-large, rel=1e-9)


def test_only_the_ratio_to_the_target_matters():
    factor = step(KLController(0.05, 6.0), 6.6)
    assert step(KLController(3.0, 6.0), 6.6) == pytest.approx(factor, rel=1e-12)
    assert step(KLController(0.05, 0.6), 0.66) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("kl", "sign"), [(1e9, 1), (7.2, 1), (0.0, -1), (-50.0, -1)])
def test_a_fifth_at_most_per_horizon(kl, sign):
    """However far off the target; in small steps the fifth compounds."""
    assert step(KLController(0.05, 6.0, horizon=1000), kl, n=1000) == pytest.approx(1 + sign * 0.2, rel=1e-9)
    controller = KLController(1.0, 6.0, horizon=1000)
    for _ in range(500):
        step(controller, kl, n=2)
    assert controller.coef == pytest.approx(math.exp(sign * 0.2), rel=1e-3)


@pytest.mark.parametrize("start", [0.01, 10.0])
@pytest.mark.parametrize("n", [50, 200])
def test_reaches_the_target(start, n):
    """A policy whose KL falls as it is penalized, KL = 1 / coef: 0.5 nats are reached at coef = 2."""
    controller = KLController(start, target=0.5, horizon=1000)
    distances = []
    for _ in range(40_000 // n):
        step(controller, 1 / controller.coef, n)
        distances.append(abs(controller.coef - 2))
    assert controller.coef == pytest.approx(2, rel=1e-6)
    assert all(later <= earlier + 1e-9 for earlier, later in zip(distances, distances[1:], strict=False))


def test_observations_accumulate():
    once, often = KLController(0.05, 6.0), KLController(0.05, 6.0)
    once.observe(448.0, 64)
    for kl_sum, n in [(100.0, 10), (0.0, 4), (348.0, 50)]:
        often.observe(kl_sum, n)
    once.update()
    often.update()
    assert once == often
    assert once.coef > 0.05


def test_update_forgets_what_it_used():
    controller = KLController(0.05, 6.0)
    step(controller, 60.0)
    assert step(controller, 6.0) == 1
    fixed = KLController(0.05)
    step(fixed, 60.0)
    assert fixed == KLController(0.05)


@pytest.mark.parametrize("target", [None, 6.0])
def test_update_with_nothing_observed_changes_nothing(target):
    controller = KLController(0.05, target)
    controller.update()
    assert controller == KLController(0.05, target)


def test_state_survives_a_roundtrip():
    controller = KLController(0.05, 6.0, horizon=1000)
    step(controller, 60.0)
    controller.observe(100.0, 10)  # a checkpoint may fall between an observation and its update
    restored = KLController(**asdict(controller))
    assert restored == controller
    assert step(restored, 7.0) == step(controller, 7.0) > 1
    assert restored == controller


def test_coefficient_stays_positive_however_large_the_batch():
    controller = KLController(0.1, target=6.0, horizon=10)
    for _ in range(5):
        controller.observe(0.0, 1000)
        controller.update()
    assert controller.coef == pytest.approx(0.1 * 0.8**5)
