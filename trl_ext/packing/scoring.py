"""
TRL's scoring forward (log-probabilities and entropies of completions) of no more than is needed: prompts that several
completions share are run once, and the LM head only where a token is scored.
"""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..compat import FusedCausalLMOutput
from ..models.lm_head import base_causal_lm
from .layout import Layout, packed_layout, rows_layout, using


class CompactScoring:
    """
    Stands for a model in TRL's `_get_per_token_logps_and_entropies`.

    Args:
        model (`nn.Module`): The model, perhaps in a distributed wrapper.
        unwrapped (`PreTrainedModel` or `PeftModel`): The same without it.
        completion_length (`int`): T, of the batches that it will be given.
        way (`str`): `"rows"`, one for each completion; `"packed"`, one for each prompt; or `"cheaper"`.
    """

    def __init__(
        self,
        model: nn.Module,
        unwrapped: PreTrainedModel | PeftModel,
        completion_length: int,
        way: str,
    ):
        self.model, self.base = model, base_causal_lm(unwrapped)
        self.num_states = completion_length + 1
        self.way = way

    def layout(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Layout:
        if self.way != "packed":
            rows = rows_layout(input_ids, attention_mask, self.num_states)
        if self.way == "rows":
            return rows
        packed = packed_layout(input_ids, attention_mask, self.num_states)
        if self.way == "packed":
            return packed
        hidden_size = self.base.config.get_text_config().hidden_size
        return packed if packed.cost(hidden_size) < rows.cost(hidden_size) else rows

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **kwargs
    ) -> FusedCausalLMOutput:
        layout = self.layout(input_ids, attention_mask)
        labels = labels[:, 1 - self.num_states :]
        scored = labels != -100
        index = layout.index[:, :-1][scored]
        if len(index) == 0:  # the output stays connected to the model
            index, tokens = layout.index[:1, 0], layout.actions[:1, 0]
        else:
            tokens = labels[scored]

        def keep_scored(module, args, output):
            states = output.last_hidden_state.flatten(0, 1)
            output.last_hidden_state = states[index.to(states.device)].unsqueeze(0)
            return output

        hook = self.base.base_model.register_forward_hook(keep_scored)  # after the critic's, which needs all states
        try:
            with using(layout):
                inputs = layout.inputs_of(self.base)
                outputs = self.model(**inputs, shift_labels=tokens.unsqueeze(0), **kwargs)
        finally:
            hook.remove()

        def in_rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.new_zeros(scored.shape).masked_scatter(scored, values)

        outputs.log_probs, outputs.entropy = in_rows(outputs.log_probs), in_rows(outputs.entropy)
        return outputs
