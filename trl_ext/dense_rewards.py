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
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


def shaped_rewards(potentials: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    r"""
    A potential's rise with each token: r_t = gamma Phi(s_{t+1}) - Phi(s_t).

    Discounted they sum to gamma^T Phi(s_T) - Phi(s_0): to the potential of the whole, less what no action changes. So
    the best policy is that for the reward Phi(s_T) at the end, and each token is told at once what it did.

    Args:
        potentials (`torch.Tensor` of shape `(1 + T,)`): Phi of the prompt and of each prefix after it.
        gamma (`float`, *optional*, defaults to `1.0`): The discount of the MDP.

    Returns:
        `torch.Tensor` of shape `(T,)`.

    Reference: Ng, Harada and Russell 1999, Policy invariance under reward transformations, theorem 1.
    """
    return gamma * potentials[1:] - potentials[:-1]


def rewards_of_turns(totals: list[float], tool_mask: list[int]) -> list[float]:
    """
    What each turn adds to an environment's total, on the last token of that turn.

    Args:
        totals (`list[float]`): Before the first turn, and after each turn. What it is before counts for the first turn;
            what comes after the policy's last turn counts for that one.
        tool_mask (`list[int]`): 1 at the policy's own tokens. A run of them is a turn.

    Returns:
        `list[float]`: One reward per token, which sum to the last total.
    """
    rewards = [0.0] * len(tool_mask)
    ends = [t for t, own in enumerate(tool_mask) if own and (t + 1 == len(tool_mask) or not tool_mask[t + 1])]
    for turn, (before, after) in enumerate(zip([0.0, *totals[1:-1]], totals[1:], strict=True)):
        rewards[ends[min(turn, len(ends) - 1)]] += after - before
    return rewards


def is_dense(reward: Any) -> bool:
    """Whether a reward is of tokens or spans, and not of the whole completion."""
    return isinstance(reward, list | tuple) or (isinstance(reward, torch.Tensor | np.ndarray) and reward.ndim == 1)


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text that the characters of spans are counted in: of a conversation, the one reply."""
    if isinstance(completion, str):
        return completion
    if len(completion) != 1:
        raise ValueError(
            f"spans count the characters of one text, and the completion has {len(completion)} messages. Return one "
            "reward per token instead"
        )
    return completion[0]["content"]


def token_ends(completion_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """For each token how many characters of the completion's text there are up to its end."""
    return [
        len(tokenizer.decode(completion_ids[:t], skip_special_tokens=True)) for t in range(1, len(completion_ids) + 1)
    ]


def rewards_of_tokens(
    reward: list, completion: str | list[dict[str, Any]], completion_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """
    A dense reward as one number for each token of the completion.

    Raises:
        ValueError: for another number of tokens than the completion has, a span outside of its text, or a reward that
            is no finite number.
    """
    if not any(isinstance(item, list | tuple) for item in reward):
        if len(reward) not in (0, len(completion_ids)):
            raise ValueError(
                f"{len(reward)} rewards for {len(completion_ids)} tokens (`completion_ids` has them, the end-of-sequence "
                "token among them). Return as many"
            )
        values = [float(value) for value in reward] or [0.0] * len(completion_ids)
    else:
        text = text_of(completion)
        decoded = tokenizer.decode(completion_ids, skip_special_tokens=True)
        offset = decoded.find(text)
        if offset < 0:
            raise ValueError("spans of a text which is not what the tokens say. Return one reward per token instead")
        ends = token_ends(completion_ids, tokenizer)
        values = [0.0] * len(completion_ids)
        for start, end, value in reward:
            if not 0 <= start < end <= len(text):
                raise ValueError(
                    f"the span {start} to {end} of a text of {len(text)} characters. Return spans within it"
                )
            last = next(t for t, stop in enumerate(ends) if stop >= offset + end)
            values[last] += float(value)
    if not all(map(math.isfinite, values)):
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
        self.is_empty = True

    def totals(self, rewards: list, name: str, weight: float) -> list[float | None]:
        """What the function `name` returned, with the sum in place of each dense reward, which is kept, weighted."""
        totals = []
        for row, reward in enumerate(rewards):
            if is_dense(reward):
                reward = self._keep(row, list(reward), name, weight)
            totals.append(reward)
        return totals

    def _keep(self, row: int, reward: list, name: str, weight: float) -> float:
        try:
            values = rewards_of_tokens(reward, self.completions[row], self.completion_ids[row], self.tokenizer)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The reward function '{name}' returned for row {row} of the batch {error}, or None where it does not "
                "apply."
            ) from None
        self.rewards[row] = [kept + weight * value for kept, value in zip(self.rewards[row], values, strict=True)]
        self.is_empty = False
        return math.fsum(values)

    def tensor(self, device: torch.device) -> torch.Tensor:
        """`(B, T)`, T the longest completion's; 0 where nothing was given."""
        return pad_sequence([torch.tensor(row) for row in self.rewards], batch_first=True).to(device)
