"""Trains a tiny policy, in this process or in one that is killed: `resuming.py MODEL OUTPUT STEP [--resume]`."""

import os
import signal
import sys

import helpers
from datasets import Dataset
from transformers import TrainerCallback

from trl_ext import PPOConfig, PPOTrainer


class DieAt(TrainerCallback):
    """Kills the process without a chance to clean up, after the checkpoint of `step`."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(model, output_dir, resume=False, callbacks=()):
    args = PPOConfig(
        **helpers.settings(
            output_dir,
            max_steps=18,  # rollouts of four updates, epochs of eight
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=3,
            per_device_eval_batch_size=8,
            num_iterations=2,
            steps_per_generation=2,
            gradient_accumulation_steps=1,
            kl_in_reward=0.1,
            kl_target=0.5,
            kl_horizon=20,
            target_kl=0.5,
            per_device_train_batch_size=2,
            lr_scheduler_type="linear",
            critic_warmup_steps=6,  # within which the first kill falls
            save_rollouts=True,
        )
    )
    dataset = Dataset.from_dict({"prompt": helpers.PROMPTS})
    trainer = PPOTrainer(model, helpers.count_good, args, dataset, eval_dataset=dataset, callbacks=[*callbacks])
    trainer.train(resume_from_checkpoint=resume or None)


if __name__ == "__main__":
    model, output_dir, step, *flags = sys.argv[1:]
    train(model, output_dir, "--resume" in flags, [DieAt(int(step))])
