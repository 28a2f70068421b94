"""Where completions end, for the engine that samples them: at its end tokens, and with its stop strings."""

import functools
import warnings
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from ..models.decoding import DEFAULTS, settings_of
from .sampling import altered, warning_of


NO_TOKEN = 2**31 - 1  # which `StopStringCriteria` takes for one that is in no string


class StopStrings:
    """
    Finds where a completion ends with a stop string, as `generate` does.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The policy's.
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
        """Number of tokens until a stop string is complete, which may begin in the prompt; None where none is."""
        met = self._met(prompt_ids, completion_ids, len(completion_ids))
        return int(met.int().argmax()) + 1 if met.any() else None

    def is_last(self, prompt_ids: list[int], completion_ids: list[int]) -> bool:
        """True where the last token completes a stop string."""
        return bool(self._met(prompt_ids, completion_ids, 1))

    def _met(self, prompt_ids: list[int], completion_ids: list[int], num_tokens: int) -> torch.Tensor:
        """`(num_tokens,)` bool: which of the last tokens complete a stop string."""
        width = self.criterion.maximum_token_len
        ids = pad(torch.tensor([*prompt_ids[-width:], *completion_ids]), (width, 0), value=NO_TOKEN)
        return self.criterion(ids.unfold(0, width, 1)[-num_tokens:], None)


class StoppingMixin:
    """
    Ends completions where the engine does: the parent knows only the end tokens of the model and the tokenizer, so
    what pads a completion after any other end would be trained as the policy's own, and count as cut.
    """

    _stop_strings: StopStrings | None = None
    _ended_by_string: list[bool] | None = None  # of the completions of the present rollout

    def _set_up_sampling(self) -> None:
        """Reads the engine's settings. To be called when the parent's `__init__` has prepared model and engine."""
        settings = self._engine_settings()
        ends = settings.get("eos_token_id", self.eos_token_ids)
        if isinstance(ends, list) and None in ends and self.rollout_func is None and not self.use_vllm:
            raise ValueError(
                "The policy's tokenizer has no end-of-sequence token to end completions with. Set `tokenizer.eos_token`, "
                "or name the tokens to stop at: `generation_kwargs={'eos_token_id': [...]}`."
            )
        self.eos_token_ids = [*([ends] if isinstance(ends, int) else ends), *settings.get("stop_token_ids", [])]
        strings = settings.get("stop") if self.use_vllm else settings.get("stop_strings")
        if strings:
            self._stop_strings = StopStrings(self._tokenizer, strings)
        if self.rollout_func is None and self.accelerator.is_main_process:
            self._warn_of_altered_sampling(settings)

    def _engine_settings(self) -> dict[str, Any]:
        """Options that the engine samples with, those at None left out."""
        given = self.args.generation_kwargs or {}
        if self.use_vllm:
            names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            structure = {"structured_outputs": self.args.vllm_structured_outputs_regex}
            settings = structure | {name: getattr(self, name) for name in names} | given
        elif self.use_transformers_continuous_batching:  # which asks the model's generation config for nothing
            settings = self.generation_config.to_dict()
        else:
            settings = DEFAULTS | settings_of(self.model, self.generation_config)
        if self._is_vlm and "suppress_tokens" not in given:
            settings.pop("suppress_tokens", None)  # the parent's: a token in place of which there is an image
        return {name: value for name, value in settings.items() if value is not None}

    def _warn_of_altered_sampling(self, settings: dict[str, Any]) -> None:
        options = altered(settings, self.temperature)
        if options:
            own = {name for name in options if not self.use_vllm and self.generation_kwargs.get(name) is None}
            warnings.warn(warning_of(options, self.temperature, own, self._corrects_sampling), stacklevel=4)

    # --- Ends ---

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._stop_strings is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with self._tokenizer_for_generate():
            completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        lengths = [self._stop_strings.length(*ids) for ids in zip(prompt_ids, completion_ids, strict=True)]
        completion_ids = [ids[:length] for ids, length in zip(completion_ids, lengths, strict=True)]
        if logprobs is not None:
            logprobs = [of_row[: len(ids)] for of_row, ids in zip(logprobs, completion_ids, strict=True)]
        return completion_ids, logprobs

    @contextmanager
    def _tokenizer_for_generate(self):
        """`generate` reads stop strings with a tokenizer, which the parent does not give it."""
        own = vars(self._policy).get("generate")
        self._policy.generate = functools.partial(self._policy.generate, tokenizer=self._tokenizer)
        try:
            yield
        finally:
            del self._policy.generate
            if own is not None:
                self._policy.generate = own

    def _generate(self, prompts):
        outputs = super()._generate(prompts)
        if self._stop_strings is not None:
            prompt_ids, completion_ids, tool_mask, *_ = outputs
            pairs = list(zip(prompt_ids, completion_ids, strict=True))
            self._ended_by_string = [self._stop_strings.is_last(*ids) for ids in pairs]
            self._count_as_ended(completion_ids, tool_mask or [[1] * len(ids) for ids in completion_ids])
        return outputs

    def _count_as_ended(self, completion_ids: list[list[int]], tool_mask: list[list[int]]) -> None:
        """The parent's metrics have just counted as clipped what ended with a stop string."""
        device = self.accelerator.device
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        ended = [ids[-1] in ends or met for ids, met in zip(completion_ids, self._ended_by_string, strict=True)]
        ended = self.accelerator.gather(torch.tensor(ended, device=device))
        lengths = self.accelerator.gather(torch.tensor([float(sum(own)) for own in tool_mask], device=device))
        of_ended = lengths[ended] if ended.any() else lengths.new_zeros(1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/clipped_ratio"][-1] = 1 - ended.float().mean().item()
        for name in ("mean", "min", "max"):
            metrics[f"completions/{name}_terminated_length"][-1] = getattr(of_ended, name)().item()

    def _generate_and_score_completions(self, inputs):
        if self._stop_strings is None or not self.mask_truncated_completions:
            return super()._generate_and_score_completions(inputs)
        # The parent would mask what ended with a stop string, too
        self.mask_truncated_completions = False
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self.mask_truncated_completions = True
        has_ended = self._terminated(batch).unsqueeze(1)
        masks = [name for name in ("completion_mask", "tool_mask") if name in batch]
        batch |= {name: batch[name] * has_ended for name in masks}
        own = torch.stack([batch[name] for name in masks]).prod(dim=0)
        batch["num_items_in_batch"] = self.accelerator.gather(own.sum()).sum()
        return batch

    def _terminated(self, batch) -> torch.Tensor:
        """`(B,)`: [`_have_ended`] of a batch."""
        lengths = batch["completion_mask"].sum(dim=1).clamp(min=1).tolist()
        rows = [ids[:length] for ids, length in zip(batch["completion_ids"].tolist(), lengths, strict=True)]
        return torch.tensor(self._have_ended(rows), device=batch["completion_ids"].device)

    def _have_ended(self, completion_ids: list[list[int]]) -> list[bool]:
        """
        True where the completion ended by itself: its last token is an eos (or pad) id, TRL's notion, or completes a
        stop string, and does not end a call that was not answered.
        """
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        by_string = self._ended_by_string or [False] * len(completion_ids)
        rows = zip(completion_ids, by_string, self._awaits_answer, strict=True)
        return [(ids[-1] in ends or met) and not awaits for ids, met, awaits in rows]
