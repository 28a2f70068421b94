"""
Converters of scores and of pairs to the `ranking` type, and back; [`~trl_ext.data.sources`] has those of public datasets.

| function | judgement | better is |
| --- | --- | --- |
| [`from_scores`] | `scores` | higher |
| [`from_pairs`] | `chosen`, `rejected`, perhaps `tie` | `chosen` |

They take a [`~datasets.Dataset`] and return one with `prompt`, `completions` and `ranks`, unless they say otherwise,
and none of the source's other columns. Where the source is not as documented, they raise a ValueError that names the
column, and the row if it is one row's. Rows of no use, with fewer than two completions ranked, are converted like
others: [`~trl_ext.data.rankings.prepare_rankings`] finds them.
"""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, List, Value
from trl.data_utils import maybe_extract_prompt

from .orders import weak_order
from .rankings import prepare_rankings
from .rows import NUMBER, PAIRS, RANKS, TEXT, convert_rows, get, in_row, ranks_of_scores, require, whole


def from_scores(dataset: Dataset, tie_threshold: float = 0.0) -> Dataset:
    """
    Ranks completions by their scores, near ones tied.

    Ties chain, or they would not be transitive: the scores are sorted and neighbours within the threshold are tied, so
    the best and the worst of a tie may be further apart.

    Args:
        dataset ([`~datasets.Dataset`]): `prompt`, `completions` and `scores`, a number for each completion, higher for
            better; null or NaN is unranked.
        tie_threshold (`float`, *optional*, defaults to `0.0`): Neighbours that differ by no more than this are tied.

    Example:

    ```python
    >>> row = {"prompt": "2 + 2 =", "completions": [" 5", " 4", " four"], "scores": [0.1, 0.9, 0.8]}
    >>> from_scores(Dataset.from_list([row]), tie_threshold=0.1)["ranks"][0]
    [2, 1, 1]
    ```
    """
    require(0 <= tie_threshold < math.inf, f"`tie_threshold` must be a number from 0, got {tie_threshold}.")
    dataset = whole(dataset)
    for name in (*TEXT, "scores"):
        require(name in dataset.features, f"column `{name}`: is missing, got {dataset.column_names}. Rename yours.")

    def convert(row):
        completions, scores = get(row, "completions", list), get(row, "scores", list)
        is_valid = len(scores) == len(completions) and all(
            score is None or (isinstance(score, NUMBER) and not math.isinf(score)) for score in scores
        )
        expected = f"must be {len(completions)} finite numbers or nulls, one for each completion"
        require(is_valid, f"column `scores`: {expected}, got {scores!r}.")
        return {name: row[name] for name in TEXT} | {"ranks": ranks_of_scores(scores, tie_threshold)}

    return convert_rows(dataset, convert, {name: dataset.features[name] for name in TEXT} | RANKS)


def from_pairs(dataset: Dataset) -> Dataset:
    """
    Gathers the pairs of each prompt into one ranking.

    Args:
        dataset ([`~datasets.Dataset`]): TRL's preference type, text or conversational: `prompt`, `chosen`, `rejected`
            and optionally `tie`, true where the order means nothing. Without `prompt`, that is the beginning that the
            two share; for texts it can include the first letters of both answers, which then differs between pairs
            and keeps them from meeting in one ranking.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `completions` (the distinct ones), and either `ranks`, if the pairs amount to
        an order ([`~trl_ext.data.orders.weak_order`]), or `pairs`; the other is null.

    Example:

    ```python
    >>> pairs = {"chosen": [" 4", " four"], "rejected": [" 5", " 4"], "tie": [False, True]}
    >>> from_pairs(Dataset.from_dict({"prompt": ["2 + 2 ="] * 2} | pairs))[0]
    {'prompt': '2 + 2 =', 'completions': [' 4', ' 5', ' four'], 'ranks': [1, 2, 1], 'pairs': None}
    ```
    """
    dataset, rankings = whole(dataset), {}
    for index, row in enumerate(dataset):
        pair = in_row(index, _explicit_pair, row)
        prompt, numbers, pairs = rankings.setdefault(json.dumps(pair["prompt"]), (pair["prompt"], {}, []))
        texts = [json.dumps(pair[name]) for name in ("chosen", "rejected")]
        i, j = [numbers.setdefault(text, len(numbers)) for text in texts]
        pairs.append([i, j, 0 if row.get("tie") else 1])
    rows = []
    for prompt, numbers, pairs in rankings.values():
        ranks = weak_order(pairs, len(numbers))
        completions = [json.loads(text) for text in numbers]
        rows.append({"prompt": prompt, "completions": completions, "ranks": ranks, "pairs": None if ranks else pairs})
    completion, prompt = dataset.features["chosen"], dataset.features.get("prompt")
    if type(prompt) is not type(completion):  # the completions hold the prompt
        prompt = completion
    types = {"prompt": prompt, "completions": List(completion)}
    return Dataset.from_list(rows, features=Features(types | RANKS | PAIRS))


