"""The notation of rankings: `B > C = D > A`, where A is the first completion."""

import re
import string
import unicodedata


# NFKC takes care of full-width forms, and leaves these to be read as the three symbols
SYMBOLS = str.maketrans({"≻": ">", "≺": "<", **dict.fromkeys("~∼≈≃≅〜", "=")})


def parse_ranking(text: str, num_completions: int) -> list[int | None]:
    r"""
    Reads the ranks that a text such as `"B > C = D > A"` gives.

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
    text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)
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
    Writes a ranking as the text from which [`parse_ranking`] reads it back. Unranked completions are left out.

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
    """Returns the letters of the completions, or their numbers where there are more than letters."""
    if num_completions <= len(string.ascii_uppercase):
        return list(string.ascii_uppercase[:num_completions])
    return [str(i + 1) for i in range(num_completions)]
