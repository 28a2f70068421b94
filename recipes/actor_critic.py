r"""
REINFORCE, Q actor-critic, A2C, PPO or NLPO on your prompts and rewards. Every option of the algorithm's config and of
`ModelConfig` is an argument here, and `--config FILE.yaml` sets many at once (the command line wins over the file). See
the options of one algorithm with `--algorithm a2c --help`.

PPO with a reward model, from a file, on one GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml \
        recipes/actor_critic.py --config recipes/ppo.yaml

A2C with a python reward, `def reward(completions, **columns) -> list[float]` in my_rewards.py of this folder, and LoRA
(a function may also return a list for each completion, one reward per token or spans of characters `(start, end,
reward)`):

    accelerate launch --config_file recipes/accelerate_configs/multi_gpu.yaml recipes/actor_critic.py \
        --algorithm a2c --reward_funcs my_rewards.reward --dataset_name prompts.jsonl \
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --use_peft --output_dir qwen-7b-a2c

PPO with policy, reference, critic and reward model as adapters on one 4-bit base model; the reward model is what
`ranking_reward.py --use_peft --load_in_4bit` made of the same base:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/actor_critic.py \
        --algorithm ppo --critic adapter --kl_in_reward 0.05 --reward_model my-reward-adapter \
        --dataset_name prompts.jsonl --model_name_or_path Qwen/Qwen2.5-7B-Instruct --learning_rate 1e-5 \
        --use_peft --load_in_4bit --output_dir qwen-7b-ppo

REINFORCE on a 4-bit base model, the prompts in another column, the result pushed to the Hub:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/actor_critic.py \
        --algorithm reinforce --reward_model trl-lib/Qwen2-0.5B-Reward --dataset_name openai/gsm8k \
        --dataset_config main --prompt_column question --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
        --use_peft --load_in_4bit --output_dir qwen-7b-reinforce --push_to_hub
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset, IterableDataset
from sft import (
    RecipeArguments,
    load_split,
    parse_arguments,
    prepare_model_args,
    save,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    NLPOConfig,
    NLPOTrainer,
    PPOConfig,
    PPOTrainer,
    QActorCriticConfig,
    QActorCriticTrainer,
    ReinforceConfig,
    ReinforceTrainer,
)


ALGORITHMS = {
    "reinforce": (ReinforceConfig, ReinforceTrainer),
    "q_actor_critic": (QActorCriticConfig, QActorCriticTrainer),
    "a2c": (A2CConfig, A2CTrainer),
    "ppo": (PPOConfig, PPOTrainer),
    "nlpo": (NLPOConfig, NLPOTrainer),
}


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


@dataclass
class ActorCriticArguments(RewardArguments):
    """Arguments of this script."""

    algorithm: str = field(default="ppo", metadata={"help": "What to train with.", "choices": list(ALGORITHMS)})


def choose_algorithm(args: list[str]) -> str:
    """The algorithm that the command line, or else the YAML file, asks for: the other options depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algorithm")
    parser.add_argument("--config", type=Path)
    known, _ = parser.parse_known_args(args)
    in_file = yaml.safe_load(known.config.read_text(encoding="utf-8")) if known.config is not None else {}
    algorithm = known.algorithm or in_file.get("algorithm", ActorCriticArguments.algorithm)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {algorithm} is unknown. Choose one of {', '.join(ALGORITHMS)}.")
    return algorithm


def import_reward(path: str) -> Callable:
    """The function that 'module.function' names, from the working directory or an installed package."""
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"--reward_funcs {path}: expected 'module.function', e.g. my_rewards.{path}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--reward_funcs {path} cannot be imported from {os.getcwd()}: {error}.") from error


def get_rewards(script_args: RewardArguments) -> list[str | Callable]:
    """Reward models (which the trainer loads), then reward functions."""
    rewards = [*(script_args.reward_model or []), *map(import_reward, script_args.reward_funcs or [])]
    if not rewards:
        raise ValueError(
            "No reward: pass --reward_model (a folder or Hub id), --reward_funcs (module.function), or both."
        )
    return rewards


def load_prompts(script_args: RewardArguments, split: str) -> Dataset | IterableDataset:
    """The split `split` with its prompts in the column `prompt`."""
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


def parse(args: list[str]) -> tuple:
    """The trainer's class, and the arguments of this script, of the training and of the model."""
    config_class, trainer_class = ALGORITHMS[choose_algorithm(args)]
    usage = "%(prog)s [--config FILE.yaml] [--algorithm reinforce|q_actor_critic|a2c|ppo|nlpo] [OPTIONS]"
    arguments = (ActorCriticArguments, config_class, ModelConfig)
    return trainer_class, *parse_arguments(__doc__, arguments, args, usage)


def main() -> None:
    trainer_class, script_args, training_args, model_args = parse(sys.argv[1:])
    prepare_model_args(model_args, training_args)
    has_eval = training_args.eval_strategy != "no"
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=get_rewards(script_args),
        args=training_args,
        train_dataset=load_prompts(script_args, script_args.dataset_train_split),
        eval_dataset=load_prompts(script_args, script_args.dataset_test_split) if has_eval else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save(trainer, script_args)


if __name__ == "__main__":
    main()
