"""Baselines: against loops, a reference library, and expectations over all that can happen in a small MDP."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from enumerable_mdp import PREFIXES, TokenMDP
from scipy.optimize import lsq_linear

from trl_ext import token_mdp
from trl_ext.actor_critic.baseline import Baseline


def batch(num_rows, num_steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_rows, num_steps, generator=generator) < 0.7
    mask[:, 0] = True
    return torch.randn(num_rows, num_steps, generator=generator, dtype=torch.float64), mask


@pytest.mark.parametrize("group_size", [None, 3])
def test_means_of_others_are_those_of_a_loop(group_size):
    x, mask = batch(6, 5)
    mask[:3] &= torch.tensor([[True], [False], [False]])  # a group of which only one has tokens
    means = token_mdp.means_of_others(token_mdp.token_totals([x], mask), group_size)[:, 0]
    for i in range(6):
        others = [j for j in range(6) if j != i and (group_size is None or j // group_size == i // group_size)]
        values = [x[j, t] for j in others for t in range(5) if mask[j, t]]
        expected = torch.stack(values).mean() if values else torch.tensor(torch.nan, dtype=x.dtype)
        torch.testing.assert_close(means[i], expected, equal_nan=True)


def test_step_means_of_others_are_those_of_a_loop():
    x, mask = batch(6, 5)
    means = torch.arange(6, dtype=x.dtype)
    rows = [x[i][mask[i]].tolist() for i in range(6)]  # the n-th chosen token is at step n
    got = token_mdp.step_means_of_others(x, mask, token_mdp.step_totals(x, mask), means)
    for i, row in enumerate(rows):
        expected = []
        for n in range(len(row)):
            others = [r[n] for j, r in enumerate(rows) if j != i and len(r) > n]
            expected.append((sum(others) + means[i].item()) / (len(others) + 1))
        assert got[i][mask[i]].tolist() == pytest.approx(expected)
    assert not got[~mask].any()


@pytest.mark.parametrize("seed", range(20))
def test_weights_are_those_of_bounded_least_squares(seed):
    features, mask = [batch(8, 5, 10 * seed + k)[0] for k in range(3)], batch(8, 5, seed)[1]
    y = 0.6 * features[0] + 0.3 * features[1] - 0.5 * features[2] * (seed % 2) + 0.3 * batch(8, 5, 999 + seed)[0]
    moments = token_mdp.least_squares_moments(features, y, mask)
    weights = token_mdp.least_squares_weights(moments, ridge=0.0)
    a, b = np.stack([f[mask].numpy() for f in features], axis=1), y[mask].numpy()
    reference = lsq_linear(a, b, bounds=(0, np.inf))
    assert reference.x.max() < 1
    np.testing.assert_allclose(weights, reference.x, atol=1e-6)
    share = token_mdp.explained_by_weights(moments, weights).item()
    assert share == pytest.approx(1 - ((a @ reference.x - b) ** 2).sum() / (b**2).sum())


def test_a_feature_that_hardly_varied_has_next_to_no_weight():
    (y, mask), (noise, _) = batch(16, 5), batch(16, 5, 1)
    moments = token_mdp.least_squares_moments([1e-6 * (y + noise)], y, mask)
    assert 0 < token_mdp.least_squares_weights(moments) < 1e-3
    assert token_mdp.least_squares_weights(torch.zeros(3, 3)).tolist() == [0, 0]


# --- On an MDP that can be enumerated ---


@pytest.fixture(params=[False, True], ids=["horizon", "early-end"])
def mdp(request):
    return TokenMDP(early_end=request.param)


def some_critic(mdp, seed):
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(len(PREFIXES), generator=generator, dtype=torch.float64)[mdp.states] - 3


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.7, 0.4)])
def test_the_gradient_is_unbiased_whatever_the_critic_says(mdp, weights):
    returns = token_mdp.discounted_returns(mdp.rewards, mdp.mask).double()
    values, probabilities = some_critic(mdp, 0), mdp.probabilities.detach()
    expected = torch.zeros_like(mdp.logits)
    for i, j in itertools.product(range(len(returns)), repeat=2):  # all rollouts of two completions
        pair = torch.tensor([i, j])
        mask = mdp.mask[pair]
        totals = token_mdp.token_totals([returns[pair], values[pair]], mask)
        means, value_means = token_mdp.means_of_others(totals).unbind(dim=1)
        of_step = token_mdp.step_means_of_others(
            returns[pair], mask, token_mdp.step_totals(returns[pair], mask), means
        )
        features = [of_step - means.unsqueeze(1), values[pair] - value_means.unsqueeze(1)]
        baseline = token_mdp.combine_features(means, features, torch.tensor(weights, dtype=torch.float64))
        advantages = torch.where(mask, returns[pair] - baseline, 0)
        surrogate = (mdp.logps[pair] * advantages).sum() / 2
        expected += probabilities[i] * probabilities[j] * torch.autograd.grad(surrogate, mdp.logits)[0]
    torch.testing.assert_close(expected, torch.autograd.grad(mdp.objective(1.0), mdp.logits)[0])


@pytest.mark.parametrize("seed", range(12))
def test_advantages_vary_no_more_than_with_the_better_of_mean_and_critic(mdp, seed):
    returns = token_mdp.discounted_returns(mdp.rewards, mdp.mask).double()
    true = mdp.true_values(1.0)
    critics = [true, -true, 3 * true + 7, some_critic(mdp, seed)]
    values = critics[seed] if seed < 3 else critics[3] + (seed - 3) / 4 * true
    density = torch.where(mdp.mask, mdp.probabilities.detach().unsqueeze(1), 0)

    def mean(x):  # over the tokens of very many completions
        return (density * x).sum() / density.sum()

    y, feature = returns - mean(returns), values - mean(values)
    moments = token_mdp.least_squares_moments([density.sqrt() * feature], density.sqrt() * y, mdp.mask)
    weights = token_mdp.least_squares_weights(moments, ridge=0.0)
    gated = token_mdp.combine_features(mean(returns).expand(len(y)), [feature], weights)
    squares = [mean((returns - baseline).square()) for baseline in (gated, mean(returns).expand_as(returns), values)]
    assert squares[0] <= min(squares[1:]) + 1e-12
    if seed == 0:
        assert squares[0] < 0.9 * squares[1] and weights.item() == pytest.approx(1)
    if seed == 1:
        assert weights.item() == 0
    variances = [
        mdp.gradient_variance(torch.where(mdp.mask, returns - b, 0).detach())
        for b in (gated, mean(returns).expand_as(returns), values)
    ]
    assert variances[0] <= min(variances[1:]) * 1.02


# --- Over rollouts ---


def baselines(rollouts, group_size=1, learns=True):
    """Baselines of rollouts `(returns, values, mask)` one after the other."""
    baseline = Baseline(Accelerator(cpu=True))
    results = []
    for returns, values, mask in rollouts:
        result, metrics = baseline(returns, values, mask, torch.arange(len(mask)), group_size, learns)
        results.append((torch.where(mask, returns - result, 0), metrics))
    return results


def rollouts(num, seed=0, constant=None, offset=0.0, scale=1.0):
    result = []
    for n in range(num):
        noise, mask = batch(8, 5, seed + 2 * n)
        values, _ = batch(8, 5, seed + 2 * n + 1)
        returns = (noise if constant is None else torch.full_like(noise, constant)) * scale + offset
        result.append((returns.float(), (values * scale).float(), mask))
    return result


def test_equal_returns_have_advantages_of_exactly_0_whatever_the_critic_says():
    for constant in (1.0, -0.1, 1e4 / 3):
        for group_size in (1, 4):
            for advantages, _ in baselines(rollouts(5, constant=constant), group_size):
                assert not advantages.any()


@pytest.mark.parametrize("group_size", [1, 2, 8])
def test_what_is_added_to_all_returns_changes_no_advantage_and_a_factor_scales_them(group_size):
    plain = baselines(rollouts(5), group_size)
    for (advantages, _), (shifted, _), (scaled, _) in zip(
        plain,
        baselines(rollouts(5, offset=32.0), group_size),
        baselines(rollouts(5, scale=64.0), group_size),
        strict=True,
    ):
        torch.testing.assert_close(shifted, advantages, atol=1e-4, rtol=0)
        torch.testing.assert_close(scaled, 64 * advantages, atol=1e-3, rtol=1e-4)


def test_a_critic_that_was_silent_is_not_shouted_after():
    """One that said nothing of the first rollout had a weight of millions in the second."""
    first, second = rollouts(2)
    first = (first[0], 1e-9 * first[1], first[2])
    (_, _), (advantages, metrics) = baselines([first, second])
    assert metrics["baseline/critic"] < 1e-3 and advantages.abs().max() < 10


def test_a_critic_that_knows_is_believed_and_a_group_that_tells_the_prompt_apart():
    generator = torch.Generator().manual_seed(0)
    known, told = [], []
    for _ in range(6):
        noise, mask = batch(16, 5, 3)
        level = torch.randn(4, 1, generator=generator, dtype=torch.float64).repeat_interleave(4, dim=0)
        returns = (level + 0.01 * noise).float()
        known.append((returns, level.expand_as(returns).float(), mask))
        told.append((returns, None, mask))
    for name, results in (("critic", baselines(known)), ("group", baselines(told, group_size=4))):
        advantages, metrics = results[-1]
        assert metrics[f"baseline/{name}"] > 0.9 and metrics["baseline/explained"] > 0.95


@pytest.mark.parametrize("num_unscored", [0, 2])
def test_a_completion_alone_is_compared_with_those_before_it(num_unscored):
    mask = torch.tensor([[True] * 3] + [[False] * 3] * num_unscored)
    alone = [(torch.full(mask.shape, reward), None, mask) for reward in (2.0, 4.0, 4.0)]
    advantages = [advantages[0, 0].item() for advantages, _ in baselines(alone)]
    assert advantages == pytest.approx([0.0, 2.0, 1.8])  # by the running mean 2, 2, 2.2


def test_evaluation_leaves_the_past_as_it_is():
    results = baselines(rollouts(4), learns=False)
    assert all(metrics["baseline/critic"] == metrics["baseline/step"] == 0 for _, metrics in results)
