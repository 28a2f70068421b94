"""
The rows that a batch of sequences is run in, and where in them each state lies.

[`pack_groups`] is the packer of the package: sequences of a group lie in one row, after a single copy of what they
share (see [`~trl_ext.packing.prefix`]).

TRL runs a row for each completion: its prompt, padded on the left, then the completion, padded on the right. The
[`Layout`] of such a batch may also be packed: completions of one prompt lie in one row, after a single copy of all but
the last token of it. That one, whose state chooses the first token, each has for itself:

    tokens        the film  |  was good <eos>  |  was a bore <eos>
    segments      0   0     |  1   1    1      |  2   2 2    2
    states                     s0  s1   s2        s0  s1 s2  s3

State s_t chooses token t of the completion; the last is what is left when it has ended.
"""

import inspect
from collections import defaultdict
from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import nn

from ..compat import MULTIMODAL_KEYS
from .micro_batches import real_tokens
from .prefix import PADDING, attention_mask, common_prefix_length, pack


@dataclass
class Packed:
    """
    Sequences in rows: those of a group after one copy of what they share, padded on the right.

    Args:
        input_ids, positions, segments (`torch.Tensor` of shape `(R, L)`): The rows, see [`~trl_ext.packing.prefix`].
        origins (`torch.Tensor` of shape `(N,)`): Token t of sequence n, unless shared, is number `origins[n] + t` of
            the R L tokens.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    origins: torch.Tensor


def pack_groups(
    sequences: list[list[int]],
    firsts: list[int],
    groups: list[Hashable],
    pad_token_id: int = 0,
    pad_to_multiple_of: int | None = None,
) -> Packed:
    """
    Packs N sequences, a row for each group.

    Args:
        sequences (`list[list[int]]`): N lists of tokens.
        firsts (`list[int]`): N indices of the first token that a sequence keeps for itself even if others have the
            same, because its state is read.
        groups (`list`): N keys. Sequences of equal keys lie in one row, rows in the order in which keys first come.
        pad_token_id (`int`, *optional*, defaults to `0`): Fills rows up.
        pad_to_multiple_of (`int`, *optional*): Make L a multiple of this.
    """
    members = defaultdict(list)
    for n, group in enumerate(groups):
        members[group].append(n)
    rows, places = [], {}
    for row, numbers in enumerate(members.values()):
        limit = min(firsts[n] for n in numbers)
        length = common_prefix_length([sequences[n][:limit] for n in numbers])
        *columns, starts = pack(sequences[numbers[0]][:length], [sequences[n][length:] for n in numbers])
        rows.append(columns)
        places |= {n: (row, start - length) for n, start in zip(numbers, starts, strict=True)}
    multiple = pad_to_multiple_of or 1
    width = -(-max(len(ids) for ids, *_ in rows) // multiple) * multiple
    padded = (
        torch.tensor([column + [value] * (width - len(column)) for column in columns])
        for columns, value in zip(zip(*rows, strict=True), (pad_token_id, 0, PADDING), strict=True)
    )
    origins = [row * width + origin for row, origin in (places[n] for n in range(len(sequences)))]
    return Packed(*padded, torch.tensor(origins))


def packed_inputs(
    model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    Returns packed rows `(R, L)` in the form that this model takes, whatever wrappers are around it.

    Raises:
        ValueError: for a model that cannot take rows which hold several sequences.
    """
    model = extract_model_from_parallel(model)
    mask = attention_mask(model.config, segments, positions, model.dtype)
    if not takes_positions(model):
        raise ValueError("it takes no positions")
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}


