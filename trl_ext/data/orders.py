"""The order that a row's judgement amounts to, whether given as `ranks`, as text or as pairs."""

from typing import Any

from .notation import parse_ranking
from .rows import is_whole, require


def read_judgements(row: dict[str, Any], num_completions: int) -> tuple[list | None, list | None]:
    """
    Reads the judgement of a row without null columns.

    Args:
        row (`dict[str, Any]`): With `ranks`, `ranking` or `pairs`; pairs may stand beside ranks that say the same.
        num_completions (`int`): K.

    Returns:
        `tuple[list | None, list | None]`: K ranks from 1 without gaps, None for unranked, or None for pairs that amount
        to no order; and the pairs, if the row has them.

    Raises:
        ValueError: for a judgement that is missing or does not fit; it names the column.
    """
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


def _read_ranking(text: Any, num_completions: int) -> list[int | None]:
    require(
        isinstance(text, str),
        f"column `ranking`: must be text such as 'B > C = D > A', got {text!r}. Numbers belong in `ranks`.",
    )
    try:
        return parse_ranking(text, num_completions)
    except ValueError as error:
        raise ValueError(f"column `ranking`: {error}") from None


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


def weak_order(pairs: list[list[int]], num_completions: int) -> list[int | None] | None:
    """
    Returns the ranks that judgements of pairs amount to, or None.

    They amount to ranks if no judgement contradicts the others or their consequences (A = B and B > C give A > C), and
    every two of the completions that were judged are compared by them.

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
        # If none is unbeaten, the groups go in a circle, or one beats itself; if several are, nothing compares them
        if len(best) != 1:
            return None
        remaining -= best
        ranks[best.pop()] = len(ranks) + 1
    return [ranks.get(number) for number in group]
