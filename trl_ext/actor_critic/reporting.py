"""
Metrics of rollouts and updates, as functions that decide nothing: each takes what a stage has found, over the chosen
tokens of all processes, and returns what is to be logged of it. `README.md` beside this file says what each metric
means and what to do when it looks bad.
"""

import math
import time

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..token_mdp import credit_moments, first_own_token, kl_estimate, kl_estimates
from .rollout import Credit, Rollout


logger = get_logger(__name__)

# What rounding in bfloat16 leaves of a ratio of 1 and of a KL of 0, per token, with room to spare
MAX_FIRST_RATIO_DEVIATION = 0.05
MAX_FIRST_KL = 0.01


# --- A rollout ---


def kl_sums(rollout: Rollout, logps: torch.Tensor, accelerator: Accelerator) -> dict[str, float]:
    """
    Sums up the KL to the reference.

    Returns:
        `dict[str, float]`: Sums of the estimates by name, in nats, and of `tokens` and `completions`.
    """
    mask = rollout.chosen
    estimates = kl_estimates(logps, rollout.ref_logps)
    sums = {name: torch.where(mask, estimate, 0).sum() for name, estimate in estimates.items()}
    sums |= {"tokens": mask.sum(), "completions": mask.any(dim=1).sum()}
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
    return dict(zip(sums, totals, strict=True))


