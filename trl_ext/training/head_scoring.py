"""
Log-probabilities by the model's own LM head, where TRL's fused one gives others.

TRL's scoring forward runs the trunk and multiplies by the head's weight; what a family does to its logits besides, it
knows by the names in some configs. [`score_as_the_model_does`] asks the model itself, once, and [`HeadScoring`] is the remedy.
"""

import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..compat import FusedCausalLMOutput
from ..models.lm_head import CHUNK_SIZE, base_causal_lm, logits_of
from ..packing.layout import CURRENT
from ..token_mdp.nucleus import masked_log_probs


logger = get_logger(__name__)

# Any will do, if there is no better
COMPARED_TEXT = "The film was a good one, and the plot was not."
NUM_COMPARED_TOKENS = 64
# Nats by which log-probabilities may differ: kernels do, and half precision rounds logits
TOLERANCE, TOLERANCE_HALF = 1e-2, 0.25


class HeadScoring:
    """
    Puts log-probabilities and entropies by [`logits_of`] in place of those that TRL's fused LM head gives, by two hooks.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        temperature (`float`): Logits are divided by it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, temperature: float):
        self.model, self.temperature = base_causal_lm(model), temperature
        self._is_active = True
        self._hidden_states: torch.Tensor | None = None
        self.hooks = [
            self.model.base_model.register_forward_hook(self._keep_hidden_states),
            model.register_forward_hook(self._rescore, with_kwargs=True),
        ]

    def _keep_hidden_states(self, module, args, output):
        if self._is_active:
            self._hidden_states = output.last_hidden_state

    def _rescore(self, module, args, kwargs, output):
        hidden_states, self._hidden_states = self._hidden_states, None
        if hidden_states is None or not isinstance(output, FusedCausalLMOutput):
            return None
        current = CURRENT.get()
        layout = None if current is None else current.layout
        if layout is None:  # the model is run on the batch as it is, perhaps after virtual tokens
            labels = kwargs["labels"]
            scored = labels[:, 1:] != -100
            tokens = labels[:, 1:][scored]
        else:
            scored = layout.mask[:, 1:]
            tokens = layout.actions[:, :-1][scored]
        if not scored.any():
            return None

        def before_tokens(states: torch.Tensor) -> torch.Tensor:
            states = states[:, -labels.size(1) :] if layout is None else layout.states(states)
            return states[:, :-1][scored]

        columns = [before_tokens(hidden_states), *self._further_columns(kwargs, before_tokens), tokens]
        chunks = zip(*(column.split(CHUNK_SIZE) for column in columns), strict=True)
        of_chunks = [checkpoint(self._logps, *chunk, use_reentrant=False) for chunk in chunks]
        logps, entropy, *further = (torch.cat(parts) for parts in zip(*of_chunks, strict=True))
        self._keep_further(*further)
        where = torch.ones_like(output.log_probs, dtype=torch.bool)  # a compact output is of what is scored alone
        if where.numel() != len(tokens):
            where = nn.functional.pad(scored, (where.size(1) - scored.size(1), 0))
        replaced = {"log_probs": torch.zeros_like(output.log_probs).masked_scatter(where, logps)}
        if output.entropy is not None:
            replaced["entropy"] = torch.zeros_like(output.log_probs).masked_scatter(where, entropy)
        return type(output)(**{**output, **replaced})

    def _further_columns(self, kwargs: dict, before_tokens) -> list[torch.Tensor]:
        """Returns the columns that `_logps` takes between hidden states and tokens, a row for each token."""
        return []

    def _logps(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns log-probabilities, entropies, and the columns that `_keep_further` takes, a row for each token."""
        logits = logits_of(self.model, hidden_states) / self.temperature
        return masked_log_probs(logits, torch.ones_like(logits, dtype=torch.bool), tokens)

    def _keep_further(self, *further: torch.Tensor) -> None:
        """Takes the columns that `_logps` returns beside log-probabilities and entropies."""


