"""
The publication of a dataset: Parquet with its features declared, a card, and an upload that can be finished from disk if
it fails.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .metadata import check_language, check_licence
from .model_card import TEMPLATES
from .uploading import full_repo_id, upload


SHARD_SIZE = 500 * 2**20  # bytes in memory
SHARDS = "data/*-?????-of-?????.parquet"  # matches all names that `_write` gives


@dataclass(frozen=True)
class Publication:
    """The arguments that all datasets are published with, for which see [`publish_rankings`]; some are refused."""

    repo_id: str
    licence: str
    collected: str
    folder: str | Path
    title: str | None
    language: str | list[str] | None
    licence_name: str | None
    licence_link: str | None
    tags: str | list[str] | None
    private: bool
    token: str | None

    def __post_init__(self):
        self._check_text("licence")
        check_licence(self.licence, self.licence_name, "licence", "licence_name")
        if self.language is not None:
            check_language(self.language)
        self._check_text("collected")

    def _check_text(self, name: str) -> None:
        """Refuses an argument that is empty."""
        if not (getattr(self, name) or "").strip():
            raise ValueError(f"`{name}` is empty. Whoever finds the dataset needs it.")

    def upload(
        self,
        splits: DatasetDict,
        template: str,
        content: dict[str, Any],
        tags: set[str],
        task_categories: list[str] | None = None,
    ) -> str:
        """
        Writes Parquet and card to `folder`, and uploads both in place of an earlier publication.

        Args:
            splits ([`~datasets.DatasetDict`]): The data.
            template (`str`): File name of the card's template.
            content (`dict[str, Any]`): Variables of the template, beside those that all have.
            tags (`set[str]`): Tags of this kind of dataset.
            task_categories (`list[str]`, *optional*): Tasks of the Hub that it is for.

        Returns:
            `str`: The commit's address.
        """
        repo_id = full_repo_id(self.repo_id, self.token)
        folder, title = Path(self.folder), self.title or repo_id.split("/")[-1]
        shards = {name: _write(split, name, folder) for name, split in splits.items()}
        files = [{"split": name, "path": f"data/{name}-*-of-{number:05d}.parquet"} for name, number in shards.items()]
        metadata = {
            "license": self.licence,
            "license_name": self.licence_name,
            "license_link": self.licence_link,
            "task_categories": task_categories,
        }
        card_data = DatasetCardData(
            **{key: value for key, value in metadata.items() if value},
            language=None if self.language is None else listed(self.language),
            tags=sorted({"trl_ext", *tags, *listed(self.tags)}),
            pretty_name=title,
            configs=[{"config_name": "default", "data_files": files}],
        )
        content = content | {"title": title, "collected": self.collected.strip(), "repo_id": repo_id}
        card = DatasetCard.from_template(card_data, template_path=str(TEMPLATES / template), **content)
        card.save(folder / "README.md")
        written = ["README.md", *(file["path"].replace("*", "?????") for file in files)]
        uploaded = upload(
            folder, repo_id, "dataset", self.private, self.token, allow_patterns=written, delete_patterns=[SHARDS]
        )
        return uploaded.commit_url


def _write(split: Dataset, name: str, folder: Path) -> int:
    """Writes a split in files of at most about `SHARD_SIZE`. Returns their number, which all their names have."""
    size = split.data.nbytes * len(split) / split.data.num_rows  # the split may be a choice of the table's rows
    num_shards = min(len(split), max(1, math.ceil(size / SHARD_SIZE)))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        shard = split.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / "data" / f"{name}-{index:05d}-of-{num_shards:05d}.parquet")
    return num_shards


def splits_of(data: Dataset | DatasetDict, columns: Iterable[str]) -> DatasetDict:
    """Returns the splits by name. Refuses those that lack `columns` or that `load_dataset` could not give back."""
    splits = data if isinstance(data, dict) else {"train": data}
    for name, split in splits.items():
        if not isinstance(split, Dataset):
            raise ValueError(
                f"The split {name!r} is a {type(split).__name__}. A `datasets.Dataset` can be published, such as "
                "`Dataset.from_list(list(stream))` of a stream."
            )
    splits = DatasetDict({name: split.with_format(None) for name, split in splits.items()})  # rows of plain values
    if not splits:
        raise ValueError("There is no split to publish.")
    first_name, first = next(iter(splits.items()))
    for name, split in splits.items():
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            raise ValueError(f"{name!r} cannot be the name of a split. Use letters, digits, `_` and `.`.")
        missing = [column for column in columns if column not in split.column_names]
        if missing:
            raise ValueError(f"The split {name!r} lacks {', '.join(missing)}; it has {', '.join(split.column_names)}.")
        if len(split) == 0:
            raise ValueError(f"The split {name!r} has no rows. Leave it out.")
        if split.features != first.features:
            raise ValueError(
                f"The splits {first_name!r} and {name!r} differ in their features, and could not be loaded together: "
                f"{first.features} and {split.features}. Cast one to the other's."
            )
    return splits


def check_ids(**ids: list[str | None]) -> None:
    """Refuses names, by argument, that no repository of the Hub can have."""
    for argument, names in ids.items():
        for name in filter(None, names):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(
                    f"`{argument}` takes Hub ids, e.g. 'user/name', and {name!r} is none: {error}"
                ) from None


def listed(names: str | list[str] | None) -> list[str]:
    """Returns names as a list, a name alone as a list of one."""
    return [names] if isinstance(names, str) else list(names or [])
