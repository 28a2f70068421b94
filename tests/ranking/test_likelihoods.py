"""Likelihoods of rankings with ties against what owes nothing to their code: enumeration, identities, invariances."""

import itertools
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.ranking import (
    LISTWISE_MODELS,
    PAIRWISE_MODELS,
    RANKING_MODELS,
    initial_log_tie,
    judgements_nll,
    max_tie_order,
    predict_pair,
    ranking_nll,
    wins_and_ties,
)


# Losses and gradients, enumerated at 60 digits. They lie beside the repository, not in it
REFERENCE = Path(os.environ.get("TIES_REFERENCE_CASES", SHARED / "research" / "ties_reference_cases.json"))
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_file(), reason=f"No reference cases at {REFERENCE}: set TIES_REFERENCE_CASES to their path."
)
PREFIXES = ("bt_pairs", "soft_pairs", "rao_kupper", "davidson", "pl_strict", "pl_marginal", "pl_efron", "pl_breslow")
REFERENCE_NAMES = dict(zip((*PREFIXES, "davidson_luce"), RANKING_MODELS, strict=True))

# All orders differ: an index that is off by one shows
LOG_TIE = {"rao_kupper": 0.7, "davidson": -0.4, "davidson_luce": (-0.2, -1.2, -0.7, -2.3, -1.6)}

every_model = pytest.mark.parametrize("model", RANKING_MODELS)


def f64(data):
    return torch.tensor(data, dtype=torch.float64)


def assert_close(actual, expected, atol=1e-11, rtol=0):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def tie_parameters(model, dtype=torch.float64):
    return torch.tensor(LOG_TIE[model], dtype=dtype) if model in LOG_TIE else None


def random_rankings(model, size=(60, 6), spread=2.0, seed=0):
    """Draws what `ranking_nll` takes."""
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(size, generator=generator, dtype=torch.float64)
    ranks = torch.randint(0, 4, size, generator=generator)
    if model == "plackett_luce":
        ranks = (ranks + torch.rand(size, generator=generator)).argsort(dim=1).argsort(dim=1)
    return scores, ranks, model, tie_parameters(model)


def with_padding(scores, ranks, garbage, num_absent=3):
    """The same items in the same order with absent ones anywhere in between, and where the items are now."""
    size = scores.size(0), scores.size(1) + num_absent
    places = torch.rand(size, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, : scores.size(1)]
    places = places.sort(dim=1).values
    padded = scores.new_full(size, garbage).scatter(1, places, scores)
    return padded, ranks.new_full(size, -1).scatter(1, places, ranks), places


def evaluate(scores, ranks, model, log_tie=None):
    """Loss of each ranking and the gradient of their sum with respect to the scores."""
    scores = scores.detach().clone().requires_grad_()
    loss = ranking_nll(scores, ranks, model, log_tie)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def likelihoods(scores, orders, model, log_tie=None):
    return ranking_nll(f64([list(scores)] * len(orders)), torch.tensor(orders), model, log_tie).neg().exp()


def weak_orders(num_items):
    """All of them, as ranks without gaps."""
    return [r for r in itertools.product(range(num_items), repeat=num_items) if set(r) == set(range(max(r) + 1))]


def group_sizes(ranks):
    return tuple(ranks.count(rank) for rank in sorted(set(ranks) - {-1}))


# --- Values: references, enumeration, closed forms ---


# In fp32, scores of about 100 are rounded by up to 4e-6, and a loss adds up to 15 pairs of them
@needs_reference
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-6, 3e-5)])
def test_reference_cases(dtype, rtol, atol):
    seen = set()
    for case in json.loads(REFERENCE.read_text())["cases"]:
        for name, expected in case["losses"].items():
            model = REFERENCE_NAMES.get(name.split("|")[0])
            if model is None:
                continue
            inputs, truth = [torch.tensor([case["scores"]], dtype=dtype)], [expected["loss"], *expected["grad"]]
            if expected["params"]:
                [params], [gradient] = expected["params"].values(), expected["grad_params"].values()
                if model == "davidson_luce":  # delta_1 = 1 is listed too, and absent orders are null
                    params = [-math.inf if x is None else x for x in params[1:]]
                    gradient = [x or 0.0 for x in gradient[1:]]
                inputs.append(torch.tensor(params, dtype=dtype))
                truth += np.ravel(gradient).tolist()
            inputs = [x.requires_grad_() for x in inputs]
            loss = ranking_nll(inputs[0], torch.tensor([case["ranks"]]), model, *inputs[1:])
            loss.backward()
            actual = [loss.item(), *torch.cat([x.grad.flatten() for x in inputs]).tolist()]
            assert actual == pytest.approx(truth, rel=rtol, abs=atol), (case["id"], name)
            seen |= {model, name}
    assert seen >= {*RANKING_MODELS, "davidson_luce|D=K,delta2 absent"}


