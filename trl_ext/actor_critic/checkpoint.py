"""How [`ActorCriticTrainer`] saves and resumes: the critic, the KL controller, and an unfinished rollout."""

import math
import os
from contextlib import nullcontext
from dataclasses import asdict

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from ..critic.critic import CRITIC_NAME
from ..critic.files import VALUE_HEAD_FILE, restore_critic, save_critic
from ..models.companion import split_state_dict, walked_without_child, without_child


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
        self.trainer._step, self.trainer._buffered_inputs = 0, None
        self.trainer._epochs_ended = False
        self.trainer._is_first_update = state.global_step == 0
        self.trainer._window_kl.zero_()
        self.trainer._begin_recording(state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._train_sampler is not None and args.shuffle_dataset:
            epoch = math.floor((state.epoch or 0) + 1e-6)  # `state.epoch` counts in fractions
            self.trainer._train_sampler.generator.manual_seed(args.seed + epoch)


class CheckpointingMixin:
    """
    Writes the critic beside the policy wherever the parent saves the policy, and reads it where it reads it. A
    checkpoint also holds the KL controller and, when it falls between two updates on one rollout, that rollout, so
    that a resumed run goes on exactly as if it had not stopped.
    """

    _train_sampler = None  # streams have none
    _saved_with_model = (VALUE_HEAD_FILE, CRITIC_NAME)

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def train(self, *args, **kwargs):
        if self.critic is None:
            return super().train(*args, **kwargs)
        with walked_without_child(self.callback_handler.callbacks, self.accelerator, CRITIC_NAME):
            return super().train(*args, **kwargs)

    def _without_critic(self):
        """The plain policy within the context, for the parent to save or load."""
        return nullcontext() if self.critic is None else without_child(self._policy, CRITIC_NAME)

    def _save(self, output_dir=None, state_dict=None):
        policy_state, critic_state = state_dict, None
        if state_dict is not None:  # gathered by FSDP or DeepSpeed, policy and critic in one
            policy_state, critic_state = split_state_dict(state_dict, CRITIC_NAME)
        with self._without_critic():
            super()._save(output_dir, policy_state)
        if self.critic is not None and self.args.should_save:
            save_critic(self.critic, output_dir or self.args.output_dir, critic_state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:  # one sharded state for policy and critic
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._without_critic():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.critic is not None:
            restore_critic(self.critic, resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        with self._without_critic():
            super()._load_best_model()
        if self.critic is not None:
            restore_critic(self.critic, self.state.best_model_checkpoint)

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
            "epochs_ended": self._epochs_ended,
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
                self._epochs_ended = rollout["epochs_ended"]
                self._buffered_inputs = send_to_device(rollout["buffered_inputs"], self.accelerator.device)
