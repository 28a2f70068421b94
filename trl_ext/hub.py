"""
Publishing datasets on the Hub: Parquet with its features declared, a card that says what is in it, and an upload that
can be finished from disk if it fails.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import DatasetCard, DatasetCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .dataset_cards import describe_rankings, describe_rollouts, describe_samples
from .model_card import TEMPLATES
from .ranking_data import prepare_rankings
from .rollouts import ROLLOUT_COLUMNS
from .uploading import upload


SHARD_SIZE = 500 * 2**20  # bytes in memory


def publish_rankings(
    rankings: Dataset | DatasetDict,
    repo_id: str,
    licence: str,
    collected: str,
    folder: str | Path,
    *,
    models: list[str] | None = None,
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
        models (`list[str]`, *optional*): Hub ids of models that were trained on it.
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
    _check_texts(licence, collected)
    _check_ids(models=models or [])
    splits = _splits_of(rankings, columns=[])  # of which `prepare_rankings` knows more
    for name, split in splits.items():
        prepare_rankings(split, dataset_name=name)  # raises where it is malformed
    metadata = {"license": licence, "language": language, "tags": {"preference", "ranking", "rlhf", *(tags or [])}}
    content = describe_rankings(splits) | {"collected": collected, "models": models, "title": title}
    return _publish(splits, "rankings_dataset.md", metadata, content, repo_id, folder, private, token)


def publish_rollouts(
    rollouts: Dataset | DatasetDict,
    repo_id: str,
    licence: str,
    collected: str,
    folder: str | Path,
    *,
    model: str | None = None,
    reward: str | None = None,
    title: str | None = None,
    language: list[str] | None = None,
    tags: list[str] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """
    Publish what a training with `save_rollouts` recorded, which `load_dataset(repo_id)` then gives back.

    Args:
        rollouts ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): From [`~trl_ext.load_rollouts`]; all of it, or
            those splits and rows that should be seen.
        collected (`str`): How: which policy was trained on which prompts, with what reward and algorithm.
        model (`str`, *optional*): Hub id of the policy that came out of the training.
        reward (`str`, *optional*): Hub id of the reward model.
        All others as in [`publish_rankings`], and so are the results.

    Raises:
        ValueError: for other data than recorded rollouts, or without `licence` or `collected`.
        [`~trl_ext.uploading.PublishError`]: where the upload fails.
    """
    _check_texts(licence, collected)
    _check_ids(model=[model], reward=[reward])
    splits = _splits_of(rollouts, ROLLOUT_COLUMNS)
    metadata = {
        "license": licence,
        "language": language,
        "task_categories": ["reinforcement-learning", "text-generation"],
        "tags": {"rlhf", "rollouts", "token-level", *(tags or [])},
    }
    content = describe_rollouts(splits) | {"collected": collected, "model": model, "reward": reward, "title": title}
    return _publish(splits, "rollouts_dataset.md", metadata, content, repo_id, folder, private, token)


def publish_samples(
    samples: Dataset | DatasetDict,
    repo_id: str,
    licence: str,
    collected: str,
    folder: str | Path,
    *,
    model: str | None = None,
    reward: str | None = None,
    title: str | None = None,
    language: list[str] | None = None,
    tags: list[str] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """
    Publish completions that were sampled and scored, and those of them that were kept, which `load_dataset(repo_id)`
    then gives back.

    Args:
        samples ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): From [`~trl_ext.CompletionSampler.sample`] and
            [`~trl_ext.keep_best`], e.g. `DatasetDict(samples=samples, kept=keep_best(samples))`. The card shows how to
            fine-tune on `kept`, or on the first split if there is none. A dataset alone becomes the split `train`.
        collected (`str`): How: which prompts, how many completions of each, what was kept.
        model (`str`, *optional*): Hub id of the policy they were sampled from.
        reward (`str`, *optional*): Hub id of the reward model.
        All others as in [`publish_rankings`], and so are the results.

    Raises:
        ValueError: for data without prompts, completions and scores, or without `licence` or `collected`.
        [`~trl_ext.uploading.PublishError`]: where the upload fails.
    """
    _check_texts(licence, collected)
    _check_ids(model=[model], reward=[reward])
    splits = _splits_of(samples, ["prompt", "completion", "score"])
    metadata = {
        "license": licence,
        "language": language,
        "task_categories": ["text-generation"],
        "tags": {"best-of-n", "rejection-sampling", "sft", *(tags or [])},
    }
    content = describe_samples(splits) | {"collected": collected, "model": model, "reward": reward, "title": title}
    content["imitated"] = "kept" if "kept" in splits else next(iter(splits))
    return _publish(splits, "samples_dataset.md", metadata, content, repo_id, folder, private, token)


def _check_texts(licence: str, collected: str) -> None:
    for name, value in (("licence", licence), ("collected", collected)):
        if not value or not value.strip():
            raise ValueError(f"`{name}` is empty. Whoever finds the dataset needs it.")


def _check_ids(**ids: list[str | None]) -> None:
    for argument, names in ids.items():
        for name in filter(None, names):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(
                    f"`{argument}` takes Hub ids, e.g. 'user/name', and {name!r} is none: {error}"
                ) from None


def _splits_of(data: Dataset | DatasetDict, columns: Iterable[str]) -> DatasetDict:
    """By name, if `load_dataset` could give them back and each has these columns."""
    splits = data if isinstance(data, DatasetDict) else DatasetDict({"train": data})
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


def _publish(
    splits: DatasetDict,
    template: str,
    metadata: dict[str, Any],
    content: dict[str, Any],
    repo_id: str,
    folder: str | Path,
    private: bool,
    token: str | None,
) -> str:
    """Write Parquet and card to `folder`, and upload both."""
    folder, title = Path(folder), content["title"] or repo_id.split("/")[-1]
    files = [{"split": name, "path": _write(split, name, folder)} for name, split in splits.items()]
    card_data = DatasetCardData(
        **metadata | {"tags": sorted({"trl_ext", *metadata["tags"]})},
        pretty_name=title,
        configs=[{"config_name": "default", "data_files": files}],
    )
    content = content | {"title": title, "collected": content["collected"].strip(), "repo_id": repo_id}
    card = DatasetCard.from_template(card_data, template_path=str(TEMPLATES / template), **content)
    card.save(folder / "README.md")
    return upload(folder, repo_id, "dataset", private, token).commit_url


def _write(split: Dataset, name: str, folder: Path) -> str:
    """
    In files of at most about [`SHARD_SIZE`]. Returns the pattern of their names, which no other number of files has:
    what an earlier publication left in the repository is none of them.
    """
    size = split.data.nbytes * len(split) / split.data.num_rows  # of rows that may be chosen from more
    num_shards = min(len(split), max(1, math.ceil(size / SHARD_SIZE)))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        shard = split.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / "data" / f"{name}-{index:05d}-of-{num_shards:05d}.parquet")
    return f"data/{name}-*-of-{num_shards:05d}.parquet"
