"""The token MDP against what owes nothing to its code: exact enumeration, identities, invariances."""

import itertools
import math
import statistics

import pytest
import torch
from enumerable_mdp import HORIZON, PREFIXES, STATE, TokenMDP
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import token_mdp
from trl_ext.token_mdp import (
    combine_moments,
    discounted_returns,
    explained_share,
    explained_variance,
    first_own_token,
    generalized_advantage_estimate,
    kl_estimate,
    length_adaptive_lambda,
    masked_mean,
    masked_moments,
    masked_var,
    masked_whiten,
    one_step_returns,
    place_on_last_token,
)


property_test = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def f64(data):
    return torch.tensor(data, dtype=torch.float64)


def assert_close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(params=[False, True], ids=["horizon", "early-end"])
def mdp(request):
    return TokenMDP(early_end=request.param)


gammas = pytest.mark.parametrize("gamma", [1.0, 0.8])
lams = pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])


# --- Policy gradients, by enumeration ---


@gammas
def test_expected_returns_are_action_values(mdp, gamma):
    values, action_values = mdp.solve(gamma)
    returns = discounted_returns(mdp.rewards, mdp.mask, gamma)
    assert_close((mdp.probabilities * returns[:, 0]).sum(), mdp.objective(gamma))
    assert_close(values[STATE[()]], mdp.objective(gamma).detach())
    expected = mdp.expectation_given_action(returns)
    reached = ~expected.isnan()
    assert reached.sum() == (21 if mdp.early_end else 39)
    assert_close(expected[reached], action_values[reached])


def test_what_is_followed_is_the_gradient_of_the_objective_without_discounting_alone(mdp):
    for gamma in (1.0, 0.8):
        exact = torch.autograd.grad(mdp.objective(gamma), mdp.logits)[0]
        difference = (mdp.followed_gradient(gamma) - exact).abs().max()
        assert exact.abs().max() > 0.01 and (difference < 1e-12 if gamma == 1 else difference > 0.01)


@gammas
@pytest.mark.parametrize("baseline", [0.0, 3.7])
def test_reinforce_gradient_is_exact(mdp, gamma, baseline):
    weights = discounted_returns(mdp.rewards, mdp.mask, gamma) - baseline
    assert_close(mdp.expected_gradient(weights), mdp.followed_gradient(gamma), atol=1e-10)


@pytest.mark.parametrize("baseline", [False, True])
def test_bandit_gradient_is_exact(mdp, baseline):
    exact = torch.autograd.grad(mdp.objective(1.0), mdp.logits)[0]
    weights = one_step_returns(mdp.rewards, mdp.mask)
    if baseline:
        weights = weights - first_own_token(mdp.true_values(1.0), mdp.mask).unsqueeze(1)
    assert_close(mdp.expected_gradient(weights), exact, atol=1e-10)


@gammas
@lams
def test_actor_critic_gradient_is_exact(mdp, gamma, lam):
    advantages, _ = generalized_advantage_estimate(mdp.rewards, mdp.true_values(gamma), mdp.mask, gamma, lam)
    assert_close(mdp.expected_gradient(advantages), mdp.followed_gradient(gamma), atol=1e-10)


@gammas
def test_any_critic_leaves_lam_one_unbiased_and_only_it(mdp, gamma):
    exact = mdp.followed_gradient(gamma)
    wrong = mdp.true_values(gamma) + torch.linspace(-2, 3, len(PREFIXES), dtype=torch.float64)[mdp.states]

    def gradient(lam):
        advantages, _ = generalized_advantage_estimate(mdp.rewards, wrong, mdp.mask, gamma, lam)
        return mdp.expected_gradient(advantages)

    assert_close(gradient(1.0), exact, atol=1e-10)
    assert (gradient(0.5) - exact).abs().max() > 0.01


