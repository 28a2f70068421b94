r"""
Likelihoods of rankings with ties, as pure functions.

A prompt has K completions with scores s_i (log-worths: the worth of i is exp(s_i)). People order them, and cannot
separate some: a weak order C_1 > C_2 > ... of groups of tied items. In the code

| symbol | tensor | meaning |
| --- | --- | --- |
| s_i | `scores` `(B, K)` | what the model gives completion i; only differences matter |
| r_i | `ranks` `(B, K)` | lower is better, equal is tied, gaps are allowed; -1 marks absent items and padding |
| log theta, log nu, log delta_n | `log_tie` | how likely ties are |

Pairwise models see every pair as a judgement of its own; listwise ones tell how a whole order comes about, stage by
stage: which group is first, which of the rest is second, ... with A_j the items that stage j still has to place.

| `model` | probability | ties |
| --- | --- | --- |
| `bradley_terry` | P(i > j) = sigmoid(s_i - s_j) | are left out |
| `soft_bradley_terry` | the same | count half a win for each |
| `rao_kupper` | P(i > j) = e^{s_i} / (e^{s_i} + theta e^{s_j}) | `log_tie` = log theta > 0 |
| `davidson` | P(i = j) / sqrt(P(i > j) P(j > i)) = nu | `log_tie` = log nu; DPO-D's nu_D is nu / 2 |
| `plackett_luce` | P(i first of A) = e^{s_i} / sum_A e^{s} | are an error |
| `plackett_luce_marginal` | the sum over all orders within a tie | have an order, which is unknown |
| `plackett_luce_efron`, `plackett_luce_breslow` | approximate that, up to log \|C\|! | the same |
| `davidson_luce` | P(C first of A) ~ delta_\|C\| (prod_C e^{s})^{1/\|C\|} | `log_tie` = (log delta_2, ..., log delta_D) |

Only Davidson-Luce sums to 1 over all weak orders of K > 2 items. For K = 2 it is Davidson's model, and with D = 1,
where no ties are possible, Plackett-Luce's.

References: Bradley and Terry 1952; Rao and Kupper 1967; Davidson 1970; Plackett 1975; Breslow 1974 and Efron 1977 (ties
in Cox's partial likelihood); Turner, van Etten, Firth and Kosmidis 2020, https://arxiv.org/abs/1810.12068, and Firth,
Kosmidis and Turner 2019, https://arxiv.org/abs/1909.07123 (Davidson-Luce).
"""

import math
from collections import Counter
from functools import cache

import torch
import torch.nn.functional as F


PAIRWISE_MODELS = ("bradley_terry", "soft_bradley_terry", "rao_kupper", "davidson")
LISTWISE_MODELS = (
    "plackett_luce",
    "plackett_luce_marginal",
    "plackett_luce_efron",
    "plackett_luce_breslow",
    "davidson_luce",
)
RANKING_MODELS = (*PAIRWISE_MODELS, *LISTWISE_MODELS)


def ranking_nll(
    scores: torch.Tensor,
    ranks: torch.Tensor,
    model: str = "davidson_luce",
    log_tie: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Negative log-likelihood of each prompt's ranking, in nats, summed over its pairs (pairwise models) or stages
    (listwise ones); 0 where fewer than two items are ranked.

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
    scores, log_tie = _checked(scores, model, log_tie)
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
        return _pairwise_nll(scores, *wins_and_ties(ranks), model, log_tie)
    sizes = torch.where(present, tie_sizes(ranks), 0)
    if model == "davidson_luce":
        _check_tie_orders(sizes, log_tie)
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
    Negative log-likelihood of judgements of pairs, which need not agree with any order of the items.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): Log-worths.
        wins (`torch.Tensor` of shape `(B, K, K)`): How often i was judged better than j.
        ties (`torch.Tensor` of shape `(B, K, K)`, symmetric): How often i and j were judged equal.
        model (`str`, *optional*, defaults to `"davidson"`): One of `PAIRWISE_MODELS`.
        log_tie (`torch.Tensor`, *optional*): As for [`ranking_nll`].

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    if model not in PAIRWISE_MODELS:
        raise ValueError(f"Judgements of pairs need a pairwise `model`, one of {PAIRWISE_MODELS}, got {model!r}.")
    scores, log_tie = _checked(scores, model, log_tie)
    judged = judged_items(wins, ties)
    if not scores[judged].isfinite().all():
        raise ValueError("`scores` holds NaN or infinity for a judged item.")
    return _pairwise_nll(torch.where(judged, scores, 0), wins, ties, model, log_tie)


