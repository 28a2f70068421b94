"""Trains on scripted completions, for comparing one process with two: `actor_critic_script.py MODEL OUTPUT CASE BATCH`."""

import os
import sys

import helpers
import torch
from datasets import Dataset
from peft import LoraConfig
from processes.fsdp_on_cpu import allow_fsdp_on_cpu, whole_weights

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    PPOConfig,
    PPOTrainer,
    QActorCriticConfig,
    QActorCriticTrainer,
    ReinforceConfig,
    ReinforceTrainer,
)


CASES = {
    "ppo": (PPOTrainer, PPOConfig, {"num_iterations": 2, "kl_in_reward": 0.1, "kl_target": 1.0, "kl_horizon": 20}),
    "ppo-groups": (PPOTrainer, PPOConfig, {"num_iterations": 2, "num_generations": 4, "shared_prefix": "always"}),
    "ppo-separate": (PPOTrainer, PPOConfig, {"num_iterations": 2, "critic": "separate"}),
    "ppo-lora": (PPOTrainer, PPOConfig, {"num_iterations": 2}),
    "a2c-lora-checkpointing": (A2CTrainer, A2CConfig, {"gradient_checkpointing": True, "critic": "separate"}),
    "ppo-lora-adapter": (
        PPOTrainer,
        PPOConfig,
        {"num_iterations": 2, "critic": "adapter", "gradient_checkpointing": True},
    ),
    "a2c-whitened": (A2CTrainer, A2CConfig, {"whiten_advantages": True, "truncation": "bootstrap"}),
    "q-all-actions-lora": (
        QActorCriticTrainer,
        QActorCriticConfig,
        {"q_rank": 4, "policy_gradient": "all_actions", "gradient_checkpointing": True},
    ),
    "reinforce": (ReinforceTrainer, ReinforceConfig, {}),
}


def score_length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    model, output_dir, *cases, batch_size = sys.argv[1:]
    for case in cases:
        trainer_class, config_class, overrides = CASES[case]
        sizes = {"per_device_train_batch_size": int(batch_size), "max_steps": 4}
        args = config_class(**helpers.settings(f"{output_dir}/{case}", save_rollouts=True, **sizes, **overrides))
        peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if "lora" in case else None
        trainer = trainer_class(
            model,
            score_length,
            args,
            Dataset.from_dict({"prompt": helpers.PROMPTS}),
            peft_config=peft_config,
            rollout_func=helpers.scripted_rollout,
        )
        trainer.train()
        weights, num_sharded = whole_weights(trainer._policy)
        if trainer.accelerator.is_main_process:
            result = weights, trainer.state.log_history, trainer.kl_controller.coef, trainer.accelerator.num_processes
            torch.save((*result, num_sharded), f"{output_dir}/{case}.pt")
    # Without teardown: torch 2.13's gloo can deadlock there, joining a thread that waits for the interpreter's lock
    sys.stdout.flush()
    os._exit(0)