@gammas
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_expected_advantage_with_the_true_critic_is_exact_for_any_lam(mdp, gamma, lam):
    values, action_values = mdp.solve(gamma)
    exact = action_values - values.unsqueeze(1)
    advantages, returns = generalized_advantage_estimate(mdp.rewards, mdp.true_values(gamma), mdp.mask, gamma, lam)
    expected = mdp.expectation_given_action(advantages)
    reached = ~expected.isnan()
    assert_close(expected[reached], exact[reached])
    assert_close(mdp.expectation_given_action(returns)[reached], action_values[reached])


@gammas
@lams
@pytest.mark.parametrize("length", [1, 2])
def test_bootstrapped_truncation_leaves_advantages_unbiased(mdp, gamma, lam, length):
    """An episode cut after `length` tokens, with V of the state it was cut in; one that ended there has none."""
    values, action_values = mdp.solve(gamma)
    kept = mdp.mask & (torch.arange(HORIZON) < length)
    bootstrap = torch.where(mdp.mask[:, length], values[mdp.states[:, length]], 0)
    advantages, _ = generalized_advantage_estimate(
        mdp.rewards, mdp.true_values(gamma), kept, gamma, lam, bootstrap=bootstrap
    )
    expected = mdp.expectation_given_action(advantages, upto=length)
    reached = ~expected.isnan()
    assert reached.sum() == {(False, 1): 3, (False, 2): 12, (True, 1): 3, (True, 2): 9}[mdp.early_end, length]
    assert_close(expected[reached], (action_values - values.unsqueeze(1))[reached])


def test_the_critic_lowers_the_variance_of_the_gradient(mdp):
    values = mdp.true_values(1.0)
    without = mdp.gradient_variance(discounted_returns(mdp.rewards, mdp.mask))
    with_critic = mdp.gradient_variance(generalized_advantage_estimate(mdp.rewards, values, mdp.mask, lam=1.0)[0])
    assert with_critic < 0.5 * without
    bandit = one_step_returns(mdp.rewards, mdp.mask)
    start = first_own_token(values, mdp.mask).unsqueeze(1)
    assert mdp.gradient_variance(bandit - start) < 0.5 * mdp.gradient_variance(bandit)
    # Causality: past rewards only add noise to a token's credit
    assert without < mdp.gradient_variance(bandit)


# --- Identities ---


def random_batch(rows=6, length=8):
    """Own tokens scattered at random, one row of nothing else and one of none."""
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[0], mask[1] = True, False
    return rewards, values, mask, torch.randn(rows, generator=generator, dtype=torch.float64)


def chosen_entries(row, mask):
    return [x for x, own in zip(row.tolist(), mask.tolist(), strict=True) if own]