@needs_reference
def test_reference_sums_over_all_weak_orders():
    log_tie = {"rao_kupper": math.log(3), "davidson": math.log(2), "davidson_luce": [math.log(0.5)] * 3}
    for row in json.loads(REFERENCE.read_text())["normalisation"]:
        orders = weak_orders(row["K"])
        for name, model in REFERENCE_NAMES.items():
            if model == "plackett_luce":
                continue
            p = likelihoods(row["scores"], orders, model, f64(log_tie[model]) if model in log_tie else None)
            assert p.sum().item() == pytest.approx(row["sum_over_all_weak_orders"][name], abs=1e-9), (row["K"], name)
            for pattern, expected in row["sum_per_tie_composition"].get(name, {}).items():
                of_pattern = [str(group_sizes(order)) == pattern for order in orders]
                assert p[of_pattern].sum().item() == pytest.approx(expected, abs=1e-9), (row["K"], name, pattern)


def brute_force_nll(scores, ranks, model, log_tie):
    """From the definitions: worths instead of scores, in plain floats, over all subsets and permutations."""
    worth, items, loss = [math.exp(s) for s in scores], [i for i, rank in enumerate(ranks) if rank >= 0], 0.0
    for i, j in itertools.combinations(items, 2) if model in PAIRWISE_MODELS else ():
        a, b = worth[i], worth[j]
        if model == "rao_kupper":
            win, lose = a / (a + math.exp(log_tie) * b), b / (b + math.exp(log_tie) * a)
        else:
            total = a + b + (math.exp(log_tie) * math.sqrt(a * b) if model == "davidson" else 0)
            win, lose = a / total, b / total
        if ranks[i] != ranks[j]:
            loss -= math.log(win if ranks[i] < ranks[j] else lose)
        elif model != "bradley_terry":
            loss -= math.log(win * lose) / 2 if model == "soft_bradley_terry" else math.log(1 - win - lose)
    remaining = items if model in LISTWISE_MODELS else ()
    while remaining:
        group = [i for i in remaining if ranks[i] == min(ranks[j] for j in remaining)]
        product, m = math.prod(worth[i] for i in group), len(group)
        # The worth of what is still to be placed when the k-th of the group is, for every order of the group
        totals = [
            [sum(worth[i] for i in remaining if i not in order[:k]) for k in range(m)]
            for order in itertools.permutations(group)
        ]
        if model in ("plackett_luce", "plackett_luce_marginal"):
            loss -= math.log(sum(product / math.prod(total) for total in totals))
        elif model == "plackett_luce_efron":  # the mean over the orders
            loss -= math.log(product / math.prod(sum(column) / len(totals) for column in zip(*totals, strict=True)))
        elif model == "plackett_luce_breslow":
            loss -= math.log(product / totals[0][0] ** m)
        else:
            choices = {
                subset: math.exp(log_delta) * math.prod(worth[i] for i in subset) ** (1 / n)
                for n, log_delta in enumerate((0, *log_tie), start=1)
                for subset in itertools.combinations(remaining, n)
            }
            loss -= math.log(choices[tuple(group)] / sum(choices.values()))
        remaining = [i for i in remaining if i not in group]
    return loss


@every_model
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_brute_force(model, data):
    K = data.draw(st.integers(1, 6))
    scores = data.draw(st.lists(st.floats(-3, 3), min_size=K, max_size=K))
    ranks = data.draw(st.lists(st.integers(-1, 3), min_size=K, max_size=K))
    log_tie = data.draw(st.floats(0.01, 3)) if model in ("rao_kupper", "davidson") else None
    if model == "plackett_luce":
        ranks = [rank if rank < 0 else rank * K + i for i, rank in enumerate(ranks)]
    if model == "davidson_luce":
        log_tie = data.draw(st.lists(st.floats(-3, 2), min_size=max_tie_order([ranks]) - 1, max_size=6))
        ruled_out = data.draw(st.sets(st.integers(2, 6))).difference(group_sizes(ranks))
        log_tie = [-math.inf if n in ruled_out else x for n, x in enumerate(log_tie, start=2)]
    loss = ranking_nll(f64([scores]), torch.tensor([ranks]), model, None if log_tie is None else f64(log_tie))
    assert loss.item() == pytest.approx(brute_force_nll(scores, ranks, model, log_tie), rel=1e-10, abs=1e-10)


def test_closed_forms_by_hand():
    """Three equal items, the first two tied before the third."""
    delta_2, delta_3 = (math.exp(x) for x in LOG_TIE["davidson_luce"][:2])
    expected = {
        # One first of three, one pair of three, or all three; each item has a third of the stage's gradient
        "davidson_luce": (delta_2 / (3 + 3 * delta_2 + delta_3), [-1 / 6, -1 / 6, 1 / 3]),
        # 2 / ((2 + c)(1 + c)) at c = 1, where Efron's has 1 for 2
        "plackett_luce_marginal": (1 / 3, [-5 / 12, -5 / 12, 5 / 6]),
        "plackett_luce_efron": (1 / 3 * 1 / 2, [-5 / 12, -5 / 12, 5 / 6]),
        "plackett_luce_breslow": (1 / 9, [-1 / 3, -1 / 3, 2 / 3]),
    }
    for model, (p, gradient) in expected.items():
        loss, grad = evaluate(f64([[5.0, 5.0, 5.0]]), torch.tensor([[0, 0, 1]]), model, tie_parameters(model))
        assert_close(loss, f64([-math.log(p)])), assert_close(grad, f64([gradient]))


