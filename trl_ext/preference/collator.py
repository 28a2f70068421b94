"""Batches of rankings: their judgements as tensors, their completions as rows and packed after their shared prefix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from ..compat import pad
from ..models.score_head import last_real_token
from ..packing.layout import pack_groups
from ..ranking import wins_and_ties


def judged_indices(ranks: list[int] | None, pairs: list[list[int]] | None) -> list[int]:
    """Returns the indices of the completions that somebody judged."""
    if pairs is not None:  # an order that they imply may hold more than was judged
        return sorted({item for i, j, _ in pairs for item in (i, j)})
    return [i for i, rank in enumerate(ranks) if rank is not None and rank >= 0]


def judgement_tensors(examples: list[dict[str, Any]], items: list[list[int]]) -> dict[str, torch.Tensor]:
    """
    Returns `ranks` `(B, K)` and `wins`, `ties` `(B, K, K)` over the judged items of each example. `ranks` are -1 where
    an example has only `pairs`.
    """
    num_items = max(map(len, items))
    ranks = torch.full((len(examples), num_items), -1)
    for row, example, kept in zip(ranks, examples, items, strict=True):
        if example["ranks"] is not None:
            row[: len(kept)] = torch.tensor([example["ranks"][i] for i in kept])
    wins, ties = (judgement.float() for judgement in wins_and_ties(ranks))
    for b, (example, kept) in enumerate(zip(examples, items, strict=True)):
        if example.get("pairs") is not None:  # as they were judged: not every pair of a ranking need have been
            wins[b], ties[b] = 0, 0
            for i, j, preferred in example["pairs"]:
                i, j = kept.index(i), kept.index(j)
                if preferred == 0:
                    ties[b, i, j] += 1
                    ties[b, j, i] += 1
                else:
                    winner, loser = (i, j) if preferred == 1 else (j, i)
                    wins[b, winner, loser] += 1
    return {"ranks": ranks, "wins": wins, "ties": ties}


@dataclass
class DataCollatorForRanking(DataCollatorMixin):
    """
    Collates examples of rankings; those of pairs go to TRL's own collator.

    A batch has, for B prompts with K completions at most, N in all, of L tokens at most:

    - `ranks` `(B, K)`, `wins` and `ties` `(B, K, K)`: see [`~trl_ext.ranking`];
    - `input_ids`, `attention_mask`, `completion_mask` `(N, L)`: prompt and completion of each, and `rows` `(B, K)`,
      which of them is which (0 for padding);
    - `packed_input_ids`, `packed_positions`, `packed_segments`, `packed_completion_mask` `(B, L')`: all completions of
      a prompt in one row, see [`~trl_ext.packing.prefix`]; `ends` `(B, K)`, where the token lies that scores each.

    Args:
        pad_token_id (`int`): Fills rows up.
        pair_collator (`Callable`): For examples that are no rankings.
        pad_to_multiple_of (`int`, *optional*): Make lengths multiples of this.
    """

    pad_token_id: int
    pair_collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if examples[0].keys().isdisjoint(("group_ids", "completion_ids")):
            return self.pair_collator(examples)
        items = [judged_indices(example["ranks"], example.get("pairs")) for example in examples]
        groups = [[self._sequence(example, i) for i in kept] for example, kept in zip(examples, items, strict=True)]
        return judgement_tensors(examples, items) | self._rows(groups) | self._packed(groups)

    @staticmethod
    def _sequence(example: dict[str, Any], i: int) -> tuple[list[int], int | None]:
        """Returns the i-th completion after its prompt, and its start, which a reward model need not know."""
        if "group_ids" in example:
            return example["group_ids"][i], None
        return example["prompt_ids"] + example["completion_ids"][i], len(example["prompt_ids"])

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        return pad(
            [torch.tensor(row, dtype=torch.long) for row in rows],
            padding_value=value,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def _rows(self, groups) -> dict[str, torch.Tensor]:
        flat = [sequence for group in groups for sequence in group]
        numbers = iter(range(len(flat)))
        rows = [torch.tensor([next(numbers) for _ in group]) for group in groups]
        return {
            "input_ids": self._pad([ids for ids, _ in flat], self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids, _ in flat], 0),
            "completion_mask": self._pad([self._mask(ids, start) for ids, start in flat], 0),
            "rows": pad(rows),
        }

    def _packed(self, groups) -> dict[str, torch.Tensor]:
        flat = [sequence for group in groups for sequence in group]
        sequences = [ids for ids, _ in flat]
        # Each completion keeps the token that scores it, which transformers takes to be the last that is no padding,
        # and the one before its first that is scored itself, which predicts it
        ends = [last_real_token(ids, self.pad_token_id) for ids in sequences]
        firsts = [
            end if start is None else min(end, max(start - 1, 0)) for end, (_, start) in zip(ends, flat, strict=True)
        ]
        prompts = [number for number, group in enumerate(groups) for _ in group]
        packed = pack_groups(sequences, firsts, prompts, self.pad_token_id, self.pad_to_multiple_of)
        ends = (packed.origins + torch.tensor(ends)) % packed.input_ids.size(1)
        starts = pad([torch.tensor([first_counted(start) for _, start in group]) for group in groups])
        starts = starts.gather(1, (packed.segments - 1).clamp(min=0))  # of the completion that a token belongs to
        return {
            "packed_input_ids": packed.input_ids,
            "packed_positions": packed.positions,
            "packed_segments": packed.segments,
            "packed_completion_mask": ((packed.segments > 0) & (packed.positions >= starts)).long(),
            "ends": pad(ends.split([len(group) for group in groups])),
        }

    @staticmethod
    def _mask(ids: list[int], start: int | None) -> list[int]:
        """Returns 1 at the completion's tokens."""
        start = first_counted(start)
        return [0] * start + [1] * (len(ids) - start)


def first_counted(start: int | None) -> int:
    """Returns the first token of a completion that counts: nothing predicts one that no prompt comes before."""
    return 0 if start is None else max(start, 1)
