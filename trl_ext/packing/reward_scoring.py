"""A reward model's scores of a rollout: without padding, and with each prompt run once."""

import itertools

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import SequenceClassifierOutput

from ..models.score_head import last_real_token, scores_of_all_tokens
from .check import NUM_COMPARED, PrefixCheck
from .layout import forward_cost
from .micro_batches import grouped_by_length
from .prefix import PADDING, attention_mask, common_prefix_length, pack


Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class RewardScoring(nn.Module):
    """
    A reward model that scores texts of one prompt, and of similar length, together: each batch is cut to its own
    longest, and runs the prompt once for all of its texts where that is less work.

    Args:
        model (`nn.Module`): Gives `logits` `(B, 1)` of texts padded on the right.
        batch_size (`int`): Texts scored at once.
        prompts (`list`): What each text begins with.
        check ([`PrefixCheck`], *optional*): Whether the model may run texts after a shared prefix. By default not.
    """

    def __init__(self, model: nn.Module, batch_size: int, prompts: list, check: PrefixCheck | None = None):
        super().__init__()
        self.model, self.batch_size, self.check = model, batch_size, check
        self.prompts = [repr(prompt) for prompt in prompts]  # messages cannot be hashed

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: torch.Tensor
    ) -> SequenceClassifierOutput:
        # A text without tokens is one of padding: with nothing to see, its score would hang on how long others are
        attention_mask = attention_mask.clone()
        attention_mask[:, 0] = 1
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        lengths = attention_mask.sum(dim=1).tolist()
        order = grouped_by_length(self.prompts, lengths)
        # As many batches in each process, which a model that is sharded over them needs
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

        def in_rows(rows: list[int]) -> torch.Tensor:
            length = max(lengths[row] for row in rows)
            return self.model(**{name: x[rows, :length] for name, x in inputs.items()}).logits

        def packed(rows: list[int]) -> Packed:
            return self._pack([input_ids[row, : lengths[row]].tolist() for row in rows], rows)

        compared = batches[0][:NUM_COMPARED]

        def compare():
            return in_rows(compared).float(), self._scores(*packed(compared)).float()

        def shows():
            return len({self.prompts[row] for row in compared}) < len(compared)

        packs = self.check is not None and self.check(self.model, compare, shows)
        logits = []
        for rows in batches:
            batch = packed(rows) if packs else None
            is_less_work = packs and self._cost(*batch[0].shape) < self._cost(len(rows), max(lengths[r] for r in rows))
            logits.append(self._scores(*batch) if is_less_work else in_rows(rows))
        logits = torch.cat(logits)
        return SequenceClassifierOutput(logits=logits[torch.tensor(order, device=logits.device).argsort()])

    @property
    def _config(self):
        return self.model.config.get_text_config()

    def _cost(self, num_rows: int, length: int) -> int:
        return forward_cost(num_rows, length, self._config.hidden_size)

    def _pack(self, texts: list[list[int]], rows: list[int]) -> Packed:
        """
        Texts as rows for each prompt: input ids, positions and segments, `(R, L)`, and where in the R L positions the
        token lies that scores each text, `(B,)`.
        """
        packed, ends = [], []
        for _, group in itertools.groupby(zip(texts, rows, strict=True), key=lambda pair: self.prompts[pair[1]]):
            group = [ids for ids, _ in group]
            last = [last_real_token(ids, self._config.pad_token_id) for ids in group]
            length = min(common_prefix_length(group), *last)  # each keeps the token that scores it
            *columns, starts = pack(group[0][:length], [ids[length:] for ids in group])
            ends += [(len(packed), start + end - length) for start, end in zip(starts, last, strict=True)]
            packed.append([torch.tensor(column) for column in columns])
        padding = (self._config.pad_token_id, 0, PADDING)
        input_ids, positions, segments = (
            pad_sequence(list(column), batch_first=True, padding_value=value).to(self.model.device)
            for column, value in zip(zip(*packed, strict=True), padding, strict=True)
        )
        index = torch.tensor([row * input_ids.size(1) + end for row, end in ends], device=input_ids.device)
        return input_ids, positions, segments, index

    def _scores(
        self, input_ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        mask = attention_mask(self._config, segments, positions, self.model.dtype)
        with scores_of_all_tokens(self.model):
            outputs = self.model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return outputs.logits.flatten(0, 1)[index]
