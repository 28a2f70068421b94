"""
A collection of rankings: the items to judge, and the judgements of all annotators, in files that survive a kill.

A folder holds

    completions.jsonl            items: `prompt`, `completions`, and perhaps `id` (else the texts give one) and
                                 `sources`, who wrote each completion (a letter)
    judgements-<annotator>.jsonl a line for each act of an annotator, in order; nothing is ever rewritten

A line is written to disk before the next item is shown, so a process that is killed loses nothing that was answered; a
line that was cut in the middle by a loss of power is not one, and its item is asked again. The last line about an item
counts: undoing is a line, too. A judgement is of the texts that were shown: where an item has others by now, it
is asked again.
"""

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from ..ranking.agreement import ranking_agreement
from .items import COMPLETIONS_FILE, read_items
from .judgements import NAME, Judgements
from .rows import logger, require


def all_judgements(folder: str | Path) -> list[Judgements]:
    """Returns the judgements of all annotators."""
    prefix = "judgements-"
    files = sorted(Path(folder).glob(f"{prefix}*.jsonl"))
    names = [file.stem.removeprefix(prefix) for file in files]
    for file, name in zip(files, names, strict=True):
        require(
            NAME.fullmatch(name), f"{file}: must have letters, digits and . _ - only, got {name!r}. Rename the file."
        )
    return [Judgements(folder, name) for name in names]


def agreement(folder: str | Path) -> dict[str, float] | None:
    """Returns the [`ranking_agreement`] of a folder's annotators; None while no two of them have ranked the same item."""
    everybody = all_judgements(folder)
    rankings = []
    for item in read_items(folder):
        ranks = [theirs[item.id]["ranks"] for theirs in everybody if item in theirs]
        rankings.append([r for r in ranks if r is not None])
    try:
        return ranking_agreement(rankings)
    except ValueError:
        return None


def collected_rankings(folder: str | Path) -> Dataset:
    """
    Returns the judgements as a dataset of the `ranking` type, a row for each: `prompt`, `completions`, `ranks`, and
    `id`, `annotator`, `sources`, `seconds` and `flag`. Skipped items are left out; so are, with a warning, judgements of
    items that the folder does not have any more.

    Raises:
        ValueError: if nothing was ranked yet.
    """
    items = {item.id: item for item in read_items(folder)}
    rows, num_stale = [], 0
    for judgements in all_judgements(folder):
        for record in judgements:
            item = items.get(record["id"])
            if item not in judgements:
                num_stale += record["status"] == "ranked"
            elif record["status"] == "ranked":
                shown = {"prompt": item.prompt, "completions": item.completions, "sources": item.sources}
                given = {"ranks": record["ranks"], "id": item.id, "annotator": judgements.annotator}
                effort = {"seconds": float(record["seconds"]), "flag": record["flag"]}
                rows.append(shown | given | effort)
    if num_stale:
        PartialState()  # the logger asks it which process this is
        logger.warning(
            f"Left out {num_stale} rankings: {COMPLETIONS_FILE} in {folder} does not have what was ranked, or has other "
            "texts under the same id by now. They stay in the files of judgements; put the old file back to use them."
        )
    if not rows:
        raise ValueError(f"Nothing was ranked in {folder} yet. Start recipes/rank_completions.py.")
    return Dataset.from_list(rows)
