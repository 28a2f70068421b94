"""The memory of past rollouts: means, and how well returns were explained by the critic and by other completions."""

from typing import NamedTuple

import torch
from accelerate import Accelerator

from .. import token_mdp
from ..critic.heads import FORGETTING


class PastMean:
    """A running mean of tensors over rollouts, the last ones most."""

    def __init__(self):
        self.value: torch.Tensor | None = None  # before the first

    def learn(self, x: torch.Tensor) -> None:
        """Counts `x` among the past from now on."""
        self.value = x if self.value is None else self.value.to(x).lerp(x, FORGETTING)

    def before(self, x: torch.Tensor, learns: bool = False) -> torch.Tensor:
        """Returns the mean so far, or `x` itself where there is none; `learns` counts `x` among the past afterwards."""
        mean = x if self.value is None else self.value.to(x)
        if learns:
            self.learn(x)
        return mean


class Weighed(NamedTuple):
    """
    The weights of features by past rollouts.

    Args:
        weights (`torch.Tensor` of shape `(K,)`): Between 0 and 1; 0 at first.
        share (`float`): The share of y's squares that features with these weights explain now.
        past_share (`float`): The share that they explained on past rollouts as they stand, without weights; 0 if none.
    """

    weights: torch.Tensor
    share: float
    past_share: float


class PastRollouts:
    """
    The memory of how well features have explained something on past rollouts ([`~trl_ext.token_mdp.baseline`]).

    Args:
        accelerator (`Accelerator`): Knows the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.moments = PastMean()

    def weigh(self, features: list[torch.Tensor], y: torch.Tensor, mask: torch.Tensor, learns: bool) -> Weighed:
        """
        Weighs features by the past, to which this rollout belongs afterwards.

        Args:
            features, y, mask: As [`~trl_ext.token_mdp.least_squares_moments`] takes them.
            learns (`bool`): False to leave the past as it is.
        """
        moments = self.accelerator.reduce(token_mdp.least_squares_moments(features, y, mask), reduction="sum")
        past = self.moments.before(torch.zeros_like(moments))
        weights = token_mdp.least_squares_weights(past)
        if learns:
            self.moments.learn(moments)
        share, past_share = token_mdp.explained_by_weights(
            torch.stack([moments, past]), torch.stack([weights, torch.ones_like(weights)])
        ).tolist()
        return Weighed(weights, share, max(past_share, 0.0))


class Baseline:
    """
    Blends the critic's values with mean returns of other completions ([`~trl_ext.token_mdp.baseline`]).

    Args:
        accelerator (`Accelerator`): Knows the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.past = PastRollouts(accelerator)
        self.means = PastMean()  # of returns, and values

    def __call__(
        self,
        returns: torch.Tensor,
        values: torch.Tensor | None,
        mask: torch.Tensor,
        index: torch.Tensor,
        group_size: int,
        learns: bool,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """
        Returns the baseline of a whole rollout, and what of it is logged.

        Args:
            returns (`torch.Tensor` of shape `(B, T)`): G_t of this process's completions.
            values (`torch.Tensor` of shape `(B, T)`, *optional*): V(s_t), of a critic.
            mask (`torch.Tensor` of shape `(B, T)`, bool): True at the tokens that the policy chose.
            index (`torch.Tensor` of shape `(B,)`): The place of each among those that were sampled together.
            group_size (`int`): Completions of a prompt.
            learns (`bool`): True to fit the weights of rollouts to come to this one, too.

        Returns:
            `tuple[torch.Tensor, dict[str, float]]`: `(B, T)`, and metrics.
        """
        # Counted from the greatest, returns that are equal are 0 exactly, and so are their advantages
        origin = self.accelerator.gather(torch.where(mask, returns, -torch.inf).max()).max()
        origin = torch.where(origin.isfinite(), origin, 0)
        returns = torch.where(mask, returns - origin, 0)

        totals = token_mdp.token_totals([returns] if values is None else [returns, values], mask)
        totals = self.accelerator.gather(totals[index.argsort()])  # in the order in which they were sampled
        of_steps = self.accelerator.pad_across_processes(token_mdp.step_totals(returns, mask))
        of_steps = self.accelerator.reduce(of_steps, reduction="sum")
        rows = self.accelerator.process_index * len(index) + index
        learns = learns and totals[:, 0].sum().item() > 0  # a rollout in which nothing counts says nothing

        means = token_mdp.mean_of_totals(totals)
        origins = torch.stack([origin, *torch.zeros_like(means[1:])])
        # Where no other completion is at hand there are those of the past
        past_means = self.means.before(means + origins, learns) - origins
        mean, features = token_mdp.features_of_others(
            returns, values, mask, totals, of_steps, rows, group_size, past_means
        )
        names, features = list(features), list(features.values())
        weights, share, _ = self.past.weigh(features, returns - mean.unsqueeze(1), mask, learns)
        metrics = {f"baseline/{name}": weight for name, weight in zip(names, weights.tolist(), strict=True)}
        metrics["baseline/explained"] = share
        return origin + token_mdp.combine_features(mean, features, weights), metrics

    def state_dict(self) -> dict[str, torch.Tensor | None]:
        return {"moments": self.past.moments.value, "means": self.means.value}

    def load_state_dict(self, state: dict[str, torch.Tensor | None]) -> None:
        self.past.moments.value, self.means.value = state["moments"], state["means"]
