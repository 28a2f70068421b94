"""How [`ActorCriticTrainer`] saves and resumes the KL controller and an unfinished rollout."""

import math
import os
from dataclasses import asdict

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback


KL_CONTROLLER_FILE = "kl_controller.pt"


class StartOfTraining(TrainerCallback):
    """
    Brings what a trainer carries from rollout to rollout to its beginning, before a checkpoint may restore it, and
    makes the order of prompts a function of seed and epoch: TRL's sampler draws each epoch's from where the last one
    left its generator, which a resumed run cannot know.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_training(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._train_sampler is not None and args.shuffle_dataset:
            epoch = math.floor((state.epoch or 0) + 1e-6)  # `state.epoch` counts in fractions
            self.trainer._train_sampler.generator.manual_seed(args.seed + epoch)


class CheckpointingMixin:
    """
    A checkpoint also holds the KL controller and, when it falls between two updates on one rollout, that rollout, so
    that a resumed run goes on exactly as if it had not stopped.
    """

    _train_sampler = None  # streams have none

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    @property
    def _rollout_layout(self) -> list[int]:
        """What a rollout's division into updates depends on."""
        args = self.args
        sizes = [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation]
        return [self.accelerator.num_processes, *sizes, self.num_iterations]

    def _rollout_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"rollout_{self.accelerator.process_index}.pt")

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            torch.save(asdict(self.kl_controller), os.path.join(output_dir, KL_CONTROLLER_FILE))
        in_rollout = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        rollout = {
            "layout": self._rollout_layout,
            "step": self._step,
            "epochs_ended": self.trust_region.has_ended,
            "buffered_inputs": self._buffered_inputs if in_rollout else None,
        }
        torch.save(rollout, self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        kl_file, rollout_file = os.path.join(checkpoint, KL_CONTROLLER_FILE), self._rollout_file(checkpoint)
        if os.path.isfile(kl_file):
            saved = torch.load(kl_file, weights_only=True)
            self.kl_controller.kl_sum = saved["kl_sum"]
            self.kl_controller.num_completions = saved["num_completions"]
            if self.args.kl_target is not None:  # else the coefficient is the configuration's
                self.kl_controller.coef = saved["coef"]
        if os.path.isfile(rollout_file):
            rollout = torch.load(rollout_file, weights_only=True, map_location="cpu")
            # A rollout is cut for one layout; under another the next step samples anew
            if rollout["layout"] == self._rollout_layout:
                self._step = rollout["step"]
                self.trust_region.has_ended = rollout["epochs_ended"]
                self._buffered_inputs = send_to_device(rollout["buffered_inputs"], self.accelerator.device)
