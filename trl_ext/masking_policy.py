"""
The masking policy of NLPO: a snapshot of the policy whose nucleus is all that the policy may sample from.

[`snapshot`] copies what trains and shares what is frozen: under LoRA that is one more adapter on the same base, without
it a second model. Masks are never stored: sampling computes one for each next token ([`MaskingProcessor`]), and every
scoring forward computes them again, some tokens at a time ([`MaskedScoring`]).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import LogitsProcessor, PreTrainedModel

from .compat import cache_argument
from .critic import trunk_inputs
from .layouts import current, last_states
from .lm_head import CHUNK_SIZE, base_causal_lm, logits_of
from .masking import masked_log_probs, nucleus


def snapshot(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """A copy of a model, in evaluation mode and without gradients, that shares the weights which do not train."""
    shared = {id(tensor): tensor for tensor in model.buffers()}
    shared |= {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if tensors and next(module.children(), None) is None and all(t is None or id(t) in shared for t in tensors):
            shared[id(module)] = module
    copied = copy.deepcopy(model, shared)
    for module in copied.modules():
        if id(module) not in shared:
            module._forward_hooks.clear()  # the critic's
    return copied.eval().requires_grad_(False)


@torch.no_grad()
def refresh(masking_policy: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Bring a [`snapshot`] up to date with the [`trained_weights`] of its model."""
    for name, weight in weights.items():
        masking_policy.get_parameter(name).copy_(weight)


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a [`snapshot`] of `model` does not share with it."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


class Mask:
    """
    Which tokens the masking policy allows.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The masking policy.
        top_p (`float`), min_tokens_to_keep (`int`), always (`torch.Tensor`): As [`masking.nucleus`] takes them.
        autocast (`Callable`): The context that the policy's forward runs in.
    """

    def __init__(self, model, top_p: float, min_tokens_to_keep: int, always: torch.Tensor, autocast: Callable):
        self.model = model
        self.top_p, self.min_tokens_to_keep, self.always = top_p, min_tokens_to_keep, always
        self.autocast = autocast

    @torch.no_grad()
    def read(self, **inputs):
        """The trunk's output. Not the whole model's: TRL's fused forward is bound to the model it was copied from."""
        with self.autocast():
            return base_causal_lm(self.model).base_model(**inputs)

    @torch.no_grad()
    def allowed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., V)`, bool, of the trunk's last hidden states `(..., H)`."""
        with self.autocast():
            logits = logits_of(base_causal_lm(self.model), hidden_states)
        return nucleus(logits, self.top_p, self.min_tokens_to_keep, self.always.to(logits.device))


class MaskingProcessor(LogitsProcessor):
    """
    Keeps one call of `generate` inside the mask. The masking policy reads along, with a cache of its own.

    Args:
        mask ([`Mask`]): The mask.
        attention_mask (`torch.Tensor` of shape `(B, P)`): Of the prompts, padded on the left.
    """

    def __init__(self, mask: Mask, attention_mask: torch.Tensor):
        self.mask = mask
        self.attention_mask = attention_mask
        self.cache = None
        self.num_read = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        missing = input_ids.size(1) - self.attention_mask.size(1)
        new = self.attention_mask.new_ones(len(input_ids), missing)
        self.attention_mask = torch.cat([self.attention_mask, new], dim=1)
        positions = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        cache_name = cache_argument(base_causal_lm(self.mask.model).base_model)
        outputs = self.mask.read(
            input_ids=input_ids[:, self.num_read :],
            attention_mask=self.attention_mask,
            position_ids=positions[:, self.num_read :],
            use_cache=True,
            **{cache_name: self.cache},
        )
        self.cache, self.num_read = outputs[cache_name], input_ids.size(1)
        return scores.masked_fill(~self.mask.allowed(outputs.last_hidden_state[:, -1]), -torch.inf)


class MaskedScoring:
    """
    Puts log pi~ and its entropy in place of log pi's in a model's scoring forwards (those of TRL's fused LM head), by
    two hooks: the trunk's hidden states are scored again, within the nucleus of the masking policy.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy, or its reference.
        mask ([`Mask`]): The mask.
        temperature (`float`): Logits are divided by it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, mask: Mask, temperature: float):
        self.model, self.mask, self.temperature = base_causal_lm(model), mask, temperature
        self.forced = torch.zeros(2)  # sampled tokens that the mask, when computed again, left out; and all tokens
        self._is_active = False
        self._hidden_states: torch.Tensor | None = None
        self.model.base_model.register_forward_hook(self._keep_hidden_states)
        model.register_forward_hook(self._mask_output, with_kwargs=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Scoring forwards within the context are masked."""
        self._is_active = True
        try:
            yield
        finally:
            self._is_active, self._hidden_states = False, None

    def _keep_hidden_states(self, module, args, output):
        if self._is_active:
            self._hidden_states = output.last_hidden_state

    def _mask_output(self, module, args, kwargs, output):
        if not self._is_active or self._hidden_states is None:
            return None
        inputs, layout = trunk_inputs(kwargs), current()
        if layout is None:  # the model is run on the batch as it is
            layout = last_states(**inputs, num_states=inputs["input_ids"].size(1))
            scored = kwargs["labels"][:, 1:] != -100
        else:
            scored = layout.mask[:, 1:]
            if not scored.any():
                return None
        hidden_states, self._hidden_states = layout.states(self._hidden_states)[:, :-1][scored], None
        tokens = layout.actions[:, :-1][scored]
        masking_states = layout.states(self.mask.read(**inputs, use_cache=False).last_hidden_state)[:, :-1][scored]
        chunks = [x.split(CHUNK_SIZE) for x in (hidden_states, masking_states, tokens)]
        scores = [checkpoint(self._score, *chunk, use_reentrant=False) for chunk in zip(*chunks, strict=True)]
        log_probs, entropy, forced = (torch.cat(parts) for parts in zip(*scores, strict=True))
        self.forced += torch.tensor([forced.sum().item(), len(forced)])
        # A compact output is of what is scored alone
        where = (
            scored if output.log_probs.shape == scored.shape else torch.ones_like(output.log_probs, dtype=torch.bool)
        )
        replaced = {
            "log_probs": torch.zeros_like(output.log_probs).masked_scatter(where, log_probs),
            "entropy": torch.zeros_like(output.log_probs).masked_scatter(where, entropy),
        }
        return type(output)(**{**output, **replaced})

    def _score(self, hidden_states, masking_states, tokens):
        allowed = self.mask.allowed(masking_states)
        forced = ~allowed.gather(1, tokens.unsqueeze(1)).squeeze(1)
        # Kernels of a whole sequence and of one token at a time differ, and one log of 0 would spoil the batch
        allowed.scatter_(1, tokens.unsqueeze(1), True)
        logits = logits_of(self.model, hidden_states) / self.temperature
        return *masked_log_probs(logits, allowed, tokens), forced
