"""The last thing that a training recipe does."""

import os
import sys
from pathlib import Path

from .arguments import RecipeArguments


def save(trainer, script_args: RecipeArguments) -> None:
    """Writes the final model with its card, pushes them if asked to, and ends training."""
    dataset_name = None if Path(script_args.dataset_name).exists() else script_args.dataset_name
    trainer.save_model()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    else:
        model_name = Path(trainer.args.hub_model_id or trainer.args.output_dir).name
        trainer.create_model_card(model_name=model_name, dataset_name=dataset_name)
    # Several processes on CPU often hang when they destroy Gloo's group, whose threads are then joined by DDP's reducer
    # while it holds the interpreter lock, and sometimes abort when they end without (torch 2.13): they leave as they are
    if trainer.accelerator.device.type != "cpu":
        trainer.accelerator.end_training()
    elif trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
