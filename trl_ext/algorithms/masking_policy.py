"""
The masking policy of NLPO: a snapshot of the policy whose nucleus is all that the policy may sample from.

[`snapshot`] copies what trains and shares what is frozen: under LoRA that is one more adapter on the same base, without
it a second model. Masks are never stored: sampling computes one for each next token ([`MaskingProcessor`]), and every
scoring forward computes them again, some tokens at a time ([`MaskedScoring`]).
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import LogitsProcessor, PreTrainedModel

from ..compat import cache_argument, has_states_alone
from ..critic.critic import trunk_inputs
from ..models.lm_head import base_causal_lm, logits_of
from ..token_mdp.nucleus import masked_log_probs, nucleus
from ..training.head_scoring import HeadScoring


logger = get_logger(__name__)

# A state that was spoilt by reading a token shows when the next is read
NUM_STEPS_COMPARED = 3
FUNCTIONS = (FunctionType, MethodType, functools.partial)


def snapshot(model: PreTrainedModel | PeftModel, left_out: Collection[int] = ()) -> PreTrainedModel | PeftModel:
    """
    Returns a copy of a model, in evaluation mode and without gradients, that shares the weights which do not train.

    What was put on the model's instances (a `forward` of their own, hooks) is put on the copy's, and runs on the copy.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        left_out (`Collection[int]`, *optional*): Ids of the handles of hooks that the copy does without.
    """
    copies = {id(tensor): tensor for tensor in model.buffers()}
    copies |= {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if tensors and next(module.children(), None) is None and all(t is None or id(t) in copies for t in tensors):
            copies[id(module)] = module
    copied_modules = [module for module in model.modules() if id(module) not in copies]
    # Copying what functions and hooks are methods of would copy whatever that knows
    functions = [
        (module, name, x) for module in copied_modules for name, x in vars(module).items() if isinstance(x, FUNCTIONS)
    ]
    copies |= {id(function): function for _, _, function in functions}
    for module in copied_modules:
        copies |= {id(hooks): type(hooks)() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    copied = copy.deepcopy(model, copies)  # which adds everything it copies
    for _, _, function in functions:
        copies.pop(id(function), None)
    for module, name, function in functions:
        vars(copies[id(module)])[name] = rebound(function, copies)
    for module in copied_modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            kept = {key: rebound(hook, copies) for key, hook in hooks.items() if key not in left_out}
            copies[id(hooks)].update(kept)
    return copied.eval().requires_grad_(False)


def rebound(function: Any, copies: dict[int, Any], seen: frozenset[int] = frozenset()) -> Any:
    """
    Returns a function that does with copies what this one does with their originals, wherever it knows these from: as
    the object that it is a method of, from its closure, its defaults or its module.

    Args:
        function (`Any`): Whatever is no function, and has no copy, is returned as it is.
        copies (`dict[int, Any]`): By the `id` of the original.
        seen (`frozenset[int]`, *optional*): Functions that know this one: a function may know itself.
    """
    if id(function) in copies:
        return copies[id(function)]
    if not isinstance(function, FUNCTIONS) or id(function) in seen:
        return function

    def again(value: Any) -> Any:
        return rebound(value, copies, seen | {id(function)})

    def cell_again(cell: CellType) -> CellType:
        return cell if cell == CellType() else CellType(again(cell.cell_contents))  # it may be empty

    if isinstance(function, MethodType):
        return MethodType(again(function.__func__), again(function.__self__))
    if isinstance(function, functools.partial):
        keywords = {name: again(value) for name, value in function.keywords.items()}
        return functools.partial(again(function.func), *map(again, function.args), **keywords)
    names = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    names = {name: copies[id(value)] for name, value in names.items() if id(value) in copies}
    result = FunctionType(
        function.__code__,
        function.__globals__ | names if names else function.__globals__,
        function.__name__,
        function.__defaults__ and tuple(map(again, function.__defaults__)),
        function.__closure__ and tuple(map(cell_again, function.__closure__)),
    )
    result.__kwdefaults__ = function.__kwdefaults__ and {k: again(v) for k, v in function.__kwdefaults__.items()}
    return functools.update_wrapper(result, function)


@torch.no_grad()
def refresh(masking_policy: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Brings a [`snapshot`] up to date with the [`trained_weights`] of its model."""
    for name, weight in weights.items():
        masking_policy.get_parameter(name).copy_(weight)


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights of `model` that a [`snapshot`] does not share with it."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


class Mask:
    """
    The tokens that the masking policy allows.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The masking policy.
        top_p (`float`), min_tokens_to_keep (`int`), always (`torch.Tensor`): As [`~trl_ext.token_mdp.nucleus.nucleus`] takes them.
        autocast (`Callable`): The context that the policy's forward runs in.
    """

    def __init__(self, model, top_p: float, min_tokens_to_keep: int, always: torch.Tensor, autocast: Callable):
        self.model = model
        self.top_p, self.min_tokens_to_keep, self.always = top_p, min_tokens_to_keep, always
        self.autocast = autocast
        self.keeps_state: bool | None = None  # true if it may read token by token, once that has been tried
        self.num_compared = 0

    @torch.no_grad()
    def read(self, **inputs):
        """Runs the trunk, and returns its output."""
        with self.autocast():
            return base_causal_lm(self.model).base_model(**inputs)

    @torch.no_grad()
    def allowed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Marks the tokens that are allowed, `(..., V)` bool, after the trunk's last hidden states `(..., H)`."""
        with self.autocast():
            logits = logits_of(base_causal_lm(self.model), hidden_states)
        return nucleus(logits, self.top_p, self.min_tokens_to_keep, self.always.to(logits.device))