@pytest.mark.parametrize(("num_items", "num_orders"), [(2, 3), (3, 13), (4, 75)])
def test_probabilities_sum_to_1_over_all_weak_orders(num_items, num_orders):
    orders = weak_orders(num_items)
    assert len(orders) == num_orders
    generator = torch.Generator().manual_seed(num_items)
    scores, *log_ties = (2 * torch.randn(9, 6, generator=generator, dtype=torch.float64)).unbind()
    models = [("davidson_luce", log_ties[d][:d]) for d in (*range(num_items), num_items + 2)]
    if num_items == 2:
        models += [(model, f64(x)) for model in ("rao_kupper", "davidson") for x in (0.01, 1.0, 7.0)]
    for model, log_tie in models:
        max_order = log_tie.numel() + 1
        possible = [order for order in orders if max(group_sizes(order)) <= max_order]
        assert likelihoods(scores[:num_items], possible, model, log_tie).sum().item() == pytest.approx(1, abs=1e-11)
    # The marginal: over all orders with groups of the same sizes, of which there are 2^(K-1) kinds
    p = likelihoods(scores[:num_items], orders, "plackett_luce_marginal")
    patterns = [group_sizes(order) for order in orders]
    for pattern in patterns:
        assert p[[other == pattern for other in patterns]].sum().item() == pytest.approx(1, abs=1e-11)
    assert p.sum().item() == pytest.approx(2 ** (num_items - 1), abs=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_davidson_luce_of_64_items(dtype, tolerance, spread):
    generator = torch.Generator().manual_seed(0)
    scores = (spread * torch.randn(1, 64, generator=generator)).to(dtype).requires_grad_()
    log_tie = torch.randn(63, generator=generator).to(dtype).requires_grad_()
    ranks = torch.arange(64)[None] ** 2 // 500  # 23 items in the first group
    loss = ranking_nll(scores, ranks, "davidson_luce", log_tie)
    loss.backward()
    assert scores.grad.isfinite().all() and log_tie.grad.isfinite().all()

    s, delta, expected = scores[0].double().detach().numpy(), [1.0, *log_tie.double().exp().tolist()], 0.0
    for rank in ranks.unique().tolist():
        left, group = s[ranks[0].numpy() >= rank], s[ranks[0].numpy() == rank]
        if spread == 0:  # all groups of n items are as likely
            sums = [math.comb(len(left), n) for n in range(1, len(left) + 1)]
        else:  # the coefficient of x^n in prod_i (1 + exp(s_i / n) x)
            sums = [abs(np.poly(-np.exp(left / n))[n]) for n in range(1, len(left) + 1)]
        total = math.fsum(d * e for d, e in zip(delta, sums, strict=False))
        expected += math.log(total) - math.log(delta[len(group) - 1]) - group.mean()
    assert expected > 20 and loss.item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("num_tied", [2, 12, 40])
def test_marginal_of_large_groups(dtype, tolerance, num_tied):
    for num_below in (1, 5, 24):  # of equal worth: any set of as many items may come first
        ranks = torch.tensor([[0] * num_tied + [1] * num_below])
        loss = ranking_nll(torch.full(ranks.shape, 3.0, dtype=dtype), ranks, "plackett_luce_marginal")
        assert loss.item() == pytest.approx(math.log(math.comb(num_tied + num_below, num_tied)), rel=tolerance)
    for log_ratio in (-40.0, -4.0, 4.0, 40.0):  # one below, of other worth: P = prod_k k / (k + ratio)
        scores, ranks = (
            torch.tensor([[0.0] * num_tied + [log_ratio]], dtype=dtype),
            torch.tensor([[0] * num_tied + [1]]),
        )
        loss, grad = evaluate(scores, ranks, "plackett_luce_marginal")
        places, ratio = range(1, num_tied + 1), math.exp(log_ratio)
        slope = sum(ratio / (k + ratio) for k in places)
        truth = [sum(math.log1p(ratio / k) for k in places), *[-slope / num_tied] * num_tied, slope]
        assert [loss.item(), *grad[0].tolist()] == pytest.approx(truth, rel=10 * tolerance, abs=tolerance)


# --- Invariances, and models that coincide ---


@every_model
def test_invariances(model):
    scores, ranks, _, log_tie = random_rankings(model)
    loss, grad = evaluate(scores, ranks, model, log_tie)
    assert loss.min() > 0 and grad.abs().amax(dim=1).min() > 1e-3
    assert_close(grad.sum(dim=1), torch.zeros_like(loss))
    shift = f64([-100.0, 30.0]).repeat(30).unsqueeze(1)
    assert_close(evaluate(scores + shift, ranks, model, log_tie), (loss, grad), atol=1e-10)
    other_labels = torch.tensor([7, 8, 1000, 2**40, 2**41, 2**42])[ranks]
    assert_close(evaluate(scores, other_labels, model, log_tie), (loss, grad))
    order = torch.rand(60, 6, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    permuted = evaluate(scores.gather(1, order), ranks.gather(1, order), model, log_tie)
    assert_close(permuted, (loss, grad.gather(1, order)))


@every_model
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_is_as_if_it_were_not_there(model, garbage):
    scores, ranks, _, log_tie = random_rankings(model)
    loss, grad = evaluate(scores, ranks, model, log_tie)
    scores, ranks, places = with_padding(scores, ranks, garbage)
    # The last two rows have one item and none
    scores, ranks = torch.cat([scores, scores[:2]]), torch.cat([ranks, torch.full_like(ranks[:2], -1)])
    ranks[60, places[0, 0]] = 3
    padded_loss, padded_grad = evaluate(scores, ranks, model, log_tie)
    assert_close((padded_loss[:60], padded_grad[:60].gather(1, places)), (loss, grad))
    assert (padded_grad[ranks == -1] == 0).all() and (padded_loss[60:] == 0).all() and (padded_grad[60:] == 0).all()


def test_for_two_items_davidson_luce_is_davidson():
    scores, ranks, *_ = random_rankings("davidson", (60, 2))
    for nu in torch.linspace(-3, 3, 5, dtype=torch.float64):
        expected = evaluate(scores, ranks, "davidson", nu)
        for log_tie in (nu[None], torch.stack([nu, nu + 5])):  # three of two items are no choice
            assert_close(evaluate(scores, ranks, "davidson_luce", log_tie), expected)


def test_without_ties_all_listwise_models_are_plackett_luce():
    scores, ranks, *_ = random_rankings("plackett_luce")
    expected = evaluate(scores, ranks, "plackett_luce")
    for model in LISTWISE_MODELS:  # Davidson-Luce with D = 1
        assert_close(evaluate(scores, ranks, model), expected)
    assert_close(evaluate(scores, ranks, "davidson_luce", f64([-math.inf] * 3)), expected)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-9), (torch.float32, 5e-6)])
