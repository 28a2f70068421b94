"""What [`ActorCriticTrainer`] logs: metrics over all processes, and the columns of TRL's completions table."""

import math
import time

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from .. import token_mdp


logger = get_logger(__name__)

KL_ESTIMATORS = ("k1", "k2", "k3")
# What rounding in bfloat16 leaves of a ratio of 1 and of a KL of 0, per token, with room to spare
MAX_FIRST_RATIO_DEVIATION = 0.05
MAX_FIRST_KL = 0.01


class ReportingMixin:
    """
    Adds to TRL's metrics. Each is taken over the own tokens of all processes: those of a rollout, or those of a
    micro-batch for what an update measures (and for everything, where the training forward gives the values). As
    TRL's, they are then averaged over the logging interval.

    | metric | meaning |
    | --- | --- |
    | `kl/k1`, `kl/k2`, `kl/k3` | estimates of the KL to the reference per token, nats ([`token_mdp.kl_estimate`]) |
    | `kl/coef` | present coefficient of the KL in the reward |
    | `returns/mean`, `values/mean` | what the critic should and does say |
    | `advantages/mean`, `advantages/std` | before whitening |
    | `explained_variance` | share of the returns' variance that the critic explains; 1 is perfect, 0 a constant |
    | `value_loss`, `value_clip_ratio` | half the squared error per token; share of tokens beyond `cliprange_value` |
    | `ratio/mean`, `ratio/max` | of the policy to the one that sampled; 1 in the first update on a rollout |
    | `approx_kl` | k3 of the KL between the same two, per token |
    | `target_kl_exceeded` | 1 where `target_kl` ended the epochs |
    | `first_step/ratio_deviation`, `first_step/kl` | mean of abs(ratio - 1), and k3 to the reference, before any update |
    | `prompts/clipped_ratio` | share of prompts too long for the context, once there was one |
    | `tokens_per_second` | completion tokens of a rollout over the time until the next one |

    TRL's `frac_reward_zero_std` is dropped for single completions, whose groups have no spread.
    """

    def _log_rollout(self, batch, mode: str) -> None:
        """Open the batch's rows in the completions table and measure throughput."""
        self._log_cut_prompts(len(batch["scores"]), mode)
        if (self.num_generations if mode == "train" else self.num_generations_eval) == 1:
            self._metrics[mode].pop("frac_reward_zero_std", None)
        num_rows = len(batch["scores"]) * self.accelerator.num_processes
        self._logs["extra"]["value"].extend([math.nan] * num_rows)
        self._logs["extra"]["decisive_token"].extend([""] * num_rows)
        self._first_logged_row = len(self._logs["advantages"]) - num_rows
        if mode == "train":
            now = time.perf_counter()
            if self._last_rollout is not None:
                started, tokens = self._last_rollout
                self._metrics[mode]["tokens_per_second"].append(tokens / (now - started))
            self._last_rollout = (now, batch["num_items_in_batch"].item())

    def _log_cut_prompts(self, num_prompts: int, mode: str) -> None:
        """Count the prompts that were too long for the context, from the first one on, and warn of that one."""
        counts = self.accelerator.reduce(
            torch.tensor([self._num_cut_prompts, num_prompts], device=self._scores.device)
        )
        num_cut, num_prompts = counts.tolist()
        if num_cut and not self._has_cut_prompts:
            self._has_cut_prompts = True
            what = "go on beyond it, for they hold images" if self._is_vlm else "lost their first tokens"
            logger.warning(
                f"{num_cut} of {num_prompts} prompts of a rollout have more than the {self.max_prompt_length} tokens that "
                f"the model's context less `max_completion_length` leaves, and {what}: the policy answers what it did "
                "not read whole. Filter or shorten the prompts, or lower `max_completion_length`. "
                "`prompts/clipped_ratio` counts them from now on."
            )
        if self._has_cut_prompts:
            self._metrics[mode]["prompts/clipped_ratio"].append(num_cut / num_prompts)

    def _log_kl(self, logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor, mode: str) -> None:
        estimates = [token_mdp.kl_estimate(logps, ref_logps, name) for name in KL_ESTIMATORS]
        sums = [torch.where(mask, estimate, 0).sum() for estimate in estimates]
        local = torch.stack([*sums, mask.sum(), mask.any(dim=1).sum()])
        *sums, tokens, completions = self.accelerator.reduce(local, reduction="sum").tolist()
        for name, total in zip(KL_ESTIMATORS, sums, strict=True):
            self._metrics[mode][f"kl/{name}"].append(total / max(tokens, 1))
        if self.args.kl_in_reward:
            self._metrics[mode]["kl/coef"].append(self.kl_controller.coef)
        if mode == "train" and not self._in_critic_warmup:
            self.kl_controller.observe(sums[0], int(completions))

    def _log_advantages(self, batch, advantages, returns, values, mask, mode: str) -> None:
        metrics = self._metrics[mode]
        _, mean, var = self._global_moments(advantages, mask)
        metrics["advantages/mean"].append(mean.item())
        metrics["advantages/std"].append(var.sqrt().item())
        _, mean, var_returns = self._global_moments(returns, mask)
        metrics["returns/mean"].append(mean.item())
        if values is not None:
            metrics["values/mean"].append(self._global_moments(values, mask)[1].item())
            _, _, var_errors = self._global_moments(returns - values, mask)
            explained = token_mdp.explained_share(var_errors, var_returns, mean)
            metrics["explained_variance"].append(explained.item())
        self._log_completions_table(batch, advantages, values, mask)

    def _log_completions_table(self, batch, advantages, values, mask) -> None:
        """
        One row per completion: its mean advantage, V of its prompt, and the token with the largest advantage in size.
        Rows are found by index, for the batch may have been shuffled and split since they were opened.
        """
        if not self.log_completions:
            return
        means = torch.where(mask, advantages, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        starts = token_mdp.first_own_token(values, mask) if values is not None else torch.full_like(means, math.nan)
        largest = torch.where(mask, advantages, 0).abs().argmax(dim=1, keepdim=True)
        tokens = self._tokenizer.convert_ids_to_tokens(batch["completion_ids"].gather(1, largest).squeeze(1).tolist())
        credits = advantages.gather(1, largest).squeeze(1).tolist()
        rows_per_process = len(self._logs["advantages"]) - self._first_logged_row
        offset = self.accelerator.process_index * (rows_per_process // self.accelerator.num_processes)
        rows = zip(
            (batch["completion_index"] + offset).tolist(),
            means.tolist(),
            starts.tolist(),
            [f"{token!r} {credit:+.2f}" for token, credit in zip(tokens, credits, strict=True)],
            strict=True,
        )
        for row, mean, start, token in gather_object(list(rows)):
            position = self._first_logged_row + row
            if position >= 0:  # an evaluation batch may be longer than the table
                self._logs["advantages"][position] = mean
                self._logs["extra"]["value"][position] = f"{start:.2f}"
                self._logs["extra"]["decisive_token"][position] = token

    def _log_update(self, inputs, logps, values, per_token_value_loss, mask) -> None:
        """Metrics of one micro-batch's forward; `values` and `per_token_value_loss` are None without a critic."""
        mode = "train" if self.model.training else "eval"
        if mode == "train" and self._is_first_update:
            self._is_first_update = False
            self._check_first_update(inputs, logps, mask)
        old_logps = inputs.get("old_per_token_logps")
        old_logps = logps if old_logps is None else old_logps
        ratio = torch.where(mask, (logps - old_logps).exp(), 1)
        approx_kl = torch.where(mask, token_mdp.kl_estimate(old_logps, logps, "k3"), 0).sum()
        zero = torch.zeros_like(approx_kl)
        value_loss = value_clipped = zero
        if values is not None:
            value_loss = per_token_value_loss.detach().sum()
            if self.args.cliprange_value is not None:
                value_clipped = (((values - inputs["values"]).abs() > self.args.cliprange_value) & mask).sum()
        if mode == "train":
            self._window_kl += torch.stack([approx_kl, mask.sum()])
        local = torch.stack([mask.sum(), torch.where(mask, ratio, 0).sum(), approx_kl, value_loss, value_clipped])
        tokens, *sums = self.accelerator.reduce(local, reduction="sum").tolist()
        if tokens == 0:
            return
        ratio_mean, approx_kl, value_loss, value_clipped = (x / tokens for x in sums)
        metrics = self._metrics[mode]
        metrics["ratio/mean"].append(ratio_mean)
        metrics["ratio/max"].append(self.accelerator.gather(ratio.max()).max().item())
        metrics["approx_kl"].append(approx_kl)
        if values is not None:
            metrics["value_loss"].append(value_loss)
            if self.args.cliprange_value is not None:
                metrics["value_clip_ratio"].append(value_clipped)

    def _check_first_update(self, inputs, logps, mask) -> None:
        """
        Before its first update a policy is the one that sampled, so the ratio is 1, and mostly its own reference, so the
        KL is 0. Where the forwards that should agree do not, gradients are of something else than the policy.
        """
        old_logps, ref_logps = inputs.get("old_per_token_logps"), inputs.get("ref_per_token_logps")
        deviation = kl = torch.zeros_like(logps)
        if old_logps is not None:
            deviation = ((logps - old_logps).exp() - 1).abs()
        if ref_logps is not None:
            kl = token_mdp.kl_estimate(logps, ref_logps, "k3")
        local = torch.stack([torch.where(mask, x, 0).sum() for x in (deviation, kl)] + [mask.sum()])
        *sums, tokens = self.accelerator.reduce(local, reduction="sum").tolist()
        checks = [
            ("ratio_deviation", old_logps, MAX_FIRST_RATIO_DEVIATION, "the policy that sampled"),
            ("kl", ref_logps, MAX_FIRST_KL, "the reference"),
        ]
        for total, (name, other, limit, other_name) in zip(sums, checks, strict=True):
            if other is None:
                continue
            value = total / max(tokens, 1)
            self._metrics["train"][f"first_step/{name}"].append(value)
            if value > limit:
                dropout = (
                    "" if self.args.disable_dropout else "dropout (set `disable_dropout=True`, and `lora_dropout=0`), "
                )
                logger.warning(
                    f"Before the first update the policy differs from {other_name}: `first_step/{name}` is {value:.3g} "
                    f"per token, and rounding explains no more than {limit}. Usual causes: {dropout}randomness of the "
                    "model's own (the jitter of a router, set to 0 in its config), a policy that was trained further than "
                    "its reference, or weights in a lower precision than `bf16` computes in."
                )
