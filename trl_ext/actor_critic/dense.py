r"""
Rewards of tokens and of spans of text: R(s_t, a_t) beside the holistic R(x, y).

For each completion a reward function may return

    0.7                               one number, for the whole completion
    [0.0, 0.1, ..., -0.2]             one for each of its tokens
    [(0, 12, 0.5), (30, 41, -1.0)]    spans: from character, up to character, reward; it falls to the last token that
                                      holds some of the span, when the writer is done with it
    None                              not applicable

as Wu et al. 2023, Fine-Grained Human Feedback, https://huggingface.co/papers/2306.01693, section 3.1, place them.
"""

import math
import os
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..token_mdp import shaped_rewards


# Tokens that are decoded together at most, unless the last of them are part of a character that is not complete
MAX_WINDOW = 32
INVALID = "\N{REPLACEMENT CHARACTER}"


@dataclass
class ShapedReward:
    """
    The pay of a completion under `prefix_rewards`.

    Args:
        rewards (`list[float]`): One for each token.
        total (`float`): The logged reward: the score of the whole less that of the prompt, whatever gamma is.
    """

    rewards: list[float]
    total: float


def shaped_reward(
    potentials: torch.Tensor, end: torch.Tensor, chosen: list[int], gamma: float = 1.0, goes_on: bool = False
) -> ShapedReward:
    """
    Pays [`shaped_rewards`] to the tokens that the policy chose; those between, of a tool or an environment, are no time
    steps.

    Args:
        potentials (`torch.Tensor` of shape `(1 + T,)`): Phi of the prompt and of each prefix after it.
        end (`torch.Tensor` of shape `()`): The score of the whole.
        chosen (`list[int]`): T, 1 at the tokens that the policy chose.
        gamma (`float`, *optional*, defaults to `1.0`): The discount of the MDP.
        goes_on (`bool`, *optional*, defaults to `False`): True if the last state is worth what may come after it.
    """
    steps = torch.tensor(chosen, device=potentials.device).nonzero().squeeze(1)
    rewards = torch.zeros_like(potentials[1:])
    rewards[steps] = shaped_rewards(potentials[[*steps.tolist(), -1]], gamma, None if goes_on else end)
    return ShapedReward(rewards.tolist(), (end - potentials[0]).item())


def is_dense(reward: Any) -> bool:
    """
    Returns True for rewards of tokens or spans, in a list, tensor or array; one with a single number is of the whole.
    """
    if isinstance(reward, torch.Tensor | np.ndarray):
        return reward.ndim > 0 and math.prod(reward.shape) != 1
    return isinstance(reward, list | tuple)


def described(item: Any) -> str:
    """Returns the beginning and the type of an object that was returned in place of a reward."""
    text = repr(item)
    return f"{text if len(text) <= 60 else text[:60] + '...'} (`{type(item).__name__}`)"


def number_of(reward: Any) -> float:
    """
    Returns a reward as a float, of any kind that TRL takes: Python's and numpy's, tensors and arrays of one element.

    Raises:
        TypeError: if the reward is no number.
    """
    if isinstance(reward, torch.Tensor | np.ndarray) and math.prod(reward.shape) == 1:
        reward = reward.item()
    if isinstance(reward, str | bytes | np.complexfloating) or not isinstance(reward, SupportsFloat):
        raise TypeError(f"{described(reward)}, which is no number. Return a number, or a list of numbers or spans")
    return float(reward)


def is_finite(reward: float) -> bool:
    """Returns True for a number that float32, in which rewards are kept, can hold."""
    return abs(reward) <= torch.finfo(torch.float32).max


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """Returns the text that the characters of spans are counted in: of a conversation, the one reply."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise ValueError(
            f"spans count the characters of one text, and the completion has {len(completion)} messages. Return one "
            "reward per token instead"
        )
    return completion[0]["content"]


def text_offset(completion: str | list[dict[str, Any]], decoded: str) -> int:
    """
    Finds where the text of [`text_of`] begins in what all of the completion's tokens say; of a reply with reasoning,
    after that.

    Raises:
        ValueError: if the tokens say something else.
    """
    reasoning = ""
    if not isinstance(completion, str):
        reasoning = completion[0].get("reasoning_content") or completion[0].get("thinking") or ""
    start = decoded.find(reasoning) + len(reasoning)
    offset = decoded.find(text_of(completion), max(start, 0))
    if offset < 0:
        raise ValueError("spans of a text which is not what the tokens say. Return one reward per token instead")
    return offset


def token_ends(completion_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Counts for each token how many characters of the completion's text are complete with it: as many as what is decoded
    up to this token has in common with the whole. A character that tokens share (an emoji, Chinese, the bytes that a
    vocabulary falls back on) is complete with the last of them.

    The time is linear in the number of tokens: once the two agree, only what comes after is decoded again, behind the
    tokens up to the agreement before, for what a tokenizer writes of a word depends on there being one before it.

    Returns:
        `list[int]`: One for each token; they never fall.
    """

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(completion_ids[start:stop], skip_special_tokens=True)

    text, skipped = decode(0, len(completion_ids)), _special_ids(tokenizer)
    ends = [0]
    start = last = 0  # tokens: the first that is decoded, and the first after the latest agreement
    known = agreed = 0  # characters up to the latest agreement: of what is decoded from `start` on, and of the text
    for stop, token in enumerate(completion_ids, 1):
        new = "" if token in skipped else decode(start, stop)[known:]
        common = len(os.path.commonprefix([new, text[agreed : agreed + len(new)]]))
        ends.append(max(agreed + common, ends[-1]))
        if new and common == len(new):
            agreed += common
            base = decode(last, stop)
            # What reads otherwise by itself (a word's inner piece, a byte that is part of no character) is no start
            if (text.endswith(base, 0, agreed) and INVALID not in base) or stop - start > MAX_WINDOW:
                start, known = last, len(base)
            else:
                known += common
            last = stop
    ends[-1] = len(text)  # of what reads like nothing before it, too
    return ends[1:]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _is_position(value: Any) -> bool:
    """Returns True for whole numbers; those in an array of spans are floats."""
    return hasattr(value, "__index__") or (isinstance(value, float) and value.is_integer())


