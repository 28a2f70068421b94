r"""
The `ranking` dataset type: the completions of a prompt, in an order in which some may be tied.

| column | content |
| --- | --- |
| `prompt` | a text, or a list of messages |
| `completions` | K >= 2 of the same kind: texts, or lists of messages |

and one kind of judgement:

| column | content |
| --- | --- |
| `ranks` | K whole numbers: lower is better, equal is tied, null (or -1, or NaN) is unranked |
| `ranking` | the same as text: `"B > C = D > A"`, where A is the first completion and those left out are unranked |
| `pairs` | judgements `[i, j, v]` of completions i and j, from 0: v = 1 if i is better, 2 if j is, 0 for neither |

Pairs need not agree with any order (people can find A = B and B = C, and A > C all the same). If they do, `ranks` may
stand beside them and say so. A column that is null counts as absent, so rows of different kinds can be concatenated.
"""

import re
import string
import unicodedata
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from trl.data_utils import get_dataset_column_names

from .rows import check_texts, is_whole, plain, report_dropped, require


# What NFKC, which takes care of full-width forms, leaves of the symbols
_SYMBOLS = str.maketrans({"≻": ">", "≺": "<", **dict.fromkeys("~∼≈≃≅〜", "=")})


# --- Rankings as text ---


def parse_ranking(text: str, num_completions: int) -> list[int | None]:
    r"""
    The ranks that a text such as `"B > C = D > A"` gives.

    Args:
        text (`str`): Labels from best to worst, with `>` (or `≻`) between them, and `=` (or `~`, `∼`, `≈`) where they
            are tied; or from worst to best, with `<` (or `≺`). A label is a letter of either case, A for the first
            completion, or a number from 1; beyond 26 completions only a number.
        num_completions (`int`): K.

    Returns:
        `list[int | None]`: K ranks, from 1 without gaps; None for completions that the text does not name.

    Raises:
        ValueError: For a label that is unknown, missing or repeated, or both `>` and `<`.

    Example:

    ```python
    >>> parse_ranking("B > C = D > A", 4)
    [3, 1, 2, 2]
    >>> parse_ranking("4 < 1 ~ 2", 4)
    [1, 1, None, 2]
    ```
    """
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS)
    if ">" in text and "<" in text:
        raise ValueError(f"must go one way, from best to worst with `>` or from worst to best with `<`, got {text!r}.")
    groups = re.split("[<>]", text) if text.strip() else []
    if "<" in text:
        groups.reverse()
    labels = _labels(num_completions)
    positions = {label: i for i, label in enumerate(labels)} | {str(i + 1): i for i in range(num_completions)}
    ranks = [None] * num_completions
    for rank, group in enumerate(groups, start=1):
        for label in map(str.strip, group.split("=")):
            i = positions.get(label.upper())
            if i is None:
                expected = f"{labels[0]} to {labels[-1]}" + (f" or 1 to {len(labels)}" if labels[0] == "A" else "")
                raise ValueError(f"must have labels from {expected} between its symbols, got {label!r} in {text!r}.")
            if ranks[i] is not None:
                raise ValueError(f"must name each completion once at most, got {label!r} again in {text!r}.")
            ranks[i] = rank
    return ranks


def format_ranking(ranks: list[int | None]) -> str:
    """
    The text that [`parse_ranking`] reads back as the same ranking. Unranked completions are left out.

    Args:
        ranks (`list[int | None]`): Lower is better, equal is tied, None or -1 is unranked.

    Returns:
        `str`: With letters, or with numbers beyond 26 completions.

    Example:

    ```python
    >>> format_ranking([4, 1, 2, 2, None])
    'B > C = D > A'
    ```
    """
    groups = {}
    for label, rank in zip(_labels(len(ranks)), ranks, strict=True):
        if rank is not None and rank >= 0:
            groups.setdefault(rank, []).append(label)
    return " > ".join(" = ".join(groups[rank]) for rank in sorted(groups))


def _labels(num_completions: int) -> list[str]:
    if num_completions <= len(string.ascii_uppercase):
        return list(string.ascii_uppercase[:num_completions])
    return [str(i + 1) for i in range(num_completions)]


# --- Judgements of pairs ---


