r"""
Likelihoods of rankings with ties, as pure functions of tensors.

A prompt has K completions with scores s_i (log-worths: the worth of i is exp(s_i)). People order them, and cannot
separate some: a weak order C_1 > C_2 > ... of groups of tied items. In the code

| symbol | tensor | meaning |
| --- | --- | --- |
| s_i | `scores` `(B, K)` | the score that the model gives completion i; only differences matter |
| r_i | `ranks` `(B, K)` | lower is better, equal is tied, gaps are allowed; -1 marks absent items and padding |
| log theta, log nu, log delta_n | `log_tie` | how likely ties are |

| module | contents |
| --- | --- |
| [`~trl_ext.ranking.likelihood`] | the negative log-likelihood of rankings and of judgements of pairs, under any model |
| [`~trl_ext.ranking.pairwise`], [`~trl_ext.ranking.listwise`] | the models' equations |
| [`~trl_ext.ranking.prediction`] | the probability of each outcome of a pair |
| [`~trl_ext.ranking.tie_rates`] | the tie parameters that learning starts from |
| [`~trl_ext.ranking.metrics`] | how well scores predict judgements |
| [`~trl_ext.ranking.agreement`] | how far annotators agree |
| [`~trl_ext.ranking.rewardbench`] | the score of RewardBench 2's subset Ties |

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

from .likelihood import RANKING_MODELS, judgements_nll, ranking_nll
from .listwise import LISTWISE_MODELS, davidson_luce_nll, plackett_luce_marginal_nll, plackett_luce_nll, tie_sizes
from .pairwise import PAIRWISE_MODELS, judged_items, wins_and_ties
from .prediction import MAX_ENUMERATED, predict_pair, predict_pairs_of_ranking
from .tie_rates import initial_log_tie, max_tie_order


__all__ = [
    "LISTWISE_MODELS",
    "MAX_ENUMERATED",
    "PAIRWISE_MODELS",
    "RANKING_MODELS",
    "davidson_luce_nll",
    "initial_log_tie",
    "judged_items",
    "judgements_nll",
    "max_tie_order",
    "plackett_luce_marginal_nll",
    "plackett_luce_nll",
    "predict_pair",
    "predict_pairs_of_ranking",
    "ranking_nll",
    "tie_sizes",
    "wins_and_ties",
]
