r"""
The loss of a batch of rankings.

For a prompt with K ranked completions of log-worths s_i it is the negative log-likelihood of their ranking (listwise
likelihoods) or of their judgements (pairwise ones), by a divisor that makes K = 2 the parent's loss:

    L = -log P(ranking | s) / (K - 1)                    listwise
    L = -sum_ij log P(judgement of i and j | s) / n      pairwise, with n judgements

Neither divisor depends on the outcome: dividing by the number of stages, which ties make fewer, would weigh rankings
with many ties more and bias the tie parameters upwards.
"""

import torch

from ..ranking import PAIRWISE_MODELS, judgements_nll, ranking_nll


def ranking_loss(
    log_worths: torch.Tensor, inputs: dict[str, torch.Tensor], model: str, log_tie: torch.Tensor | None
) -> torch.Tensor:
    """
    Returns the loss, a scalar.

    Args:
        log_worths (`torch.Tensor` of shape `(B, K)`): The log-worths s_i.
        inputs (`dict[str, torch.Tensor]`): The batch, with `ranks` `(B, K)`, `wins` and `ties` `(B, K, K)`.
        model (`str`), log_tie (`torch.Tensor`, *optional*): The likelihood.
    """
    if model in PAIRWISE_MODELS:
        nll = judgements_nll(log_worths, inputs["wins"], inputs["ties"], model, log_tie)
        divisor = (inputs["wins"] + inputs["ties"] / 2).sum(dim=(1, 2))
    else:
        nll = ranking_nll(log_worths, inputs["ranks"], model, log_tie)
        divisor = (inputs["ranks"] >= 0).sum(dim=1) - 1
    return (nll / divisor).mean()
