r"""
Natural language policy optimization (NLPO): PPO whose actions are those that a masking policy finds likely.

    L_t = -min( rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t ),   rho_t = pi~(a_t|s_t) / pi~_old(a_t|s_t)

with pi~ the policy within the top-p nucleus of pi_psi, renormalised ([`~trl_ext.token_mdp.nucleus`]), and pi_psi a
snapshot of the policy, renewed every `mask_update_steps` rollouts. A vocabulary has 100,000 actions and few that make
sense; NLPO explores these alone.

Departures from the paper's own implementation (RL4LMs):

1. pi~ is renormalised, in the ratio and in the KL; there the log-probabilities of the ratio are those of pi.
2. The snapshot that samples is the one that is renewed; there the sampler keeps the first one forever.
3. The snapshot is part of a checkpoint and restored with it.
4. Evaluation samples from pi, unless `mask_in_eval`.

The mass that pi has outside the nucleus has neither gradient nor KL: neither pi~ nor its KL to the reference's depends on
it. It moves with what the logits share alone, until the snapshot is renewed and what has become likely is inside.
`mask/inside` logs the mass inside, which is about `top_p_mask` of a snapshot that was just renewed.

Reference: Ramamurthy et al. 2023, https://huggingface.co/papers/2210.01241, section 4 and algorithm 1.
"""

import os
import textwrap
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import LogitsProcessorList

from ..compat import generating_by
from ..training.arguments import document_fields
from .masking_policy import Mask, MaskedScoring, MaskingProcessor, refresh, snapshot, trained_weights
from .ppo import PPOConfig, PPOTrainer


MASKING_POLICY_FILE = "masking_policy.pt"


