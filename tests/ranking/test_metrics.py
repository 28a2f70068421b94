"""Ranking metrics against scipy, scikit-learn, loops over pairs, simulated judgements and hand examples."""

import itertools
import json
import math

import pytest
import torch
from benchmarks.gap_auc import gap_auc
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from sklearn.metrics import roc_auc_score

from trl_ext.ranking import (
    MAX_ENUMERATED,
    RANKING_MODELS,
    judgements_nll,
    predict_pair,
    predict_pairs_of_ranking,
    ranking_nll,
    wins_and_ties,
)
from trl_ext.ranking.metrics import (
    NUM_BINS,
    baseline_nll,
    kendall_tau_b,
    means_of_sums,
    ranking_sums,
)
from trl_ext.ranking.rewardbench import rewardbench2_ties


REFERENCE_CASES = SHARED / "research" / "ties_reference_cases.json"
LOG_TIE = {"rao_kupper": [0.7], "davidson": [0.3], "davidson_luce": [0.2, -0.5, -1.5]}
METRICS = {
    "pair_accuracy",
    "three_way_accuracy",
    "tie_rate",
    "predicted_tie_rate",
    "tie_calibration_error",
    "kendall_tau_b",
    "pair_log_likelihood",
}

property_test = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def f64(data):
    return torch.tensor(data, dtype=torch.float64)


def log_tie_of(model):
    return f64(LOG_TIE[model]) if model in LOG_TIE else None


def assert_close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


def rankings(num_prompts=40, num_items=5, absent=0.2, seed=0):
    """Scores and ranks on coarse grids, so that both have ties, with absent items."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (num_prompts, num_items), generator=generator).double() / 2
    ranks = torch.randint(0, 4, (num_prompts, num_items), generator=generator)
    ranks[torch.rand(ranks.shape, generator=generator) < absent] = -1
    return scores, ranks


def judgements(num_prompts=30, num_items=4, seed=0):
    """Draws how often pairs were judged so, in any direction: no order need agree with it."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 5, (num_prompts, num_items), generator=generator).double() / 2
    wins, ties = torch.randint(0, 3, (2, num_prompts, num_items, num_items), generator=generator)
    return scores, wins.triu(1) + wins.tril(-1), ties.triu(1) + ties.triu(1).mT


def listed(scores, wins, ties):
    """Every single judgement as (prompt, score of the better, score of the other, is it a tie?)."""
    for b, s in enumerate(scores.tolist()):
        for i, j in itertools.combinations(range(len(s)), 2):
            yield from [(b, s[i], s[j], False)] * int(wins[b, i, j])
            yield from [(b, s[j], s[i], False)] * int(wins[b, j, i])
            yield from [(b, s[i], s[j], True)] * int(ties[b, i, j])


def added(*sums):
    return {name: sum(part[name] for part in sums) for name in sums[0]}


def metrics(scores, wins, ties, model="davidson_luce", log_tie=None):
    return means_of_sums(ranking_sums(scores, wins, ties, model, log_tie))


# --- Sums ---