def test_without_ties_two_items_have_the_loss_of_reward_trainer(dtype, atol):
    chosen, rejected = 5 * torch.randn(2, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))
    expected = -F.logsigmoid(chosen - rejected)
    scores, ranks = torch.stack([rejected, chosen], dim=1), torch.tensor([[1, 0]]).expand(50, 2)
    for model in ("bradley_terry", "soft_bradley_terry"):
        assert torch.equal(ranking_nll(scores, ranks, model), expected)
    for model in LISTWISE_MODELS:
        assert_close(ranking_nll(scores, ranks, model), expected, atol=atol)
    for model, log_tie in (("rao_kupper", 1e-9), ("davidson", -60.0)):  # ties all but ruled out
        assert_close(ranking_nll(scores, ranks, model, torch.tensor(log_tie, dtype=dtype)), expected, atol=atol)


# --- Gradients ---


@every_model
def test_derivatives_are_those_of_the_loss(model):
    scores, ranks, _, log_tie = random_rankings(model, (3, 3), spread=1.0, seed=2)
    scores, ranks, _ = with_padding(scores, ranks, 1e3, num_absent=1)
    inputs = [x.requires_grad_() for x in (scores, log_tie) if x is not None]

    def loss(scores, log_tie=None):
        return ranking_nll(scores, ranks, model, log_tie)

    assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradgradcheck(loss, inputs)


@every_model
def test_wide_scores_in_single_precision(model):
    generator = torch.Generator().manual_seed(0)
    scores = 120 * torch.rand(100, 6, generator=generator) - 60
    scores, ranks, _ = with_padding(scores, random_rankings(model, (100, 6))[1], math.nan)
    weights = torch.randn(100, 9, generator=generator)
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [scores.to(dtype), tie_parameters(model, dtype)]
        inputs = [x.requires_grad_() for x in inputs if x is not None]
        loss = ranking_nll(inputs[0], ranks, model, *inputs[1:])
        gradient = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
        second = torch.autograd.grad((gradient[0] * weights).sum(), inputs)
        assert all(x.isfinite().all() for x in (loss, *gradient, *second))
        results.append([x.detach().double() for x in (loss, *gradient, *second)])
    # A loss of 100 nats has 8e-6 to its last place in fp32, and the gradient of `log_tie` sums 100 prompts
    assert_close(*results, atol=1e-4, rtol=1e-6)


@every_model
def test_the_best_item_is_pushed_up_and_the_worst_down(model):
    _, ranks, *_ = rankings = random_rankings(model, (200, 6))
    _, grad = evaluate(*rankings)
    for extreme, sign in ((ranks.amin(dim=1, keepdim=True), -1), (ranks.amax(dim=1, keepdim=True), 1)):
        unique = (ranks == extreme) & ((ranks == extreme).sum(dim=1, keepdim=True) == 1)
        assert unique.sum() > 30 and (grad[unique] * sign > 0).all()


@pytest.mark.parametrize("model", ["davidson_luce", "davidson", "rao_kupper", "soft_bradley_terry"])
def test_ties_pull_scores_together(model):
    scores, ranks, _, log_tie = random_rankings(model, (100, 6))
    if model in PAIRWISE_MODELS:  # where other pairs pull too, it is so only if all are tied
        ranks = torch.zeros_like(ranks)
    _, grad = evaluate(scores, ranks, model, log_tie)
    tied = wins_and_ties(ranks)[1]
    together = (scores.unsqueeze(2) - scores.unsqueeze(1)) * (grad.unsqueeze(2) - grad.unsqueeze(1))
    assert tied.sum() > 200 and (together[tied] > 0).all()


