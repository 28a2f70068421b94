"""A reward model's scores of a rollout: without padding, and with each prompt run once."""

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..models.score_head import last_real_token, scores_of_all_tokens
from .check import NUM_COMPARED, PrefixCheck
from .layout import Packed, forward_cost, pack_groups, packed_inputs
from .micro_batches import grouped_by_length
from .prefix import real_tokens


class RewardScoring(nn.Module):
    """
    A reward model that scores texts of one prompt, and of similar length, together: each batch is cut to its own
    longest, and runs the prompt once for all of its texts where that is less work.

    Args:
        model (`nn.Module`): Gives `logits` `(B, 1)` of texts padded on the right.
        batch_size (`int`): Texts scored at once.
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
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        texts = real_tokens(input_ids, attention_mask)
        config = self.model.config.get_text_config()
        ends = [last_real_token(text, config.pad_token_id) for text in texts]
        order = grouped_by_length(self.prompts, [len(text) for text in texts])
        # As many batches in each process, which a model that is sharded over them needs
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

        def longest(rows: list[int]) -> int:
            return max(len(texts[row]) for row in rows)

        def pack(rows: list[int]) -> Packed:
            of_rows = ([values[row] for row in rows] for values in (texts, ends, self.prompts))
            return pack_groups(*of_rows, config.pad_token_id)

        def scores_in_rows(rows: list[int]) -> torch.Tensor:
            return self.model(**{name: x[rows, : longest(rows)] for name, x in inputs.items()}).logits

        def scores_packed(rows: list[int], packed: Packed) -> torch.Tensor:
            columns = (x.to(self.model.device) for x in (packed.input_ids, packed.positions, packed.segments))
            with scores_of_all_tokens(self.model):
                logits = self.model(**packed_inputs(self.model, *columns), use_cache=False).logits
            return logits.flatten(0, 1)[packed.origins + torch.tensor([ends[row] for row in rows])]

        compared = batches[0][:NUM_COMPARED]

        def compared_scores(is_packed: bool) -> torch.Tensor:
            return scores_packed(compared, pack(compared)) if is_packed else scores_in_rows(compared)

        def shows() -> bool:
            return len({self.prompts[row] for row in compared}) < len(compared)

        packs = self.check is not None and self.check(compared_scores, shows)
        logits = []
        for rows in batches:
            packed = pack(rows) if packs else None
            in_rows = forward_cost(len(rows), longest(rows), config.hidden_size)
            is_less_work = packs and forward_cost(*packed.input_ids.shape, config.hidden_size) < in_rows
            logits.append(scores_packed(rows, packed) if is_less_work else scores_in_rows(rows))
        logits = torch.cat(logits)
        return SequenceClassifierOutput(logits=logits[torch.tensor(order, device=logits.device).argsort()])