def scatter(rows, mask):
    """The inverse of `chosen_entries` over a batch, 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    out[mask] = f64([x for row in rows for x in row])
    return out


@gammas
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_is_the_double_sum_of_td_errors(gamma, lam, cut):
    rewards, values, mask, bootstrap = random_batch()
    expected = []
    for b in range(len(mask)):
        r, v = chosen_entries(rewards[b], mask[b]), chosen_entries(values[b], mask[b])
        following = [*v[1:], bootstrap[b].item() if cut else 0.0]
        deltas = [r[k] + gamma * following[k] - v[k] for k in range(len(r))]
        expected.append(
            [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(deltas))]
        )
        if lam == 0:
            assert expected[-1] == deltas
    advantages, returns = generalized_advantage_estimate(rewards, values, mask, gamma, lam, bootstrap if cut else None)
    assert_close(advantages, scatter(expected, mask))
    assert_close(returns, advantages + torch.where(mask, values, 0))
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@gammas
@pytest.mark.parametrize("cut", [False, True])
def test_returns_are_discounted_sums_and_lam_one_subtracts_the_value(gamma, cut):
    rewards, values, mask, bootstrap = random_batch()
    tail = bootstrap if cut else torch.zeros_like(bootstrap)
    expected = []
    for b in range(len(mask)):
        r = [*chosen_entries(rewards[b], mask[b]), tail[b].item()]  # the rest of the episode, in one last reward
        expected.append([sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r) - 1)])
    expected = scatter(expected, mask)
    end = bootstrap if cut else None
    assert_close(discounted_returns(rewards, mask, gamma, end), expected)
    advantages, returns = generalized_advantage_estimate(rewards, values, mask, gamma, 1.0, end)
    assert_close(returns, expected)
    assert_close(advantages, torch.where(mask, expected - values, 0))


def test_bandit_returns_are_the_whole_reward_at_every_chosen_token():
    rewards, _, mask, bootstrap = random_batch()
    totals = [math.fsum(chosen_entries(rewards[b], mask[b])) for b in range(len(mask))]
    for end, tails in [(None, [0.0] * len(mask)), (bootstrap, bootstrap.tolist())]:
        expected = [[totals[b] + tails[b]] * int(mask[b].sum()) for b in range(len(mask))]
        assert_close(one_step_returns(rewards, mask, end), scatter(expected, mask))


@gammas
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_bootstrap_stands_for_the_rest_of_the_episode(gamma, lam, length):
    rewards, values, _, bootstrap = random_batch()
    mask = torch.ones_like(rewards, dtype=torch.bool)
    kept = torch.arange(rewards.size(1)) < length
    advantages, returns = generalized_advantage_estimate(rewards, values, mask, gamma, lam, bootstrap)

    # With the value the trace would have seen there, the cut changes nothing: V for lam=0, the return for lam=1
    seen = (1 - lam) * values[:, length] + lam * returns[:, length]
    cut_advantages, cut_returns = generalized_advantage_estimate(rewards, values, mask & kept, gamma, lam, seen)
    assert_close(cut_advantages[:, :length], advantages[:, :length])
    assert_close(cut_returns[:, :length], returns[:, :length])

    # With V of the state instead, what is lost is the decayed advantage of the state
    cut_advantages, _ = generalized_advantage_estimate(rewards, values, mask & kept, gamma, lam, values[:, length])
    lost = f64([(gamma * lam) ** (length - t) for t in range(length)]) * advantages[:, length : length + 1]
    assert_close(advantages[:, :length] - cut_advantages[:, :length], lost)


def test_lam_per_row_is_each_row_with_its_own():
    rewards, values, mask, bootstrap = random_batch()
    lams = torch.linspace(0, 1, len(mask), dtype=torch.float64)
    batch = generalized_advantage_estimate(rewards, values, mask, 0.9, lams, bootstrap)
    for b, lam in enumerate(lams.tolist()):
        row = slice(b, b + 1)
        alone = generalized_advantage_estimate(rewards[row], values[row], mask[row], 0.9, lam, bootstrap[row])
        assert_close(batch[0][row], alone[0])
        assert_close(batch[1][row], alone[1])


def test_no_gradient_flows_through_the_critic():
    rewards, values, mask, bootstrap = random_batch()
    values.requires_grad_()
    bootstrap.requires_grad_()
    advantages, returns = generalized_advantage_estimate(rewards, values, mask, bootstrap=bootstrap)
    assert not advantages.requires_grad and not returns.requires_grad
    assert not one_step_returns(rewards, mask, bootstrap).requires_grad
    assert not discounted_returns(rewards, mask, bootstrap=bootstrap).requires_grad


def test_inputs_are_left_as_they_were():
    batch = random_batch()
    before = [x.clone() for x in batch]
    generalized_advantage_estimate(*batch[:3], bootstrap=batch[3])
    one_step_returns(batch[0], *batch[2:])
    masked_whiten(batch[0], batch[2])
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))


# --- Masked positions are not time steps ---


eighths = st.integers(-80, 80).map(lambda n: n / 8)  # their sums are exact, in any order
junk = st.sampled_from([math.inf, -math.inf, math.nan, 0.0, 1e30, -7.5])


@st.composite
def batches(draw):
    """The same chosen tokens twice: alone, and with masked junk before, between and after them."""
    rows = draw(st.lists(st.lists(st.tuples(eighths, eighths), max_size=4), min_size=1, max_size=3))
    gaps = st.lists(st.tuples(junk, junk), max_size=2)
    stuffed = []
    for row in rows:
        positions = [(pair, False) for pair in draw(gaps)]
        for pair in row:
            positions += [(pair, True)] + [(other, False) for other in draw(gaps)]
        stuffed.append(positions)
    alone = [[(pair, True) for pair in row] for row in rows]
    per_row = {name: draw(st.lists(eighths, min_size=len(rows), max_size=len(rows))) for name in ("score", "end")}
    return _batch(alone, (0.0, 0.0)), _batch(stuffed, draw(st.tuples(junk, junk))), per_row


def _batch(rows, padding):
    length = max(1, *(len(row) for row in rows)) if rows else 1
    rows = [row + [(padding, False)] * (length - len(row)) for row in rows]
    pairs = f64([[pair for pair, _ in row] for row in rows])
    return pairs[..., 0], pairs[..., 1], torch.tensor([[own for _, own in row] for row in rows])


@property_test
@given(batches(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_masked_positions_change_nothing(drawn, gamma, lam, cut):
    alone, stuffed, per_row = drawn
    scores, bootstrap = f64(per_row["score"]), f64(per_row["end"]) if cut else None

    def evaluate(rewards, values, mask):
        per_row_lam = torch.linspace(0, lam, len(mask), dtype=torch.float64)
        per_token = {
            "gae": generalized_advantage_estimate(rewards, values, mask, gamma, lam, bootstrap)[0],
            "lambda returns": generalized_advantage_estimate(rewards, values, mask, gamma, lam, bootstrap)[1],
            "lambda per row": generalized_advantage_estimate(rewards, values, mask, gamma, per_row_lam, bootstrap)[0],
            "returns": discounted_returns(rewards, mask, gamma, bootstrap),
            "bandit returns": one_step_returns(rewards, mask, bootstrap),
            "holistic reward": place_on_last_token(scores, mask),
            "whitened": masked_whiten(rewards, mask),
        }
        for name, x in per_token.items():
            assert (x[~mask] == 0).all(), name
        others = {
            "first": first_own_token(values, mask),
            "mean": masked_mean(rewards, mask),
            "var": masked_var(rewards, mask),
            "moments": masked_moments(rewards, mask),
            "explained variance": explained_variance(values, rewards, mask),
        }
        return {name: x[mask] for name, x in per_token.items()} | others

    expected, actual = evaluate(*alone), evaluate(*stuffed)
    for name, x in expected.items():
        assert x.isfinite().all() or name == "explained variance"
        torch.testing.assert_close(
            actual[name], x, rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_place_on_last_token():
    mask = torch.tensor(
        [
            [1, 1, 1, 0, 0],  # padding on the right
            [1, 1, 0, 0, 1],  # a tool's text between chosen tokens
            [1, 0, 1, 0, 0],  # a tool's text after the last chosen token
            [0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0],
        ]
    )
    scores = f64([1.5, -2.0, 3.0, 0.25, math.inf])
    expected = f64(
        [[0, 0, 1.5, 0, 0], [0, 0, 0, 0, -2.0], [0, 0, 3.0, 0, 0], [0, 0, 0, 0.25, 0], [0, 0, 0, 0, 0]],
    )
    assert torch.equal(place_on_last_token(scores, mask), expected)


def test_first_own_token():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    values = f64([[1, 2, math.nan], [math.inf, 5, 6], [7, 8, 9], [math.nan, math.nan, math.nan]])
    assert torch.equal(first_own_token(values, mask), f64([1, 5, 9, 0]))


def test_rows_without_chosen_tokens_give_zeros():
    content = torch.full((2, 3), math.nan, dtype=torch.float64)
    mask, zeros = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.float64)
    bootstrap = f64([2.0, -1.0])
    for x in [
        *generalized_advantage_estimate(content, content, mask, bootstrap=bootstrap),
        discounted_returns(content, mask, bootstrap=bootstrap),
        one_step_returns(content, mask, bootstrap),
        place_on_last_token(bootstrap, mask),
        masked_whiten(content, mask),
    ]:
        assert torch.equal(x, zeros)
    assert torch.equal(first_own_token(content, mask), zeros[:, 0])
    for x in [masked_mean(content, mask), masked_var(content, mask), *combine_moments(torch.zeros(2, 3))]:
        assert x == 0
    assert torch.equal(masked_moments(content, mask), zeros[0])
    assert explained_variance(content, content, mask).isnan()


@lams
def test_one_token_episodes(lam):
    rewards, values, mask = f64([[2.0], [3.0], [5.0]]), f64([[0.5], [1.0], [7.0]]), torch.tensor([[1], [1], [0]])
    bootstrap = f64([10.0, 0.0, 4.0])
    advantages, returns = generalized_advantage_estimate(rewards, values, mask, 0.5, lam, bootstrap)
    assert torch.equal(advantages, f64([[6.5], [2.0], [0.0]]))
    assert torch.equal(returns, f64([[7.0], [3.0], [0.0]]))
    assert torch.equal(one_step_returns(rewards, mask, bootstrap), f64([[12.0], [3.0], [0.0]]))
    assert torch.equal(place_on_last_token(bootstrap, mask), f64([[10.0], [0.0], [0.0]]))
    assert torch.equal(first_own_token(values, mask), f64([0.5, 1.0, 0.0]))
    assert masked_var(rewards, torch.tensor([[1], [0], [0]])) == 0


# --- Dtypes and shapes ---


FUNCTIONS = {
    "advantages": lambda x, y, m: generalized_advantage_estimate(x, y, m, 0.9, 0.7, y[:, 0])[0],
    "lambda_returns": lambda x, y, m: generalized_advantage_estimate(x, y, m, 0.9, 0.7, y[:, 0])[1],
    "discounted_returns": lambda x, y, m: discounted_returns(x, m, 0.9, y[:, 0]),
    "one_step_returns": lambda x, y, m: one_step_returns(x, m, y[:, 0]),
    "first_own_token": lambda x, y, m: first_own_token(x, m),
    "length_adaptive_lambda": lambda x, y, m: length_adaptive_lambda(40 + x[:, 0]),
    "place_on_last_token": lambda x, y, m: place_on_last_token(x[:, 0], m),
    "kl_k1": lambda x, y, m: kl_estimate(x, y, "k1"),
    "kl_k2": lambda x, y, m: kl_estimate(x, y, "k2"),
    "kl_k3": lambda x, y, m: kl_estimate(x, y, "k3"),
    "masked_mean": lambda x, y, m: masked_mean(x, m),
    "masked_var": lambda x, y, m: masked_var(x, m),
    "masked_moments": lambda x, y, m: masked_moments(x, m),
    "masked_whiten": lambda x, y, m: masked_whiten(x, m),
    "explained_variance": lambda x, y, m: explained_variance(x, y, m),
}


def noise(dtype):
    x, y = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[:, 25:] = False
    return x, y, mask


@pytest.mark.parametrize(
    "name",
    FUNCTIONS,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    x, y, mask = noise(dtype)
    if name == "length_adaptive_lambda":  # its argument is rounded here, before the call
        x = x.float().round().to(dtype)
    out, expected = FUNCTIONS[name](x, y, mask), FUNCTIONS[name](x.float(), y.float(), mask)
    assert out.dtype == expected.dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_precision_is_kept(name):
    out = FUNCTIONS[name](*noise(torch.float64))
    assert out.dtype == torch.float64
    assert not torch.equal(out.float().double(), out)  # not rounded on the way


def test_one_double_input_is_enough():
    x, y, mask = noise(torch.float32)
    for a, b in [(x.double(), y), (x, y.double())]:
        assert generalized_advantage_estimate(a, b, mask)[0].dtype == torch.float64
        assert kl_estimate(a, b).dtype == torch.float64


def test_mask_may_be_of_any_dtype():
    rewards, values, mask, _ = random_batch()
    expected = generalized_advantage_estimate(rewards, values, mask)[0]
    for dtype in (torch.long, torch.float32):
        assert torch.equal(generalized_advantage_estimate(rewards, values, mask.to(dtype))[0], expected)
        assert torch.equal(masked_whiten(rewards, mask.to(dtype)), masked_whiten(rewards, mask))
        assert torch.equal(one_step_returns(rewards, mask.to(dtype)), one_step_returns(rewards, mask))


def test_shape_mismatch_names_the_shapes():
    narrow, wide = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"rewards.*\(2, 3\).*values.*\(2, 4\)"):
        generalized_advantage_estimate(narrow, wide, narrow)
    with pytest.raises(ValueError, match=r"values.*\(2, 3\).*mask.*\(2, 4\)"):
        generalized_advantage_estimate(narrow, narrow, wide)
    for function in (discounted_returns, one_step_returns):
        with pytest.raises(ValueError, match=r"rewards.*\(2, 3\).*mask.*\(2, 4\)"):
            function(narrow, wide)
    with pytest.raises(ValueError, match=r"values.*\(2, 3\).*mask.*\(2, 4\)"):
        first_own_token(narrow, wide)
    with pytest.raises(ValueError, match=r"\(3,\)"):  # one row without its batch dimension
        one_step_returns(narrow[0], narrow[0])


# --- KL ---


def categorical_pair():
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = torch.randn(2, 1, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref_logits


def exact_kl(logits, other_logits):
    distribution = torch.distributions.Categorical
    return torch.distributions.kl_divergence(distribution(logits=logits), distribution(logits=other_logits)).sum()


def test_kl_expectations():
    logits, ref_logits = categorical_pair()
    logps, ref_logps = logits.detach().log_softmax(-1), ref_logits.log_softmax(-1)
    k1, k2, k3 = (kl_estimate(logps, ref_logps, name) for name in ("k1", "k2", "k3"))
    exact = exact_kl(logits, ref_logits).detach()
    assert_close((logps.exp() * k1).sum(), exact)
    assert_close((logps.exp() * k3).sum(), exact)
    assert (k1 < 0).any() and (k2 > 0).all() and (k3 > 0).all()
    assert torch.equal(kl_estimate(logps, ref_logps), k1)
    for name in ("k1", "k2", "k3"):
        assert (kl_estimate(logps, logps, name) == 0).all()


def test_kl_gradients_in_expectation():
    """In a loss each does something else: k1 nothing, k2 descends KL(pi || ref), k3 descends KL(ref || pi)."""
    logits, ref_logits = categorical_pair()

    def expected_gradient(name):
        logps = logits.log_softmax(-1)
        estimate = kl_estimate(logps, ref_logits.log_softmax(-1), name)
        return torch.autograd.grad((logps.detach().exp() * estimate).sum(), logits)[0]

    assert_close(expected_gradient("k1"), torch.zeros_like(ref_logits))
    assert_close(expected_gradient("k2"), torch.autograd.grad(exact_kl(logits, ref_logits), logits)[0])
    assert_close(expected_gradient("k3"), torch.autograd.grad(exact_kl(ref_logits, logits), logits)[0])


def test_k3_keeps_its_sign_and_precision_near_zero():
    difference = torch.logspace(-18, 1, 500, dtype=torch.float32)
    for d in (difference, -difference):
        assert (kl_estimate(d.unsqueeze(0), torch.zeros(1, 500), "k3") >= 0).all()
    tiny = kl_estimate(f64([[1e-6]]), f64([[0.0]]), "k3")
    assert_close(tiny / 5e-13, f64([[1.0]]), atol=1e-3)


def test_unknown_kl_estimator():
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


# --- Statistics ---


def test_masked_moments_are_those_of_the_selection():
    x, _, mask, _ = random_batch()
    selected = x[mask]
    assert_close(masked_mean(x, mask), selected.mean())
    assert_close(masked_var(x, mask), selected.var())
    count, mean, squares = masked_moments(x, mask)
    assert count == len(selected)
    assert_close(mean, selected.mean())
    assert_close(squares, selected.var(correction=0) * len(selected))


def test_whitening_gives_mean_zero_and_variance_one():
    x, _, mask, _ = random_batch()
    x = 5 + 3 * x
    selected = masked_whiten(x, mask, eps=0.0)[mask]
    assert_close(selected.mean(), f64(0.0))
    assert_close(selected.var(), f64(1.0))
    assert (x[mask].argsort() == selected.argsort()).all()
    assert_close(masked_whiten(2 * x - 7, mask, eps=0.0)[mask], selected)
    assert_close(masked_whiten(-x, mask, eps=0.0)[mask], -selected)
    assert_close(masked_whiten(x, mask)[mask], selected, atol=1e-7)  # eps is next to nothing
    assert (masked_whiten(torch.full_like(x, 0.5), mask) == 0).all()


def test_whitening_a_part_with_the_moments_of_the_whole():
    x, _, mask, _ = random_batch()
    parts = list(zip(x.split([1, 2, 3]), mask.split([1, 2, 3]), strict=True))
    _, mean, var = combine_moments(torch.stack([masked_moments(*part) for part in parts]))
    whitened = torch.cat([masked_whiten(*part, mean, var) for part in parts])
    assert_close(whitened, masked_whiten(x, mask))


@property_test
@given(
    st.lists(st.tuples(eighths, st.integers(0, 3)), min_size=1, max_size=12),
    st.sampled_from([0.0, 1e8]),  # far from 0, the mean of squares less the square of the mean has no digit left
)
def test_combined_moments_are_those_of_the_whole(entries, offset):
    data = [offset + x for x, _ in entries]
    x, part = f64([data]), torch.tensor([[i for _, i in entries]])
    count, mean, var = combine_moments(torch.stack([masked_moments(x, part == i) for i in range(4)]))
    exact = statistics.variance(data) if len(data) > 1 else 0.0  # in rational arithmetic
    assert count == len(data)
    assert_close(mean, f64(statistics.mean(data)), atol=1e-7)
    torch.testing.assert_close(var, f64(exact), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(masked_var(x, torch.ones_like(x)), f64(exact), rtol=1e-6, atol=1e-6)


def test_explained_variance():
    returns, noise, mask, _ = random_batch()
    returns = torch.where(mask, returns, math.nan)  # elsewhere it is never looked at
    assert_close(explained_variance(returns, returns, mask), f64(1.0))
    assert_close(explained_variance(returns + 3.0, returns, mask), f64(1.0))
    assert_close(explained_variance(torch.full_like(returns, 3.0), returns, mask), f64(0.0))
    assert_close(explained_variance(-returns, returns, mask), f64(-3.0))
    assert_close(explained_variance(0.5 * returns, returns, mask), f64(0.75))
    assert explained_variance(5 * noise, returns, mask) < 0
    assert explained_variance(noise, torch.ones_like(noise), mask).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explained_variance_of_constant_returns_is_nan(dtype):
    """The constant may be any: most are not exact in binary, nor is the mean of several."""
    for constant, length in itertools.product([0.1, 0.3, 1 / 3, 2.3, 1000.1], range(1, 40)):
        returns = torch.full((1, length), constant, dtype=dtype)
        values = torch.linspace(-1, 1, length, dtype=dtype).unsqueeze(0)
        assert explained_variance(values, returns, torch.ones(1, length)).isnan(), (constant, length)


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_explained_variance_of_returns_that_vary_far_from_zero(offset):
    """A hundred and more float32 steps apart, so that they do vary."""
    returns = offset + torch.linspace(-0.02, 0.02, 50).unsqueeze(0)
    mask = torch.ones(1, 50)
    assert_close(explained_variance(returns, returns, mask), torch.tensor(1.0), atol=1e-6)
    assert_close(explained_variance(2 * offset - returns, returns, mask), torch.tensor(-3.0), atol=1e-2)


def test_explained_share_of_a_batch_in_parts():
    returns, values, mask, _ = random_batch()

    def moments(x):
        parts = zip(x.split([1, 2, 3]), mask.split([1, 2, 3]), strict=True)
        return combine_moments(torch.stack([masked_moments(*part) for part in parts]))

    _, mean, var_returns = moments(returns)
    _, _, var_errors = moments(returns - values)
    assert_close(explained_share(var_errors, var_returns, mean), explained_variance(values, returns, mask))


def test_length_adaptive_lambda():
    lengths = torch.tensor([0, 1, 19, 20, 40, 100, 1000])
    expected = torch.tensor([0, 0, 0, 0, 0.5, 0.8, 0.98])
    assert_close(length_adaptive_lambda(lengths, alpha=0.05), expected, atol=1e-6)
    assert torch.equal(length_adaptive_lambda(lengths), length_adaptive_lambda(lengths, alpha=0.05))
    assert_close(length_adaptive_lambda(torch.tensor([4, 10]), alpha=1.0), torch.tensor([0.75, 0.9]), atol=1e-6)
    curve = length_adaptive_lambda(torch.arange(1, 2000))
    assert (curve[20:] > curve[19:-1]).all() and (curve[:20] == 0).all()
    assert (curve >= 0).all() and (curve < 1).all()


# --- The decoupled estimator and the penalized reward ---


def test_decoupled_lambdas_are_two_estimates():
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    mask, bootstrap = torch.rand(4, 7) < 0.7, torch.randn(4, dtype=torch.float64)
    advantages, returns = token_mdp.decoupled_advantage_estimate(rewards, values, mask, 0.9, 0.0, 1.0, bootstrap)
    # lambda 0 of the policy: one-step errors; lambda 1 of the critic: Monte-Carlo returns, whatever the values say
    for row in range(4):
        own = mask[row].nonzero()[:, 0].tolist()
        after = [*own[1:], None]
        for t, following in zip(own, after, strict=True):
            next_value = bootstrap[row] if following is None else values[row, following]
            next_return = bootstrap[row] if following is None else returns[row, following]
            assert_close(advantages[row, t], rewards[row, t] + 0.9 * next_value - values[row, t])
            assert_close(returns[row, t], rewards[row, t] + 0.9 * next_return)
    per_row = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    _, returns_of_rows = token_mdp.decoupled_advantage_estimate(rewards, values, mask, 0.9, per_row, 1.0, bootstrap)
    assert_close(returns_of_rows, returns)


def test_penalized_rewards_sum_to_the_score_less_the_log_ratio():
    torch.manual_seed(0)
    logps, ref_logps = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
    junk = torch.where(mask.bool(), logps, torch.inf)
    rewards = token_mdp.kl_penalized(torch.ones(3, 5), junk, ref_logps, mask, 0.25)
    log_ratio = torch.stack([(logps - ref_logps)[row][mask[row].bool()].sum() for row in range(3)])
    assert_close(rewards.sum(dim=1), mask.sum(dim=1) - 0.25 * log_ratio)
    assert (rewards[mask == 0] == 0).all()