def test_marginal_pulls_no_ties_together():
    scores, ranks, model, _ = random_rankings("plackett_luce_marginal", (100, 6))
    ranks = ranks.clamp(max=1)
    ranks[:, :2] = torch.tensor([0, 1])  # two groups
    _, grad = evaluate(scores, ranks, model)
    assert (grad[ranks == 0] < 0).all() and (grad[ranks == 1] > 0).all()
    loss, grad = evaluate(scores, torch.zeros_like(ranks), model)
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("model", ["rao_kupper", "davidson", "soft_bradley_terry", "davidson_luce"])
def test_slope_of_a_tie_far_out_and_at_0(model):
    slope = 1 if model == "rao_kupper" else 0.5
    scores, ranks = f64([[60, 0], [0, 60], [3, 3], [-60, 0]]), torch.tensor([[0, 0], [0, 0], [0, 0], [0, 1]])
    _, grad = evaluate(scores, ranks, model, tie_parameters(model))
    # The last one is no tie, but a comparison lost that was thought won
    assert_close(grad, f64([[slope, -slope], [-slope, slope], [0, 0], [-1, 1]]))


@pytest.mark.parametrize("model", ["davidson_luce", "bradley_terry"])
def test_bound_of_the_gradient(model):
    _, ranks, *_ = rankings = random_rankings(model, (300, 4), spread=10)
    norm = evaluate(*rankings)[1].abs().sum(dim=1)
    num_terms = wins_and_ties(ranks)[0].sum(dim=(1, 2))
    if model == "davidson_luce":  # stages: all groups but a last one of a single item, which is no choice
        num_terms = f64([len(sizes) - (sizes[-1] == 1) for sizes in map(group_sizes, ranks.tolist())])
    assert (norm <= 2 * num_terms + 1e-12).all()
    assert (norm / (2 * num_terms).clamp(min=1)).max() > 0.99  # the bound is reached


# --- Judgements and predictions of pairs ---


@pytest.mark.parametrize("model", PAIRWISE_MODELS)
def test_judgements(model):
    scores, ranks, _, log_tie = random_rankings(model)
    scores, ranks, _ = with_padding(scores, ranks, math.nan)
    wins, ties = wins_and_ties(ranks)
    loss = judgements_nll(scores.requires_grad_(), wins, ties, model, log_tie)
    [grad] = torch.autograd.grad(loss.sum(), scores)
    assert_close((loss.detach(), grad), evaluate(scores, ranks, model, log_tie))
    # A judgement made three times counts three times
    assert_close(judgements_nll(scores, 3 * wins, 3 * ties, model, log_tie), 3 * loss)
    # A = B and B = C, but A > C twice: no order says so, each pair alone does
    wins, ties = torch.zeros(2, 1, 3, 3)
    wins[0, 0, 2] = 2
    ties[0, [0, 1, 1, 2], [1, 0, 2, 1]] = 1
    a, b, c = 0.3, -0.2, 1.1
    pairs = [((a, b), (0, 0)), ((b, c), (0, 0)), ((a, c), (0, 1)), ((a, c), (0, 1))]
    expected = sum(brute_force_nll(*pair, model, LOG_TIE.get(model)) for pair in pairs)
    assert judgements_nll(f64([[a, b, c]]), wins, ties, model, log_tie).item() == pytest.approx(expected, abs=1e-12)


# Davidson-Luce also with its parameters left out: D = 1
@pytest.mark.parametrize(
    ("model", "log_tie"), [*((model, tie_parameters(model)) for model in RANKING_MODELS), ("davidson_luce", None)]
)
def test_predict_pair(model, log_tie):
    s_i, s_j = 4 * torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    win, tie, lose = predict_pair(s_i, s_j, model, log_tie)
    assert_close(win + tie + lose, torch.ones(5, 3, dtype=torch.float64))
    assert_close(predict_pair(s_j, s_i, model, log_tie), (lose, tie, win))
    assert (tie > 0).all() if log_tie is not None else (tie == 0).all()
    for p, order in ((win, [0, 1]), (tie, [0, 0]), (lose, [1, 0])):
        if log_tie is not None or order != [0, 0]:
            nll = ranking_nll(torch.stack([s_i, s_j], -1).flatten(0, 1), torch.tensor([order] * 15), model, log_tie)
            assert_close(p.flatten(), nll.neg().exp())


# --- Tie parameters ---


def test_max_tie_order():
    assert max_tie_order([[1, 2, 2], [3, 3, 3, 0], [None, None, -1, -1, -1, -1]]) == 3
    assert max_tie_order([[0, 1], [None]]) == max_tie_order([[]]) == max_tie_order([]) == 1


def test_initial_log_tie_of_pairs():
    ranks = [[1, 1, 2], [None, 7, 5, -1, 6], [-1, 3]]  # 1 of 6 pairs is tied
    for model, expected in (("rao_kupper", 7 / 5), ("davidson", 2 / 5)):
        [log_tie] = initial_log_tie(ranks, model)
        assert math.exp(log_tie) == pytest.approx(expected)
        assert predict_pair(f64([0.0]), f64([0.0]), model, f64(log_tie))[1].item() == pytest.approx(1 / 6)


