"""Trains on rankings, to compare processes: `ranking_script.py POLICY REWARD_MODEL OUTPUT BATCH`."""

import os
import sys

import helpers
import torch
from datasets import Dataset
from peft import LoraConfig
from processes.fsdp_on_cpu import allow_fsdp_on_cpu, whole_weights

from trl_ext import RankingDPOConfig, RankingDPOTrainer, RankingRewardConfig, RankingRewardTrainer


CASES = {
    "reward": (RankingRewardTrainer, RankingRewardConfig, {}),
    "reward-davidson-checkpointing": (
        RankingRewardTrainer,
        RankingRewardConfig,
        {"ranking_model": "davidson", "gradient_checkpointing": True},
    ),
    "reward-lora": (RankingRewardTrainer, RankingRewardConfig, {}),
    "dpo": (RankingDPOTrainer, RankingDPOConfig, {"ranking_model": "davidson"}),
    "dpo-lora": (RankingDPOTrainer, RankingDPOConfig, {}),
}


def peft_config(case):
    if "lora" not in case:
        return None
    modules_to_save = ["score"] if "reward" in case else None
    target_modules = ["q_proj", "v_proj"]
    return LoraConfig(r=4, target_modules=target_modules, modules_to_save=modules_to_save, init_lora_weights=False)


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    policy, reward_model, output_dir, batch_size = sys.argv[1:]
    dataset = Dataset.from_dict(helpers.make_rankings(8))
    evaluation = Dataset.from_dict(helpers.make_rankings(5, seed=1))
    for case, (trainer_class, config_class, overrides) in CASES.items():
        args = config_class(
            **helpers.ranking_settings(
                output_dir,
                per_device_train_batch_size=int(batch_size),
                per_device_eval_batch_size=int(batch_size),
                eval_strategy="steps",
                eval_steps=2,
                max_steps=4,
                optim="sgd",
                learning_rate=0.1,
                **overrides,
            )
        )
        trainer = trainer_class(
            reward_model if "reward" in case else policy,
            args=args,
            train_dataset=dataset,
            eval_dataset=evaluation,
            peft_config=peft_config(case),
        )
        trainer.train()
        weights, num_sharded = whole_weights(trainer._model)
        if trainer.accelerator.is_main_process:
            result = {
                "weights": weights,
                "num_sharded": num_sharded,
                "log_history": trainer.state.log_history,
                "num_processes": trainer.accelerator.num_processes,
                "packs": trainer._packs,
            }
            torch.save(result, f"{output_dir}/{case}.pt")
    # Without teardown: torch 2.13's gloo can deadlock there, joining a thread that waits for the interpreter's lock
    sys.stdout.flush()
    os._exit(0)
