"""
The ends of completions, for the engine that samples them: its end tokens and its stop strings.

TRL knows only the end tokens of the model and the tokenizer, so what pads a completion after any other end would be
trained as the policy's own, and count as cut.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, StopStringCriteria


NO_TOKEN = 2**31 - 1  # which `StopStringCriteria` takes for one that is in no string


class StopStrings:
    """
    Finds where a completion ends with a stop string, as `generate` does.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the policy.
        strings (`str` or `list[str]`): With the token that completes the first of them a completion ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: str | list[str]):
        try:
            self.criterion = StopStringCriteria(tokenizer, strings)
        except ValueError as error:
            raise ValueError(
                f"The stop strings {strings!r} cannot be looked for in what {type(tokenizer).__name__} writes ({error}). "
                "Leave them out of `generation_kwargs`, or stop at tokens, by its `eos_token_id`."
            ) from error

    def length(self, prompt_ids: list[int], completion_ids: list[int]) -> int | None:
        """
        Returns the number of tokens until a stop string is complete, which may begin in the prompt; None where none
        is.
        """
        met = self._met(prompt_ids, completion_ids, len(completion_ids))
        return int(met.int().argmax()) + 1 if met.any() else None

    def cut(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], logps: list[list[float]] | None):
        """Returns completions, and their log-probabilities, without what an engine has put after a stop string."""
        lengths = [self.length(*ids) for ids in zip(prompt_ids, completion_ids, strict=True)]
        completion_ids = [ids[:length] for ids, length in zip(completion_ids, lengths, strict=True)]
        if logps is not None:
            logps = [of_row[: len(ids)] for of_row, ids in zip(logps, completion_ids, strict=True)]
        return completion_ids, logps

    def is_last(self, prompt_ids: list[int], completion_ids: list[int]) -> bool:
        """Returns True where the last token completes a stop string."""
        return bool(self._met(prompt_ids, completion_ids, 1))

    def _met(self, prompt_ids: list[int], completion_ids: list[int], num_tokens: int) -> torch.Tensor:
        """Returns `(num_tokens,)` bool: which of the last tokens complete a stop string."""
        width = self.criterion.maximum_token_len
        ids = pad(torch.tensor([*prompt_ids[-width:], *completion_ids]), (width, 0), value=NO_TOKEN)
        return self.criterion(ids.unfold(0, width, 1)[-num_tokens:], None)


def end_tokens_of(settings: dict[str, Any], end_tokens: list[int]) -> list[int]:
    """Returns the tokens that end completions, by an engine's settings, or else those of model and tokenizer."""
    ends = settings.get("eos_token_id", end_tokens)
    return [*([ends] if isinstance(ends, int) else ends), *settings.get("stop_token_ids", [])]


def have_ended(
    prompt_ids: list[list[int]], completion_ids: list[list[int]], end_tokens: set[int], strings: StopStrings | None
) -> list[bool]:
    """Returns True for each completion whose last token is an end token, or completes a stop string."""
    return [
        ids[-1] in end_tokens or (strings is not None and strings.is_last(prompt, ids))
        for prompt, ids in zip(prompt_ids, completion_ids, strict=True)
    ]


def ended_metrics(has_ended: list[bool], is_chosen: list[list[int]], accelerator: Accelerator) -> dict[str, float]:
    """Returns TRL's metrics of completions that have ended, which counts those that end with a stop string as cut."""
    has_ended = accelerator.gather(torch.tensor(has_ended, device=accelerator.device))
    lengths = [float(sum(row)) for row in is_chosen]
    lengths = accelerator.gather(torch.tensor(lengths, device=accelerator.device))
    of_ended = lengths[has_ended] if has_ended.any() else lengths.new_zeros(1)
    metrics = {"completions/clipped_ratio": 1 - has_ended.float().mean().item()}
    for name in ("mean", "min", "max"):
        metrics[f"completions/{name}_terminated_length"] = getattr(of_ended, name)().item()
    return metrics


def without_cut(batch: dict[str, Any], has_ended: torch.Tensor, accelerator: Accelerator) -> dict[str, Any]:
    """Returns TRL's batch without the tokens of completions that have not ended `(B,)`, as `truncation='mask'` asks."""
    masks = [name for name in ("completion_mask", "tool_mask") if name in batch]
    batch |= {name: batch[name] * has_ended.unsqueeze(1) for name in masks}
    chosen = torch.stack([batch[name] for name in masks]).prod(dim=0)
    return batch | {"num_items_in_batch": accelerator.gather(chosen.sum()).sum()}
