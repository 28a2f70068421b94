"""How [`ActorCriticTrainer`] leaves out what need not be computed: padding, repeated prompts, unscored positions."""

import functools

import torch
from peft import PeftModel

from ..compat import MULTIMODAL_KEYS
from ..packing.check import NUM_COMPARED, PrefixCheck
from ..packing.micro_batches import Batch, by_length, sort_windows, trim
from ..packing.scoring import CompactScoring


class CompactBatchesMixin:
    """Arranges micro-batches by length, and scores completions by [`CompactScoring`]."""

    def _set_up_compact_batches(self) -> None:
        """To be called when the parent's `__init__` has prepared the model."""
        if self.args.balance_tokens and self.accelerator.num_processes > 1:
            raise ValueError(
                "`balance_tokens=True` gives micro-batches of different numbers of completions, and TRL gathers metrics "
                "of equally many from each process. Leave it out, or train in one process."
            )
        if self.args.shared_prefix == "always" and self.aux_loss_enabled:
            raise ValueError(
                "`shared_prefix='always'` runs a prompt once for all its completions, and the loss that balances experts "
                "(`output_router_logits` of the model) counts it once for each. Set `shared_prefix='auto'`."
            )
        if self.args.shared_prefix == "always" and self.args.compact_scoring and self._why_not_compactly({}):
            raise ValueError(
                "`shared_prefix='always'` runs a prompt once for all its completions where they are scored compactly, and "
                f"they are not: {self._why_not_compactly({})}. Set `shared_prefix='auto'`."
            )
        self._prefix_check = PrefixCheck(self.args, self.accelerator, self._policy)
        self._critic_prefix_check = PrefixCheck(self.args, self.accelerator, self._policy, name="The critic")

    # --- Micro-batches ---

    def _prepare_inputs(self, generation_batch):
        earlier = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not earlier:  # a new rollout
            self._buffered_inputs = self._by_length(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _by_length(self, batches: list[Batch]) -> list[Batch]:
        if not self.args.length_batches:
            return batches
        window, num_batches = self.args.gradient_accumulation_steps, len(batches)
        if self.pad_to_multiple_of is not None or has_images(batches[0]):
            length = f"`pad_to_multiple_of={self.pad_to_multiple_of}` says how long batches are"
            self._say_not_by_length("batches hold images" if has_images(batches[0]) else length)
            return batches
        reason = None
        if window % num_batches != 0 and num_batches % window != 0:
            reason = (
                f"optimizer steps of {window} micro-batches and rollouts of {num_batches} do not divide each other"
            )
        elif self._loss_depends_on_micro_batches:
            reason = "the loss takes means, or quantiles, over the tokens of a micro-batch, which would be others"
        if reason is None:
            return sort_windows(batches, window, self.args.balance_tokens)
        if min(window, num_batches) > 1:
            self._say_not_by_length(reason)
        return [trim(batch) for batch in batches]

    def _say_not_by_length(self, reason: str) -> None:
        for option in ("length_batches", *(["balance_tokens"] if self.args.balance_tokens else [])):
            self.notices(
                option,
                reason,
                "completions of different lengths lie in one micro-batch, and more of what is computed is padding",
                f"Change that, or set `{option}=False` to be told no more.",
            )

    @property
    def _loss_depends_on_micro_batches(self) -> bool:
        """Whether the parent takes means, or quantiles, over the tokens of a micro-batch."""
        is_of_entropy = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        return self.loss_type == "bnpo" or is_of_entropy or self.aux_loss_enabled

    # --- Scoring ---

    def _scoring_order(self, input_ids, attention_mask, completion_length, batch_size, kwargs) -> torch.Tensor:
        """In which rows are scored, when not all at once: those alike in length, and of one prompt, together."""
        rows = torch.arange(len(input_ids), device=input_ids.device)
        if batch_size is None or batch_size >= len(input_ids) or not self._scores_compactly(kwargs):
            return rows
        num_prompt = input_ids.size(1) - completion_length
        return by_length(input_ids[:, :num_prompt], attention_mask[:, :num_prompt], attention_mask[:, num_prompt:])

    def _scores_compactly(self, kwargs) -> bool:
        return self.args.compact_scoring and self._why_not_compactly(kwargs) is None

    def _why_not_compactly(self, kwargs) -> str | None:
        if isinstance(self._policy, PeftModel) and self._policy.active_peft_config.is_prompt_learning:
            return "a prompt-tuned policy puts virtual tokens before the prompt"
        if self._is_vlm or has_images(kwargs):
            return "the policy takes images"
        return None

    def _compact_scoring(self, model, input_ids, attention_mask, completion_length, batch_size, kwargs):
        """What is scored with in place of `model`."""
        if not self._scores_compactly(kwargs):
            if self.args.compact_scoring:
                self.notices(
                    "compact_scoring",
                    self._why_not_compactly(kwargs),
                    "each prompt is run once for each of its completions, and padding with them",
                    "Use LoRA, or a policy of texts; or set `compact_scoring=False` to be told no more.",
                )
            return model
        unwrapped = self.accelerator.unwrap_model(model)
        ways = [CompactScoring(model, unwrapped, completion_length, way) for way in ("rows", "packed")]
        # Of a mixture of experts, the balancing loss counts prompts as often as they are run
        if kwargs.get("compute_aux_loss") and self.args.shared_prefix == "auto" and self.num_generations > 1:
            self.notices(
                "shared_prefix",
                "the loss that balances experts (`output_router_logits` of the model) counts prompts as often as they "
                "are run",
                "the prompt is run again for each completion",
                "Load the model with `output_router_logits=False`, or set `shared_prefix='never'` to be told no more.",
            )
        if kwargs.get("compute_aux_loss") or self.num_generations == 1:
            return ways[0]
        ids, mask = (x[:batch_size][:NUM_COMPARED] for x in (input_ids, attention_mask))

        @functools.cache  # asked for until a batch has shown it, and then no more
        def layouts():
            return [way.layout(ids, mask) for way in ways]

        def shows():  # where nothing is shared any mask is right
            return len(layouts()[1].inputs["input_ids"]) < len(ids)

        def logps(is_packed):
            labels = ids.masked_fill(mask == 0, -100)
            scored = mask[:, -completion_length:].bool()
            return ways[is_packed](ids, mask, labels, fused_lm_head=True).log_probs[scored]

        def critic_states(is_packed):
            layout = layouts()[is_packed]
            return self.critic.trunk_states(layout)[layout.mask]

        packs = self._prefix_check(logps, shows)
        if packs and self.critic is not None and self.critic.trunk is not None:  # which may be of another kind
            packs = self._critic_prefix_check(critic_states, shows)
        return CompactScoring(model, unwrapped, completion_length, "cheaper" if packs else "rows")


def has_images(batch: Batch) -> bool:
    return any(batch.get(key) is not None for key in MULTIMODAL_KEYS)
