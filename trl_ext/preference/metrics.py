"""The metrics of rankings, as functions of a batch: what can be summed over batches and processes, and the means of it."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..ranking import MAX_ENUMERATED, PAIRWISE_MODELS, judged_items, judgements_nll, ranking_nll
from ..ranking.metrics import baseline_nll, means_of_sums, ranking_sums


logger = get_logger(__name__)


def gathered(accelerator: Accelerator, log_worths: torch.Tensor, inputs: dict) -> dict[str, torch.Tensor]:
    """
    Returns `log_worths` and `ranks` `(B, K)`, `wins` and `ties` `(B, K, K)` of all processes; of an evaluation's last
    batch, without the rows that only fill it up.
    """

    def padded(tensor: torch.Tensor, value: int = 0) -> torch.Tensor:
        for dim in range(1, tensor.dim()):
            tensor = accelerator.pad_across_processes(tensor, dim=dim, pad_index=value)
        return tensor

    batch = (padded(log_worths), padded(inputs["ranks"], -1), padded(inputs["wins"]), padded(inputs["ties"]))
    return dict(zip(("log_worths", "ranks", "wins", "ties"), accelerator.gather_for_metrics(batch), strict=True))


def batch_sums(batch: dict[str, torch.Tensor], model: str, log_tie: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """
    Sums what metrics are means of over a batch.

    Args:
        batch (`dict[str, torch.Tensor]`): The batch as [`gathered`] returns it.
        model (`str`), log_tie (`torch.Tensor`, *optional*): The likelihood.

    Returns:
        `dict[str, torch.Tensor]`: The sums of [`~trl_ext.ranking.metrics.ranking_sums`], of the `margin` of winners over
        losers, of rankings, and of the log-likelihoods of these, by the model and by a baseline that knows how frequent
        ties are and nothing else.
    """
    log_worths, ranks, wins, ties = (batch[name] for name in ("log_worths", "ranks", "wins", "ties"))
    sums = ranking_sums(log_worths, wins, ties, model, log_tie)
    if sums["pairs"] < sums["strict_pairs"] + sums["tied_pairs"]:
        logger.warning_once(
            f"'{model}' says how likely ties are within rankings of up to {MAX_ENUMERATED} completions; of larger "
            "ones it would take too long. three_way_accuracy, predicted_tie_rate, tie_calibration_error and "
            "pair_log_likelihood leave those out; tie_rate and all other metrics count every ranking."
        )
    if model in PAIRWISE_MODELS:
        nlls = [judgements_nll(s, wins, ties, model, log_tie) for s in (log_worths, torch.zeros_like(log_worths))]
    else:
        nlls = [ranking_nll(log_worths, ranks, model, log_tie), baseline_nll(ranks, model, log_tie)]
    return sums | {
        "margin": (wins * (log_worths.unsqueeze(2) - log_worths.unsqueeze(1))).sum(),
        "rankings": torch.tensor(float(len(log_worths))),
        "ranking_log_likelihood": -nlls[0].sum(),
        "baseline_log_likelihood": -nlls[1].sum(),
    }


def metrics_of(all_sums: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Returns the metrics of several batches, from their [`batch_sums`]."""
    sums = {}
    for batch in all_sums:
        for name, value in batch.items():
            sums.setdefault(name, []).append(value.cpu())
    sums = {name: torch.stack(values).sum(dim=0) for name, values in sums.items()}
    means = means_of_sums(sums)
    if "pair_accuracy" in means:
        means["accuracy"] = means.pop("pair_accuracy")
    if sums["strict_pairs"] > 0:
        means["margin"] = (sums["margin"] / sums["strict_pairs"]).item()
    means["log_likelihood"] = (sums["ranking_log_likelihood"] / sums["rankings"]).item()
    means["baseline_log_likelihood"] = (sums["baseline_log_likelihood"] / sums["rankings"]).item()
    return means


def policy_metrics(
    accelerator: Accelerator, logps: torch.Tensor, outputs, inputs: dict, packed: bool
) -> dict[str, float]:
    """
    Returns what DPO logs of the policy's forward over a batch, of all processes.

    Args:
        accelerator (`Accelerator`): Knows the processes.
        logps (`torch.Tensor` of shape `(B, K)`): Log-probabilities of the completions.
        outputs ([`FusedCausalLMOutput`]): Output of the forward, with `entropy` and `is_top1` of each token.
        inputs (`dict[str, torch.Tensor]`): The batch.
        packed (`bool`): True if the forward was run on packed rows.
    """
    mask = inputs["packed_completion_mask" if packed else "completion_mask"][:, 1:].bool()
    entropy, is_top1 = (values[:, -mask.size(1) :][mask].float() for values in (outputs.entropy, outputs.is_top1))
    judged = judged_items(inputs["wins"], inputs["ties"])
    local = torch.stack([entropy.sum(), is_top1.sum(), mask.sum(), logps[judged].sum(), judged.sum()])
    entropy, is_top1, tokens, logps, completions = accelerator.reduce(local, reduction="sum").tolist()
    return {
        "entropy": entropy / max(tokens, 1),
        "mean_token_accuracy": is_top1 / max(tokens, 1),
        "logps/mean": logps / max(completions, 1),
    }


def named_ties(model: str, log_tie: list[float]) -> dict[str, float]:
    """Returns the tie parameters by their names in the equations of [`~trl_ext.ranking`]."""
    values = torch.tensor(log_tie).double().exp().tolist()  # in fp32 what 89 is the logarithm of is infinite
    if model == "davidson_luce":
        return {f"tie/delta_{n}": value for n, value in enumerate(values, start=2)}
    name = "tie/theta" if model == "rao_kupper" else "tie/nu"
    return {name: values[0]}
