"""
Trains with real generation, evaluates, saves and resumes, in this process or, as one of several,
`saving.py POLICY REWARD_MODEL REWARD_ADAPTER OUTPUT BATCH`.
"""

import os
import sys

import helpers
import torch
from datasets import Dataset
from peft import LoraConfig
from processes.fsdp_on_cpu import allow_fsdp_on_cpu, whole_weights

from trl_ext import (
    PPOConfig,
    PPOTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
)


PPO = {
    "num_iterations": 2,  # so that the checkpoint falls between two updates on one rollout
    "kl_in_reward": 0.1,
    "max_completion_length": 12,
    "adam_epsilon": 1e-4,  # or Adam makes much of the rounding in gradients of next to nothing
    "generation_kwargs": {"do_sample": False},  # the same completions, however many processes there are
}
CASES = {
    "ppo-shared": PPO,
    "ppo-separate": {
        **PPO,
        "critic": "separate",
        "critic_model_name_or_path": "reward_model",
        "num_generations": 2,
        "shared_prefix": "always",
    },
    "ppo-lora": PPO,
    "reward": {"ranking_model": "davidson"},
    "reward-lora": {},
    "dpo-lora": {"ranking_model": "rao_kupper"},
}
RESUMED_FROM = 3


def make_trainer(case, output_dir, policy, rewards, batch_size):
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size, "max_steps": 4}
    saving = {"save_strategy": "steps", "save_steps": RESUMED_FROM, "eval_strategy": "steps", "eval_steps": 2}
    peft_config = None
    if "lora" in case:
        torch.manual_seed(0)
        peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="reward" in case)
    if "ppo" in case:
        args = PPOConfig(**helpers.settings(output_dir, **sizes, **saving, **CASES[case]))
        prompts = Dataset.from_dict({"prompt": helpers.PROMPTS})
        evaluation = prompts.select(range(4))
        return PPOTrainer(policy, rewards, args, prompts, eval_dataset=evaluation, peft_config=peft_config)
    trainer_class, config_class = (
        (RankingRewardTrainer, RankingRewardConfig) if "reward" in case else (RankingDPOTrainer, RankingDPOConfig)
    )
    args = config_class(**helpers.ranking_settings(output_dir, **sizes, **saving, **CASES[case]))
    return trainer_class(
        policy,
        args=args,
        train_dataset=Dataset.from_dict(helpers.make_rankings(8)),
        eval_dataset=Dataset.from_dict(helpers.make_rankings(4, seed=1)),
        peft_config=peft_config,
    )


def why_an_adapter_critic_is_refused(output_dir, policy, rewards):
    args = PPOConfig(**helpers.settings(output_dir, critic="adapter"))
    prompts = Dataset.from_dict({"prompt": helpers.PROMPTS})
    try:
        PPOTrainer(policy, rewards, args, prompts, peft_config=LoraConfig(target_modules="all-linear"))
    except ValueError as error:
        return str(error)


def train(policy, reward_model, reward_adapter, output_dir, batch_size):
    """Trains every case, and leaves in `output_dir` what came of it; under FSDP also of a run that is resumed."""
    for case in CASES:
        rewards = [reward_adapter if "lora" in case else reward_model, helpers.count_good]
        inputs = policy, rewards, batch_size
        trainer = make_trainer(case, f"{output_dir}/{case}", *inputs)
        trainer.train()
        trainer.save_model()
        weights, num_sharded = whole_weights(trainer.accelerator.unwrap_model(trainer.model))
        result = {
            "distributed_type": trainer.accelerator.distributed_type,
            "num_sharded": num_sharded,
            "weights": weights,
            "log_history": trainer.state.log_history,
        }
        if trainer.is_fsdp_enabled:
            again = make_trainer(case, f"{output_dir}/{case}-again", *inputs)
            with torch.no_grad():
                for parameter in again.model.parameters():
                    if parameter.requires_grad:
                        parameter.zero_()  # which only the checkpoint mends
            again.train(resume_from_checkpoint=f"{output_dir}/{case}/checkpoint-{RESUMED_FROM}")
            result["resumed"], _ = whole_weights(again.accelerator.unwrap_model(again.model))
        if trainer.accelerator.is_main_process:
            torch.save(result, f"{output_dir}/{case}.pt")
    if trainer.is_fsdp_enabled:
        message = why_an_adapter_critic_is_refused(output_dir, policy, rewards)
        torch.save(message, f"{output_dir}/refused_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    *models, output_dir, batch_size = sys.argv[1:]
    train(*models, output_dir, int(batch_size))
    # Without teardown: torch 2.13's gloo can deadlock there, joining a thread that waits for the interpreter's lock
    sys.stdout.flush()
    os._exit(0)
