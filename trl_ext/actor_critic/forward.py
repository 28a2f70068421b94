"""
The policy's forwards over a rollout, and the results that each gives.

| updates on a rollout | the pass without gradient gives | the training forward gives |
| --- | --- | --- |
| one, of the whole | | log-probabilities, values, credit |
| one, in micro-batches, with statistics over all of them | credit | log-probabilities |
| several, of which the first is of the whole | (at the very first update alone) | old log-probabilities, values, credit |
| several minibatches; or vLLM's samples are corrected for | old log-probabilities, values, credit | |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Forward(NamedTuple):
    """
    The results of one forward of the policy over a rollout. The first three are those of TRL's own pass.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities of its tokens.
        entropies (`torch.Tensor` of shape `(B, T)`, *optional*): Entropies of the distributions that tokens were drawn from.
        aux_loss (`torch.Tensor` of shape `()`, *optional*): The loss that balances experts.
        values (`torch.Tensor` of shape `(B, T + 1, ...)`, *optional*): The critic's values before each token, and last
            of the state after all of them.
    """

    logps: torch.Tensor
    entropies: torch.Tensor | None
    aux_loss: torch.Tensor | None
    values: torch.Tensor | None


@dataclass(frozen=True)
class ForwardPlan:
    """
    The table above, for the arguments of a training.

    Args:
        trl_scores (`bool`): TRL would score a rollout with the policy before training on it.
        first_update_scores (`bool`):
            The first of several updates is of the whole rollout, with the weights that sampled it, so that its forward
            gives what TRL's pass would.
        credit_takes_forward (`bool`): Advantages depend on values, or on log-probabilities.
        statistics_take_pass (`bool`):
            Advantages depend on a forward over all micro-batches of an update, and no pass of TRL's gives it.
    """

    trl_scores: bool
    first_update_scores: bool
    credit_takes_forward: bool
    statistics_take_pass: bool

    @classmethod
    def of(cls, args, corrects_sampling: bool, takes_forward: bool, has_batch_statistics: bool) -> ForwardPlan:
        """
        Reads the plan off a configuration.

        Args:
            args ([`ActorCriticConfig`]): The configuration.
            corrects_sampling (`bool`): TRL compares log-probabilities of vLLM with the policy's.
            takes_forward (`bool`): Advantages depend on a forward of the policy.
            has_batch_statistics (`bool`): A completion's advantages depend on other completions of the batch.
        """
        accumulation, num_batches = args.gradient_accumulation_steps, args.steps_per_generation
        trl_scores = accumulation % (num_batches * args.num_iterations) != 0 or corrects_sampling
        takes_all = takes_forward and has_batch_statistics and num_batches > 1
        return cls(
            trl_scores=trl_scores,
            first_update_scores=trl_scores
            and accumulation % num_batches == 0
            and not corrects_sampling
            and not takes_all,
            credit_takes_forward=takes_forward,
            statistics_take_pass=takes_all and not trl_scores,
        )

    def trl_may_score(self, is_training: bool, is_first_update: bool) -> bool:
        """
        Returns True where TRL's pass over a rollout is of use. The very first rollout has it in any case: it shows
        whether the policy differs from what it trains as.
        """
        return self.trl_scores and not (is_training and self.first_update_scores and not is_first_update)
