"""
Publishing datasets on the Hub: Parquet with its features declared, a card that says what is in it, and an upload that
can be finished from disk if it fails.
"""

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData

from .annotation import ranking_agreement
from .model_card import TEMPLATES
from .ranking_data import prepare_rankings
from .uploading import upload


RANKING_COLUMNS = {
    "prompt": "what was answered",
    "completions": "the answers",
    "ranks": "one for each completion: lower is better, equal is tied, null was not ranked",
    "pairs": "judgements `[i, j, v]` of two completions: v = 1 if i is better, 2 if j is, 0 for neither",
    "ranking": "the same as text",
    "id": "of the prompt with its completions; rows of several annotators share it",
    "annotator": "who ranked",
    "sources": "who wrote each completion",
    "seconds": "how long it took",
    "flag": "what the annotator thought wrong with the item",
}


def publish_rankings(
    rankings: Dataset | DatasetDict,
    repo_id: str,
    licence: str,
    collected: str,
    folder: str | Path,
    *,
    title: str | None = None,
    language: list[str] | None = None,
    tags: list[str] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """
    Publish a dataset of the `ranking` type, which `load_dataset(repo_id)` then gives back.

    Args:
        rankings ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): With the columns of [`ranking_data`], and perhaps
            those of [`collection.collected_rankings`]. A dataset alone becomes the split `train`.
        repo_id (`str`): Where to.
        licence (`str`): Under which it may be used, e.g. `"cc-by-4.0"`. Yours to choose: there is no default.
        collected (`str`): How: who ranked, what they were told, where prompts and completions are from.
        folder (`str` or `Path`): Where the files are written first, and stay.
        title (`str`, *optional*): By default the repository's name.
        language, tags (`list[str]`, *optional*): For the card's metadata.
        private (`bool`, *optional*, defaults to `False`): Only for those with access.
        token (`str`, *optional*): By default the one that `hf auth login` stored.

    Returns:
        `str`: The commit's address.

    Raises:
        ValueError: for rankings that could not be trained on, or without `licence` or `collected`.
        [`~trl_ext.uploading.PublishError`]: where the upload fails.
    """
    for name, value in (("licence", licence), ("collected", collected)):
        if not value or not value.strip():
            raise ValueError(f"`{name}` is empty. Whoever finds the dataset needs it.")
    splits = rankings if isinstance(rankings, DatasetDict) else DatasetDict({"train": rankings})
    for name, split in splits.items():
        prepare_rankings(split, dataset_name=name)  # raises where it is malformed
    folder = Path(folder)
    for name, split in splits.items():
        file = folder / "data" / f"{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        split.to_parquet(file)
    metadata = DatasetCardData(
        license=licence,
        language=language,
        pretty_name=title or repo_id.split("/")[-1],
        tags=sorted({"trl_ext", "preference", "ranking", "rlhf", *(tags or [])}),
        configs=[{"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}-*"} for s in splits]}],
    )
    content = describe_rankings(splits)
    card = DatasetCard.from_template(
        metadata,
        template_path=str(TEMPLATES / "rankings_dataset.md"),
        title=title or repo_id.split("/")[-1],
        repo_id=repo_id,
        collected=collected.strip(),
        **content,
    )
    card.save(folder / "README.md")
    return upload(folder, repo_id, "dataset", private, token).commit_url


def describe_rankings(splits: DatasetDict) -> dict[str, Any]:
    """What the card says of the data: counts, ties, shapes, agreement, columns, the first row."""
    first = next(iter(splits.values()))
    prepared = [row for name, split in splits.items() for row in prepare_rankings(split, dataset_name=name)]
    sizes, shapes, ties, pairs = Counter(), Counter(), 0, 0
    for row in prepared:
        sizes[len(row["completions"])] += 1
        ranks = [rank for rank in row["ranks"] or [] if rank is not None and rank >= 0]
        outcomes = (
            [a == b for a, b in itertools.combinations(ranks, 2)]
            if ranks
            else [value == 0 for _, _, value in row["pairs"]]
        )
        ties, pairs = ties + sum(outcomes), pairs + len(outcomes)
        if ranks:
            levels = sorted(set(ranks))
            shapes["".join(str(1 + levels.index(rank)) for rank in sorted(ranks))] += 1
    by_item = defaultdict(list)
    if {"id", "annotator", "ranks"} <= set(first.column_names):
        for split in splits.values():
            for row in split:
                if row["ranks"] is not None:
                    by_item[row["id"]].append(row["ranks"])
    annotators = (
        len({a for split in splits.values() for a in split["annotator"]}) if "annotator" in first.features else None
    )
    return {
        "num_rows": len(prepared),
        "num_prompts": len({json.dumps(row["prompt"]) for row in prepared}),
        "num_completions": sum(len(row["completions"]) for row in prepared),
        "num_pairs": pairs,
        "tie_rate": f"{ties / pairs:.1%}",
        "annotators": annotators,
        "agreement": _agreement(list(by_item.values())),
        "splits": [(name, len(split)) for name, split in splits.items()],
        "columns": [
            (name, _type_of(feature), RANKING_COLUMNS.get(name, "")) for name, feature in first.features.items()
        ],
        "sizes": sorted(sizes.items()),
        "shapes": shapes.most_common(5),
        "first_row": json.dumps(first[0], ensure_ascii=False, indent=2),
    }


def _agreement(rankings: list[list[list[int | None]]]) -> dict[str, str] | None:
    """None where no two annotators ranked the same."""
    try:
        measured = ranking_agreement(rankings)
    except ValueError:
        return None
    shown = {name: f"{measured[name]:.1%}" for name in ("agreement", "strict_agreement")}
    return shown | {"alpha": f"{measured['alpha']:.2f}"}


def _type_of(feature: Any) -> str:
    """`List(Value('string'))` as `list of string`."""
    text = str(feature).replace("Value('", "").replace("')", "")
    while "List(" in text:
        text = text.replace("List(", "list of ", 1)
    return text.replace(")", "").replace("|", "\\|")
