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
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from trl import ModelConfig, get_peft_config, get_quantization_config

from shared.arguments import parse_arguments, prepare_model_args
from shared.rewards import RewardArguments, get_rewards, load_prompts
from shared.saving import save
from trl_ext import load_rollouts
from trl_ext.algorithms import ALGORITHMS


@dataclass
class ActorCriticArguments(RewardArguments):
    """Arguments of this script."""

    algorithm: str = field(default="ppo", metadata={"help": "What to train with.", "choices": list(ALGORITHMS)})
    pretrain_critic: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an earlier run with `--save_rollouts`, of any algorithm, on whose completions the critic "
            "is trained before the policy learns."
        },
    )


def choose_algorithm(args: list[str]) -> str:
    """Returns what the command line, or else the YAML file, asks for; the other options depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algorithm")
    parser.add_argument("--config", type=Path)
    known, _ = parser.parse_known_args(args)
    in_file = yaml.safe_load(known.config.read_text(encoding="utf-8")) if known.config is not None else {}
    algorithm = known.algorithm or in_file.get("algorithm", ActorCriticArguments.algorithm)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {algorithm} is unknown. Choose one of {', '.join(ALGORITHMS)}.")
    return algorithm


def parse(args: list[str]) -> tuple:
    """Returns the trainer's class, and the arguments of this script, of the training and of the model."""
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
    if script_args.pretrain_critic is not None and training_args.resume_from_checkpoint is None:
        trainer.pretrain_critic(load_rollouts(script_args.pretrain_critic)["train"])
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save(trainer, script_args)


if __name__ == "__main__":
    main()