def predict_pair(
    score_i: torch.Tensor, score_j: torch.Tensor, model: str = "davidson_luce", log_tie: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Probability that i wins, that they tie and that i loses, each of the scores' shape. Models without a probability of
    ties give 0 for them.
    """
    score_i, log_tie = _checked(score_i, model, log_tie)
    diff = score_i - score_j.to(score_i.dtype)
    win, tie = _pair_logps(diff, model, log_tie)
    lose, _ = _pair_logps(-diff, model, log_tie)
    return win.exp(), tie.exp(), lose.exp()


def predict_pairs_of_ranking(
    scores: torch.Tensor, model: str = "davidson_luce", log_tie: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    [`predict_pair`] for each pair of items that are ranked together with the others. Only Davidson-Luce makes a
    difference: how often it ties two items depends on what they are ranked with. Its stages are enumerated: all sets of
    items that may be left, and all groups that may come first of them.

    Args:
        scores (`torch.Tensor` of shape `(B, K)`): Log-worths; `K <= MAX_ENUMERATED` for `davidson_luce`.
        model, log_tie: As for [`ranking_nll`].

    Returns:
        `tuple` of three `torch.Tensor` of shape `(B, K, K)`: probability that i is placed before j, with it, after it.
    """
    num_items = scores.size(1)
    if model != "davidson_luce" or num_items == 2:
        return predict_pair(scores.unsqueeze(2), scores.unsqueeze(1), model, log_tie)
    scores, log_tie = _checked(scores, model, log_tie)
    log_delta = F.pad(torch.cat([log_tie.new_zeros(1), log_tie])[:num_items], (1, 0), value=-math.inf)
    log_delta = F.pad(log_delta, (0, num_items + 1 - len(log_delta)), value=-math.inf)
    member = _members(num_items).to(scores)  # (2^K, K)
    sizes = member.sum(dim=1)
    log_weights = log_delta[sizes.long()] + scores @ member.T / sizes.clamp(min=1)  # (B, 2^K), of each group
    reached = torch.zeros_like(log_weights)  # how likely it is that a set is what is left at some stage
    reached[:, -1] = 1
    before = scores.new_zeros(*scores.shape, num_items)
    tied = torch.zeros_like(before)
    for left, groups in _stages(num_items):
        left, groups = left.to(scores.device), groups.to(scores.device)
        rest = left.unsqueeze(1) - groups
        p = (reached[:, left].unsqueeze(2) * log_weights[:, groups].softmax(dim=2)).flatten(1)  # (B, N G)
        reached.index_add_(1, rest.flatten(), p)
        placed, later = member[groups.flatten()].unsqueeze(2), member[rest.flatten()].unsqueeze(1)
        before += (p @ (placed * later).flatten(1)).view_as(before)
        tied += (p @ (placed * placed.mT).flatten(1)).view_as(tied)
    other = ~torch.eye(num_items, dtype=torch.bool, device=scores.device)
    return before, tied * other, before.mT


MAX_ENUMERATED = 10  # items have 3^10 pairs of a set that is left and a group of it


def _members(num_items: int) -> torch.Tensor:
    """`(2^K, K)` bool: item i is in the set of number s if the bit i of s is set."""
    return (torch.arange(2**num_items).unsqueeze(1) >> torch.arange(num_items)) & 1 > 0


@cache
def _stages(num_items: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Numbers of all sets of K, K - 1, ..., 2 items, `(N,)`, with those of all groups that may come first of each,
    `(N, G)`.
    """
    member = _members(num_items)
    bits = 2 ** torch.arange(num_items)
    stages = []
    for size in range(num_items, 1, -1):
        left = (member.sum(dim=1) == size).nonzero().flatten()
        items = bits.expand(len(left), -1)[member[left]].view(-1, size)
        stages.append((left, items @ _members(size)[1:].long().T))
    return stages


# --- Pairs ---


def wins_and_ties(ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(wins, ties)`, `(B, K, K)` bool: whether i is ranked before j, and whether they are tied."""
    present = ranks >= 0
    both = present.unsqueeze(2) & present.unsqueeze(1)
    r_i, r_j = ranks.unsqueeze(2), ranks.unsqueeze(1)
    other = ~torch.eye(ranks.size(1), dtype=torch.bool, device=ranks.device)
    return both & (r_i < r_j), both & other & (r_i == r_j)


def judged_items(wins: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """`(B, K)` bool: which items there is any judgement of."""
    return (wins + wins.mT + ties > 0).any(dim=2)


def _pair_logps(diff: torch.Tensor, model: str, log_tie: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(log P(i > j), log P(i = j))` for `diff` s_i - s_j."""
    if model == "rao_kupper":
        win, lose = F.logsigmoid(diff - log_tie), F.logsigmoid(-diff - log_tie)
        # log(theta^2 - 1), which expm1(2 log_tie) would overflow
        return win, 2 * log_tie + torch.log(-torch.expm1(-2 * log_tie)) + win + lose
    if model == "davidson_luce" and log_tie.numel():
        model, log_tie = "davidson", log_tie[0]
    if model == "davidson":
        # By the geometric mean of the worths: all three terms stay in range, and a tie costs half the difference
        log_total = torch.logsumexp(torch.stack([diff / 2, -diff / 2, log_tie.expand_as(diff)]), dim=0)
        return diff / 2 - log_total, log_tie - log_total
    return F.logsigmoid(diff), torch.full_like(diff, -math.inf)


def _pairwise_nll(scores, wins, ties, model, log_tie) -> torch.Tensor:
    """Every pair's -log P, weighted by how often it was judged so; `ties` hold each pair twice."""
    diff = scores.unsqueeze(2) - scores.unsqueeze(1)
    win, tie = _pair_logps(diff, model, log_tie)
    if model == "soft_bradley_terry":
        tie = (win + F.logsigmoid(-diff)) / 2
    elif model == "bradley_terry":
        tie = torch.zeros_like(diff)
    return -(wins * win + ties * tie / 2).sum(dim=(1, 2))


# --- Stages ---


def tie_sizes(ranks: torch.Tensor) -> torch.Tensor:
    """`(B, K)`: with how many items, itself included, an item shares its rank."""
    return (ranks.unsqueeze(2) == ranks.unsqueeze(1)).sum(dim=2)


def plackett_luce_nll(scores: torch.Tensor, ranks: torch.Tensor, efron: bool = False) -> torch.Tensor:
    r"""
    Plackett-Luce, with Breslow's or Efron's way with ties.

        L = sum_i [log sum_{j: r_j >= r_i} w_ij exp(s_j) - s_i]

    The items placed with i are still to be placed when it is: all of each (Breslow, w = 1), or, for the k-th of a group
    of m (k = 0, 1, ...), the share w = 1 - k/m of each (Efron).

    Args:
        scores, ranks (`torch.Tensor` of shape `(B, K)`): As for [`ranking_nll`], with scores 0 for absent items.
        efron (`bool`, *optional*, defaults to `False`)

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    present = ranks >= 0
    tied = ranks.unsqueeze(2) == ranks.unsqueeze(1)
    remaining = (ranks.unsqueeze(1) >= ranks.unsqueeze(2)) & present.unsqueeze(1) | ~present.unsqueeze(2)
    log_weights = torch.zeros_like(scores).unsqueeze(1).expand_as(tied)
    if efron:
        placed_before = tied.tril(diagonal=-1).sum(dim=2, keepdim=True).to(scores.dtype)
        share = 1 - placed_before / tied.sum(dim=2, keepdim=True)
        log_weights = torch.where(tied, share.log(), 0)
    log_total = (scores.unsqueeze(1) + log_weights).masked_fill(~remaining, -math.inf).logsumexp(dim=2)
    return torch.where(present, log_total - scores, 0).sum(dim=1)


def davidson_luce_nll(scores: torch.Tensor, ranks: torch.Tensor, log_tie: torch.Tensor) -> torch.Tensor:
    r"""
    Davidson-Luce: a stage picks a group of tied items, by its geometric mean worth and how likely its size is.

        P(C | A) = delta_|C| exp(mean_C s) / sum_{n <= D} delta_n e_n({exp(s_i / n): i in A})

    with delta_1 = 1 and e_n the elementary symmetric polynomial of order n, the sum over all groups of n items. The
    sets A of the stages are nested, so one sweep from the worst item to the best gives the polynomials of all of them,
    O(K D^2):

        e_k <- e_k + exp(s_i / n) e_{k-1}        for every n

    Args:
        scores, ranks (`torch.Tensor` of shape `(B, K)`): As for [`ranking_nll`], with scores 0 for absent items.
        log_tie (`torch.Tensor` of shape `(D-1,)`): log delta_2, ..., log delta_D.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    present = ranks >= 0
    max_order = log_tie.numel() + 1
    log_delta = torch.cat([log_tie.new_zeros(1), log_tie])
    # Worst first and absent ones last, so that each prompt's t-th item enters at step t
    order = torch.where(present, -ranks, 1).argsort(dim=1, stable=True)
    sorted_ranks = ranks.gather(1, order)
    next_ranks = F.pad(sorted_ranks[:, 1:], (0, 1), value=-1)
    closes_group = (sorted_ranks >= 0) & (next_ranks != sorted_ranks)

    orders = torch.arange(1, max_order + 1, device=scores.device, dtype=scores.dtype)
    steps = scores.gather(1, order).unsqueeze(2) / orders  # (B, K, D)
    # log e_k, for k up to the number of items so far. Those beyond are 0, whose logarithm has no gradient: the table
    # grows with the items instead of holding them
    log_e = torch.zeros_like(steps[:, 0]).unsqueeze(2)  # (B, D, 1)
    log_totals = []
    for step in steps.unbind(dim=1):
        with_item = log_e + step.unsqueeze(2)  # of order k + 1
        # Not torch.logaddexp, whose second derivative overflows where the two are far apart
        both = torch.stack([log_e[:, :, 1:], with_item[:, :, :-1]]).logsumexp(dim=0)
        log_e = torch.cat([log_e[:, :, :1], both, with_item[:, :, -1:]], dim=2)[:, :, : max_order + 1]
        log_e_n = log_e.diagonal(offset=1, dim1=1, dim2=2)  # order n from the n-th row
        log_totals.append((log_delta[: log_e_n.size(1)] + log_e_n).logsumexp(dim=1))
    log_total = torch.stack(log_totals, dim=1)  # (B, K), that of A = the items up to here

    sizes = torch.where(present, tie_sizes(ranks), 1)
    log_delta_of_item = log_delta[(sizes - 1).clamp(max=max_order - 1)]
    of_group = torch.where(present, (scores + log_delta_of_item) / sizes, 0)
    return torch.where(closes_group, log_total, 0).sum(dim=1) - of_group.sum(dim=1)


def plackett_luce_marginal_nll(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    r"""
    Plackett-Luce, summed over all orders of the items within each tie.

    Let item i arrive at a time of rate exp(s_i); Plackett-Luce is the order of arrival. A tied group C comes before the
    rest, with total rate b, in any order, with probability

        P = int_0^inf b e^{-b t} prod_{i in C} (1 - e^{-exp(s_i) t}) dt

    which the trapezoid rule in log t gives to 12 digits. It runs in fp64. The last group has nothing to come before,
    and a group of one the closed form exp(s_i) / (exp(s_i) + b).

    Args:
        scores, ranks (`torch.Tensor` of shape `(B, K)`): As for [`ranking_nll`], with scores 0 for absent items.

    Returns:
        `torch.Tensor` of shape `(B,)`.
    """
    present = ranks >= 0
    s = scores.double()
    below = (ranks.unsqueeze(1) > ranks.unsqueeze(2)) & present.unsqueeze(2)  # [b, i, j]: j is worse than i
    has_below = below.any(dim=2)
    log_b = s.unsqueeze(1).masked_fill(~below, -math.inf)
    log_b = torch.where(has_below.unsqueeze(2), log_b, 0).logsumexp(dim=2)
    log_rate = torch.where(has_below, s - log_b, 0)  # in units of b

    spacing = 0.1
    end = math.log(scores.size(1) + 1) + 3.8
    log_t = torch.arange(-38, end, spacing, dtype=s.dtype, device=s.device)
    log_arrived = _log1mexp(log_rate.unsqueeze(2) + log_t)  # (B, K, Q)
    tied = (ranks.unsqueeze(2) == ranks.unsqueeze(1)) & present.unsqueeze(2)
    log_integrand = log_t - log_t.exp() + tied.to(s.dtype) @ log_arrived  # (B, K, Q), the same for a group's items
    log_p = math.log(spacing) + log_integrand.logsumexp(dim=2)

    sizes = torch.where(present, tie_sizes(ranks), 1)
    log_p = torch.where(sizes == 1, F.logsigmoid(log_rate), log_p)
    return -torch.where(has_below, log_p / sizes, 0).sum(dim=1).to(scores.dtype)


def _log1mexp(log_a: torch.Tensor) -> torch.Tensor:
    """`log(1 - exp(-exp(log_a)))` without loss of digits; beyond `log_a = 5` it is 0 to 64 digits."""
    is_small, is_tiny = log_a < math.log(math.log(2)), log_a < -30
    a = log_a.clamp(min=-30, max=5).exp()
    # Each branch sees harmless values where the other is taken: a NaN would spoil the gradient of both
    small = torch.expm1(-torch.where(is_small, a, 0.5)).neg().log()
    large = torch.log1p(-torch.exp(-torch.where(is_small, 1.0, a)))
    return torch.where(is_tiny, log_a, torch.where(is_small, small, large))


# --- Ties: how many there are, and arguments that fit ---


def max_tie_order(ranks: list[list[int | None]]) -> int:
    """The size of the largest tied group."""
    return max((max(_group_sizes(row), default=1) for row in ranks), default=1)


def initial_log_tie(ranks: list[list[int | None]], model: str, max_order: int | None = None) -> list[float]:
    r"""
    The tie parameters that fit best if all items were of equal worth: where learning them starts from.

    With a share p of all pairs tied, theta = (1 + p) / (1 - p) (Rao-Kupper) and nu = 2 p / (1 - p) (Davidson). For
    Davidson-Luce, delta_n solves

        delta_n = (number of groups of n) / sum_stages [C(m, n) / sum_k delta_k C(m, k)]        with m = |A|

    Outcomes that were never seen count half a time, which keeps every parameter finite; the groups that are then
    expected are in the ratio of these counts.

    Long rankings may be few, and all of them begin with large ties: where no smaller group was picked though there was
    room for one of t, the data put no bound on delta_t, delta_{t+1}, ... These maximise the likelihood times a prior,

        log delta_n ~ N(min_k [log delta_k + min(0, log C(m, k) - log C(m, n))], 1)        over the k < t

    with m the size of the shortest such stage: a group of n is no likelier than the rarest of the smaller ones, until
    many rankings say that it is. Orders that no prompt was long enough for take the smallest delta.

    Args:
        ranks (`list[list[int | None]]`): One list for each prompt; None or -1 is absent.
        model (`str`): One of `RANKING_MODELS`.
        max_order (`int`, *optional*): D, at least the largest group; that by default.

    Returns:
        `list[float]`: One log theta or log nu, or log delta_2 to log delta_D; empty for models without ties.
    """
    _check_model(model)
    groups = [_group_sizes(row) for row in ranks]
    if model in ("rao_kupper", "davidson"):
        num_ties = sum(math.comb(n, 2) for sizes in groups for n in sizes)
        num_pairs = sum(math.comb(sum(sizes), 2) for sizes in groups)
        p = max(num_ties, 0.5) / (max(num_ties, 0.5) + max(num_pairs - num_ties, 0.5))
        return [math.log((1 + p) / (1 - p))] if model == "rao_kupper" else [math.log(2 * p / (1 - p))]
    if model != "davidson_luce":
        return []
    largest = max((max(sizes, default=1) for sizes in groups), default=1)
    max_order = max_order or largest
    if max_order < largest:
        raise ValueError(f"`max_order` is {max_order}, but a tie of {largest} items was found.")
    # A last group of one is no choice
    stages = Counter((sum(sizes[j:]), n) for sizes in groups for j, n in enumerate(sizes) if sum(sizes[j:]) > 1)
    stages = stages or Counter({(2, 1): 1})
    possible = min(max_order, max(m for m, _ in stages))
    num_bounded = _num_bounded(stages, possible)
    log_delta = _fit_log_delta(stages, torch.zeros(1).double(), num_bounded, prior=None)
    if num_bounded < possible:
        shortest = {n: min(m for m, _ in stages if m >= n) for n in range(num_bounded + 1, possible + 1)}
        rates = [_log_comb(m, num_bounded) - _log_comb(m, possible)[n - 1] for n, m in shortest.items()]
        prior = torch.stack([(log_delta + rate.clamp(max=0)).min() for rate in rates])
        log_delta = _fit_log_delta(stages, log_delta, possible, prior)
    log_delta = log_delta.tolist()
    return (log_delta + [min(log_delta)] * (max_order - possible))[1:]


def _num_bounded(stages: Counter, possible: int) -> int:
    """
    The largest order whose delta the stages, (number of items, size of the group picked) -> count, put a bound on.
    Orders that are possible in all stages have one, as those below them count half a time at least.
    """
    for order in range(min(m for m, _ in stages) + 1, possible + 1):
        counts = [sum(count for (_, n), count in stages.items() if n == k) for k in range(order, possible + 1)]
        if sum(max(count, 0.5) for count in counts) >= sum(count for (m, _), count in stages.items() if m >= order):
            return order - 1
    return possible


def _fit_log_delta(stages: Counter, fixed: torch.Tensor, max_order: int, prior: torch.Tensor | None) -> torch.Tensor:
    """
    log delta_1, ..., log delta_{max_order} `(max_order,)`, of which the first are `fixed`. Stages that picked a larger
    group say nothing of them. `prior` holds the means of the others; without it those never picked count half a time.
    Newton's method, in steps that cannot overshoot.
    """
    stages = {(m, n): count for (m, n), count in stages.items() if n <= max_order}
    if max_order == len(fixed) or not stages:
        return fixed
    log_combinations = torch.stack([_log_comb(m, max_order) for m, _ in stages])  # (S, D)
    times = torch.tensor(list(stages.values())).double()
    counts = torch.tensor([sum(count for (_, n), count in stages.items() if n == k + 1) for k in range(max_order)])
    counts = counts.double() if prior is not None else counts.double().clamp(min=0.5)
    scale = 1 if prior is not None else counts.sum() / times.sum()
    start = prior if prior is not None else -log_combinations.logsumexp(dim=0)[len(fixed) :] + math.log(len(stages))
    log_delta = torch.cat([fixed, start])
    free = slice(len(fixed), None)
    for _ in range(1000):
        p = (log_delta + log_combinations).softmax(dim=1)
        gradient = counts - scale * (times @ p)
        curvature = scale * (torch.diag(times @ p) - p.T @ (times.unsqueeze(1) * p))
        gradient, curvature = gradient[free], curvature[free, free]
        if prior is not None:
            gradient, curvature = gradient - (log_delta[free] - prior), curvature + torch.eye(len(prior)).double()
        step = torch.linalg.solve(curvature, gradient)
        step = step / step.abs().max().clamp(min=1)
        log_delta[free] += step
        if step.abs().max() < 1e-10:
            break
    return log_delta


def _log_comb(num_items: int, max_order: int) -> torch.Tensor:
    """log C(num_items, n) for n = 1 to `max_order`, -inf where there are not as many."""
    orders = torch.arange(1, max_order + 1).double()
    m = torch.tensor(float(num_items)).double()
    log_comb = torch.lgamma(m + 1) - torch.lgamma(orders + 1) - torch.lgamma((m - orders).clamp(min=0) + 1)
    return log_comb.masked_fill(orders > m, -math.inf)


def _group_sizes(ranks: list[int | None]) -> list[int]:
    """Sizes of the tied groups, best first."""
    ranked = [rank for rank in ranks if rank is not None and rank >= 0]
    return [ranked.count(rank) for rank in sorted(set(ranked))]


def _check_model(model: str) -> None:
    if model not in RANKING_MODELS:
        raise ValueError(f"`model` must be one of {RANKING_MODELS}, got {model!r}.")


def _checked(scores, model, log_tie) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`scores` and `log_tie` in fp32 or better, if the latter fits the model."""
    _check_model(model)
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


def _check_tie_orders(sizes: torch.Tensor, log_tie: torch.Tensor) -> None:
    largest = sizes.max().item() if sizes.numel() else 1
    if largest > log_tie.numel() + 1:
        raise ValueError(
            f"`ranks` holds a tie of {largest} items, and `log_tie` allows for {log_tie.numel() + 1} at most (D). "
            "Give log delta_n for more orders."
        )
    if any((sizes == n + 2).any() for n in (log_tie == -math.inf).nonzero().flatten().tolist()):
        raise ValueError("`ranks` holds a tie of a size whose `log_tie` is -inf, which rules it out.")
