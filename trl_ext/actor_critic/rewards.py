"""How [`ActorCriticTrainer`] scores completions: TRL's rewards, checked, and those of tokens, spans and prefixes."""

import functools
import itertools
import math

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer
from trl.data_utils import is_conversational

from ..adapters.reward_models import RewardModel
from ..compat import get_config_model_id
from ..models.quantization import is_quantized
from ..models.score_head import has_score_head, scores_of_prefixes_and_whole
from ..packing.check import PrefixCheck
from ..packing.reward_scoring import RewardScoring
from ..token_mdp import rewards_of_turns
from .checks import checked_reward
from .dense import DenseRewards, ShapedReward, shaped_reward


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
        for index, (func, name, weight) in enumerate(names_and_weights):
            if isinstance(func, nn.Module):
                pay = self._pay_prefixes if self.args.prefix_rewards else self._pay_texts
                func = functools.partial(pay, func, self._reward_models[index])
            elif self.turn_rewards and index >= self._num_given_rewards:
                func = self._turn_reward(self._paying_environments[index - self._num_given_rewards])
            func = checked_reward(func, name, functools.partial(dense.totals, name=name, weight=weight))
            self.reward_funcs.append(func)
        try:
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs
        unscorable = rewards_per_func.isnan().all(dim=1)
        scores = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        first = self.accelerator.process_index * len(prompts)
        self._scores = scores.masked_fill(unscorable, math.nan)[first : first + len(prompts)]
        self._token_rewards = None if dense.is_empty else dense.tensor(scores.device)
        self._dense_totals = None if dense.is_empty else dense.totals_of_rows(scores.device)
        if self._token_rewards is not None:
            if not self.args.uses_raw_rewards:
                raise ValueError(
                    "Rewards of tokens and spans are no scores to compare within a group. Set `scale_rewards='none'` and "
                    "`multi_objective_aggregation='sum_then_normalize'`."
                )
            # The whole completion's reward is what the dense ones leave of the total that the parent logs
            self._scores = self._scores - self._dense_totals
        return rewards_per_func

    def _own_rewards(self, rewards_per_func: torch.Tensor) -> list[dict[str, float | None]]:
        """
        For each completion of this process its `score`, the weighted sum of all its rewards, and `reward/<name>` of each
        function, from what the functions gave those of all processes; None where none applies.
        """
        scores = self._scores if self._dense_totals is None else self._scores + self._dense_totals
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
            name = f"The reward model {name}"
            self._reward_prefix_checks[reward_model] = PrefixCheck(self.args, self.accelerator, reward_model, name)
        return self._reward_prefix_checks[reward_model]

    def _turn_reward(self, environment_class):
        """A reward function that pays what each turn adds to what environments of this class say."""

        def reward(environments, **kwargs):
            return [
                rewards_of_turns(totals, mask)
                if type(environment) is environment_class and totals[-1] is not None
                else None
                for environment, totals, mask in zip(environments, self._turn_totals, self._tool_mask, strict=True)
            ]

        return reward

    # --- Reward models ---

    def _set_up_reward_models(self) -> None:
        """Make the reward models ready, and refuse at once what they cannot score, as far as it can be known."""
        self._reward_models = {}  # by their index in `reward_funcs`
        for index, (func, name) in enumerate(zip(self.reward_funcs, self.reward_func_names, strict=True)):
            if not isinstance(func, nn.Module):
                continue
            if isinstance(func, PeftModel) and index not in self._reward_adapters:  # nor does TRL prepare it
                func = self.accelerator.prepare_model(
                    func, device_placement=not is_quantized(func), evaluation_mode=True
                )
                self.reward_funcs[index] = func
            model = self.accelerator.unwrap_model(func)
            if self.reward_processing_classes[index] is None:  # TRL finds those of plain transformers models
                self.reward_processing_classes[index] = AutoTokenizer.from_pretrained(
                    get_config_model_id(model.config), trust_remote_code=self.args.trust_remote_code
                )
            self._reward_models[index] = RewardModel(
                model, self.reward_processing_classes[index], name or type(model).__name__
            )
        dataset = self.train_dataset
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            self._check_reward_models(dataset[0])
            for reward_model in self._reward_models.values():
                reward_model.check_lengths(dataset["prompt"], self.max_completion_length or 1)

    def _check_reward_models(self, row: dict) -> None:
        """Before anything is sampled for prompts like that of `row`."""
        for reward_model in self._reward_models.values():
            reward_model.check(is_conversational({"prompt": row["prompt"]}))

    def _reward_input_ids(self, reward_model: RewardModel, prompts, completions, columns: dict) -> list[list[int]]:
        """What the model reads of each prompt and completion."""
        names = [name for name in ("tools", "chat_template_kwargs") if name in columns]
        return [
            reward_model.input_ids(
                prompt, completion, {name: columns[name][i] for name in names}, **self.chat_template_kwargs
            )
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    def _pay_texts(self, func: nn.Module, reward_model: RewardModel, prompts, completions, **columns) -> list:
        """The model's score of each text."""
        if self.args.length_batches:
            check = self._prefix_check_of(func, reward_model.name)
            func = RewardScoring(func, self.args.per_device_train_batch_size, prompts, check)
        return reward_model.score(self._reward_input_ids(reward_model, prompts, completions, columns), func)

    def _pay_prefixes(
        self, func: nn.Module, reward_model: RewardModel, prompts, completions, completion_ids, **columns
    ) -> list[ShapedReward | None]:
        """The rise of the model's score with each token, up to its score of the whole."""
        whole_ids = self._reward_input_ids(reward_model, prompts, completions, columns)
        prompt_ids = self._tokenize_prompts(prompts)[0]
        fit = [
            reward_model.fits(max(prompt + ids, whole, key=len))
            for prompt, ids, whole in zip(prompt_ids, completion_ids, whole_ids, strict=True)
        ]
        longest = reward_model.max_length
        prefixes, wholes = scores_of_prefixes_and_whole(func, prompt_ids, completion_ids, whole_ids, longest)
        rows = zip(prefixes, wholes, self._tool_mask, self._go_on(completion_ids), fit, strict=True)
        return [
            shaped_reward(potentials, whole, own, self.args.gamma, goes_on) if fits else None
            for potentials, whole, own, goes_on, fits in rows
        ]

    def _go_on(self, completion_ids: list[list[int]]) -> list[bool]:
        """Which completions were cut in a state that is worth what the critic says."""
        if self.args.truncation != "bootstrap":
            return [False] * len(completion_ids)
        return [not ended for ended in self._have_ended(completion_ids)]