def counts_and_gradient(rows, log_tie):
    """Counts groups of 2, 3, ..., and returns the gradient of the loss at equal scores."""
    ranks = [[-1 if rank is None else rank for rank in row] + [-1] * (6 - len(row)) for row in rows]
    log_tie = f64(log_tie).requires_grad_()
    loss = ranking_nll(f64([[0.0] * 6] * len(ranks)), torch.tensor(ranks), "davidson_luce", log_tie).sum()
    sizes = [n for row in ranks for n in group_sizes(row)]
    return f64([sizes.count(n) for n in range(2, len(log_tie) + 2)]), *torch.autograd.grad(loss, log_tie)


def test_initial_log_tie_of_davidson_luce_maximises_the_likelihood():
    patterns = {1234: 298, 1233: 50, 1123: 44, 1223: 27, 1112: 25, 1222: 12, 1111: 12, 1122: 10}
    observed = [list(map(int, str(pattern))) for pattern, count in patterns.items() for _ in range(count)]
    assert [round(math.exp(x), 3) for x in initial_log_tie(observed, "davidson_luce")] == [0.132, 0.078, 0.131]
    rng = random.Random(0)
    drawn = [rng.choices([None, -1, 0, 1, 2], [1, 1, 4, 4, 4], k=rng.randint(1, 6)) for _ in range(300)]
    for rows in (observed, drawn):
        counts, grad = counts_and_gradient(rows, initial_log_tie(rows, "davidson_luce"))
        assert counts.min() > 0 and grad.abs().max() < 1e-5


def test_initial_log_tie_counts_unseen_orders_half():
    # Of three items two come first, always; then one is left, which is no choice: 3 : 3 delta_2 : delta_3 = 0.5 : 8 : 0.5
    assert initial_log_tie([[0, 0, 1]] * 8, "davidson_luce", 3) == pytest.approx([math.log(16), math.log(3)])
    rows = [[0, 1, 1, 1], [1, 0, 2, 3], [0, 1, 2, 2, 2]] * 4
    counts, grad = counts_and_gradient(rows, initial_log_tie(rows, "davidson_luce", max_order=5))
    # The gradient is what is expected less what is observed
    assert_close((counts + grad) / (counts + grad)[1], f64([0.5, 8, 0.5, 0.5]) / 8, atol=1e-6)


@pytest.mark.parametrize(
    "rows", [[], [[]], [[4]], [[0, 0]], [[0, 1]], [[0, 0, 0]] * 50, [[0, 1, 2, 3]] * 50, [[1, None]]]
)
def test_initial_log_tie_is_finite(rows):
    for model in RANKING_MODELS:
        num = {"rao_kupper": 1, "davidson": 1, "davidson_luce": max_tie_order(rows) - 1}.get(model, 0)
        log_tie = initial_log_tie(rows, model)
        assert len(log_tie) == num and all(map(math.isfinite, log_tie))
        assert model != "rao_kupper" or log_tie[0] > 0


ROWS_OF_FOUR = (
    [[1, 2, 3, 4]] * 53 + [[1, 2, 2, 3]] * 30 + [[1, 1, 2, 3]] * 10 + [[1, 2, 2, 2]] * 5 + [[1, 1, 1, 1]] * 2
)


@pytest.mark.parametrize("num_tied", [1, 3, 50, 100_000])
def test_a_tie_of_a_rare_size_is_bounded_by_the_prior(num_tied):
    """The penalised likelihood's own gradient is 0 there, and the smaller orders are what they were."""
    rows = ROWS_OF_FOUR + [[1] * 6] * num_tied
    log_tie, before = initial_log_tie(rows, "davidson_luce"), initial_log_tie(ROWS_OF_FOUR, "davidson_luce")
    assert log_tie[:3] == pytest.approx(before) and max(map(abs, log_tie)) < 20
    tie = torch.tensor(log_tie, dtype=torch.float64, requires_grad=True)
    nll = num_tied * ranking_nll(f64([[0.0] * 6]), torch.ones(1, 6), log_tie=tie).sum()
    prior_mean = min(before)  # groups of 5 and 6 are few among six, so that a small delta makes them rare
    penalty = ((tie[3:] - prior_mean) ** 2).sum() / 2
    gradient = torch.autograd.grad(nll + penalty, tie)[0]
    assert gradient[3:].abs().max() < 1e-5
    p_tied = math.exp(-ranking_nll(f64([[0.0] * 6]), torch.ones(1, 6), log_tie=tie.detach()).item())
    assert p_tied < 0.05 if num_tied == 1 else p_tied > 0.8 if num_tied >= 50 else True


def test_one_large_tie_hardly_moves_the_likelihood_of_others():
    before, after = (f64(initial_log_tie(ROWS_OF_FOUR + more, "davidson_luce")) for more in ([], [[1] * 6]))
    held_out = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 1, 2, 3, 4, 5], [1, 2, 2, 2, 3, 3]])
    losses = [ranking_nll(f64([[0.0] * 6] * 3), held_out, log_tie=log_tie) for log_tie in (before, after)]
    assert_close(*losses, atol=0.1)