@torch.no_grad()
def score_as_the_model_does(
    model: nn.Module,
    models: list[PreTrainedModel | PeftModel],
    ids: list[int],
    temperature: float = 1.0,
    is_half: bool = False,
    is_sharded: bool = False,
    reads_head: bool = False,
) -> list[HeadScoring]:
    """
    Compares log-probabilities by TRL's fused LM head, and by ours, with those of the model's own logits; [`HeadScoring`]
    where the fused one is wrong.

    Args:
        model (`nn.Module`): The model with TRL's fused LM head, perhaps in a distributed wrapper.
        models (`list[PreTrainedModel | PeftModel]`): The same without it, and its reference if that is another.
        ids (`list[int]`): A text.
        temperature (`float`, *optional*, defaults to `1.0`): The temperature of the fused LM head.
        is_half (`bool`, *optional*, defaults to `False`): The model computes in half precision.
        is_sharded (`bool`, *optional*, defaults to `False`): Its weights are split over processes.
        reads_head (`bool`, *optional*, defaults to `False`): The trainer uses [`logits_of`] in any case.

    Returns:
        `list[HeadScoring]`: None where the fused one is right.

    Raises:
        ValueError: where the model's own logits are made in a way that no scoring here follows.
    """
    policy, input_ids = models[0], torch.tensor([ids[:NUM_COMPARED_TOKENS]], device=models[0].device)
    base, tokens = base_causal_lm(policy), input_ids[0, 1:]
    if len(tokens) == 0:
        return []
    for scored in models:
        remove_head_scoring(scored)  # an earlier trainer's
    fused, logits, hidden_states = both_ways(model, base, input_ids)
    plain, name = logps_of(logits, tokens, temperature), type(base).__name__
    tolerance = TOLERANCE_HALF if is_half else TOLERANCE
    error_of_fused = (fused - plain).abs().max().item()
    is_right = error_of_fused <= tolerance
    if is_right and not reads_head:
        return []
    if is_sharded:
        raise ValueError(
            f"TRL's fused LM head leaves out something that {name} does to its logits: its log-probabilities are off by "
            f"{error_of_fused:.2g} nats, and where weights are sharded there is no other way to score. Use DDP, or a "
            "model whose head TRL knows."
        )
    error = (logps_of(logits_of(base, hidden_states), tokens, temperature) - plain).abs().max().item()
    if not error <= tolerance:
        raise ValueError(
            f"Log-probabilities computed from the hidden states of {name} are off by {error:.2g} nats from those of its "
            "own logits: something is done to them that the model's class does not do. Remove what was put on the model "
            "(a `forward` of its own, a hook that changes logits), or use another model."
        )
    if is_right:
        return []
    logger.warning(
        f"TRL's fused LM head leaves out something that {name} does to its logits: its log-probabilities are off by "
        f"{error_of_fused:.2g} nats. The model's own head is run in its place, at the cost of a second pass through it. "
        "With a model whose head TRL knows there is one."
    )
    return [HeadScoring(scored, temperature) for scored in models]


def both_ways(model: nn.Module, base: PreTrainedModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Runs a text `(1, L)` with TRL's fused LM head and without.

    Returns:
        `tuple[torch.Tensor, ...]`: Log-probabilities `(L-1,)` of its tokens by the fused head, and the logits
        `(L-1, V)` and hidden states `(L-1, H)` before them.
    """
    num_tokens, states = input_ids.size(1) - 1, []
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    hook = base.base_model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    was_training = model.training
    model.eval()
    try:
        fused = model(**inputs, labels=input_ids, fused_lm_head=True).log_probs[0, -num_tokens:]
        logits = model(**inputs).logits[0, -num_tokens - 1 : -1]
    finally:
        model.train(was_training)
        hook.remove()
    return fused, logits, states[-1][0, -num_tokens - 1 : -1]


def logps_of(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns log-probabilities `(L,)` of `tokens` `(L,)` by logits `(L, V)`."""
    return (logits.float() / temperature).log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)


def remove_head_scoring(model: PreTrainedModel | PeftModel) -> None:
    """Undoes every [`HeadScoring`] of a model, NLPO's among them."""
    for module in (model, base_causal_lm(model).base_model):
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), HeadScoring):
                module._forward_hooks.pop(key)
