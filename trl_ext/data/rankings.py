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

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from trl.data_utils import get_dataset_column_names

from .orders import read_judgements
from .rows import PAIRS, RANKS, check_texts, plain, report_dropped, require


def is_ranking(example: dict[str, Any] | list[str]) -> bool:
    """
    Returns True if an example, or a dataset with these column names, is of the ranking type.

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
    Brings all kinds of judgement into one form. Normalizing a normalized row changes nothing.

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
    ranks, pairs = read_judgements(row, len(row["completions"]))
    if ranks is not None:
        ranks = [-1 if rank is None else rank for rank in ranks]
    normalized = {"prompt": row["prompt"], "completions": row["completions"], "ranks": ranks}
    return normalized if pairs is None else normalized | {"pairs": pairs}


def prepare_rankings(
    dataset: Dataset | IterableDataset,
    on_error: str = "raise",
    dataset_name: str = "train",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Normalizes all rows with [`normalize_ranking`]: `ranks` take the place of `ranking`, other columns stay.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): A dataset of the ranking type.
        on_error (`str`, *optional*, defaults to `"raise"`): `"drop"` leaves out rows that cannot be normalized, and
            logs how many and why; a streamed dataset leaves them out without a word.
        dataset_name (`str`, *optional*, defaults to `"train"`): Name of the dataset in messages.
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
        f"`pairs`, got {columns}. Rename its columns, or convert it with a function of `trl_ext.data`.",
    )
    is_streamed = isinstance(dataset, IterableDataset)
    if not is_streamed and len(dataset) == 0:
        return dataset  # `map` would not change its columns
    types = RANKS | (PAIRS if "pairs" in columns else {}) | {"ranking_error": Value("string")}
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
    """Returns the columns `names` of the normalized row, or says in `ranking_error` why there are none."""
    try:
        normalized = normalize_ranking(row)
    except ValueError as error:
        if on_error == "raise":
            raise ValueError(f"{dataset_name} row {index}, {error}") from None
        normalized = {"ranking_error": str(error)}
    return {name: normalized.get(name) for name in names}