class MaskingProcessor(LogitsProcessor):
    """
    Keeps one call of `generate` inside the mask. The masking policy reads along, with a cache of its own; where a model
    has none, or goes on from it otherwise than it read the whole, it reads all tokens again for each.

    Args:
        mask ([`Mask`]): The mask.
        attention_mask (`torch.Tensor` of shape `(B, P)`): Mask of the prompts, padded on the left.
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
        if self.mask.keeps_state is False:
            state = self._state(input_ids)
        else:
            state = self._next_state(input_ids)
        return scores.masked_fill(~self.mask.allowed(state), -torch.inf)

    def _state(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the last hidden state of a whole text, `(B, H)`."""
        return self._read(input_ids, 0, use_cache=False).last_hidden_state[:, -1]

    def _next_state(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the last hidden state, `(B, H)`, from the tokens that are new since the last call; at first from the whole."""
        name = cache_argument(base_causal_lm(self.mask.model).base_model)
        if name is None:
            return self._without_cache(input_ids, "takes no cache of one")
        outputs = self._read(input_ids, self.num_read, use_cache=True, **{name: self.cache})
        self.cache = outputs.get(name)
        if self.cache is None:
            return self._without_cache(input_ids, "returns no cache")
        state, goes_on = outputs.last_hidden_state[:, -1], self.num_read > 0
        self.num_read = input_ids.size(1)
        if self.mask.keeps_state is None and goes_on:
            whole = self._state(input_ids)
            difference = ((state - whole).abs().max() / whole.abs().max()).item()
            if not difference <= (1e-3 if state.dtype == torch.float32 else 5e-2):
                return self._without_cache(
                    input_ids, f"goes on from its cache to states {difference:.2g} of their size off"
                )
            self.mask.num_compared += 1
            if self.mask.num_compared == NUM_STEPS_COMPARED:
                self.mask.keeps_state = True
        return state

    def _without_cache(self, input_ids: torch.Tensor, reason: str) -> torch.Tensor:
        logger.warning(
            f"NLPO's masking policy reads the whole text again for each token, since {type(self.mask.model).__name__} "
            f"{reason}: sampling takes time quadratic in the length. A shorter `max_completion_length`, or a model "
            "with attention alone, is faster."
        )
        self.mask.keeps_state = False
        return self._state(input_ids)

    def _read(self, input_ids: torch.Tensor, start: int, **kwargs):
        positions = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        # State-space models take the mask of what they are given, those with attention that of all that is seen
        is_of_states = has_states_alone(base_causal_lm(self.mask.model).base_model)
        return self.mask.read(
            input_ids=input_ids[:, start:],
            attention_mask=self.attention_mask[:, start:] if is_of_states else self.attention_mask,
            position_ids=positions[:, start:],
            **kwargs,
        )


class MaskedScoring(HeadScoring):
    """
    Puts log pi~ and its entropy in place of log pi's in a model's scoring forwards: the trunk's hidden states are scored
    again, within the nucleus of the masking policy.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy, or its reference.
        mask ([`Mask`]): The mask.
        temperature (`float`): Logits are divided by it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, mask: Mask, temperature: float):
        super().__init__(model, temperature)
        self._is_active = False
        self.mask = mask
        self.seen = torch.zeros(
            3
        )  # sampled tokens that the mask, computed again, left out; pi's mass inside; all tokens

    @contextmanager
    def active(self) -> Iterator[None]:
        """Masks the scoring forwards within the context."""
        self._is_active = True
        try:
            yield
        finally:
            self._is_active, self._hidden_states = False, None

    def _further_columns(self, kwargs, before_tokens):
        return [before_tokens(self.mask.read(**trunk_inputs(kwargs), use_cache=False).last_hidden_state)]

    def _logps(self, hidden_states, masking_states, tokens):
        allowed = self.mask.allowed(masking_states)
        forced = ~allowed.gather(1, tokens.unsqueeze(1)).squeeze(1)
        # Kernels of a whole sequence and of one token at a time differ, and one log of 0 would spoil the batch
        allowed.scatter_(1, tokens.unsqueeze(1), True)
        logits = logits_of(self.model, hidden_states) / self.temperature
        inside = torch.where(allowed, logits.detach().float().softmax(dim=-1), 0).sum(dim=-1)
        return *masked_log_probs(logits, allowed, tokens), forced, inside

    def _keep_further(self, forced, inside):
        self.seen += torch.tensor([forced.sum().item(), inside.sum().item(), len(forced)])

    def metrics(self) -> dict[str, float]:
        """Returns the means over the tokens that were scored since this was last asked; none of no token."""
        *sums, count = self.seen.tolist()
        self.seen.zero_()
        return {f"mask/{name}": x / count for name, x in zip(("forced", "inside"), sums, strict=True) if count > 0}
