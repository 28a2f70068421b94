"""Pushes from two processes: `pushing.py MODEL OUTPUT`, with the Hub of the environment."""

import os
import sys

import helpers
from datasets import Dataset

from trl_ext import PPOConfig, PPOTrainer


if __name__ == "__main__":
    model, output_dir = sys.argv[1:]
    args = PPOConfig(
        **helpers.settings(output_dir, save_strategy="steps", save_steps=2),
        push_to_hub=True,
        hub_model_id="user/two",
        hub_strategy="checkpoint",
    )
    dataset = Dataset.from_dict({"prompt": helpers.PROMPTS})
    trainer = PPOTrainer(model, helpers.count_good, args, dataset)
    trainer.train()
    trainer.push_to_hub()
    # Without teardown: torch 2.13's gloo can deadlock there, joining a thread that waits for the interpreter's lock
    sys.stdout.flush()
    os._exit(0)