def weak_order(pairs: list[list[int]], num_completions: int) -> list[int | None] | None:
    """
    The ranks that judgements of pairs amount to, if they do.

    That is, if no judgement contradicts the others or what follows from them (A = B and B > C give A > C), and every
    two of the completions that were judged are compared by them.

    Args:
        pairs (`list[list[int]]`): Judgements `[i, j, v]`; v = 1 if i is better, 2 if j is, 0 for a tie.
        num_completions (`int`): K.

    Returns:
        `list[int | None]` or `None`: K ranks, from 1 without gaps, with None for completions in no pair; None if the
        pairs do not amount to an order.

    Example:

    ```python
    >>> weak_order([[0, 1, 0], [1, 2, 2]], 4)
    [2, 2, 1, None]
    >>> weak_order([[0, 1, 0], [1, 2, 0], [0, 2, 1]], 3) is None
    True
    ```
    """
    group = list(range(num_completions))  # tied completions share a number
    for i, j, v in pairs:
        if v == 0:
            group = [group[i] if other == group[j] else other for other in group]
    beats = {(group[i], group[j]) if v == 1 else (group[j], group[i]) for i, j, v in pairs if v != 0}
    remaining = {group[i] for pair in pairs for i in pair[:2]}
    ranks = {}
    while remaining:
        best = remaining - {worse for better, worse in beats if better in remaining}
        # None unbeaten: the groups go in a circle, or one beats itself. Several: nothing compares them
        if len(best) != 1:
            return None
        remaining -= best
        ranks[best.pop()] = len(ranks) + 1
    return [ranks.get(number) for number in group]


# --- Rows ---


def is_ranking(example: dict[str, Any] | list[str]) -> bool:
    """
    Whether an example, or a dataset with these column names, is of the ranking type.

    Args:
        example (`dict[str, Any]` or `list[str]`): A row, whose null columns count as absent, or column names.

    Example:

    ```python
    >>> is_ranking({"prompt": "2 + 2 =", "completions": [" 4", " 5"], "ranks": [1, 2]})
    True
    >>> is_ranking(["prompt", "chosen", "rejected"])
    False
    ```
    """
    names = {name for name in example if not isinstance(example, Mapping) or example[name] is not None}
    return {"prompt", "completions"} <= names and not names.isdisjoint(("ranks", "ranking", "pairs"))


def normalize_ranking(row: dict[str, Any]) -> dict[str, Any]:
    """
    One form for all kinds of judgement. Normalizing a normalized row changes nothing.

    Args:
        row (`dict[str, Any]`): A row of the ranking type; further columns are ignored.

    Returns:
        `dict[str, Any]`: `prompt` and `completions` as they are; `ranks`, K whole numbers from 1 without gaps, with -1
        for unranked, or None when the pairs amount to no order; and `pairs` if the row has them.

    Raises:
        ValueError: If the row is not of the ranking type, ranks fewer than two completions, has more than one kind of
            judgement, or one that does not fit its completions. The message names the column and says how to mend it.

    Example:

    ```python
    >>> normalize_ranking({"prompt": "2 + 2 =", "completions": [" 5", " 4", " four"], "ranking": "B = C > A"})
    {'prompt': '2 + 2 =', 'completions': [' 5', ' 4', ' four'], 'ranks': [2, 1, 1]}
    ```
    """
    row = {name: value for name, value in row.items() if value is not None}
    check_texts(row)
    ranks, pairs = _read_judgements(row, len(row["completions"]))
    if ranks is not None:
        ranks = [-1 if rank is None else rank for rank in ranks]
    normalized = {"prompt": row["prompt"], "completions": row["completions"], "ranks": ranks}
    return normalized if pairs is None else normalized | {"pairs": pairs}


def _read_judgements(row: dict[str, Any], num_completions: int) -> tuple[list | None, list | None]:
    given = [name for name in ("ranks", "ranking", "pairs") if name in row]
    require(given, "column `ranks`: is missing or null, as are `ranking` and `pairs`. Give one of them.")
    require(
        "ranking" not in given or len(given) == 1,
        "column `ranking`: must be the only judgement, got `ranks` or `pairs` too. Keep one of them.",
    )
    ranks = order = pairs = None
    if given[0] != "pairs":
        read = _read_ranks if given[0] == "ranks" else _read_ranking
        ranks = read(row[given[0]], num_completions)
        num_ranked = num_completions - ranks.count(None)
        require(num_ranked > 1, f"column `{given[0]}`: must rank two or more, got {num_ranked}. Remove the row.")
    if "pairs" in row:
        pairs = _read_pairs(row["pairs"], num_completions)
        order = weak_order(pairs, num_completions)
        require(
            ranks is None or ranks == order,
            "columns `ranks` and `pairs`: must say the same where both are given. Keep one of them.",
        )
    return ranks or order, pairs


def _read_ranking(text: Any, num_completions: int) -> list[int | None]:
    require(
        isinstance(text, str),
        f"column `ranking`: must be text such as 'B > C = D > A', got {text!r}. Numbers belong in `ranks`.",
    )
    try:
        return parse_ranking(text, num_completions)
    except ValueError as error:
        raise ValueError(f"column `ranking`: {error}") from None