@pytest.mark.parametrize("data", [(rankings, True), (judgements, False)], ids=["rankings", "judgements"])
@pytest.mark.parametrize("model", RANKING_MODELS)
def test_metrics_are_means_over_the_list_of_judgements(model, data):
    make, are_ranks = data
    scores, *rest = make()
    wins, ties = wins_and_ties(*rest) if are_ranks else rest
    if model == "davidson_luce":  # which says other things of two items among others: see below
        scores, wins, ties = scores[:, :2], wins[:, :2, :2], ties[:, :2, :2]
    log_tie = log_tie_of(model)
    correct, three_way, predicted, observed, log_likelihood = [], [], [], [], []
    for _, better, other, tied in listed(scores, wins, ties):
        win, tie, lose = (p.item() for p in predict_pair(f64(better), f64(other), model, log_tie))
        best = [outcome for outcome, p in enumerate([win, tie, lose]) if p == max(win, tie, lose)]
        three_way.append((1 if tied else 0) in best and 1 / len(best))
        predicted.append(tie)
        observed.append(tied)
        if not tied:
            correct.append(1.0 if better > other else 0.5 if better == other else 0.0)
        if not tied or log_tie is not None:
            log_likelihood.append(math.log(tie if tied else win))
    n = len(observed)
    # By the decimal's first digit, and the rates of a bin instead of its sums
    bins = [[k for k in range(n) if min(int(predicted[k] * 10), 9) == b] for b in range(10)]
    rates = [[sum(x[k] for k in of) / len(of) for x in (predicted, observed)] for of in bins if of]
    error = sum(len(of) / n * abs(p - o) for of, (p, o) in zip(filter(None, bins), rates, strict=True))
    tau_b = [tau for tau in kendall_tau_b(scores, wins, ties).tolist() if not math.isnan(tau)]
    expected = {
        "pair_accuracy": sum(correct) / len(correct),
        "three_way_accuracy": sum(three_way) / n,
        "tie_rate": sum(observed) / n,
        "predicted_tie_rate": sum(predicted) / n,
        "tie_calibration_error": error,
        "kendall_tau_b": sum(tau_b) / len(tau_b),
        "pair_log_likelihood": sum(log_likelihood) / len(log_likelihood),
    }
    assert set(expected) == METRICS
    assert metrics(scores, wins, ties, model, log_tie) == pytest.approx(expected, rel=1e-10)


def test_sums_by_hand():
    # A > B = C, and the model says A = B > C. With nu = 2, P(win) and P(tie) are 1/4 and 1/2 at equal scores, and
    # 16/25 and 8/25 where the worths are 16 to 1
    scores = f64([[math.log(16), math.log(16), 0.0]])
    sums = ranking_sums(scores, *wins_and_ties(torch.tensor([[0, 1, 1]])), "davidson", f64(math.log(2)))
    expected = {
        "pairs": f64(3),
        "strict_pairs": f64(2),
        "tied_pairs": f64(1),
        "pair_correct": f64(1.5),
        "three_way_correct": f64(1),
        "tie_bin_pairs": f64([0, 0, 0, 2, 0, 1, 0, 0, 0, 0]),
        "tie_bin_predicted": f64([0, 0, 0, 0.64, 0, 0.5, 0, 0, 0, 0]),
        "tie_bin_observed": f64([0, 0, 0, 1, 0, 0, 0, 0, 0, 0]),
        "kendall_tau_b_sum": f64(0.5),  # (1 - 0) / sqrt(2 * 2)
        "kendall_tau_b_prompts": f64(1),
        "log_likelihood": f64(math.log(1 / 4) + math.log(16 / 25) + math.log(8 / 25)),
        "log_likelihood_pairs": f64(3),
    }
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-12)
    assert means_of_sums(sums) == pytest.approx(
        {
            "pair_accuracy": 0.75,
            "three_way_accuracy": 1 / 3,
            "tie_rate": 1 / 3,
            "predicted_tie_rate": 1.14 / 3,
            "tie_calibration_error": (0.36 + 0.5) / 3,
            "kendall_tau_b": 0.5,
            "pair_log_likelihood": math.log(16 / 25 * 8 / 25 / 4) / 3,
        }
    )


@pytest.mark.parametrize("model", RANKING_MODELS)
def test_constant_scores_are_chance(model):
    _, ranks = rankings()
    result = metrics(torch.ones(ranks.shape), *wins_and_ties(ranks), model, log_tie_of(model))
    assert result["pair_accuracy"] == 0.5
    assert "kendall_tau_b" not in result
    if model not in LOG_TIE:  # never a tie: chance among the strict pairs, nothing for the others
        assert result["predicted_tie_rate"] == 0
        assert result["three_way_accuracy"] == pytest.approx((1 - result["tie_rate"]) / 2, rel=1e-6)
        assert result["pair_log_likelihood"] == pytest.approx(-math.log(2), rel=1e-6)


