"""How [`ActorCriticTrainer`] scores completions: TRL's rewards, checked, and those of tokens, spans and prefixes."""

import functools
import itertools
import math

import torch
from accelerate.logging import get_logger
from torch import nn

from .checks import checked_reward
from .dense_rewards import DenseRewards, rewards_of_turns, shaped_rewards
from .prefix_check import PrefixCheck
from .reward_scoring import RewardScoring
from .score_head import has_score_head, prefix_scores


logger = get_logger(__name__)


def distinct_names(names: list[str]) -> list[str]:
    """
    Names of rewards that tell them apart: two lambdas, or two folders `checkpoint-100`, would share their columns and
    metrics. The second `length` becomes `length_2`; it is warned of.
    """
    distinct = []
    for index, name in enumerate(names):
        others = {*distinct, *names[index + 1 :]}
        if name in distinct:
            name = next(new for n in itertools.count(2) if (new := f"{name}_{n}") not in others)
            logger.warning(
                f"Several rewards are called {names[index]!r}: number {index + 1} of them all, in the order of "
                f"`reward_funcs`, is logged and recorded as {name!r}. Give functions, or the folders of reward models, "
                "names of their own to tell them apart."
            )
        distinct.append(name)
    return distinct


class RewardsMixin:
    """
    Keeps the local scores of what the parent scores, `_scores` `(B,)` of whole completions, nan where no function
    applies, and `_token_rewards` `(B, T)` if any reward is dense.
    """

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        reward_funcs = self.reward_funcs
        dense = DenseRewards(completions, completion_ids_list, self._tokenizer)
        names_and_weights = zip(reward_funcs, self.reward_func_names, self.reward_weights.tolist(), strict=True)
        self.reward_funcs = []
        for func, name, weight in names_and_weights:
            if isinstance(func, nn.Module) and self.args.prefix_rewards:
                func = self._prefix_reward(func)
            elif self.turn_rewards and len(self.reward_funcs) >= self._num_given_rewards:
                func = self._turn_reward(self._paying_environments[len(self.reward_funcs) - self._num_given_rewards])
            if isinstance(func, nn.Module):
                if self.args.length_batches:
                    check = self._prefix_check_of(func, name)
                    func = RewardScoring(func, self.args.per_device_train_batch_size, prompts, check)
            else:
                func = checked_reward(func, name, functools.partial(dense.totals, name=name, weight=weight))
            self.reward_funcs.append(func)
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs
        for func, name, rewards in zip(reward_funcs, self.reward_func_names, rewards_per_func.T, strict=True):
            if isinstance(func, nn.Module) and not rewards.isfinite().all():
                raise ValueError(f"The reward model '{name}' in `reward_funcs` returned nan or an infinite reward.")
        unscorable = rewards_per_func.isnan().all(dim=1)
        scores = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        first = self.accelerator.process_index * len(prompts)
        self._scores = scores.masked_fill(unscorable, math.nan)[first : first + len(prompts)]
        self._token_rewards = None if dense.is_empty else dense.tensor(scores.device)
        if self._token_rewards is not None:
            if not self.args.uses_raw_rewards:
                raise ValueError(
                    "Rewards of tokens and spans are no scores to compare within a group. Set `scale_rewards='none'` and "
                    "`multi_objective_aggregation='sum_then_normalize'`."
                )
            # The whole completion's reward is what the dense ones leave of the total that the parent logs
            self._scores = self._scores - self._token_rewards.sum(dim=1)
        return rewards_per_func

    def _own_rewards(self, rewards_per_func: torch.Tensor) -> list[dict[str, float | None]]:
        """
        For each completion of this process its `score`, the weighted sum of all its rewards, and `reward/<name>` of each
        function, from what the functions gave those of all processes; None where none applies.
        """
        scores = self._scores if self._token_rewards is None else self._scores + self._token_rewards.sum(dim=1)
        first = self.accelerator.process_index * len(scores)
        rewards = torch.cat([scores.unsqueeze(1), rewards_per_func[first : first + len(scores)]], dim=1)
        names = ["score", *(f"reward/{name}" for name in self.reward_func_names)]
        return [
            {name: None if math.isnan(value) else value for name, value in zip(names, row, strict=True)}
            for row in rewards.tolist()
        ]

    def _prefix_check_of(self, reward_model: nn.Module, name: str) -> PrefixCheck | None:
        """What earlier rollouts have shown of it; None where it is no causal model."""
        if not has_score_head(reward_model):
            return None
        if reward_model not in self._reward_prefix_checks:
            name = f"The reward model {name or type(reward_model).__name__}"
            self._reward_prefix_checks[reward_model] = PrefixCheck(self.args, self.accelerator, reward_model, name)
        return self._reward_prefix_checks[reward_model]

    def _turn_reward(self, environment_class):
        """A reward function that pays what each turn adds to what environments of this class say."""

        def reward(environments, **kwargs):
            return [
                rewards_of_turns(totals, mask) if type(environment) is environment_class else None
                for environment, totals, mask in zip(environments, self._turn_totals, self._tool_mask, strict=True)
            ]

        return reward

    def _prefix_reward(self, reward_model):
        """A reward function that pays the rise of the model's score with each token."""

        def reward(prompts, completions, completion_ids, **kwargs):
            scores = prefix_scores(reward_model, self._tokenize_prompts(prompts)[0], completion_ids)
            return [shaped_rewards(row, self.args.gamma).tolist() for row in scores]

        return reward
