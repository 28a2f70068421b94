"""The state of a training besides model, critic and optimizer, so that it resumes as if it had not stopped."""

import math
import os
from dataclasses import asdict

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback


KL_CONTROLLER_FILE = "kl_controller.pt"
PAST_ROLLOUTS_FILE = "past_rollouts.pt"


class StartOfTraining(TrainerCallback):
    """
    Resets state that outlives a rollout, before a checkpoint may restore it, and makes the order of prompts a function
    of seed and epoch: TRL's sampler draws each epoch's from where the last one left its generator, which a resumed run
    cannot know.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_training(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.train_sampler is not None and args.shuffle_dataset:
            epoch = math.floor((state.epoch or 0) + 1e-6)  # `state.epoch` counts in fractions
            self.trainer.train_sampler.generator.manual_seed(args.seed + epoch)


def save_state(trainer, checkpoint: str) -> None:
    """Writes the KL controller, what is remembered of past rollouts and, between two updates on one rollout, that rollout."""
    if trainer.args.should_save:
        torch.save(asdict(trainer.kl_controller), os.path.join(checkpoint, KL_CONTROLLER_FILE))
        torch.save(trainer.state_of_rollouts(), os.path.join(checkpoint, PAST_ROLLOUTS_FILE))
    in_rollout = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    rollout = {
        "layout": division_of(trainer),
        "step": trainer._step,
        "epochs_ended": trainer.trust_region.has_ended,
        "buffered_inputs": trainer._buffered_inputs if in_rollout else None,
    }
    torch.save(rollout, rollout_file(trainer, checkpoint))


def load_state(trainer, checkpoint: str) -> None:
    """Reads what [`save_state`] has written, as far as it is there."""
    kl_file, file = os.path.join(checkpoint, KL_CONTROLLER_FILE), rollout_file(trainer, checkpoint)
    if os.path.isfile(kl_file):
        saved = torch.load(kl_file, weights_only=True)
        trainer.kl_controller.kl_sum = saved["kl_sum"]
        trainer.kl_controller.num_completions = saved["num_completions"]
        if trainer.args.kl_target is not None:  # else the coefficient is the configuration's
            trainer.kl_controller.coef = saved["coef"]
    past_file = os.path.join(checkpoint, PAST_ROLLOUTS_FILE)
    if os.path.isfile(past_file):
        trainer.load_state_of_rollouts(torch.load(past_file, weights_only=True, map_location="cpu"))
    if os.path.isfile(file):
        rollout = torch.load(file, weights_only=True, map_location="cpu")
        # A rollout is cut for one division into updates; under another the next step samples anew
        if rollout["layout"] == division_of(trainer):
            trainer._step = rollout["step"]
            trainer.trust_region.has_ended = rollout["epochs_ended"]
            trainer._buffered_inputs = send_to_device(rollout["buffered_inputs"], trainer.accelerator.device)


def division_of(trainer) -> list[int]:
    """Returns the sizes that decide how a rollout is divided into updates."""
    args = trainer.args
    sizes = [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation]
    return [trainer.accelerator.num_processes, *sizes, trainer.num_iterations]


def rollout_file(trainer, checkpoint: str) -> str:
    """Returns the path of this process's rollout."""
    return os.path.join(checkpoint, f"rollout_{trainer.accelerator.process_index}.pt")