def test_a_certain_tie_is_in_the_last_bin():
    sums = ranking_sums(torch.zeros(1, 2), *wins_and_ties(torch.tensor([[1, 1]])), "davidson", torch.tensor(40.0))
    assert sums["tie_bin_predicted"].tolist() == [0] * (NUM_BINS - 1) + [1]
    assert NUM_BINS == 10


def test_equally_likely_outcomes_share_the_credit():
    wins, ties = wins_and_ties(torch.tensor([[0, 1, 1]]))
    assert metrics(torch.zeros(1, 3), wins, ties, "davidson", torch.tensor(0.0))["three_way_accuracy"] == (
        pytest.approx(1 / 3)
    )


@property_test
@given(
    seed=st.integers(0, 10_000),
    num_prompts=st.integers(2, 12),
    cut=st.integers(0, 12),
    model=st.sampled_from(RANKING_MODELS),
    order=st.booleans(),
)
def test_sums_of_parts_are_the_sums_of_the_whole(seed, num_prompts, cut, model, order):
    scores, wins, ties = judgements(num_prompts, seed=seed)
    if order:
        scores, ranks = rankings(num_prompts, seed=seed)
        wins, ties = wins_and_ties(ranks)
    log_tie = log_tie_of(model)
    whole = ranking_sums(scores, wins, ties, model, log_tie)
    parts = [ranking_sums(scores[of], wins[of], ties[of], model, log_tie) for of in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(added(*parts), whole, rtol=1e-12, atol=1e-12)
    assert means_of_sums(added(*parts)) == pytest.approx(means_of_sums(whole), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("filler", [0.0, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("model", RANKING_MODELS)
def test_padding_changes_nothing(model, filler):
    scores, ranks = rankings()
    padded_scores = torch.cat([scores.masked_fill(ranks < 0, filler), torch.full((40, 3), filler)], dim=1)
    padded_ranks = torch.nn.functional.pad(ranks, (0, 3), value=-1)
    plain = scores, *wins_and_ties(ranks)
    padded = padded_scores, *wins_and_ties(padded_ranks)
    log_tie = log_tie_of(model)
    torch.testing.assert_close(ranking_sums(*padded, model, log_tie), ranking_sums(*plain, model, log_tie))
    assert_close(kendall_tau_b(*padded), kendall_tau_b(*plain))
    assert gap_auc(*padded) == gap_auc(*plain)


@pytest.mark.parametrize("model", RANKING_MODELS)
def test_order_of_items_changes_nothing(model):
    scores, wins, ties = judgements()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = scores[:, order], wins[:, order][:, :, order], ties[:, order][:, :, order]
    log_tie = log_tie_of(model)
    torch.testing.assert_close(
        ranking_sums(*shuffled, model, log_tie), ranking_sums(scores, wins, ties, model, log_tie)
    )
    assert gap_auc(*shuffled) == pytest.approx(gap_auc(scores, wins, ties), rel=1e-12)


@pytest.mark.parametrize(
    "transform", [torch.exp, lambda s: s**3, lambda s: 100 * s - 7], ids=["exp", "cube", "affine"]
)
def test_only_the_order_of_scores_matters_to_accuracy_and_tau_b(transform):
    of_ranks, ranks = rankings(seed=2)
    for scores, wins, ties in [(of_ranks, *wins_and_ties(ranks)), judgements(seed=2)]:
        before, after = metrics(scores, wins, ties), metrics(transform(scores), wins, ties)
        for name in ("pair_accuracy", "kendall_tau_b"):
            assert after[name] == before[name]
        assert before["pair_accuracy"] != 0.5 and before["kendall_tau_b"] != 0
        opposite = metrics(-transform(scores), wins, ties)
        assert opposite["pair_accuracy"] == pytest.approx(1 - before["pair_accuracy"])
        assert opposite["kendall_tau_b"] == pytest.approx(-before["kendall_tau_b"])


def test_half_precision_and_gradients():
    scores, ranks = rankings()
    learned = torch.tensor([0.3], requires_grad=True)
    sums = ranking_sums(scores.bfloat16().requires_grad_(), *wins_and_ties(ranks), "davidson", learned)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in sums.values())
    expected = metrics(scores, *wins_and_ties(ranks), "davidson", f64(0.3))
    assert means_of_sums(sums) == pytest.approx(expected, rel=1e-5)


def test_what_nothing_defines_is_left_out():
    assert means_of_sums(ranking_sums(torch.zeros(0, 4), *wins_and_ties(torch.zeros(0, 4, dtype=torch.long)))) == {}
    assert metrics(torch.randn(2, 3), *wins_and_ties(torch.tensor([[-1, 0, -1], [-1, -1, -1]]))) == {}
    scores, all_tied = f64([[0, 1, 2]]), wins_and_ties(torch.tensor([[3, 3, 3]]))
    assert set(metrics(scores, *all_tied, "davidson", f64(0))) == METRICS - {"pair_accuracy", "kendall_tau_b"}
    assert set(metrics(scores, *all_tied, "bradley_terry")) == (
        METRICS - {"pair_accuracy", "kendall_tau_b", "pair_log_likelihood"}
    )


@pytest.mark.parametrize("log_tie", [None, f64([]), f64([-math.inf]), f64([-math.inf, -math.inf])])
def test_ties_that_cannot_be_are_left_out_of_the_likelihood(log_tie):
    scores, wins, ties = judgements()
    sums = ranking_sums(scores, wins, ties, "davidson_luce", log_tie)
    assert_close(sums["log_likelihood"], -judgements_nll(scores, wins, ties, "bradley_terry").sum())
    assert sums["log_likelihood_pairs"] == wins.sum()


# --- Calibration, with judgements drawn from the model ---


def simulated(model, log_tie, num_prompts, num_items):
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(num_prompts, num_items, generator=generator)
    outcomes = torch.stack(predict_pair(scores.unsqueeze(2), scores.unsqueeze(1), model, log_tie), dim=-1)
    drawn = torch.multinomial(outcomes.flatten(0, 2), 1, generator=generator).reshape(outcomes.shape[:3])
    upper = torch.ones_like(drawn).triu(1).bool()
    tied = upper & (drawn == 1)
    return scores, upper & (drawn == 0) | (upper & (drawn == 2)).mT, tied | tied.mT


@pytest.mark.parametrize(
    ("model", "log_tie", "num_prompts", "num_items"),
    [("rao_kupper", [1.5], 4000, 5), ("davidson", [1.0], 4000, 5), ("davidson_luce", [1.0, 0.0], 40_000, 2)],
)
def test_calibration_error_tells_the_true_model_from_others(model, log_tie, num_prompts, num_items):
    log_tie = torch.tensor(log_tie)
    scores, wins, ties = simulated(model, log_tie, num_prompts, num_items)
    sums = ranking_sums(scores, wins, ties, model, log_tie)
    n, ties_expected = sums["tie_bin_pairs"], sums["tie_bin_predicted"]
    assert (n > 0).sum() >= 5
    # |binomial - its mean| is sqrt(2 / pi) standard deviations on average
    by_chance = ((2 / math.pi * ties_expected * (1 - ties_expected / n.clamp(min=1))).sqrt().sum() / n.sum()).item()
    assert by_chance < 0.01
    result = means_of_sums(sums)
    assert result["tie_calibration_error"] < 2 * by_chance
    assert result["tie_rate"] == pytest.approx(result["predicted_tie_rate"], abs=4 * 0.5 / math.sqrt(40_000))
    for wrong in (log_tie - 0.5, log_tie + 0.5):
        worse = metrics(scores, wins, ties, model, wrong)
        assert worse["tie_calibration_error"] > 0.03
        assert worse["pair_log_likelihood"] < result["pair_log_likelihood"]
    # Ties are as many, but at any gap
    shuffled = metrics(
        scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))], wins, ties, model, log_tie
    )
    assert shuffled["predicted_tie_rate"] == pytest.approx(result["predicted_tie_rate"], abs=0.02)
    assert shuffled["tie_calibration_error"] > 0.03


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0, 0.0], [0.4, -1.0, 2.0, 0.1]])
def test_davidson_luce_is_calibrated_within_its_rankings(scores):
    # All 75 weak orders of four items, each as often as it is likely
    ranks = torch.tensor([r for r in itertools.product(range(4), repeat=4) if set(r) == set(range(max(r) + 1))])
    log_tie = f64([0.132, 0.078, 0.131]).log()
    scores = f64(scores).expand(75, 4)
    probability = torch.exp(-ranking_nll(scores, ranks, "davidson_luce", log_tie))
    assert probability.sum() == pytest.approx(1)
    wins, ties = (x * probability[:, None, None] for x in wins_and_ties(ranks))
    result = metrics(scores, wins, ties, "davidson_luce", log_tie)
    assert result["predicted_tie_rate"] == pytest.approx(result["tie_rate"])
    assert result["tie_calibration_error"] == pytest.approx(0, abs=1e-9)
    if scores[0].eq(0).all():
        assert result["tie_rate"] == pytest.approx(0.1115, abs=1e-4)
        # and not as a pair alone would be
        assert predict_pair(f64(0), f64(0), "davidson_luce", log_tie)[1] == pytest.approx(0.132 / 2.132)


