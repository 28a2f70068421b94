"""Which forwards of the policy [`ActorCriticTrainer`] makes over a rollout, and what each is to give."""

from contextlib import nullcontext

import torch

from ..compat import MULTIMODAL_KEYS, disable_gradient_checkpointing
from ..training.head_scoring import COMPARED_TEXT, score_as_the_model_does


class PassesMixin:
    """
    Keeps the log-probabilities `(B, T)` and values `(B, T+1, ...)` of the present batch's scoring forwards in `_passes`,
    and leaves out the parent's pass where the first epoch's forward gives the same.
    """

    _reads_head = False  # whether the algorithm itself computes logits from hidden states
    _head_scoring = ()
    _heads_compared = True  # until a trainer that shards weights is made

    def _compare_heads(self, ids: list[int] | None = None) -> None:
        """To be called when the trainer is made, and again with a text where weights are sharded."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._heads_compared = self._is_vlm or not is_sharded or ids is not None
        if self._is_vlm or not self._heads_compared:
            return
        self._head_scoring = score_as_the_model_does(
            self.model,
            [self._policy] if self.ref_model is None else [self._policy, self.ref_model],
            self._tokenizer(COMPARED_TEXT)["input_ids"] if ids is None else ids,
            temperature=self.temperature,
            is_half=self.args.bf16 or self.args.fp16 or self._policy.dtype != torch.float32,
            is_sharded=is_sharded,
            reads_head=self._reads_head,
        )

    def _generate(self, prompts):
        outputs = super()._generate(prompts)
        if not self._heads_compared:
            prompt_ids, completion_ids, *_ = outputs
            self._compare_heads(prompt_ids[0] + completion_ids[0])
        return outputs

    @property
    def _parent_scores(self) -> bool:
        """Whether the parent scores a rollout with the policy before it trains on it."""
        rollout_steps = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % rollout_steps != 0 or self._corrects_sampling

    @property
    def _first_epoch_scores(self) -> bool:
        """
        Whether the first of several epochs trains on the whole rollout with the weights that sampled it: its forward
        then gives the old log-probabilities and the values, and the pass that the parent makes for them is left out.
        """
        args = self.args
        is_one_update = args.gradient_accumulation_steps % args.steps_per_generation == 0
        spans_micro_batches = args.steps_per_generation > 1 and self._has_batch_statistics and self._needs_pass
        return self._parent_scores and is_one_update and not self._corrects_sampling and not spans_micro_batches

    @property
    def _corrects_sampling(self) -> bool:
        """Whether the parent compares the log-probabilities of the engine that sampled with the policy's."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def _needs_pass(self) -> bool:
        """Whether advantages depend on the policy's forward over the rollout."""
        return self.critic is not None or self.args.kl_in_reward != 0.0

    @property
    def _has_batch_statistics(self) -> bool:
        """Whether a completion's advantages depend on the other completions of the generation batch."""
        return self.args.whiten_advantages

    def _score_rollout(self, batch):
        """Log-probabilities and values of a rollout, from a pass of our own."""
        self._passes, self._records_values = [], True
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{key: batch[key] for key in MULTIMODAL_KEYS if key in batch},
            )
        return self._passes[-1]

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *args, **kwargs
    ):
        if self._skips_pass:
            self._skips_pass = False
            return None, None, None
        # Of the passes over a rollout the policy's is the first, if there is one; the reference's needs no values
        is_recorded, self._records_values = self.critic is not None and self._records_values, False
        order = self._scoring_order(input_ids, attention_mask, logits_to_keep, batch_size, kwargs)
        input_ids, attention_mask = input_ids[order], attention_mask[order]
        scoring = self._compact_scoring(model, input_ids, attention_mask, logits_to_keep, batch_size, kwargs)
        # Before each of the T tokens, and after the last one
        recording = self.critic.recording(num_states=logits_to_keep + 1) if is_recorded else nullcontext([])
        with recording as values:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                scoring, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs
            )
        back = order.argsort()
        outputs = logps[back], None if entropies is None else entropies[back], aux_loss
        self._passes.append((outputs[0], torch.cat(values)[back] if values else None))
        if self._awaiting is not None:
            batch, self._awaiting = self._awaiting, None
            self._add_advantages(batch, *self._passes[-1])
        return outputs
