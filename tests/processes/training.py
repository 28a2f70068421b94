"""
Trains actor-critics on scripted completions, and models on rankings, in this process or, as one of several,
`training.py POLICY REWARD_MODEL OUTPUT BATCH`.
"""

import os
import sys
from pathlib import Path

import helpers
import torch
from datasets import Dataset
from peft import LoraConfig
from processes.fsdp_on_cpu import allow_fsdp_on_cpu, whole_weights

from trl_ext import (
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    load_rollouts,
)
from trl_ext.algorithms import ALGORITHMS


ACTOR_CRITICS = {
    "ppo": ("ppo", {"num_iterations": 2, "kl_in_reward": 0.1, "kl_target": 1.0, "kl_horizon": 20}),
    "ppo-groups": ("ppo", {"num_iterations": 2, "num_generations": 4, "shared_prefix": "always"}),
    "ppo-separate": ("ppo", {"num_iterations": 2, "critic": "separate"}),
    "ppo-lora": ("ppo", {"num_iterations": 2}),
    "a2c-lora-checkpointing": ("a2c", {"gradient_checkpointing": True, "critic": "separate"}),
    "ppo-lora-adapter": (
        "ppo",
        {"num_iterations": 2, "critic": "adapter", "gradient_checkpointing": True},
    ),
    "a2c-whitened": ("a2c", {"scale_advantages": True, "truncation": "bootstrap"}),
    "q-all-actions-lora": (
        "q_actor_critic",
        {"q_rank": 4, "policy_gradient": "all_actions", "gradient_checkpointing": True},
    ),
    "reinforce": ("reinforce", {}),
}
RANKERS = {
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
REFUSED_UNDER_FSDP = ("ppo-lora-adapter", "q-all-actions-lora")


def train_actor_critic(case, policy, output_dir, batch_size):
    algorithm, overrides = ACTOR_CRITICS[case]
    config_class, trainer_class = ALGORITHMS[algorithm]
    # Plain steps: Adam makes much of the rounding in gradients of next to nothing
    sizes = {"per_device_train_batch_size": batch_size, "max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    args = config_class(**helpers.settings(output_dir, save_rollouts=True, **sizes, **overrides))
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if "lora" in case else None
    trainer = trainer_class(
        policy,
        helpers.by_length,
        args,
        Dataset.from_dict({"prompt": helpers.PROMPTS}),
        peft_config=peft_config,
        rollout_func=helpers.scripted_rollout,
    )
    if case == "ppo-lora-adapter":  # on what an earlier case has sampled
        rollouts = load_rollouts(Path(output_dir).with_name("ppo"))["train"]
        trainer.pretrain_critic(rollouts, num_epochs=2, learning_rate=1e-2)
    trainer.train()
    return trainer, whole_weights(trainer._model)


def train_ranker(case, model, output_dir, batch_size):
    trainer_class, config_class, overrides = RANKERS[case]
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size, "max_steps": 4}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    args = config_class(
        **helpers.ranking_settings(output_dir, **sizes, **evaluation, optim="sgd", learning_rate=0.1, **overrides)
    )
    peft_config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["score"] if "reward" in case else None,
        init_lora_weights=False,
    )
    trainer = trainer_class(
        model,
        args=args,
        train_dataset=Dataset.from_dict(helpers.make_rankings(8)),
        eval_dataset=Dataset.from_dict(helpers.make_rankings(5, seed=1)),
        peft_config=peft_config if "lora" in case else None,
    )
    trainer.train()
    return trainer, whole_weights(trainer._model)


def train(policy, reward_model, output, batch_size):
    """Trains every case, and leaves in `output` what came of it."""
    for case in [*ACTOR_CRITICS, *RANKERS]:
        if case in REFUSED_UNDER_FSDP and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            continue
        torch.manual_seed(0)
        run = train_actor_critic if case in ACTOR_CRITICS else train_ranker
        model = reward_model if "reward" in case else policy
        trainer, (weights, num_sharded) = run(case, model, str(Path(output) / case), batch_size)
        if trainer.accelerator.is_main_process:
            result = {
                "weights": weights,
                "num_sharded": num_sharded,
                "log_history": trainer.state.log_history,
                "num_processes": trainer.accelerator.num_processes,
            }
            if case in RANKERS:
                result["packs"] = trainer._packs
            else:
                result["kl_coef"] = trainer.kl_controller.coef
            torch.save(result, f"{output}/{case}.pt")


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    policy, reward_model, output, batch_size = sys.argv[1:]
    train(policy, reward_model, output, int(batch_size))
    # Without teardown: torch 2.13's gloo can deadlock there, joining a thread that waits for the interpreter's lock
    sys.stdout.flush()
    os._exit(0)