def test_davidson_luce_predicts_each_prompt_by_its_own_number_of_items():
    log_tie = f64([0.2, -0.5])
    ranks = torch.tensor([[1, 1, 2, -1, -1, -1], [1, 2, -1, -1, 1, 3], [1, 2, 3, 4, 5, 5]])
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    together = ranking_sums(scores, *wins_and_ties(ranks), "davidson_luce", log_tie)
    apart = [
        ranking_sums(scores[b : b + 1, kept], *wins_and_ties(ranks[b : b + 1, kept]), "davidson_luce", log_tie)
        for b, kept in enumerate([[0, 1, 2], [0, 1, 4, 5], [0, 1, 2, 3, 4, 5]])
    ]
    for name, value in together.items():
        assert_close(value, sum(sums[name] for sums in apart))
    assert apart[2]["pairs"] == 15 and apart[2]["strict_pairs"] == 14


def test_davidson_luce_predicts_pairs_of_six():
    """By the probabilities of all 4683 orders of six items, ties of four and less."""
    orders = [r for r in itertools.product(range(6), repeat=6) if set(r) == set(range(max(r) + 1))]
    orders = torch.tensor([order for order in orders if max(map(order.count, order)) <= 4])
    scores, log_tie = f64([[0.4, -1.0, 2.0, 0.1, 0.7, -0.3]]), f64([0.132, 0.078, 0.131]).log()
    p = torch.exp(-ranking_nll(scores.expand(len(orders), 6), orders, "davidson_luce", log_tie))
    assert p.sum() == pytest.approx(1)
    expected = [(p @ judgement.flatten(1).double()).view(1, 6, 6) for judgement in wins_and_ties(orders)]
    before, tied, after = predict_pairs_of_ranking(scores, "davidson_luce", log_tie)
    assert_close([before, tied], expected)
    assert_close(after, expected[0].mT)


