"""The rewards of completions: those of TRL, checked, and those of tokens, spans, prefixes and turns."""

import functools
import itertools
import math

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer
from trl.data_utils import is_conversational

from ..adapters.reward_adapters import load_reward_adapter
from ..adapters.reward_models import RewardModel
from ..compat import get_config_model_id, paying_environments
from ..models.quantization import is_quantized
from ..models.score_head import has_score_head, scores_of_prefixes_and_whole
from ..packing.check import PrefixCheck
from ..packing.reward_scoring import RewardScoring
from .checks import check_prefix_rewards, check_turn_rewards, checked_reward
from .dense import DenseRewards, ShapedReward, shaped_reward
from .rollout import Completed, Rewarded
from .turns import turn_reward


logger = get_logger(__name__)


def distinct_names(names: list[str]) -> list[str]:
    """
    Makes names of rewards that tell them apart: two lambdas, or two folders `checkpoint-100`, would share their columns
    and metrics. The second `length` becomes `length_2`; it is warned of.
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


def ready_reward_models(trainer, adapters: set[int]) -> dict[int, RewardModel]:
    """
    Makes the reward models of a trainer of TRL ready to be asked, in place.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer, which has prepared those that are plain transformers models.
        adapters (`set[int]`): Indices of those in `reward_funcs` that are adapters, and prepared.

    Returns:
        `dict[int, RewardModel]`: By their index in `reward_funcs`.
    """
    models = {}
    for index, (func, name) in enumerate(zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)):
        if not isinstance(func, nn.Module):
            continue
        if isinstance(func, PeftModel) and index not in adapters:  # nor does TRL prepare it
            func = trainer.accelerator.prepare_model(
                func, device_placement=not is_quantized(func), evaluation_mode=True
            )
            trainer.reward_funcs[index] = func
        model = trainer.accelerator.unwrap_model(func)
        if trainer.reward_processing_classes[index] is None:  # TRL finds those of plain transformers models
            trainer.reward_processing_classes[index] = AutoTokenizer.from_pretrained(
                get_config_model_id(model.config), trust_remote_code=trainer.args.trust_remote_code
            )
        tokenizer = trainer.reward_processing_classes[index]
        models[index] = RewardModel(model, tokenizer, name or type(model).__name__)
    return models


def ready_rewards(trainer, adapters: dict[int, str]) -> "Rewards":
    """
    Makes what a trainer of TRL was given as rewards ready to be asked, in place, and refuses what never could be.

    Args:
        trainer ([`ActorCriticTrainer`]): The trainer.
        adapters (`dict[int, str]`): Folders or Hub ids of the adapters in `reward_funcs`, by their index.
    """
    args, processing_classes = trainer.args, trainer.reward_processing_classes
    trainer.reward_func_names = distinct_names(trainer.reward_func_names)
    environment_classes = paying_environments(trainer)  # in the order of their rewards, which come last
    for index, path in adapters.items():
        trainer.reward_funcs[index], processing_classes[index] = load_reward_adapter(
            trainer.model, path, processing_classes[index], args, trainer.accelerator, trainer.is_fsdp_enabled
        )
    reward_models = ready_reward_models(trainer, set(adapters))
    if args.turn_rewards:
        check_turn_rewards(environment_classes, trainer.rollout_func)
    rewards = Rewards(
        reward_models,
        environment_classes if args.turn_rewards else [],
        args,
        trainer.accelerator,
        trainer._tokenizer,
        trainer.chat_template_kwargs,
    )
    rewards.check_dataset(trainer.train_dataset)
    if args.prefix_rewards:
        check_prefix_rewards(trainer.reward_funcs, processing_classes, trainer._tokenizer)
    return rewards


class Rewards:
    """
    Asks reward functions and reward models.

    Args:
        reward_models (`dict[int, RewardModel]`): The models among all rewards, by their index.
        environment_classes (`list[type]`): Environments that the last of the functions ask, turn by turn; empty without
            `turn_rewards`.
        args ([`ActorCriticConfig`]): The configuration.
        accelerator (`Accelerator`): Knows the processes.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the policy.
        template_kwargs (`dict`): What the policy's chat template is given.
    """

    def __init__(
        self,
        reward_models: dict[int, RewardModel],
        environment_classes: list[type],
        args,
        accelerator: Accelerator,
        tokenizer,
        template_kwargs: dict,
    ):
        self.reward_models, self.environment_classes = reward_models, environment_classes
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        self.template_kwargs = template_kwargs
        self.prefix_checks = {}  # by reward model, what earlier rollouts have shown of it

    def check_dataset(self, dataset) -> None:
        """Refuses at once what the reward models cannot score, as far as can be known."""
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            self.check_row(dataset[0])
            for reward_model in self.reward_models.values():
                reward_model.check_lengths(dataset["prompt"], self.args.max_completion_length or 1)

    def check_row(self, row: dict) -> None:
        """Refuses prompts like that of `row`, before anything is sampled for them."""
        for reward_model in self.reward_models.values():
            reward_model.check(is_conversational({"prompt": row["prompt"]}))

    def asked_by_trl(
        self,
        reward_funcs: list,
        names: list[str],
        weights: torch.Tensor,
        completions: list,
        completion_ids: list[list[int]],
        completed: Completed | None,
    ) -> tuple[list, DenseRewards]:
        """
        Prepares the functions for one rollout.

        Args:
            reward_funcs (`list`): Functions and models.
            names (`list[str]`): Their names.
            weights (`torch.Tensor` of shape `(N,)`): Their weights.
            completions (`list`): Texts, or lists of messages.
            completion_ids (`list[list[int]]`): Their tokens.
            completed ([`Completed`], *optional*): What is known of them besides; rewards of prefixes and turns take it.

        Returns:
            `tuple[list, DenseRewards]`: What TRL is to ask, one finite number or None for each completion; and where
            the rewards of tokens among them are kept.
        """
        dense, asked = DenseRewards(completions, completion_ids, self.tokenizer), []
        first_turn_reward = len(reward_funcs) - len(self.environment_classes)
        named = zip(reward_funcs, names, weights.tolist(), strict=True)
        for index, (func, name, weight) in enumerate(named):
            if isinstance(func, nn.Module):
                pay = functools.partial(self._pay_prefixes, completed) if self.args.prefix_rewards else self._pay_texts
                func = functools.partial(pay, func, self.reward_models[index])
            elif index >= first_turn_reward:
                func = turn_reward(self.environment_classes[index - first_turn_reward], completed)
            asked.append(checked_reward(func, name, functools.partial(dense.totals, name=name, weight=weight)))
        return asked, dense

    def rewarded(self, rewards_per_func: torch.Tensor, weights: torch.Tensor, dense: DenseRewards) -> Rewarded:
        """
        Sums up what was given to the completions of this process.

        Args:
            rewards_per_func (`torch.Tensor` of shape `(B_all, N)`): The rewards of all processes; nan where one does not apply.
            weights (`torch.Tensor` of shape `(N,)`): Weights of the functions.
            dense ([`DenseRewards`]): The dense rewards of this process, as [`asked_by_trl`] returned them.
        """
        first = self.accelerator.process_index * len(dense.rewards)
        by_function = rewards_per_func[first : first + len(dense.rewards)]
        totals = (by_function * weights.to(by_function.device)).nansum(dim=1)
        totals = totals.masked_fill(by_function.isnan().all(dim=1), math.nan)
        if dense.is_empty:
            return Rewarded(totals, None, totals, by_function)
        if not self.args.uses_raw_rewards:
            raise ValueError(
                "Rewards of tokens and spans are no scores to compare within a group. Set `scale_rewards='none'` and "
                "`multi_objective_aggregation='sum_then_normalize'`."
            )
        # The whole completion's reward is what the dense ones leave of the total
        rewards = totals - dense.totals_of_rows(totals.device)
        return Rewarded(
            rewards, dense.tensor(totals.device), rewards + dense.totals_of_rows(totals.device), by_function
        )

    # --- Reward models ---

    def _input_ids(self, reward_model: RewardModel, prompts, completions, columns: dict) -> list[list[int]]:
        """Returns what the model reads of each prompt and completion."""
        names = [name for name in ("tools", "chat_template_kwargs") if name in columns]
        return [
            reward_model.input_ids(
                prompt, completion, {name: columns[name][i] for name in names}, **self.template_kwargs
            )
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    def _pay_texts(self, func: nn.Module, reward_model: RewardModel, prompts, completions, **columns) -> list:
        """Pays the model's score of each text."""
        if self.args.length_batches:
            check = self._prefix_check_of(func, reward_model.name)
            func = RewardScoring(func, self.args.per_device_train_batch_size, prompts, check)
        return reward_model.score(self._input_ids(reward_model, prompts, completions, columns), func)

    def _prefix_check_of(self, model: nn.Module, name: str) -> PrefixCheck | None:
        """Returns what is known of a model in packed rows; None where it is no causal one."""
        if not has_score_head(model):
            return None
        if model not in self.prefix_checks:
            name = f"The reward model {name}"
            self.prefix_checks[model] = PrefixCheck(self.args, self.accelerator, model, name)
        return self.prefix_checks[model]

    def _pay_prefixes(
        self,
        completed: Completed,
        func: nn.Module,
        reward_model: RewardModel,
        prompts,
        completions,
        completion_ids,
        **columns,
    ) -> list[ShapedReward | None]:
        """Pays the rise of the model's score with each token, up to its score of the whole."""
        prompt_ids = completed.prompt_ids
        whole_ids = self._input_ids(reward_model, prompts, completions, columns)
        fit = [
            reward_model.fits(max(prompt + ids, whole, key=len))
            for prompt, ids, whole in zip(prompt_ids, completion_ids, whole_ids, strict=True)
        ]
        longest = reward_model.max_length
        prefixes, wholes = scores_of_prefixes_and_whole(func, prompt_ids, completion_ids, whole_ids, longest)
        # A completion that was cut ends in a state that is worth what the critic says
        goes_on = [self.args.truncation == "bootstrap" and not ended for ended in completed.has_ended]
        rows = zip(prefixes, wholes, completed.is_chosen, goes_on, fit, strict=True)
        return [
            shaped_reward(potentials, whole, chosen, self.args.gamma, goes_on) if fits else None
            for potentials, whole, chosen, goes_on, fits in rows
        ]
