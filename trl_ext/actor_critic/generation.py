"""Generation: completions are sampled by TRL's engines, without the work that can be left out."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..adapters.merging import can_merge, merged
from ..compat import generating_by
from ..models.decoding import DEFAULTS, decode, settings_of, why_not_decode
from ..models.quantization import is_quantized
from .notices import Notices


class Generation:
    """
    Stands in for the policy's `generate` while it samples.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): The policy, before any distributed wrapper.
        args ([`ActorCriticConfig`]): The configuration.
        notices ([`Notices`]): Takes warnings of options that are on and cannot be used.
        use_vllm (`bool`): vLLM samples.
        has_rollout_func (`bool`): A function of the user's samples, perhaps with the policy's `generate`.
        is_vlm (`bool`): The policy takes images.
        is_sharded (`bool`): FSDP or DeepSpeed shards its weights.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        args,
        notices: Notices,
        use_vllm: bool,
        has_rollout_func: bool,
        is_vlm: bool,
        is_sharded: bool,
    ):
        self.policy, self.args, self.notices = policy, args, notices
        self.use_vllm, self.has_rollout_func = use_vllm, has_rollout_func
        self.is_vlm, self.is_sharded = is_vlm, is_sharded
        self.merges: bool | None = None  # until the first generation
        self.base_weights = {}  # kept while the adapter is merged into them

    # --- The adapter ---

    def merged_adapter(self):
        """Merges the adapter into its base within the context, where that is exact to undo; vLLM merges for itself."""
        if self.merges is None:
            self.merges = self._should_merge()
        return merged(self.policy, self.base_weights) if self.merges else nullcontext()

    def _should_merge(self) -> bool:
        if self.use_vllm or self.has_rollout_func:
            return False
        is_wanted = self.args.generate_merged
        if is_wanted is None:  # where rounding the sum loses nothing of the adapter
            is_wanted = self.policy.dtype == torch.float32
        reason = self._why_not_merge() if is_wanted else None
        if self.args.generate_merged and reason is not None:
            self.say_not_merged(reason)
        return is_wanted and reason is None

    def _why_not_merge(self) -> str | None:
        if not isinstance(self.policy, PeftModel):
            return "the policy has no adapter"
        if self.policy.active_peft_config.is_prompt_learning:
            return "virtual tokens cannot be merged"
        if self.is_sharded:
            return "FSDP or DeepSpeed shards the base"
        if is_quantized(self.policy):
            return "a base in few bits cannot hold what an adapter adds to it"
        if not can_merge(self.policy):
            return "the adapter cannot be merged, or is on weights that another module shares"
        return None

    def say_not_merged(self, reason: str) -> None:
        """Says that `generate_merged` is not in use."""
        self.notices(
            "generate_merged",
            reason,
            "where the policy has an adapter, its layers are run for every token that is generated",
            "Leave `generate_merged` unset, which merges where that is possible.",
        )

    # --- Decoding ---

    @contextmanager
    def compact(self) -> Iterator[None]:
        """Puts [`decode`] in place of the policy's `generate` within the context, where it does the same."""
        has_engine = self.use_vllm or self.args.use_transformers_continuous_batching
        if not self.args.compact_generation or has_engine:
            yield
            return
        reason = None
        if "generate" in vars(self.policy):
            reason = "a `generate` was put on the policy, by you or, to mask what is sampled, by NLPO"
        elif self.is_vlm:
            reason = "the policy takes images"
        elif self.is_sharded:
            reason = "FSDP or DeepSpeed has processes run equally many forwards, and their completions end apart"
        if reason is not None:
            self._say_not_compact(reason)
            yield
            return

        def compact(generate, *, generation_config, **model_inputs):
            settings = settings_of(self.policy, generation_config)
            reason = why_not_decode(self.policy, settings, model_inputs)
            if reason is None:
                return decode(self.policy, **model_inputs, settings=settings)
            self._say_not_compact(reason)
            return generate(generation_config=generation_config, **model_inputs)

        with generating_by(self.policy, compact):
            yield

    def _say_not_compact(self, reason: str) -> None:
        self.notices(
            "compact_generation",
            reason,
            "`generate` reads a prompt once for each completion and runs completions that have ended: rollouts take "
            "longer, up to twice as long where lengths differ",
            "Remove what stands against it, or set `compact_generation=False` to be told no more.",
        )


def engine_settings(trainer) -> dict:
    """Reads the options that the engine of a trainer of TRL samples with; those at None are left out."""
    given = trainer.args.generation_kwargs or {}
    if trainer.use_vllm:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        structure = {"structured_outputs": trainer.args.vllm_structured_outputs_regex}
        settings = structure | {name: getattr(trainer, name) for name in names} | given
    elif trainer.use_transformers_continuous_batching:  # which asks the model's generation config for nothing
        settings = trainer.generation_config.to_dict()
    else:
        settings = DEFAULTS | settings_of(trainer.model, trainer.generation_config)
    if trainer._is_vlm and "suppress_tokens" not in given:
        settings.pop("suppress_tokens", None)  # TRL's: a token in place of which there is an image
    return {name: value for name, value in settings.items() if value is not None}
