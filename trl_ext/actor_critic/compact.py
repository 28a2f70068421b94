"""Forwards over completions without what need not be computed: padding, repeated prompts, unscored positions."""

import functools
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..critic.critic import Critic
from ..packing.check import NUM_COMPARED, PrefixCheck
from ..packing.micro_batches import by_length, has_images
from ..packing.scoring import CompactScoring
from .notices import Notices


class CompactForwards:
    """
    Decides how completions are run through the policy, and what stands for it in TRL's scoring pass.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): The policy, before any distributed wrapper.
        critic ([`Critic`], *optional*): Its critic, which runs with it.
        args ([`ActorCriticConfig`]): The configuration.
        accelerator (`Accelerator`): Of the processes.
        notices ([`Notices`]): Where options that are on and cannot be used say so.
        num_generations (`int`): Completions of each prompt.
        is_vlm (`bool`): The policy takes images.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        critic: Critic | None,
        args,
        accelerator: Accelerator,
        notices: Notices,
        num_generations: int,
        is_vlm: bool,
    ):
        self.policy, self.critic, self.args, self.accelerator = policy, critic, args, accelerator
        self.notices, self.num_generations, self.is_vlm = notices, num_generations, is_vlm
        self.prefix_check = PrefixCheck(args, accelerator, policy)
        self.critic_prefix_check = PrefixCheck(args, accelerator, policy, name="The critic")

    def check_always(self, balances_experts: bool) -> None:
        """Refuses `shared_prefix='always'` where completions cannot be packed, whatever the model."""
        if self.args.shared_prefix != "always":
            return
        if balances_experts:
            raise ValueError(
                "`shared_prefix='always'` runs a prompt once for all its completions, and the loss that balances experts "
                "(`output_router_logits` of the model) counts it once for each. Set `shared_prefix='auto'`."
            )
        reason = self._why_not({})
        if self.args.compact_scoring and reason is not None:
            raise ValueError(
                "`shared_prefix='always'` runs a prompt once for all its completions where they are scored compactly, and "
                f"they are not: {reason}. Set `shared_prefix='auto'`."
            )

    def order(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_length: int,
        batch_size: int | None,
        kwargs: dict,
    ) -> torch.Tensor:
        """Order in which rows are run in chunks: rows of one prompt, then of similar length, are neighbours."""
        rows = torch.arange(len(input_ids), device=input_ids.device)
        is_whole = batch_size is None or batch_size >= len(input_ids)
        if is_whole or not self.args.compact_scoring or self._why_not(kwargs) is not None:
            return rows
        num_prompt = input_ids.size(1) - completion_length
        return by_length(input_ids[:, :num_prompt], attention_mask[:, :num_prompt], attention_mask[:, num_prompt:])

    def _why_not(self, kwargs: dict) -> str | None:
        if isinstance(self.policy, PeftModel) and self.policy.active_peft_config.is_prompt_learning:
            return "a prompt-tuned policy puts virtual tokens before the prompt"
        if self.is_vlm or has_images(kwargs):
            return "the policy takes images"
        return None

    def standing_for(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_length: int,
        batch_size: int | None,
        kwargs: dict,
    ) -> nn.Module | CompactScoring:
        """Returns what is run in place of `model`: [`CompactScoring`], or the model where that cannot be."""
        if not self.args.compact_scoring:
            return model
        reason = self._why_not(kwargs)
        if reason is not None:
            self.notices(
                "compact_scoring",
                reason,
                "each prompt is run once for each of its completions, and padding with them",
                "Use LoRA, or a policy of texts; or set `compact_scoring=False` to be told no more.",
            )
            return model
        unwrapped = self.accelerator.unwrap_model(model)
        ways = {way: CompactScoring(model, unwrapped, completion_length, way) for way in ("rows", "packed", "cheaper")}
        balances_experts = kwargs.get("compute_aux_loss")
        if balances_experts and self.args.shared_prefix == "auto" and self.num_generations > 1:
            self.notices(
                "shared_prefix",
                "the loss that balances experts (`output_router_logits` of the model) counts prompts as often as they "
                "are run",
                "the prompt is run again for each completion",
                "Load the model with `output_router_logits=False`, or set `shared_prefix='never'` to be told no more.",
            )
        if balances_experts or self.num_generations == 1:
            return ways["rows"]
        ids, mask = (x[:batch_size][:NUM_COMPARED] for x in (input_ids, attention_mask))
        return ways["cheaper" if self._packs(ways, ids, mask, completion_length) else "rows"]

    def _packs(
        self, ways: dict[str, CompactScoring], ids: torch.Tensor, mask: torch.Tensor, completion_length: int
    ) -> bool:
        """Returns True if policy and critic give the same for packed completions `(B, L)`, asked until one batch shows it."""
        both = [ways["rows"], ways["packed"]]

        @functools.cache  # asked for until a batch has shown it, and then no more
        def layouts():
            return [way.layout(ids, mask) for way in both]

        def shows():  # where nothing is shared any mask is right
            return len(layouts()[1].inputs["input_ids"]) < len(ids)

        def logps(is_packed):
            labels = ids.masked_fill(mask == 0, -100)
            scored = mask[:, -completion_length:].bool()
            return both[is_packed](ids, mask, labels, fused_lm_head=True).log_probs[scored]

        def critic_states(is_packed):
            layout = layouts()[is_packed]
            return self.critic.trunk_states(layout)[layout.mask]

        with nullcontext() if self.critic is None else self.critic.paused():
            packs = self.prefix_check(logps, shows)
        if packs and self.critic is not None and self.critic.trunk is not None:  # which may be of another kind
            packs = self.critic_prefix_check(critic_states, shows)
        return packs