@pytest.mark.parametrize(
    "rows",
    [
        [[1] * 5],  # the size below it was never tied: nothing is left over for orders of less than 5
        [[1] * 9, [1, 1, 1, 2, 2, 2, 3, 3, 3]],  # four orders that were never seen beside one that was
        [[1] * 20],
        [[1] * 6, [1] * 7],
        [[1] * 80],  # C(80, 40) is beyond 64 bits
    ],
)
def test_few_long_rankings_say_little_of_their_ties(rows):
    """A ranking as long as they, without ties, is about as likely as if they had not been seen."""
    log_tie = f64(initial_log_tie(ROWS_OF_FOUR + rows, "davidson_luce"))
    length = max(map(len, rows))
    assert log_tie.isfinite().all() and (log_tie < 10).all()
    strict, scores = torch.arange(length)[None], f64([[0.0] * length])
    before = ranking_nll(scores, strict, log_tie=f64(initial_log_tie(ROWS_OF_FOUR, "davidson_luce")))
    assert ranking_nll(scores, strict, log_tie=log_tie).item() == pytest.approx(before.item(), rel=0.1)


LOG_WORTHS = (0.0, 0.6, -0.8, 1.2, -0.3)


def sample_ranks(model, items, log_tie, rng):
    if model == "rao_kupper":  # a difference of logistic distribution, which is felt beyond a threshold
        u = rng.random()
        difference = LOG_WORTHS[items[0]] - LOG_WORTHS[items[1]] + math.log(u / (1 - u))
        return [0, 0] if abs(difference) < log_tie[0] else [0, 1] if difference > 0 else [1, 0]
    if model == "plackett_luce_marginal":  # the first two to arrive, in an order that was not seen, then the others
        arrival = [rng.expovariate(math.exp(LOG_WORTHS[i])) for i in items]
        return [sorted(arrival).index(t) // 2 for t in arrival]
    ranks = {}  # Davidson-Luce: each stage draws one of all groups of those left
    while left := [i for i in items if i not in ranks]:
        groups = [group for n in range(1, len(log_tie) + 2) for group in itertools.combinations(left, n)]
        log_weights = [(0, *log_tie)[len(g) - 1] + sum(LOG_WORTHS[i] for i in g) / len(g) for g in groups]
        ranks |= dict.fromkeys(rng.choices(groups, map(math.exp, log_weights))[0], len(ranks))
    return [ranks[i] for i in items]


@pytest.mark.parametrize(
    ("model", "num_items", "log_tie"),
    [
        ("davidson_luce", 4, (-0.3, -1.0, -0.2)),
        ("davidson", 2, (-0.5,)),
        ("rao_kupper", 2, (0.8,)),
        ("plackett_luce_marginal", 4, ()),
    ],
)
def test_the_truth_is_recovered(model, num_items, log_tie):
    rng = random.Random(0)
    prompts = [sorted(rng.sample(range(5), num_items)) for _ in range(3000)]
    sample = torch.tensor([[*items, *sample_ranks(model, items, log_tie, rng)] for items in prompts])
    sample, counts = sample.unique(dim=0, return_counts=True)
    (items, ranks), truth = sample.chunk(2, dim=1), f64([*LOG_WORTHS[1:], *log_tie])

    def nll(parameters):
        worths, tie = F.pad(parameters[:4], (1, 0)), parameters[4:] if log_tie else None
        return ranking_nll(worths[items], ranks, model, tie) @ counts.double()

    fitted = f64([0.0] * 4 + [0.1] * len(log_tie)).requires_grad_()
    optimizer = torch.optim.LBFGS([fitted], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nll(fitted)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fitted.grad.abs().max() < 1e-2
    # The standard errors, from the observed information: the estimate is within four, and they are small
    errors = torch.autograd.functional.hessian(nll, fitted.detach()).inverse().diagonal().sqrt()
    assert errors.max() < 0.12 and ((fitted.detach() - truth).abs() < 4 * errors).all(), (fitted, truth, errors)


@pytest.mark.parametrize("model", LOG_TIE)
def test_the_gradient_reaches_log_tie(model):
    scores, ranks, _, log_tie = random_rankings(model)
    tie = predict_pair(scores[:, 0], scores[:, 1], model, log_tie.requires_grad_())[1]
    for value, reached in ((ranking_nll(scores, ranks, model, log_tie), log_tie.numel()), (tie, 1)):
        [grad] = torch.autograd.grad(value.sum(), log_tie)
        assert (grad != 0).sum() == reached and grad.isfinite().all()  # of a pair, delta_2 alone


# --- Arguments ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_model
def test_half_precision_is_raised(model, dtype):
    scores, ranks, *_ = random_rankings(model)
    scores, log_tie = scores.to(dtype), tie_parameters(model, dtype)
    loss, grad = evaluate(scores, ranks, model, log_tie)
    expected = ranking_nll(scores.float(), ranks, model, None if log_tie is None else log_tie.float())
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and grad.dtype == dtype


SCORES, RANKS = torch.zeros(1, 3), torch.tensor([[0, 0, 1]])


@pytest.mark.parametrize(
    ("ranks", "model", "log_tie", "message"),
    [
        (RANKS, "thurstone", None, "`model` must be one of .*'thurstone'"),
        (RANKS[:, :2], "davidson_luce", None, r"`ranks` must have the shape of `scores`, \(1, 3\), got \(1, 2\)"),
        (RANKS, "plackett_luce", None, "`ranks` holds a tie"),
        (RANKS, "davidson_luce", None, "`ranks` holds a tie of 2 items, and `log_tie` allows for 1 at most"),
        (RANKS * 0, "davidson_luce", [0.0], "`ranks` holds a tie of 3 items, and `log_tie` allows for 2 at most"),
        (RANKS, "davidson_luce", [-math.inf, 0], "`ranks` holds a tie of a size whose `log_tie` is -inf"),
        (RANKS, "davidson_luce", 0.0, r"'davidson_luce' takes `log_tie` of shape \(D-1,\), finite or -inf, got 0"),
        (RANKS, "rao_kupper", None, "'rao_kupper' takes one number as `log_tie`"),
        (RANKS, "davidson", [0.0, 0.0], "'davidson' takes one number as `log_tie`"),
        (RANKS, "rao_kupper", 0.0, "`log_tie` = log theta > 0, got 0.0"),
        (RANKS, "soft_bradley_terry", 1.0, "'soft_bradley_terry' has no tie parameter: leave out `log_tie`"),
        (RANKS, "plackett_luce_efron", [], "'plackett_luce_efron' has no tie parameter: leave out `log_tie`"),
    ],
)
def test_what_ranking_nll_refuses(ranks, model, log_tie, message):
    with pytest.raises(ValueError, match=message):
        ranking_nll(SCORES, ranks, model, None if log_tie is None else torch.tensor(log_tie))


def test_what_else_is_refused():
    wins, ties = wins_and_ties(RANKS)
    for model in (*LISTWISE_MODELS, "thurstone"):
        with pytest.raises(ValueError, match="pairwise `model`"):
            judgements_nll(SCORES, wins, ties, model)
    spoiled = torch.tensor([[0.0, 0.0, math.nan]])
    with pytest.raises(ValueError, match="`scores` holds NaN or infinity for a judged item"):
        judgements_nll(spoiled, wins, ties, "bradley_terry")
    with pytest.raises(ValueError, match="`scores` holds NaN or infinity for a ranked item"):
        ranking_nll(spoiled, RANKS, "bradley_terry")
    with pytest.raises(ValueError, match="one number as `log_tie`"):
        predict_pair(SCORES, SCORES, "davidson")
    with pytest.raises(ValueError, match="`max_order` is 2, but a tie of 3 items"):
        initial_log_tie([[1, 1, 1]], "davidson_luce", max_order=2)


# --- Mended defects ---


def test_orders_no_prompt_was_long_enough_for_start_small():
    log_tie = initial_log_tie([[0, 1], [0, 0]] * 50, "davidson_luce", 4)
    assert log_tie == pytest.approx([math.log(2)] + [0.0] * 2)  # as many ties as wins of two; min(delta) = delta_1


@pytest.mark.parametrize("log_theta", [50.0, 400.0])
def test_rao_kupper_with_hardly_anything_but_ties(log_theta):
    scores, log_tie = torch.zeros(1, 2, requires_grad=True), torch.tensor(log_theta, requires_grad=True)
    nll = ranking_nll(scores, torch.tensor([[0, 1]]), "rao_kupper", log_tie)
    nll.sum().backward()
    assert nll.item() == pytest.approx(log_theta)  # P(i > j) = 1 / (1 + theta)
    assert log_tie.grad.item() == pytest.approx(1.0)
    assert predict_pair(*scores.detach()[0], "rao_kupper", log_tie.detach())[1].item() == pytest.approx(1.0)


def test_differences_are_taken_in_full_precision():
    scores = torch.tensor([4.03125, 1 / 64], dtype=torch.bfloat16)
    expected = 1 / (1 + math.exp(-(4.03125 - 1 / 64)))
    assert predict_pair(*scores, "bradley_terry")[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("model", ["davidson_luce", "bradley_terry", "plackett_luce"])
def test_no_items_cost_nothing(model):
    assert ranking_nll(torch.zeros(2, 0), torch.zeros(2, 0).long(), model).tolist() == [0, 0]


def test_small_integers_are_ranks_too():
    scores = torch.tensor([[0.3, -0.2, 1.0]])
    ranks = torch.tensor([[1, 2, 2]])
    log_tie = torch.tensor([-1.0])
    expected = ranking_nll(scores, ranks, log_tie=log_tie)
    assert torch.equal(ranking_nll(scores, ranks.to(torch.uint8), log_tie=log_tie), expected)


@pytest.mark.parametrize(
    ("scores", "model", "log_tie", "name"),
    [
        ([0.0, math.inf], "bradley_terry", None, "scores"),
        ([0.0, math.nan], "davidson_luce", None, "scores"),
        ([0.0, 1.0], "davidson", -math.inf, "log_tie"),
        ([0.0, 1.0], "rao_kupper", math.nan, "log_tie"),
        ([0.0, 1.0], "davidson_luce", [math.nan], "log_tie"),
    ],
)
def test_what_is_not_finite_is_refused(scores, model, log_tie, name):
    log_tie = None if log_tie is None else torch.tensor(log_tie)
    with pytest.raises(ValueError, match=f"{name}"):
        ranking_nll(torch.tensor([scores]), torch.tensor([[1, 2]]), model, log_tie)


def test_an_unknown_model_has_no_tie_rates():
    with pytest.raises(ValueError, match="`model`"):
        initial_log_tie([[1, 2]], "thurstone")