def kl_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Returns the means per token of what [`kl_sums`] has summed up."""
    return {f"kl/{name}": sums[name] / max(sums["tokens"], 1) for name in ("k1", "k2", "k3")}


def credit_metrics(credit: Credit, mask: torch.Tensor, accelerator: Accelerator) -> dict[str, float]:
    """Returns what advantages, returns and values are like, before scaling."""
    moments = credit_moments(credit.advantages, credit.returns, credit.values, mask, accelerator.gather)
    return {name: value.item() for name, value in moments.items()}


class Throughput:
    """Measures completion tokens of a rollout over the time from its beginning to that of the next one."""

    def __init__(self):
        self.began, self.num_tokens = None, None

    def at_rollout(self) -> dict[str, float]:
        """Returns the metric of the rollout before the one that begins now, whose `num_tokens` are to be set."""
        now, began, num_tokens = time.perf_counter(), self.began, self.num_tokens
        self.began, self.num_tokens = now, None
        return {} if num_tokens is None else {"tokens_per_second": num_tokens.item() / (now - began)}


class CutPrompts:
    """
    Counts the prompts that were too long for the model's context, from the first one on, and warns of that one.

    Args:
        max_length (`int`, *optional*): Tokens of a prompt that the context has room for.
        is_cut (`bool`): True where their first tokens are left out; images cannot be.
    """

    def __init__(self, max_length: int | None, is_cut: bool):
        self.max_length, self.is_cut, self.has_any = max_length, is_cut, False

    def at_rollout(self, num_cut: int, num_prompts: int, accelerator: Accelerator) -> dict[str, float]:
        """Returns the metric of a rollout, of which this process has `num_prompts`."""
        local = torch.tensor([num_cut, num_prompts], device=accelerator.device)
        num_cut, num_prompts = accelerator.reduce(local).tolist()
        if num_cut and not self.has_any:
            self.has_any = True
            what = "lost their first tokens" if self.is_cut else "go on beyond it, for they hold images"
            logger.warning(
                f"{num_cut} of {num_prompts} prompts of a rollout have more than the {self.max_length} tokens that "
                f"the model's context less `max_completion_length` leaves, and {what}: the policy answers what it did "
                "not read whole. Filter or shorten the prompts, or lower `max_completion_length`. "
                "`prompts/clipped_ratio` counts them from now on."
            )
        return {"prompts/clipped_ratio": num_cut / num_prompts} if self.has_any else {}


# --- TRL's table of completions ---


class CompletionsTable:
    """
    Adds to TRL's table of a rollout what is credited to each completion: its mean advantage in place of the group's,
    `value`, V of its prompt, and `decisive_token`, with the largest advantage in size.

    Args:
        logs (`dict`): TRL's columns.
        num_rows (`int`): Number of completions on all processes, which TRL has just added.
    """

    def __init__(self, logs: dict, num_rows: int):
        self.logs = logs
        self.first_row = len(logs["advantages"]) - num_rows
        logs["extra"]["value"].extend([math.nan] * num_rows)
        logs["extra"]["decisive_token"].extend([""] * num_rows)

    def add(self, rollout: Rollout, tokenizer, accelerator: Accelerator) -> None:
        """Fills in rows by their index: the rollout may have been shuffled and split since it was sampled."""
        credit, mask = rollout.credit, rollout.chosen
        advantages = torch.where(mask, credit.advantages, 0)
        means = advantages.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        starts = torch.full_like(means, math.nan) if credit.values is None else first_own_token(credit.values, mask)
        largest = advantages.abs().argmax(dim=1, keepdim=True)
        tokens = tokenizer.convert_ids_to_tokens(rollout.completion_ids.gather(1, largest).squeeze(1).tolist())
        credits = credit.advantages.gather(1, largest).squeeze(1).tolist()
        rows_per_process = (len(self.logs["advantages"]) - self.first_row) // accelerator.num_processes
        rows = zip(
            (rollout.index + accelerator.process_index * rows_per_process).tolist(),
            means.tolist(),
            starts.tolist(),
            [f"{token!r} {credit:+.2f}" for token, credit in zip(tokens, credits, strict=True)],
            strict=True,
        )
        for row, mean, start, token in gather_object(list(rows)):
            position = self.first_row + row
            if position >= 0:  # an evaluation batch may be longer than the table
                self.logs["advantages"][position] = mean
                self.logs["extra"]["value"][position] = f"{start:.2f}"
                self.logs["extra"]["decisive_token"][position] = token


# --- An update ---


def update_metrics(
    rollout: Rollout,
    logps: torch.Tensor,
    values: torch.Tensor | None,
    value_losses: torch.Tensor | None,
    args,
    accelerator: Accelerator,
    is_first: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """
    Measures one micro-batch's forward with gradient, over the chosen tokens.

    Args:
        rollout ([`Rollout`]): The micro-batch.
        logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities by the policy.
        values, value_losses (`torch.Tensor` of shape `(B, T)`, *optional*): The critic's; None without one.
        args ([`ActorCriticConfig`]): The configuration.
        accelerator (`Accelerator`): Knows the processes.
        is_first (`bool`): True for the first of a training, which is compared with the policy that sampled.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, float]]`: Sums over this process's tokens, and means over those of
        all; no means where no token is chosen.
    """
    mask, metrics = rollout.chosen, {}
    if is_first:
        metrics = first_update_metrics(rollout, logps, accelerator, has_dropout=not args.disable_dropout)
    old_logps = logps if rollout.old_logps is None else rollout.old_logps
    ratio = torch.where(mask, (logps - old_logps).exp(), 1)
    sums = {
        "tokens": mask.sum(),
        "ratio/mean": torch.where(mask, ratio, 0).sum(),
        "approx_kl": torch.where(mask, kl_estimate(old_logps, logps, "k3"), 0).sum(),
    }
    if values is not None:
        sums["value_loss"] = value_losses.detach().sum()
        if args.cliprange_value is not None:
            is_clipped = (values - rollout.credit.values).abs() > args.cliprange_value
            sums["value_clip_ratio"] = (is_clipped & mask).sum()
    tokens, *totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").tolist()
    if tokens > 0:
        metrics |= {name: total / tokens for name, total in zip(list(sums)[1:], totals, strict=True)}
        metrics["ratio/max"] = accelerator.gather(ratio.max()).max().item()
    return sums, metrics


def first_update_metrics(rollout: Rollout, logps: torch.Tensor, accelerator: Accelerator, has_dropout: bool) -> dict:
    """
    Compares the policy before its first update with the one that sampled, and with its reference.

    Before it the ratio is 1 and the KL mostly 0. Where the forwards that should agree do not, gradients are of something
    else than the policy, and a warning says so.
    """
    mask = rollout.chosen
    deviation = kl = torch.zeros_like(logps)
    if rollout.old_logps is not None:
        deviation = ((logps - rollout.old_logps).exp() - 1).abs()
    if rollout.ref_logps is not None:
        kl = kl_estimate(logps, rollout.ref_logps, "k3")
    local = torch.stack([torch.where(mask, x, 0).sum() for x in (deviation, kl)] + [mask.sum()])
    *sums, tokens = accelerator.reduce(local, reduction="sum").tolist()
    comparisons = [
        ("ratio_deviation", rollout.old_logps, MAX_FIRST_RATIO_DEVIATION, "the policy that sampled"),
        ("kl", rollout.ref_logps, MAX_FIRST_KL, "the reference"),
    ]
    metrics = {}
    for total, (name, other, limit, other_name) in zip(sums, comparisons, strict=True):
        if other is None:
            continue
        value = metrics[f"first_step/{name}"] = total / max(tokens, 1)
        if value > limit:
            dropout = "dropout (set `disable_dropout=True`, and `lora_dropout=0`), " if has_dropout else ""
            logger.warning(
                f"Before the first update the policy differs from {other_name}: `first_step/{name}` is {value:.3g} "
                f"per token, and rounding explains no more than {limit}. Usual causes: {dropout}randomness of the "
                "model's own (the jitter of a router, set to 0 in its config), a policy that was trained further than "
                "its reference, or weights in a lower precision than `bf16` computes in."
            )
    return metrics
