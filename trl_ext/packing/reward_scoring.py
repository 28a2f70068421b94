"""A reward model's scores of a rollout: without padding, and with each prompt run once."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..models.score_head import last_real_token, scores_of_all_tokens
from .check import NUM_COMPARED, PrefixCheck
from .layout import Packed, forward_cost, pack_groups, packed_inputs
from .micro_batches import grouped_by_length, real_tokens


@dataclass
class Texts:
    """
    Texts, some rows of which are wanted plain or packed.

    Args:
        inputs (`dict[str, torch.Tensor]`): The inputs of a model, `(B, L)`, padded on the right.
        prompts (`list[str]`): The beginnings of the texts, B of them.
    """

    inputs: dict[str, torch.Tensor]
    prompts: list[str]

    def __post_init__(self):
        self.tokens = real_tokens(self.inputs["input_ids"], self.inputs["attention_mask"])

    def plain(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Returns the inputs of some rows, cut to the longest of them."""
        longest = max(len(self.tokens[row]) for row in rows)
        return {name: values[rows, :longest] for name, values in self.inputs.items()}

    def packed(self, rows: list[int], pad_token_id: int) -> tuple[Packed, torch.Tensor]:
        """Returns some rows after their prompts, and the numbers of the tokens that score them, `(len(rows),)`."""
        tokens = [self.tokens[row] for row in rows]
        ends = [last_real_token(ids, pad_token_id) for ids in tokens]
        packed = pack_groups(tokens, ends, [self.prompts[row] for row in rows], pad_token_id)
        return packed, packed.origins + torch.tensor(ends)


class RewardScoring(nn.Module):
    """
    A reward model that scores texts of one prompt, and of similar length, together: each batch is cut to its own
    longest, and runs the prompt once for all of its texts where that is less work.

    Args:
        model (`nn.Module`): Gives `logits` `(B, 1)` of texts padded on the right.
        batch_size (`int`): Number of texts scored at once.
        prompts (`list`): The beginnings of the texts.
        check ([`PrefixCheck`], *optional*): Tells if the model may run texts after a shared prefix. By default not.
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
        texts = Texts(inputs | {"input_ids": input_ids, "attention_mask": attention_mask}, self.prompts)
        order = grouped_by_length(self.prompts, [len(tokens) for tokens in texts.tokens])
        # As many batches in each process, which a model that is sharded over them needs
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        packs = self.check is not None and self._may_pack(texts, batches[0][:NUM_COMPARED])
        logits = torch.cat([self._scores(texts, rows, packs) for rows in batches])
        return SequenceClassifierOutput(logits=logits[torch.tensor(order, device=logits.device).argsort()])

    def _may_pack(self, texts: Texts, rows: list[int]) -> bool:
        def scores(is_packed: bool) -> torch.Tensor:
            if is_packed:
                return self._packed_scores(*texts.packed(rows, self._config.pad_token_id))
            return self.model(**texts.plain(rows)).logits

        return self.check(scores, lambda: len({self.prompts[row] for row in rows}) < len(rows))

    def _scores(self, texts: Texts, rows: list[int], packs: bool) -> torch.Tensor:
        """Returns the scores `(len(rows), 1)`, packed if that is allowed and less work."""
        plain = texts.plain(rows)
        if packs:
            packed, index = texts.packed(rows, self._config.pad_token_id)
            if self._cost(packed.input_ids) < self._cost(plain["input_ids"]):
                return self._packed_scores(packed, index)
        return self.model(**plain).logits

    def _packed_scores(self, packed: Packed, index: torch.Tensor) -> torch.Tensor:
        columns = (column.to(self.model.device) for column in (packed.input_ids, packed.positions, packed.segments))
        with scores_of_all_tokens(self.model):
            logits = self.model(**packed_inputs(self.model, *columns), use_cache=False).logits
        return logits.flatten(0, 1)[index.to(logits.device)]

    def _cost(self, input_ids: torch.Tensor) -> int:
        return forward_cost(*input_ids.shape, self._config.hidden_size)

    @property
    def _config(self):
        return self.model.config.get_text_config()
