"""
The micro-batches of an optimizer step, of completions alike in length, each cut to its own longest.

TRL pads a rollout to its longest completion and shuffles it into micro-batches: where lengths vary, most of what is
computed is padding. Which completions share an optimizer step is left as it is, so the step is the same.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from ..compat import MULTIMODAL_KEYS


Batch = dict[str, Any]  # of tensors whose first dimension is the completions', scalars, lists and None

PROMPT_TENSORS = ("prompt_ids", "prompt_mask")


class LengthBatches:
    """
    Arranges the micro-batches of a rollout by length.

    Args:
        args ([`ActorCriticConfig`]): The configuration.
        notices (`Callable`): Takes note of options that are on and cannot be used.
        pad_to_multiple_of (`int`, *optional*): What TRL pads lengths to.
        loss_depends_on_micro_batches (`bool`): TRL takes means, or quantiles, over the tokens of a micro-batch.
    """

    def __init__(self, args, notices: Callable, pad_to_multiple_of: int | None, loss_depends_on_micro_batches: bool):
        self.args, self.notices, self.pad_to_multiple_of = args, notices, pad_to_multiple_of
        self.loss_depends_on_micro_batches = loss_depends_on_micro_batches

    def arranged(self, batches: list[Batch]) -> list[Batch]:
        """Returns the micro-batches of a rollout sorted within each optimizer step, each cut to its own longest."""
        if not self.args.length_batches:
            return batches
        window, num_batches = self.args.gradient_accumulation_steps, len(batches)
        if self.pad_to_multiple_of is not None or has_images(batches[0]):
            length = f"`pad_to_multiple_of={self.pad_to_multiple_of}` says how long batches are"
            self._say_not_arranged("batches hold images" if has_images(batches[0]) else length)
            return batches
        reason = None
        if window % num_batches != 0 and num_batches % window != 0:
            reason = (
                f"optimizer steps of {window} micro-batches and rollouts of {num_batches} do not divide each other"
            )
        elif self.loss_depends_on_micro_batches:
            reason = "the loss takes means, or quantiles, over the tokens of a micro-batch, which would be others"
        if reason is None:
            return sort_windows(batches, window, self.args.balance_tokens)
        if min(window, num_batches) > 1:
            self._say_not_arranged(reason)
        return [trim(batch) for batch in batches]

    def _say_not_arranged(self, reason: str) -> None:
        for option in ("length_batches", *(["balance_tokens"] if self.args.balance_tokens else [])):
            self.notices(
                option,
                reason,
                "completions of different lengths lie in one micro-batch, and more of what is computed is padding",
                f"Change that, or set `{option}=False` to be told no more.",
            )


def sort_windows(batches: list[Batch], window: int, balance_tokens: bool = False) -> list[Batch]:
    """
    Sorts completions by length within every `window` micro-batches, the longest first, and cuts each micro-batch by
    [`trim`].

    Args:
        batches (`list`): The micro-batches of a rollout, in the order that they are trained on, equally many
            completions in each.
        window (`int`): The number of them in an optimizer step; it divides their number, or is a multiple of it.
        balance_tokens (`bool`, *optional*, defaults to `False`): Put about as many tokens into each micro-batch in
            place of as many completions.
    """
    window = min(window, len(batches))
    result = []
    for start in range(0, len(batches), window):
        joined = join(batches[start : start + window])
        order = by_length(joined["prompt_ids"], joined["prompt_mask"], joined["completion_mask"])
        if balance_tokens:
            lengths = joined["prompt_mask"].sum(dim=1) + joined["completion_mask"].sum(dim=1)
            parts = order.split(sizes_by_tokens(lengths[order].tolist(), window))
        else:
            parts = order.chunk(window)
        result += [trim(select(joined, rows)) for rows in parts]
    return result


def sizes_by_tokens(lengths: list[int], num_parts: int) -> list[int]:
    """
    Cuts sequences of these lengths, in this order, into `num_parts` parts, so that the largest part is as small as it
    can be, and returns the number of sequences in each. A part's size is that of its sequences padded to the longest of
    them; no part is empty.
    """

    def filled(budget: int) -> list[int]:
        sizes, longest = [0], 0
        for length in lengths:
            longest = max(longest, length)
            if sizes[-1] > 0 and (sizes[-1] + 1) * longest > budget:
                sizes, longest = [*sizes, 0], length
            sizes[-1] += 1
        return sizes

    low, high = max(lengths), max(lengths) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(filled(middle)) <= num_parts else (middle + 1, high)
    sizes = filled(low)
    while len(sizes) < num_parts:  # what is left over costs nothing to split
        i = sizes.index(max(sizes))
        sizes[i : i + 1] = [sizes[i] - sizes[i] // 2, sizes[i] // 2]
    return sizes


def by_length(prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """
    Orders rows `(B,)` by their number of tokens, the most first; rows of equal prompts stay together, in the place of
    the longest of them, so that they can be run after a single copy of the prompt.
    """
    lengths = (prompt_mask.sum(dim=1) + completion_mask.sum(dim=1)).tolist()
    prompts = [tuple(prompt) for prompt in real_tokens(prompt_ids, prompt_mask)]
    return torch.tensor(grouped_by_length(prompts, lengths), device=prompt_ids.device)


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[list[int]]:
    """Returns the tokens of each row `(B, L)` without its padding."""
    return [
        [token for token, is_there in zip(ids, there, strict=True) if is_there]
        for ids, there in zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
    ]


def grouped_by_length(prompts: list[Hashable], lengths: list[int]) -> list[int]:
    """Orders rows by length, the longest first, those of equal prompts in the place of the longest of them."""
    groups = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt].append(row)
    sorted_groups = [sorted(rows, key=lambda row: -lengths[row]) for rows in groups.values()]
    sorted_groups.sort(key=lambda rows: -lengths[rows[0]])
    return [row for rows in sorted_groups for row in rows]


def join(batches: list[Batch]) -> Batch:
    """Returns one batch of the rows of several, which have one shape."""

    def joined(values: list) -> Any:
        if isinstance(values[0], torch.Tensor) and values[0].dim() > 0:
            return torch.cat(values)
        return sum(values, []) if isinstance(values[0], list) else values[0]

    return {name: joined([batch[name] for batch in batches]) for name in batches[0]}


def select(batch: Batch, rows: torch.Tensor) -> Batch:
    """Returns some rows of a batch."""

    def selected(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value[rows]
        return [value[row] for row in rows.tolist()] if isinstance(value, list) else value

    return {name: selected(value) for name, value in batch.items()}


def trim(batch: Batch) -> Batch:
    """Cuts off the columns, before prompts and after completions, that are padding in every row."""
    prompt_length = int(batch["prompt_mask"].sum(dim=1).max())
    width = batch["completion_mask"].size(1)
    # One column at least, for what takes a maximum over it
    length = max(int(batch["completion_mask"].sum(dim=1).max()), 1)

    def trimmed(name: str, value: Any) -> Any:
        if name in PROMPT_TENSORS:
            return value[:, value.size(1) - prompt_length :]
        is_of_tokens = isinstance(value, torch.Tensor) and value.dim() > 1 and value.size(1) == width
        return value[:, :length] if is_of_tokens else value

    return {name: trimmed(name, value) for name, value in batch.items()}


def has_images(batch: Batch) -> bool:
    """Returns True if a batch, or what a forward is given of one, holds images."""
    return any(batch.get(key) is not None for key in MULTIMODAL_KEYS)