def test_rankings_too_long_for_predictions_still_count_as_ties():
    ranks = torch.tensor([[1, 1, 2] + [-1] * (MAX_ENUMERATED - 2), [1, 1, 1, *range(2, MAX_ENUMERATED)]])
    scores = torch.randn(2, MAX_ENUMERATED + 1, generator=torch.Generator().manual_seed(0))
    log_tie = torch.tensor([-0.3, -1.0])
    long = metrics(scores[1:], *wins_and_ties(ranks[1:]), log_tie=log_tie)
    pairs = math.comb(MAX_ENUMERATED + 1, 2)
    assert set(long) == {"tie_rate", "pair_accuracy", "kendall_tau_b"}
    assert long["tie_rate"] == pytest.approx(3 / pairs)
    both = metrics(scores, *wins_and_ties(ranks), log_tie=log_tie)
    assert both["tie_rate"] == pytest.approx(4 / (pairs + 3))
    assert (
        both["predicted_tie_rate"]
        == metrics(scores[:1], *wins_and_ties(ranks[:1]), log_tie=log_tie)["predicted_tie_rate"]
    )


def test_no_mean_is_infinite_where_probabilities_underflow():
    scores, ranks = torch.tensor([[0.0, 400.0]]), torch.tensor([[1, 2]])
    for model, log_tie in [("bradley_terry", None), ("davidson_luce", torch.tensor([0.0]))]:
        for order in (ranks, torch.ones_like(ranks)):
            assert all(map(math.isfinite, metrics(scores, *wins_and_ties(order), model, log_tie).values()))