def takes_positions(model: nn.Module) -> bool:
    """Returns True if the forward of a model, or of the one under an adapter, has an argument for positions."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(model.forward).parameters


@dataclass
class Layout:
    """
    The rows that completions are run in, and where their states lie.

    Args:
        inputs (`dict`): The inputs of a model: `input_ids` `(R, L)`, and the tensors that go with them.
        index (`torch.Tensor` of shape `(B, S)`, *optional*): The number of each state among the R L tokens; any number
            for padding. By default states are the S last of each row.
        mask (`torch.Tensor` of shape `(B, S)`, bool): True where there is a state.
        actions (`torch.Tensor` of shape `(B, S)`): The token that follows each state; any after the last.
        segments (`torch.Tensor` of shape `(R, L)`, *optional*): Given for rows that hold several completions.
    """

    inputs: dict[str, torch.Tensor]
    index: torch.Tensor | None
    mask: torch.Tensor
    actions: torch.Tensor
    segments: torch.Tensor | None = None

    def states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Picks the states `(B, S, H)` from those of all tokens, `(R, L, H)`."""
        if self.index is None:
            return hidden_states[:, -self.mask.size(1) :]
        return hidden_states.flatten(0, 1)[self.index.to(hidden_states.device)]

    def inputs_of(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Returns the inputs in the form that this model takes; see [`packed_inputs`] for an error."""
        if self.segments is not None:
            return packed_inputs(model, self.inputs["input_ids"], self.inputs["position_ids"], self.segments)
        return {k: v for k, v in self.inputs.items() if k != "position_ids" or takes_positions(model)}

    def cost(self, hidden_size: int) -> int:
        return forward_cost(*self.inputs["input_ids"].shape, hidden_size)


def forward_cost(num_rows: int, length: int, hidden_size: int) -> int:
    """
    Returns the cost of a layer's forward, but for a factor: 12 H^2 multiplications per token, and 2 L H of attention.
    """
    return num_rows * length * (12 * hidden_size + 2 * length)


def rows_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int) -> Layout:
    """
    Lays out a row for each completion, without columns that are padding in all. Models that take `position_ids` are
    given them: without, those that learned what a position is would count padding on the left.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): Prompts and completions, as TRL pads them.
        num_states (`int`): S, one more than completions have columns.
    """
    used = attention_mask.any(dim=0).nonzero()
    first, end = int(used[0]), int(used[-1]) + 1
    index = torch.arange(input_ids.size(1) - num_states, input_ids.size(1), device=input_ids.device) - first
    index = index.clamp(max=end - first - 1)
    rows = torch.arange(len(input_ids), device=input_ids.device).unsqueeze(1) * (end - first)
    inputs = {"input_ids": input_ids[:, first:end], "attention_mask": attention_mask[:, first:end]}
    inputs["position_ids"] = positions_of(inputs["attention_mask"])
    return Layout(inputs, rows + index, *states_and_actions(input_ids, attention_mask, num_states))


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns the positions `(B, L)` of real tokens; padding, on either side, counts for nothing."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def states_and_actions(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `mask` and the `actions` of a [`Layout`] of the last states of rows."""
    actions = nn.functional.pad(input_ids[:, 1:], (0, 1))
    return attention_mask[:, -num_states:].bool(), actions[:, -num_states:]


def packed_layout(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int) -> Layout:
    """Lays out a row for each prompt, with all its completions after it; the arguments are those of [`rows_layout`]."""
    mask, actions = states_and_actions(input_ids, attention_mask, num_states)
    num_prompt = attention_mask[:, : input_ids.size(1) - num_states + 1].sum(dim=1)
    sequences, lengths = real_tokens(input_ids, attention_mask), num_prompt.tolist()
    prompts = [tuple(tokens[:length]) for tokens, length in zip(sequences, lengths, strict=True)]
    packed = pack_groups(sequences, [max(length - 1, 0) for length in lengths], prompts)
    device = input_ids.device
    first = (packed.origins.to(device) + num_prompt - 1).unsqueeze(1)
    index = torch.where(mask, first + torch.arange(num_states, device=device), first.clamp(min=0))
    inputs = {"input_ids": packed.input_ids.to(device), "position_ids": packed.positions.to(device)}
    return Layout(inputs, index, mask, actions, packed.segments.to(device))


def last_states(input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int, **inputs) -> Layout:
    """Lays out the last states of rows that are run as they are, with the positions that [`rows_layout`] gives them."""
    if not inputs.keys() & {"position_ids", *MULTIMODAL_KEYS}:  # models that see images count positions in their way
        inputs["position_ids"] = positions_of(attention_mask)
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
    return Layout(inputs, None, *states_and_actions(input_ids, attention_mask, num_states))


def compact_layout(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, num_states: int, model: nn.Module, way: str
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """
    Lays out completions with as little padding, and as few copies of a prompt, as can be.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, L)`): Prompts and completions, as TRL pads them.
        num_states (`int`): S, one more than completions have columns.
        model (`nn.Module`): The model that is to be run.
        way (`str`): `"rows"`, one for each completion; `"packed"`, one for each prompt; or the `"cheaper"` of the two.

    Returns:
        `tuple[Layout, dict[str, torch.Tensor]]`: The layout, and its inputs in the form that the model takes.
    """
    if way == "packed":
        layout = packed_layout(input_ids, attention_mask, num_states)
    else:
        layout = rows_layout(input_ids, attention_mask, num_states)
    if way == "cheaper":
        packed, hidden_size = (
            packed_layout(input_ids, attention_mask, num_states),
            model.config.get_text_config().hidden_size,
        )
        layout = packed if packed.cost(hidden_size) < layout.cost(hidden_size) else layout
    return layout, layout.inputs_of(model)


@dataclass
class Pass:
    """
    A forward of the policy over completions that is under way.

    Args:
        num_states (`int`): S, one more than completions have columns.
        layout ([`Layout`], *optional*): The rows that it is of; None if the model is run on completions as they are.
        values (`list`, *optional*): Takes the values of a critic; None if they are not asked for.
        hidden_states (`torch.Tensor`, *optional*): The last ones of the policy's trunk, once it has run.
    """

    num_states: int
    layout: Layout | None
    values: list[torch.Tensor] | None
    hidden_states: torch.Tensor | None = None


CURRENT: ContextVar[Pass | None] = ContextVar("current", default=None)