@document_fields
@dataclass
class NLPOConfig(PPOConfig):
    """Configuration of [`NLPOTrainer`]."""

    top_p_mask: float = field(
        default=0.9,
        metadata={"help": "Probability of the masking policy's nucleus, which bounds what is sampled. 1 is PPO."},
    )
    min_tokens_to_keep: int = field(
        default=100, metadata={"help": "So many of the masking policy's most likely tokens are allowed at least."}
    )
    mask_update_steps: int = field(
        default=20, metadata={"help": "Rollouts after which the masking policy is renewed from the policy."}
    )
    mask_in_eval: bool = field(default=False, metadata={"help": "Also evaluate within the mask."})
    compact_generation: bool = field(
        default=False, metadata={"help": "Not done within the mask, which `generate` is given."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.top_p_mask <= 1:
            raise ValueError(f"`top_p_mask` must be above 0 and at most 1, got {self.top_p_mask}.")
        for name in ("min_tokens_to_keep", "mask_update_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self, name):
                raise ValueError(
                    f"NLPO masks what is sampled by another model's distribution, token by token, and `{name}` samples "
                    "in an engine that takes no such mask. Remove it, or use PPO."
                )
        num_beams = (self.generation_kwargs or {}).get("num_beams", 1)
        if num_beams > 1:
            raise ValueError(
                f"NLPO masks one continuation of each prompt, and `generation_kwargs` has num_beams={num_beams}. Remove "
                "it, or use PPO."
            )


class NLPOTrainer(PPOTrainer):
    """[`PPOTrainer`] that samples from, and optimizes, the policy within the nucleus of a snapshot of itself."""

    _tag_names = ["trl", "trl_ext", "nlpo"]
    _name = "NLPO"
    _paper = {
        "title": "Is Reinforcement Learning (Not) for Natural Language Processing?",
        "id": "2210.01241",
        "citation": textwrap.dedent("""\
            @inproceedings{ramamurthy2023nlpo,
                title     = {{Is Reinforcement Learning (Not) for Natural Language Processing: Benchmarks, Baselines, and Building Blocks for Natural Language Policy Optimization}},
                author    = {Rajkumar Ramamurthy and Prithviraj Ammanabrolu and Kiant{\\'e} Brantley and Jack Hessel and Rafet Sifa and Christian Bauckhage and Hannaneh Hajishirzi and Yejin Choi},
                booktitle = {International Conference on Learning Representations},
                year      = 2023,
                eprint    = {arXiv:2210.01241},
            }"""),
    }
    _method = (
        "As in PPO, advantages are those of generalized advantage estimation and updates are clipped; but the policy "
        "that samples and is updated is the one within the nucleus (`top_p_mask`) of an earlier snapshot of itself."
    )
    config_class = NLPOConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.rollout_func is not None:
            raise ValueError(
                "NLPO masks what `generate` samples, and `rollout_func` samples by itself. Use PPO with it."
            )
        if isinstance(self._model, PeftModel) and self._model.active_peft_config.is_prompt_learning:
            raise ValueError("NLPO's mask does not see the virtual tokens of a prompt-tuned policy. Use LoRA, or PPO.")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("NLPO copies the policy's weights, which FSDP and DeepSpeed shard. Use DDP, or PPO.")
        self._num_rollouts = 0
        self._mask = None  # with all of the vocabulary, nothing is masked
        if self.args.top_p_mask < 1:
            with self._without_companion():
                masking_policy = snapshot(self._model, left_out=self._own_hooks)
            special_ids = torch.tensor(self._tokenizer.all_special_ids, dtype=torch.long)
            self._mask = Mask(
                masking_policy,
                self.args.top_p_mask,
                self.args.min_tokens_to_keep,
                special_ids,
                self.accelerator.autocast,
            )
            models = [self._model] if self.ref_model is None else [self._model, self.ref_model]
            self._masked_scoring = [MaskedScoring(model, self._mask, self.temperature) for model in models]

    @property
    def _own_hooks(self) -> set[int]:
        """Ids of the handles of what the trainer itself hooked to the policy."""
        scoring_hooks = [hook for scoring in self._head_scoring for hook in scoring.hooks]
        return {hook.id for hook in [*self.critic.hooks, *scoring_hooks]}

    @property
    def _reads_head(self) -> bool:
        return self.args.top_p_mask < 1

    @property
    def _is_masked(self) -> bool:
        return self._mask is not None and (self.model.training or self.args.mask_in_eval)

    # --- Sampling ---

    def _generate_and_score_completions(self, inputs):
        if self._mask is not None and self.model.training:
            if self._num_rollouts > 0 and self._num_rollouts % self.args.mask_update_steps == 0:
                with self._without_companion():
                    refresh(self._mask.model, trained_weights(self._model))
            self._num_rollouts += 1
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, *args, **kwargs):
        with self._masked_generate() if self._is_masked else nullcontext():
            return super()._generate_single_turn(*args, **kwargs)

    def _merged_adapter(self):
        if not self._is_masked:
            return super()._merged_adapter()
        # The masking policy runs on the same base, which must stay as it is meanwhile
        if self.args.generate_merged:
            self.generation.say_not_merged("NLPO's masking policy runs on the same base while the policy samples")
        return nullcontext()

    def _masked_generate(self):
        """Keeps the policy's `generate` inside the mask within the context: TRL passes it no logits processors."""

        def masked(generate, *args, attention_mask, **kwargs):
            processors = LogitsProcessorList([MaskingProcessor(self._mask, attention_mask)])
            return generate(*args, attention_mask=attention_mask, logits_processor=processors, **kwargs)

        return generating_by(self._model, masked)

    # --- Update ---

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if not self._is_masked:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        scoring = self._masked_scoring[-1 if model is self.ref_model else 0]
        with scoring.active():
            outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        metrics = scoring.metrics()
        if model is not self.ref_model:
            self._log_all(metrics)
        return outputs

    # --- Checkpoints ---

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self._mask is not None and self.args.should_save:
            with self._without_companion():
                weights = {name: self._mask.model.get_parameter(name) for name in trained_weights(self._model)}
            state = {"num_rollouts": self._num_rollouts, "weights": weights}
            torch.save(state, os.path.join(output_dir, MASKING_POLICY_FILE))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if self._mask is None or checkpoint is None:
            return
        file = os.path.join(checkpoint, MASKING_POLICY_FILE)
        if os.path.isfile(file):
            state = torch.load(file, weights_only=True, map_location=self.accelerator.device)
            self._num_rollouts = state["num_rollouts"]
            refresh(self._mask.model, state["weights"])