# --- Kendall's tau-b ---


def test_kendall_tau_b_of_complete_rankings_is_scipys():
    for num_items in (2, 3, 5, 9):
        scores, ranks = rankings(60, num_items, absent=0)
        expected = [kendalltau(s, -r).statistic for s, r in zip(scores.numpy(), ranks.numpy(), strict=True)]
        tau_b = kendall_tau_b(scores, *wins_and_ties(ranks))
        assert_close(tau_b, f64(expected))
        assert num_items > 3 or tau_b.isnan().any()


def test_kendall_tau_b_leaves_out_absent_items():
    scores, ranks = rankings()
    expected = [
        kendalltau(s[r >= 0], -r[r >= 0]).statistic for s, r in zip(scores.numpy(), ranks.numpy(), strict=True)
    ]
    assert_close(kendall_tau_b(scores, *wins_and_ties(ranks)), f64(expected))


def test_kendall_tau_b_of_judgements_is_their_correlation():
    # The correlation through 0 of sign(s_i - s_j) with +1, 0, -1 for how i was judged against j
    scores, wins, ties = judgements()
    expected = []
    for b in range(len(scores)):
        of_prompt = [(x > y) - (x < y) for prompt, x, y, _ in listed(scores, wins, ties) if prompt == b]
        judged = [0 if tied else 1 for prompt, _, _, tied in listed(scores, wins, ties) if prompt == b]
        norm = math.hypot(*of_prompt) * math.hypot(*judged)
        expected.append(sum(x * y for x, y in zip(of_prompt, judged, strict=True)) / norm if norm else math.nan)
    assert_close(kendall_tau_b(scores, wins, ties), f64(expected))
    mean = sum(tau for tau in expected if not math.isnan(tau)) / sum(not math.isnan(tau) for tau in expected)
    assert metrics(scores, wins, ties)["kendall_tau_b"] == pytest.approx(mean)


def test_a_cycle_of_judgements():
    wins = torch.tensor([[[0, 1, 0], [0, 0, 1], [1, 0, 0]]])
    scores, no_ties = f64([[2, 1, 0]]), torch.zeros_like(wins)
    assert kendall_tau_b(scores, wins, no_ties).item() == pytest.approx(1 / 3)
    assert metrics(scores, wins, no_ties)["pair_accuracy"] == pytest.approx(2 / 3)


# --- Gaps ---


@pytest.mark.parametrize("make", [rankings, judgements])
@pytest.mark.parametrize("seed", range(4))
def test_gap_auc_is_scikit_learns(make, seed):
    scores, *rest = make(seed=seed)
    wins, ties = wins_and_ties(*rest) if make is rankings else rest
    gaps, strict = zip(*[(abs(x - y), not tied) for _, x, y, tied in listed(scores, wins, ties)], strict=True)
    assert gap_auc(scores, wins, ties) == pytest.approx(roc_auc_score(strict, gaps), rel=1e-12)
    assert gap_auc(5 - 3 * scores, wins, ties) == pytest.approx(roc_auc_score(strict, gaps), rel=1e-12)


