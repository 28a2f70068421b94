"""Prompts and rewards, which `actor_critic.py` and `best_of_n.py` take alike."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset

from .arguments import RecipeArguments
from .data import load_split


@dataclass
class RewardArguments(RecipeArguments):
    """Arguments common to the recipes that have prompts and rewards."""

    prompt_column: str = field(default="prompt", metadata={"help": "The dataset's column of prompts."})
    reward_model: list[str] | None = field(
        default=None,
        metadata={"help": "Reward models (sequence classification with one label): local folders or Hub ids."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions, each as 'module.function', importable from the working directory. They are "
            "called as TRL calls them: with `prompts`, `completions` and the dataset's other columns. "
            "`--reward_weights` takes the models first, then the functions."
        },
    )

    def __post_init__(self):
        # A YAML file may give one of them without the brackets of a list
        if isinstance(self.reward_model, str):
            self.reward_model = [self.reward_model]
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]


def get_rewards(script_args: RewardArguments) -> list[str | Callable]:
    """Returns reward models (which the trainer loads), then reward functions."""
    rewards = [*(script_args.reward_model or []), *map(import_reward, script_args.reward_funcs or [])]
    if not rewards:
        raise ValueError(
            "No reward: pass --reward_model (a folder or Hub id), --reward_funcs (module.function), or both."
        )
    return rewards


def import_reward(path: str) -> Callable:
    """Returns the function that 'module.function' names, from the working directory or an installed package."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"--reward_funcs {path}: expected 'module.function', e.g. my_rewards.{path}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward_funcs {path} cannot be imported from {os.getcwd()}: {error}.") from error


def load_prompts(script_args: RewardArguments, split: str) -> Dataset | IterableDataset:
    """Returns the split `split` with its prompts in the column `prompt`."""
    dataset = load_split(script_args, split)
    columns = list(next(iter(dataset), {}))  # of the first row: a streamed dataset may not know its columns
    if script_args.prompt_column not in columns:
        raise ValueError(
            f"{script_args.dataset_name} has no column {script_args.prompt_column!r}, only {columns}. Name the one "
            "that holds the prompts with --prompt_column."
        )
    if script_args.prompt_column == "prompt":
        return dataset
    return dataset.rename_column(script_args.prompt_column, "prompt")