def _explicit_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the pair with its prompt, which may be the beginning that both share. Refuses one without a difference."""
    row = {name: value for name, value in row.items() if value is not None}
    for name in ("chosen", "rejected"):
        require(
            isinstance(row.get(name), (str, list)), f"column `{name}`: must be text or messages. Fill or rename it."
        )
        require(row[name] or (row[name] == "" and "prompt" in row), f"column `{name}`: is empty. Remove the row.")
    require(row["chosen"] != row["rejected"], "columns `chosen` and `rejected`: are the same. Remove the row.")
    return maybe_extract_prompt(row)


def to_pairs(dataset: Dataset, ties: bool = False) -> Dataset:
    """
    Writes every judgement as a row of TRL's preference type.

    With `ties=True`, [`from_pairs`] undoes it if no two rows have the same prompt and no two completions of a row are
    the same, up to the order of completions and those that nobody judged.

    Args:
        dataset ([`~datasets.Dataset`]): Rankings. Rows with both `ranks` and `pairs` give their pairs.
        ties (`bool`, *optional*, defaults to `False`): True keeps ties, with the earlier completion as `chosen`.

    Returns:
        [`~datasets.Dataset`]: `prompt`, `chosen`, `rejected` and, with `ties=True`, the bool `tie`.

    Example:

    ```python
    >>> row = {"prompt": "2 + 2 =", "completions": [" 5", " 4", " four"], "ranks": [2, 1, 1]}
    >>> to_pairs(Dataset.from_list([row]))[:]
    {'prompt': ['2 + 2 =', '2 + 2 ='], 'chosen': [' 4', ' four'], 'rejected': [' 5', ' 5']}
    ```
    """
    dataset = prepare_rankings(whole(dataset), dataset_name="dataset")
    completion = dataset.features["completions"].feature
    types = {"prompt": dataset.features["prompt"], "chosen": completion, "rejected": completion, "tie": Value("bool")}
    if not ties:
        del types["tie"]

    def convert(batch):
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completions"][i], "rejected": row["completions"][j], "tie": tie}
            for row in rows
            for i, j, tie in _judgements(row["ranks"], row.get("pairs"))
            if ties or not tie
        ]
        return {name: [pair[name] for pair in pairs] for name in types}

    kwargs = {"features": Features(types), "desc": "Converting rankings to pairs"}
    return dataset.map(convert, batched=True, remove_columns=dataset.column_names, **kwargs)


def _judgements(ranks: list[int] | None, pairs: list[list[int]] | None) -> Iterator[tuple[int, int, bool]]:
    """Yields the better completion, the worse one, and True if they are tied, with the earlier first."""
    if pairs is None:
        ranked = [i for i, rank in enumerate(ranks) if rank >= 0]
        for pair in itertools.combinations(ranked, 2):
            i, j = sorted(pair, key=lambda i: ranks[i])
            yield i, j, ranks[i] == ranks[j]
    else:
        for i, j, v in pairs:
            yield (min(i, j), max(i, j), True) if v == 0 else (i, j, False) if v == 1 else (j, i, False)
