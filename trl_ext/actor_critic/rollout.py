"""The data that walks from sampling to the loss: one [`Rollout`], which every stage fills in further."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass
class Completed:
    """
    A rollout that has been sampled, in the order of its prompts.

    Args:
        prompt_ids (`list[list[int]]`): Tokens of the prompts, as far as the model's context has room for them.
        has_ended (`list[bool]`): True where a completion ended by itself; the others were cut.
        is_chosen (`list[list[int]]`): 1 at tokens that the policy chose, 0 at those of tools and environments.
        turn_totals (`list[list[float | None]]`):
            The reward that each environment reports, before the first turn and after each; empty without
            `turn_rewards`.
    """

    prompt_ids: list[list[int]]
    has_ended: list[bool]
    is_chosen: list[list[int]]
    turn_totals: list[list[float | None]]


@dataclass
class Rewarded:
    """
    The rewards of this process's completions.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): Reward of each as a whole; nan where no function applies.
        token_rewards (`torch.Tensor` of shape `(B, T)`, *optional*): Rewards of its tokens, if any function gives such.
        totals (`torch.Tensor` of shape `(B,)`): Weighted sum of what all functions gave, as it is logged.
        by_function (`torch.Tensor` of shape `(B, N)`): What each of N functions gave; nan where it does not apply.
    """

    rewards: torch.Tensor
    token_rewards: torch.Tensor | None
    totals: torch.Tensor
    by_function: torch.Tensor

    def named(self, names: list[str]) -> list[dict[str, float | None]]:
        """Returns for each completion its `score`, the total, and `reward/<name>` of each function; None for nan."""
        names = ["score", *(f"reward/{name}" for name in names)]
        rows = torch.cat([self.totals.unsqueeze(1), self.by_function], dim=1).tolist()
        return [
            {name: None if math.isnan(value) else value for name, value in zip(names, row, strict=True)}
            for row in rows
        ]


@dataclass
class Credit:
    """
    Estimates of what each token of a rollout is worth.

    Args:
        advantages (`torch.Tensor` of shape `(B, T)`): A_t, which the policy follows.
        returns (`torch.Tensor` of shape `(B, T)`): G_t, which the critic is fitted to.
        values (`torch.Tensor` of shape `(B, T)`, *optional*): What the critic said of what it is fitted to.
        action_weights (`torch.Tensor` of shape `(B,)`, *optional*): The weight of a sum over all actions, beside the
            advantages of those that were sampled.
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    values: torch.Tensor | None
    action_weights: torch.Tensor | None = None

    def scaled(self, scale: torch.Tensor) -> Credit:
        """Returns the credit with all that the policy follows times `scale`, a scalar."""
        weights = None if self.action_weights is None else self.action_weights * scale
        return replace(self, advantages=self.advantages * scale, action_weights=weights)


CREDIT = [field.name for field in fields(Credit)]


@dataclass
class Rollout:
    """
    B completions of T tokens at most: completed, rewarded and, once a forward has given what it takes, credited.

    Args:
        completion_ids (`torch.Tensor` of shape `(B, T)`): The tokens.
        completion_mask (`torch.Tensor` of shape `(B, T)`): 1 at tokens that are no padding.
        rewards (`torch.Tensor` of shape `(B,)`): Reward of each completion as a whole; nan where it has none.
        token_rewards (`torch.Tensor` of shape `(B, T)`, *optional*): Rewards of tokens.
        terminated (`torch.Tensor` of shape `(B,)`, bool): True where a completion ended by itself.
        index (`torch.Tensor` of shape `(B,)`): The place of each among those that were sampled together.
        ref_logps (`torch.Tensor` of shape `(B, T)`, *optional*): Log-probabilities by the reference.
        old_logps (`torch.Tensor` of shape `(B, T)`, *optional*): Log-probabilities by the policy that sampled.
        credit ([`Credit`], *optional*): None until it is known.
        chosen (`torch.Tensor` of shape `(B, T)`, bool): True at tokens that the policy chose, of completions with a
            reward.
    """

    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    rewards: torch.Tensor
    token_rewards: torch.Tensor | None
    terminated: torch.Tensor
    index: torch.Tensor
    ref_logps: torch.Tensor | None
    old_logps: torch.Tensor | None
    credit: Credit | None
    chosen: torch.Tensor

    @classmethod
    def begun(
        cls,
        inputs: dict[str, Any],
        rewards: torch.Tensor,
        token_rewards: torch.Tensor | None,
        terminated: torch.Tensor,
    ) -> Rollout:
        """Makes a rollout of the batch that TRL has sampled, into which it writes what is known of it besides."""
        inputs["scores"], inputs["terminated"], inputs["advantages"] = rewards, terminated, None
        inputs["completion_index"] = torch.arange(len(rewards), device=rewards.device)
        if token_rewards is not None:
            missing = inputs["completion_ids"].size(1) - token_rewards.size(1)
            inputs["token_rewards"] = torch.nn.functional.pad(token_rewards, (0, missing))
        return cls.of(inputs)

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Rollout | None:
        """Reads TRL's batch, which keeps a rollout between sampling and updates; None of other batches than ours."""
        if "scores" not in inputs:
            return None
        chosen = inputs["completion_mask"].bool() & ~inputs["scores"].isnan().unsqueeze(1)
        if "tool_mask" in inputs:
            chosen = chosen & inputs["tool_mask"].bool()
        is_credited = inputs["advantages"] is not None
        return cls(
            completion_ids=inputs["completion_ids"],
            completion_mask=inputs["completion_mask"],
            rewards=inputs["scores"],
            token_rewards=inputs.get("token_rewards"),
            terminated=inputs["terminated"],
            index=inputs["completion_index"],
            ref_logps=inputs.get("ref_per_token_logps"),
            old_logps=inputs.get("old_per_token_logps"),
            credit=Credit(*(inputs.get(name) for name in CREDIT)) if is_credited else None,
            chosen=chosen,
        )

    def into(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Writes the credit of a rollout into the batch that it was made of, and returns the batch."""
        inputs |= {name: getattr(self.credit, name) for name in CREDIT}
        return inputs