def _read_ranks(values: Any, num_completions: int) -> list[int | None]:
    require(
        isinstance(values, list) and len(values) == num_completions,
        f"column `ranks`: must be a list with one rank for each completion, got {values!r} for {num_completions} "
        "completions. Give null to those that nobody ranked.",
    )
    # NaN is the one value that differs from itself: Arrow and pandas put it where whole numbers stood beside nulls
    ranks = [None if value is None or value != value or value == -1 else value for value in values]
    require(
        all(rank is None or (is_whole(rank) and rank >= 0) for rank in ranks),
        f"column `ranks`: must be whole numbers from 0, lower for better, or null for unranked, got {values!r}. "
        "If they are scores, convert them with `from_scores`.",
    )
    dense = {rank: n for n, rank in enumerate(sorted(set(ranks) - {None}), start=1)}
    return [dense.get(rank) for rank in ranks]


def _read_pairs(pairs: Any, num_completions: int) -> list[list[int]]:
    require(
        isinstance(pairs, list) and len(pairs) > 0,
        f"column `pairs`: must be a list of one or more judgements, got {pairs!r}. Give null to rows without.",
    )
    for pair in pairs:
        is_valid = isinstance(pair, list) and len(pair) == 3 and all(map(is_whole, pair))
        is_valid = is_valid and all(i in range(num_completions) for i in pair[:2]) and pair[0] != pair[1]
        require(
            is_valid and pair[2] in (0, 1, 2),
            "column `pairs`: must hold [i, j, v] with two different completions, numbered from 0, and v = 1 (i is "
            f"better), 2 (j is) or 0 (neither), got {pair!r} for {num_completions} completions. Recode or remove it.",
        )
    return [[int(value) for value in pair] for pair in pairs]


# --- Datasets ---


def prepare_rankings(
    dataset: Dataset | IterableDataset,
    on_error: str = "raise",
    dataset_name: str = "train",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Normalize all rows with [`normalize_ranking`]: `ranks` take the place of `ranking`, other columns stay.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Of the ranking type.
        on_error (`str`, *optional*, defaults to `"raise"`): `"drop"` leaves out rows that cannot be normalized, and
            logs how many and why; a streamed dataset leaves them out without a word.
        dataset_name (`str`, *optional*, defaults to `"train"`): What messages call the dataset.
        num_proc (`int`, *optional*): Number of processes, unless the dataset is streamed.

    Returns:
        The dataset, with `ranks` (null where pairs amount to no order) and, if it has them, `pairs` of whole numbers.

    Raises:
        ValueError: If the dataset is not of the ranking type, or a row cannot be normalized; the message says which
            row, counted from 0, and which column. A streamed dataset raises when it comes to the row.

    Example:

    ```python
    >>> dataset = Dataset.from_dict({"prompt": ["2 + 2 ="], "completions": [[" 5", " 4"]], "ranking": ["B > A"]})
    >>> prepare_rankings(dataset)[0]
    {'prompt': '2 + 2 =', 'completions': [' 5', ' 4'], 'ranks': [2, 1]}
    ```
    """
    require(on_error in ("raise", "drop"), f"`on_error` must be 'raise' or 'drop', got {on_error!r}.")
    dataset = plain(dataset)
    columns = get_dataset_column_names(dataset)
    require(
        is_ranking(columns),
        f"The {dataset_name} dataset must have columns `prompt`, `completions` and one of `ranks`, `ranking` and "
        f"`pairs`, got {columns}. Rename its columns, or convert it with a function of `ranking_converters` or `ranking_layouts`.",
    )
    is_streamed = isinstance(dataset, IterableDataset)
    if not is_streamed and len(dataset) == 0:
        return dataset  # its columns, which `map` would not change
    types = {"ranks": List(Value("int64")), "pairs": List(List(Value("int64"))), "ranking_error": Value("string")}
    if "pairs" not in columns:
        del types["pairs"]
    features = None
    if dataset.features is not None:
        # Types that are inferred fail on columns with nothing but nulls
        features = Features({name: type_ for name, type_ in dataset.features.items() if name != "ranking"} | types)
    kwargs = {} if is_streamed else {"num_proc": num_proc, "desc": f"Preparing {dataset_name} rankings"}
    replaced = [name for name in columns if name == "ranking"]
    settings = {"on_error": on_error, "dataset_name": dataset_name, "names": list(types)}
    dataset = dataset.map(
        _normalize_row, with_indices=True, remove_columns=replaced, features=features, fn_kwargs=settings, **kwargs
    )
    if on_error == "drop":
        if not is_streamed:
            report_dropped(dataset["ranking_error"], dataset_name)
        dataset = dataset.filter(lambda error: error is None, input_columns=["ranking_error"], **kwargs)
    return dataset.remove_columns("ranking_error")


def _normalize_row(row: dict[str, Any], index: int, on_error: str, dataset_name: str, names: list[str]) -> dict:
    try:
        normalized = normalize_ranking(row)
    except ValueError as error:
        if on_error == "raise":
            raise ValueError(f"{dataset_name} row {index}, {error}") from None
        normalized = {"ranking_error": str(error)}
    return {name: normalized.get(name) for name in names}
