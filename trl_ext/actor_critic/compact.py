"""
TRL's scoring forward (log-probabilities and entropies of completions), made compact: padding and repeated prompts are
left out, and the LM head runs only where a token is scored.
"""

import functools

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..compat import FusedCausalLMOutput
from ..critic.critic import Critic
from ..models.lm_head import base_causal_lm
from ..packing.check import NUM_COMPARED, PrefixCheck
from ..packing.layout import CURRENT, Pass, compact_layout, packed_layout, rows_layout
from ..packing.micro_batches import by_length
from .notices import Notices


class CompactForwards:
    """
    Stands for a model in TRL's `_get_per_token_logps_and_entropies`.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): The policy, before any distributed wrapper.
        critic ([`Critic`], *optional*): Its critic, which runs with it.
        args ([`ActorCriticConfig`]): The configuration.
        accelerator (`Accelerator`): Knows the processes.
        notices ([`Notices`]): Takes warnings of options that are on and cannot be used.
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
        self.base, self.notices, self.num_generations = base_causal_lm(policy), notices, num_generations
        self.prefix_check = PrefixCheck(args, accelerator, policy)
        self.critic_prefix_check = PrefixCheck(args, accelerator, policy, name="The critic")
        self.reason = None  # for not leaving anything out
        if isinstance(policy, PeftModel) and policy.active_peft_config.is_prompt_learning:
            self.reason = "a prompt-tuned policy puts virtual tokens before the prompt"
        elif is_vlm:
            self.reason = "the policy takes images"

    def check_always(self, balances_experts: bool) -> None:
        """Refuses `shared_prefix='always'` where completions cannot be packed, whatever the model."""
        if self.args.shared_prefix != "always":
            return
        if balances_experts:
            raise ValueError(
                "`shared_prefix='always'` runs a prompt once for all its completions, and the loss that balances experts "
                "(`output_router_logits` of the model) counts it once for each. Set `shared_prefix='auto'`."
            )
        if self.args.compact_scoring and self.reason is not None:
            raise ValueError(
                "`shared_prefix='always'` runs a prompt once for all its completions where they are scored compactly, and "
                f"they are not: {self.reason}. Set `shared_prefix='auto'`."
            )

    def order(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """
        Orders rows that are run in chunks: rows of one prompt, then of similar length, are neighbours.

        Args:
            input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): Prompts and completions, as TRL pads them.
            num_tokens (`int`): T, the columns of completions.
        """
        if not self.args.compact_scoring or self.reason is not None:
            return torch.arange(len(input_ids), device=input_ids.device)
        num_prompt = input_ids.size(1) - num_tokens
        return by_length(input_ids[:, :num_prompt], attention_mask[:, :num_prompt], attention_mask[:, num_prompt:])

    def __call__(
        self,
        model: nn.Module,
        num_tokens: int,
        values: list[torch.Tensor] | None,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        **kwargs,
    ) -> FusedCausalLMOutput:
        """
        Runs a model, perhaps in a distributed wrapper, as TRL's pass does.

        Args:
            model (`nn.Module`): The policy or its reference.
            num_tokens (`int`): T, the columns of completions.
            values (`list`, *optional*): Takes the critic's values `(B, T + 1, ...)`; None if they are not asked for.
            input_ids, attention_mask, labels (`torch.Tensor` of shape `(B, L)`): The rows that TRL runs.
            kwargs: TRL's other arguments of the model.
        """
        is_policy = self.accelerator.unwrap_model(model) is self.policy
        base = self.base if is_policy else base_causal_lm(self.accelerator.unwrap_model(model))
        if not self.args.compact_scoring or self.reason is not None:
            if self.args.compact_scoring:
                self.notices(
                    "compact_scoring",
                    self.reason,
                    "each prompt is run once for each of its completions, and padding with them",
                    "Use LoRA, or a policy of texts; or set `compact_scoring=False` to be told no more.",
                )
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            return run(model, base, Pass(num_tokens + 1, None, values), None, **inputs, **kwargs)
        packs = self._packs(model, base, num_tokens, input_ids, attention_mask, **kwargs)
        way, labels = "cheaper" if packs else "rows", labels[:, -num_tokens:]
        return run_compactly(model, base, way, values, input_ids, attention_mask, labels, **kwargs)

    def _packs(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        num_tokens: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        **kwargs,
    ) -> bool:
        """Returns True if policy and critic give the same for packed completions, asked until one batch has shown it."""
        if self.num_generations == 1:
            return False
        if kwargs.get("output_router_logits"):  # of a mixture of experts, which is balanced over what it is run on
            if self.args.shared_prefix == "auto":
                self.notices(
                    "shared_prefix",
                    "the loss that balances experts (`output_router_logits` of the model) counts prompts as often as "
                    "they are run",
                    "the prompt is run again for each completion",
                    "Load the model with `output_router_logits=False`, or set `shared_prefix='never'` to be told no "
                    "more.",
                )
            return False
        ids, mask = input_ids[:NUM_COMPARED], attention_mask[:NUM_COMPARED]

        @functools.cache  # asked for until a batch has shown it, and then no more
        def layouts():
            return [lay_out(ids, mask, num_tokens + 1) for lay_out in (rows_layout, packed_layout)]

        def shows():  # where nothing is shared any mask is right
            return len(layouts()[1].inputs["input_ids"]) < len(ids)

        def logps(is_packed):
            scored = mask[:, -num_tokens:].bool()
            labels = ids.masked_fill(mask == 0, -100)[:, -num_tokens:]
            way = "packed" if is_packed else "rows"
            return run_compactly(model, base, way, None, ids, mask, labels, fused_lm_head=True).log_probs[scored]

        def critic_states(is_packed):
            layout = layouts()[is_packed]
            return self.critic.trunk_states(layout)[layout.mask]

        packs = self.prefix_check(logps, shows)
        if packs and self.critic is not None and self.critic.trunk is not None:  # which may be of another kind
            packs = self.critic_prefix_check(critic_states, shows)
        return packs


def run_compactly(
    model: nn.Module,
    base: PreTrainedModel,
    way: str,
    values: list[torch.Tensor] | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **kwargs,
) -> FusedCausalLMOutput:
    """
    Runs a model in rows that [`~trl_ext.packing.layout.compact_layout`] lays out, and its LM head where a token is scored.

    Args:
        model (`nn.Module`), base (`PreTrainedModel`): The model, and what is in its wrappers.
        way (`str`), input_ids, attention_mask: The arguments of the layout.
        values (`list`, *optional*): Takes the values of a critic.
        labels (`torch.Tensor` of shape `(B, T)`): The tokens of completions; -100 where none is scored.
        kwargs: Other arguments of the model.

    Returns:
        `FusedCausalLMOutput`: With `log_probs` and `entropy` of shape `(B, T)`.
    """
    num_states = labels.size(1) + 1
    layout, inputs = compact_layout(input_ids, attention_mask, num_states, base, way)
    scored = labels != -100
    index = layout.index[:, :-1][scored]
    if len(index) == 0:  # the output stays connected to the model
        index, tokens = layout.index[:1, 0], layout.actions[:1, 0]
    else:
        tokens = labels[scored]
    current = Pass(num_states, layout, values)
    outputs = run(model, base, current, index, **inputs, shift_labels=tokens.unsqueeze(0), **kwargs)

    def in_rows(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.new_zeros(scored.shape).masked_scatter(scored, x)

    outputs.log_probs, outputs.entropy = in_rows(outputs.log_probs), in_rows(outputs.entropy)
    return outputs


def run(model: nn.Module, base: PreTrainedModel, current: Pass, index: torch.Tensor | None, **inputs):
    """Runs a model as the pass `current`, and its LM head on the states `index` `(N,)` alone, if given."""

    def keep_states(module, args, output):
        if current.values is not None:
            current.hidden_states = output.last_hidden_state
        if index is not None:
            states = output.last_hidden_state.flatten(0, 1)
            output.last_hidden_state = states[index.to(states.device)].unsqueeze(0)
        return output

    hook, token = base.base_model.register_forward_hook(keep_states), CURRENT.set(current)
    try:
        return model(**inputs)
    finally:
        CURRENT.reset(token)
        hook.remove()
