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

from ..data.rollouts import ROLLOUT_COLUMNS
from .dataset_cards import describe_rankings, describe_rollouts, describe_samples
from .metadata import check_language, check_licence
from .model_card import TEMPLATES
from .uploading import full_repo_id, upload


SHARD_SIZE = 500 * 2**20  # bytes in memory
SHARDS = "data/*-?????-of-?????.parquet"  # a pattern of all names that `_write` gives


def publish_rankings(
    rankings: Dataset | DatasetDict,
    repo_id: str,
    licence: str,
    collected: str,
    folder: str | Path,
    *,
    models: str | list[str] | None = None,
    title: str | None = None,
    language: str | list[str] | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    tags: str | list[str] | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """
    Publish a dataset of the `ranking` type, which `load_dataset(repo_id)` then gives back.

    Args:
        rankings ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): With the columns of [`~trl_ext.data.rankings`], and perhaps
            those of [`collection.collected_rankings`]. A dataset alone becomes the split `train`.
        repo_id (`str`): Where to. A name without a namespace is one of the token's user. Data that an earlier publication
            left there are deleted, though earlier commits have them still: `HfApi.super_squash_history` forgets those.
        licence (`str`): Under which it may be used, by the Hub's identifier, e.g. `"cc-by-4.0"`. Yours to choose: there
            is no default.
        collected (`str`): How: who ranked, what they were told, where prompts and completions are from.
        folder (`str` or `Path`): Where the files are written first, and stay. Of what else lies there nothing is uploaded.
        models (`str` or `list[str]`, *optional*): Hub ids of models that were trained on it.
        title (`str`, *optional*): By default the repository's name.
        language (`str` or `list[str]`, *optional*): Of the texts, as codes such as `"en"`.
        licence_name, licence_link (`str`, *optional*): Of a licence that the Hub does not know, with `licence="other"`.
        tags (`str` or `list[str]`, *optional*): For the card's metadata.
        private (`bool`, *optional*, defaults to `False`): Only for those with access. A repository that is there and
            public is refused.
        token (`str`, *optional*): By default the one that `hf auth login` stored.

    Returns:
        `str`: The commit's address.

    Raises:
        ValueError: for rankings that could not be trained on, without `collected`, or for a licence or language that the
            Hub does not take.
        [`~trl_ext.uploading.PublishError`]: where the upload fails.
    """
    licensed = _licence_and_language(licence, licence_name, licence_link, language)
    _check_texts(collected=collected)
    models = _listed(models)
    _check_ids(models=models)
    splits = _splits_of(rankings, columns=[])  # of which `describe_rankings` knows more
    metadata = licensed | {"tags": {"preference", "ranking", "rlhf", *_listed(tags)}}
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
    language: str | list[str] | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    tags: str | list[str] | None = None,
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
        ValueError: for other data than recorded rollouts, or as [`publish_rankings`].
        [`~trl_ext.uploading.PublishError`]: where the upload fails.
    """
    licensed = _licence_and_language(licence, licence_name, licence_link, language)
    _check_texts(collected=collected)
    _check_ids(model=[model], reward=[reward])
    splits = _splits_of(rollouts, ROLLOUT_COLUMNS)
    metadata = licensed | {
        "task_categories": ["reinforcement-learning", "text-generation"],
        "tags": {"rlhf", "rollouts", "token-level", *_listed(tags)},
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
    language: str | list[str] | None = None,
    licence_name: str | None = None,
    licence_link: str | None = None,
    tags: str | list[str] | None = None,
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
        ValueError: for data without prompts, completions and scores, or as [`publish_rankings`].
        [`~trl_ext.uploading.PublishError`]: where the upload fails.
    """
    licensed = _licence_and_language(licence, licence_name, licence_link, language)
    _check_texts(collected=collected)
    _check_ids(model=[model], reward=[reward])
    splits = _splits_of(samples, ["prompt", "completion", "score"])
    metadata = licensed | {
        "task_categories": ["text-generation"],
        "tags": {"best-of-n", "rejection-sampling", "sft", *_listed(tags)},
    }
    content = describe_samples(splits) | {"collected": collected, "model": model, "reward": reward, "title": title}
    content["imitated"] = "kept" if "kept" in splits else next(iter(splits))
    return _publish(splits, "samples_dataset.md", metadata, content, repo_id, folder, private, token)


def _check_texts(**texts: str) -> None:
    for name, value in texts.items():
        if not value or not value.strip():
            raise ValueError(f"`{name}` is empty. Whoever finds the dataset needs it.")


def _licence_and_language(
    licence: str, name: str | None, link: str | None, language: str | list[str] | None
) -> dict[str, Any]:
    """Metadata of a card, if the Hub takes it."""
    _check_texts(licence=licence)
    check_licence(licence, name, "licence", "licence_name")
    languages = None if language is None else _listed(language)
    if languages is not None:
        check_language(languages)
    named = {"license_name": name, "license_link": link}
    return {"license": licence, "language": languages} | {key: text for key, text in named.items() if text}


def _listed(names: str | list[str] | None) -> list[str]:
    """A name alone as a list of one, which would otherwise be read letter by letter."""
    return [names] if isinstance(names, str) else list(names or [])


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
    """Write Parquet and card to `folder`, and upload both in place of what was published before."""
    repo_id = full_repo_id(repo_id, token)
    folder, title = Path(folder), content["title"] or repo_id.split("/")[-1]
    shards = {name: _write(split, name, folder) for name, split in splits.items()}
    files = [{"split": name, "path": f"data/{name}-*-of-{number:05d}.parquet"} for name, number in shards.items()]
    card_data = DatasetCardData(
        **metadata | {"tags": sorted({"trl_ext", *metadata["tags"]})},
        pretty_name=title,
        configs=[{"config_name": "default", "data_files": files}],
    )
    content = content | {"title": title, "collected": content["collected"].strip(), "repo_id": repo_id}
    card = DatasetCard.from_template(card_data, template_path=str(TEMPLATES / template), **content)
    card.save(folder / "README.md")
    written = ["README.md", *(file["path"].replace("*", "?????") for file in files)]
    uploaded = upload(folder, repo_id, "dataset", private, token, allow_patterns=written, delete_patterns=[SHARDS])
    return uploaded.commit_url


def _write(split: Dataset, name: str, folder: Path) -> int:
    """Write a split in files of at most about [`SHARD_SIZE`]. Returns their number, which all their names have."""
    size = split.data.nbytes * len(split) / split.data.num_rows  # of rows that may be chosen from more
    num_shards = min(len(split), max(1, math.ceil(size / SHARD_SIZE)))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for index in range(num_shards):
        shard = split.shard(num_shards, index, contiguous=True)
        shard.to_parquet(folder / "data" / f"{name}-{index:05d}-of-{num_shards:05d}.parquet")
    return num_shards