def rewards_of_tokens(
    reward: list, completion: str | list[dict[str, Any]], completion_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """
    Returns a dense reward as one number for each token of the completion.

    Raises:
        ValueError: for another number of tokens than the completion has, an item among spans that is none, a span outside
            of its text, or a reward that is no finite number.
    """
    if not any(isinstance(item, list | tuple) for item in reward):
        if len(reward) not in (0, len(completion_ids)):
            raise ValueError(
                f"{len(reward)} rewards for {len(completion_ids)} tokens (`completion_ids` has them, the end-of-sequence "
                "token among them). Return as many"
            )
        values = [number_of(value) for value in reward] or [0.0] * len(completion_ids)
    else:
        text = text_of(completion)
        offset = text_offset(completion, tokenizer.decode(completion_ids, skip_special_tokens=True))
        ends = token_ends(completion_ids, tokenizer)
        values = [0.0] * len(completion_ids)
        for span in reward:
            is_span = isinstance(span, list | tuple) and len(span) == 3
            if not is_span or not all(i is None or _is_position(i) for i in span[:2]):
                raise ValueError(
                    f"{described(span)} as a span. Return spans `(start, end, reward)` alone, or one number for each token"
                )
            start, end, value = span
            if None in (start, end) or not 0 <= start < end <= len(text):
                raise ValueError(
                    f"the span {start} to {end} of a text of {len(text)} characters. Return spans within it"
                )
            values[bisect_left(ends, offset + int(end))] += number_of(value)
    if not all(map(is_finite, values)):
        raise ValueError("a reward that is nan or infinite. Return finite numbers")
    return values


class DenseRewards:
    """
    The dense rewards of a batch, as its reward functions return them.

    Args:
        completions (`list`): Texts, or lists of messages.
        completion_ids (`list[list[int]]`): Their tokens.
        tokenizer: The policy's.
    """

    def __init__(self, completions: list, completion_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase):
        self.completions, self.completion_ids, self.tokenizer = completions, completion_ids, tokenizer
        self.rewards = [[0.0] * len(ids) for ids in completion_ids]
        self.unpaid = [0.0] * len(completion_ids)  # what the totals of shaped rewards are more than their tokens' sum
        self.is_empty = True

    def totals(self, rewards: list, name: str, weight: float) -> list[float | None]:
        """Returns the rewards of the function `name` with the sum in place of each dense one, which is kept, weighted."""
        return [self._total(row, reward, name, weight) for row, reward in enumerate(rewards)]

    def _total(self, row: int, reward: Any, name: str, weight: float) -> float | None:
        if reward is None:
            return None
        if isinstance(reward, ShapedReward):
            self.unpaid[row] += weight * (reward.total - self._total(row, reward.rewards, name, weight))
            return reward.total
        try:
            if not is_dense(reward):
                return number_of(reward)
            if not isinstance(reward, list | tuple):
                is_column = reward.ndim == 2 and reward.shape[1] == 1  # as a model's head gives it
                reward = (reward[:, 0] if is_column else reward).tolist()
            values = rewards_of_tokens(reward, self.completions[row], self.completion_ids[row], self.tokenizer)
        except (TypeError, ValueError, OverflowError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(
                f"The reward function '{name}' returned for row {row} of the batch {error}, or None where it does not "
                "apply."
            ) from None
        self.rewards[row] = [kept + weight * value for kept, value in zip(self.rewards[row], values, strict=True)]
        self.is_empty = False
        return math.fsum(values)

    def tensor(self, device: torch.device) -> torch.Tensor:
        """Returns the rewards of tokens, `(B, T)` with T of the longest completion; 0 where nothing was given."""
        return pad_sequence([torch.tensor(row) for row in self.rewards], batch_first=True).to(device)

    def totals_of_rows(self, device: torch.device) -> torch.Tensor:
        """Returns the part of each completion's reward that dense rewards are, `(B,)`."""
        return self.tensor(device).sum(dim=1) + torch.tensor(self.unpaid, device=device)