def test_gap_auc_by_hand():
    ranks = torch.tensor([[0, 1, 1, 1]])
    assert gap_auc(f64([[5, 1, 2, 3]]), *wins_and_ties(ranks)) == pytest.approx(8.5 / 9)  # 4, 3, 2 against 1, 1, 2
    assert gap_auc(f64([[9, 1, 2, 3]]), *wins_and_ties(ranks)) == 1
    assert gap_auc(f64([[2, 0, 9, 20]]), *wins_and_ties(ranks)) < 0.5
    assert gap_auc(torch.zeros(1, 4), *wins_and_ties(ranks)) == 0.5
    # The difference of two fp32 scores may need more digits
    assert gap_auc(torch.tensor([[1e8, 0.0], [1e8, 1.0]]), *wins_and_ties(torch.tensor([[0, 1], [0, 0]]))) == 1


def test_gap_auc_needs_strict_pairs_and_ties():
    for ranks in ([[0, 1, 2]], [[1, 1, 1]], [[1, -1, -1]]):
        assert math.isnan(gap_auc(f64([[3, 1, 2]]), *wins_and_ties(torch.tensor(ranks))))


# --- Baseline ---


@pytest.mark.parametrize("model", [model for model in RANKING_MODELS if model != "plackett_luce"])
def test_baseline_is_what_equal_scores_get(model):
    _, ranks = rankings()
    log_tie = log_tie_of(model)
    baseline = baseline_nll(ranks, model, log_tie)
    assert baseline.shape == (40,)
    assert_close(
        baseline, ranking_nll(torch.full(ranks.shape, 7.5, dtype=baseline.dtype), ranks, model, log_tie), 1e-5
    )


def test_baseline_by_hand():
    ranks = torch.tensor([[0, 1, 1], [2, 1, 0], [0, 1, -1]])
    pairs = f64([[2, 1], [3, 0], [1, 0]])  # strict, tied
    assert_close(baseline_nll(ranks, "davidson", f64(math.log(2))), -pairs @ f64([0.25, 0.5]).log())
    # theta = 3: P(tie) = (theta - 1) / (theta + 1)
    assert_close(baseline_nll(ranks, "rao_kupper", f64(math.log(3))), -pairs @ f64([0.25, 0.5]).log())
    assert_close(baseline_nll(ranks, "bradley_terry"), pairs[:, 0].float() * math.log(2), 1e-6)
    assert_close(baseline_nll(ranks[1:], "plackett_luce"), torch.tensor([6.0, 2.0]).log(), 1e-6)


# --- RewardBench 2's Ties ---


def row(name, scores, num_correct=1):
    return {"id": name, "scores": scores, "num_correct": num_correct}


def test_rewardbench2_ties_reference_examples():
    if not REFERENCE_CASES.exists():
        pytest.skip(f"no reference cases at {REFERENCE_CASES}")
    examples = json.loads(REFERENCE_CASES.read_text())["rewardbench2_ties_examples"]["examples"]
    assert examples
    for example in examples:
        expected = {name: value for name, value in example.items() if name != "rows"}
        assert rewardbench2_ties(example["rows"]) == pytest.approx(expected, rel=0, abs=1e-12)


def test_rewardbench2_ties_by_hand():
    rows = [
        row("tied:7", [4.0, 3.0, 0.0], 2),  # gap 3, spread 1
        row("ref:7", [2.0, 0.0, 1.0]),  # gap 1: no more than the spread
        row("ref:3", [5.0, 1.0]),  # gap 4
        row("tied:3", [5.0, 3.0, -1.0], 2),  # gap 4, spread 2
        row("ref:1", [0.0, 0.0]),  # gap 0: not accurate, and without a partner
        row("tied:2", [1.0, 0.0, 2.0], 2),  # gap -2
    ]
    expected = {
        "ref_accuracy": 2 / 3,
        "tied_accuracy": 2 / 3,
        "correctness_preferred": 1.0,
        "correctness_preferred_hard": 0.5,
        "correctness_margin_score": (math.tanh(0) + math.tanh(1)) / 2,
        "overall": 0.3 * 4 / 3 + 0.2 * 1.5 + 0.01 * math.tanh(1) / 2,
    }
    result = rewardbench2_ties(rows)
    assert result == pytest.approx(expected, rel=1e-14)
    assert list(result) == list(expected)
    assert rewardbench2_ties(rows[::-1]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("wrong", "accurate", "margin_score"),
    [(0.0, 1, 1.0), (1.0, 0, 0.0), (2.0, 0, -1.0)],
    ids=["gap above 0", "0 / 0", "gap below 0"],
)
def test_rewardbench2_ties_without_spread(wrong, accurate, margin_score):
    result = rewardbench2_ties([row("ref:0", [1.0, wrong]), row("tied:0", [1.0, 1.0, wrong], 2)])
    assert result.pop("overall") == pytest.approx(accurate + 0.01 * margin_score)  # 1.01 at most
    assert result.pop("correctness_margin_score") == margin_score
    assert set(result.values()) == {accurate}


