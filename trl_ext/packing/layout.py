"""
How the completions of a batch are run through a model, and where their states then lie.

TRL runs a row for each completion: its prompt, padded on the left, then the completion, padded on the right. The
[`Layout`] of such a batch may also be shorter: completions of one prompt lie in one row, after a single copy of it (see
[`shared_prefix`]), all but whose last token they share. That one, whose state chooses the first token, each has for
itself:

    tokens        the film  |  was good <eos>  |  was a bore <eos>
    segments      0   0     |  1   1    1      |  2   2 2    2
    states                     s0  s1   s2        s0  s1 s2  s3

State s_t chooses token t of the completion; the last is what is left when it has ended.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..compat import MULTIMODAL_KEYS
from .prefix import PADDING, attention_mask, pack


@dataclass
class Layout:
    """
    Args:
        inputs (`dict`): What a model is run on: `input_ids` `(R, L)`, and what goes with them.
        index (`torch.Tensor` of shape `(B, S)`, *optional*): Where in the R L positions each state lies; anywhere for
            padding. By default the S last of each row.
        mask (`torch.Tensor` of shape `(B, S)`, bool): Which states there are.
        actions (`torch.Tensor` of shape `(B, S)`): The token that follows each state; any after the last.
        segments (`torch.Tensor` of shape `(R, L)`, *optional*): Of rows that hold several completions.
    """

    inputs: dict[str, torch.Tensor]
    index: torch.Tensor | None
    mask: torch.Tensor
    actions: torch.Tensor
    segments: torch.Tensor | None = None

    def states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(R, L, H)` -> `(B, S, H)`."""
        if self.index is None:
            return hidden_states[:, -self.mask.size(1) :]
        return hidden_states.flatten(0, 1)[self.index.to(hidden_states.device)]

    def inputs_of(self, model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
        """
        The inputs in the form that this model takes.

        Raises:
            ValueError: where it cannot take rows that hold several completions.
        """
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        has_positions = "position_ids" in inspect.signature(model.forward).parameters
        if self.segments is None:
            return {k: v for k, v in self.inputs.items() if has_positions or k != "position_ids"}
        if not has_positions:
            raise ValueError("it takes no positions")
        mask = attention_mask(model.config, self.segments, self.inputs["position_ids"], model.dtype)
        return self.inputs | {"attention_mask": mask}

    def cost(self, hidden_size: int) -> int:
        return forward_cost(*self.inputs["input_ids"].shape, hidden_size)


def forward_cost(num_rows: int, length: int, hidden_size: int) -> int:
    """Of a layer's forward, but for a factor: 12 H^2 multiplications per position, and 2 L H of attention."""
    return num_rows * length * (12 * hidden_size + 2 * length)


def rows_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int) -> Layout:
    """
    A row for each completion, without columns that are padding in all. With `position_ids`, where a model takes them:
    without, padding on the left counts for those that learned what a position is.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): Prompts and completions, as TRL pads them.
        num_states (`int`): S, one more than completions have columns.
    """
    mask = attention_mask[:, -num_states:].bool()
    actions = nn.functional.pad(input_ids[:, 1:], (0, 1))[:, -num_states:]
    used = attention_mask.any(dim=0).nonzero()
    first, end = int(used[0]), int(used[-1]) + 1
    index = torch.arange(input_ids.size(1) - num_states, input_ids.size(1), device=input_ids.device) - first
    index = index.clamp(max=end - first - 1)
    rows = torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1) * (end - first)
    inputs = {"input_ids": input_ids[:, first:end], "attention_mask": attention_mask[:, first:end]}
    inputs["position_ids"] = positions_of(inputs["attention_mask"])
    return Layout(inputs, rows + index, mask, actions)


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """`(B, L)`: the position of each real token; padding, on either side, counts for nothing."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def packed_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int) -> Layout:
    """
    A row for each prompt, with all its completions after it; the arguments of [`rows_layout`].
    """
    mask = attention_mask[:, -num_states:].bool()
    actions = nn.functional.pad(input_ids[:, 1:], (0, 1))[:, -num_states:]
    num_prompt = input_ids.size(1) - num_states + 1
    tokens = [
        [token for token, is_there in zip(ids, there, strict=True) if is_there]
        for ids, there in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ]
    lengths = attention_mask[:, :num_prompt].sum(dim=1).tolist()
    groups = defaultdict(list)
    for row, length in enumerate(lengths):
        groups[tuple(tokens[row][:length])].append(row)

    packed, starts = [], [None] * len(tokens)
    for number, (prompt, rows) in enumerate(groups.items()):
        suffixes = [tokens[row][len(prompt) - 1 :] for row in rows]
        *columns, suffix_starts = pack(list(prompt[:-1]), suffixes)
        packed.append(columns)
        for row, start in zip(rows, suffix_starts, strict=True):
            starts[row] = (number, start)
    width = max(len(ids) for ids, _, _ in packed)
    device = input_ids.device

    def padded(column: int, value: int) -> torch.Tensor:
        return torch.tensor([row[column] + [value] * (width - len(row[column])) for row in packed], device=device)

    first = torch.tensor([number * width + start for number, start in starts], device=device).unsqueeze(1)
    steps = torch.arange(num_states, device=device).unsqueeze(0)
    index = torch.where(mask, first + steps, first)
    inputs = {"input_ids": padded(0, 0), "position_ids": padded(1, 0)}
    return Layout(inputs, index, mask, actions, segments=padded(2, PADDING))


def last_states(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int, **inputs) -> Layout:
    """The last states of rows that are run as they are, with the positions that [`rows_layout`] gives them."""
    if not inputs.keys() & {"position_ids", *MULTIMODAL_KEYS}:  # models that see images count positions in their way
        inputs["position_ids"] = positions_of(attention_mask)
    actions = nn.functional.pad(input_ids[:, 1:], (0, 1))[:, -num_states:]
    mask = attention_mask[:, -num_states:].bool()
    return Layout({"input_ids": input_ids, "attention_mask": attention_mask, **inputs}, None, mask, actions)


_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def using(layout: Layout) -> Iterator[None]:
    """Forwards within the context are of what `layout` says."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def current() -> Layout | None:
    """The layout of the forward under way, if it is not that of its own inputs."""
    return _LAYOUT.get()
