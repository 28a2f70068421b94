"""
Prompts that cannot be used: without text, or too long for the model's context. A dataset that can be looked at is refused
before anything is generated; of a stream, and where images or environments add what nobody can count beforehand, the
prompt is cut as it comes ([`cut_to_context`]).
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from .dense import described


# A beginning and an end of sequence, and what a tokenizer puts before a first word, with room to spare
MAX_ADDED_TOKENS = 8


def check_context(max_prompt_length: int | None, max_completion_length: int) -> None:
    """Refuses completions as long as the model's context, which leave no room for a prompt."""
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(
            f"`max_completion_length={max_completion_length}` leaves no room for a prompt: the model's context has "
            f"{max_prompt_length + max_completion_length} positions. Lower it."
        )


class Prompts:
    """
    Keeps prompts within the model's context.

    Args:
        max_length (`int`, *optional*): Tokens that the context leaves to a prompt; unbounded by default.
        bos_token_id (`int`, *optional*): The token that stays in front of what is cut.
        is_cut (`bool`, *optional*, defaults to `True`): False where prompts hold images, whose tokens cannot be cut.
    """

    def __init__(self, max_length: int | None, bos_token_id: int | None = None, is_cut: bool = True):
        self.max_length, self.bos_token_id, self.is_cut = max_length, bos_token_id, is_cut
        self.num_too_long = 0  # of the rollout under way

    def check(
        self, name: str, datasets: Any, lengths_of: Callable[[list], list[int]] | None, has_template: bool
    ) -> None:
        """
        Refuses what can be seen to be unusable before anything is generated of it.

        Args:
            name (`str`): What errors call the datasets.
            datasets: One dataset, or a dict of them.
            lengths_of (`Callable`, *optional*): Counts the tokens of each of several prompts.
            has_template (`bool`): True where conversations are tokenized by the chat template.
        """
        for dataset_name, dataset in named_datasets(name, datasets):
            is_text = "prompt" in dataset.column_names and len(dataset) > 0 and isinstance(dataset[0]["prompt"], str)
            can_count = is_text or has_template
            check_prompts(dataset, dataset_name, lengths_of if can_count else None, self.max_length)

    def cut(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Returns prompts that the context has room for, and counts those that were too long."""
        check_prompt_ids(prompt_ids)
        self.num_too_long = sum(self.max_length is not None and len(ids) > self.max_length for ids in prompt_ids)
        if self.num_too_long and self.is_cut:
            prompt_ids = [cut_to_context(ids, self.max_length, self.bos_token_id) for ids in prompt_ids]
        return prompt_ids


def named_datasets(name: str, datasets: Any) -> Iterator[tuple[str, Dataset]]:
    """Yields the datasets that are no streams, of one or a dict of them, each after its name in errors."""
    if isinstance(datasets, Dataset):
        yield f"`{name}`", datasets
    elif isinstance(datasets, dict):
        yield from ((f"`{name}[{key!r}]`", x) for key, x in datasets.items() if isinstance(x, Dataset))


def check_prompts(
    dataset: Dataset, name: str, lengths_of: Callable[[list], list[int]] | None, max_prompt_length: int | None
) -> None:
    """
    Refuses rows without a prompt, and prompts that leave no room in the model's context.

    Every token holds at least one byte, so only prompts with more bytes than the context has tokens are tokenized.

    Args:
        dataset ([`~datasets.Dataset`]): With a column `prompt`, or none.
        name (`str`): What errors call it.
        lengths_of (`Callable`, *optional*): Counts the tokens of each of several prompts. Lengths are not looked at
            without it.
        max_prompt_length (`int`, *optional*): Tokens that the context leaves to a prompt; unbounded by default.
    """
    if "prompt" not in dataset.column_names:
        return
    sizes = []
    for row, prompt in enumerate(dataset["prompt"]):
        if not prompt:
            raise ValueError(missing_prompt(prompt, row, name))
        if not isinstance(prompt, str | list):
            raise TypeError(
                f"{name} has a prompt in row {row} that is neither a text nor a list of messages: {described(prompt)}. "
                "Convert the column `prompt`."
            )
        sizes.append(_size_of(prompt))
    if lengths_of is None or max_prompt_length is None or not sizes:
        return
    added, first = MAX_ADDED_TOKENS, dataset[0]["prompt"]
    if not isinstance(first, str):  # what a template says around each message is no more than all the first prompt's
        added += lengths_of([first])[0]
    suspects = [
        row
        for row, (size, num_messages) in enumerate(sizes)
        if size + added * -(-num_messages // sizes[0][1]) > max_prompt_length
    ]
    too_long = {}
    for start in range(0, len(suspects), 1000):
        rows = suspects[start : start + 1000]
        lengths = lengths_of([dataset[row]["prompt"] for row in rows])
        too_long |= {row: length for row, length in zip(rows, lengths, strict=True) if length > max_prompt_length}
    if too_long:
        row, length = next(iter(too_long.items()))
        raise ValueError(
            f"A prompt in row {row} of the dataset has {length} tokens, but the model's context less "
            f"`max_completion_length` leaves {max_prompt_length} ({len(too_long)} rows of {name} are too long). Shorten "
            "or filter the prompts, or lower `max_completion_length`."
        )


def _size_of(prompt: str | list) -> tuple[int, int]:
    """Counts the bytes of a prompt, and its messages."""
    if isinstance(prompt, str):
        return len(prompt.encode()), 1
    return len(json.dumps(prompt, ensure_ascii=False, default=str).encode()), len(prompt)


def missing_prompt(prompt: Any, row: int, name: str) -> str:
    """Returns the error for a row that has no prompt."""
    return (
        f"{name} has an empty prompt in row {row}: {prompt!r}. Remove it, e.g. with "
        "`dataset.filter(lambda row: row['prompt'])`."
    )


def refuse_missing_prompt(dataset: Dataset | IterableDataset, name: str) -> None:
    """Names the first row without a prompt of a stream that was seen to have one."""
    for row, example in enumerate(dataset):
        if not example.get("prompt"):
            raise ValueError(missing_prompt(example.get("prompt"), row, name))


def check_prompt_ids(prompt_ids: list[list[int]]) -> None:
    """Refuses tokenized prompts that are empty."""
    if not all(prompt_ids):
        raise ValueError(
            "A prompt in the batch has no tokens, so there is no state to generate from. Remove empty prompts from the "
            "dataset, or use a tokenizer that adds a beginning-of-sequence token."
        )


def cut_to_context(prompt_ids: list[int], max_prompt_length: int, bos_token_id: int | None) -> list[int]:
    """Returns the last tokens of a prompt that is too long, behind its beginning-of-sequence token if it has one."""
    if len(prompt_ids) <= max_prompt_length:
        return prompt_ids
    start = prompt_ids[:1] if prompt_ids[0] == bos_token_id and max_prompt_length > 1 else []
    return start + prompt_ids[len(prompt_ids) - max_prompt_length + len(start) :]