@property_test
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_rewardbench2_ties_is_affine_invariant_and_bounded(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in range(6):
        correct, wrong = torch.randn(3, generator=generator) + 2, torch.randn(4, generator=generator)
        rows.append(row(f"ref:{n}", torch.cat([correct[:1], wrong]).tolist()))
        rows.append(row(f"tied:{n}", torch.cat([correct, wrong]).tolist(), 3))
    moved = [{**of, "scores": [scale * score + shift for score in of["scores"]]} for of in rows]
    result = rewardbench2_ties(rows)
    assert rewardbench2_ties(moved) == pytest.approx(result, abs=1e-6)
    assert -0.01 <= result["overall"] <= 1.01


# --- Errors ---


@pytest.mark.parametrize("name", ["ref", "ref:", "ref:x", "ref:-1", "other:0", "tied:1:2", "", 3])
def test_rewardbench2_ties_names_a_malformed_id(name):
    rows = [row("ref:0", [1.0, 0.0]), row("tied:0", [1.0, 1.0, 0.0], 2)]
    with pytest.raises(ValueError, match=rf"'ref:<n>' or 'tied:<n>', got {name!r}"):
        rewardbench2_ties([*rows, row(name, [1.0, 0.0])])


@pytest.mark.parametrize(
    "bad",
    [
        row("ref:5", [1.0, 0.0], 0),
        row("ref:5", [1.0, 0.0], 2),
        row("tied:5", [1.0, 0.0], 1),
        row("tied:5", [1.0, math.nan, 0.0], 2),
        row("ref:5", [math.inf, 0.0]),
        row("ref:0", [1.0, 0.0]),
        row("ref:00", [1.0, 0.0]),
    ],
)
def test_rewardbench2_ties_names_a_row_that_does_not_fit(bad):
    rows = [row("ref:0", [1.0, 0.0]), row("tied:0", [1.0, 1.0, 0.0], 2)]
    with pytest.raises(ValueError, match=f"rows? '{bad['id']}'"):
        rewardbench2_ties([*rows, bad])


@pytest.mark.parametrize("rows", [[], [row("ref:0", [1.0, 0.0]), row("tied:1", [1.0, 1.0, 0.0], 2)]])
def test_rewardbench2_ties_needs_a_prompt_with_both_rows(rows):
    with pytest.raises(ValueError, match="No n has both"):
        rewardbench2_ties(rows)


@pytest.mark.parametrize("metric", [ranking_sums, kendall_tau_b, gap_auc])
def test_bad_tensors_are_refused(metric):
    scores, ranks = rankings()
    wins, ties = wins_and_ties(ranks)
    for shapes in [(scores[:, 1:], wins, ties), (scores, wins[0], ties), (scores, wins, ties[:1])]:
        with pytest.raises(ValueError, match="must be of shapes"):
            metric(*shapes)
    with pytest.raises(ValueError, match="finite for judged items"):
        metric(torch.full_like(scores, math.nan), wins, ties)
    with pytest.raises(ValueError, match="finite for judged items"):
        metric(scores / 0, wins, ties)
