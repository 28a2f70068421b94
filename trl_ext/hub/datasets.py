"""Datasets that are published on the Hub: rankings, recorded rollouts, and samples of best-of-n."""

from pathlib import Path

from datasets import Dataset, DatasetDict

from ..data.rollouts import ROLLOUT_COLUMNS
from .dataset_cards import describe_rankings, describe_rollouts, describe_samples
from .publication import Publication, check_ids, listed, splits_of


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
    Publishes a dataset of the `ranking` type, which `load_dataset(repo_id)` then gives back.

    Args:
        rankings ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): With the columns of
            [`~trl_ext.data.rankings`], and perhaps those of [`~trl_ext.data.collection.collected_rankings`]. A dataset
            alone becomes the split `train`.
        repo_id (`str`): Repository that takes the dataset. A name without a namespace is one of the token's user. Data of
            an earlier publication are deleted, though earlier commits still have them: `HfApi.super_squash_history`
            forgets those.
        licence (`str`): Licence of the dataset, by the Hub's identifier, e.g. `"cc-by-4.0"`. Yours to choose: there is
            no default.
        collected (`str`): The way the data was collected: who ranked, by which instructions, and where prompts and
            completions are from.
        folder (`str` or `Path`): Folder in which the files are written first, and stay. Other files in it are not uploaded.
        models (`str` or `list[str]`, *optional*): Hub ids of models that were trained on it.
        title (`str`, *optional*): By default the repository's name.
        language (`str` or `list[str]`, *optional*): Languages of the texts, as codes such as `"en"`.
        licence_name, licence_link (`str`, *optional*): Name and address of a licence that the Hub does not know, with
            `licence="other"`.
        tags (`str` or `list[str]`, *optional*): Further tags of the card.
        private (`bool`, *optional*, defaults to `False`): True publishes to those with access only. An existing public
            repository is refused.
        token (`str`, *optional*): By default the one that `hf auth login` stored.

    Returns:
        `str`: The commit's address.

    Raises:
        ValueError: for rankings that could not be trained on, without `collected`, or for a licence or language that the
            Hub does not take.
        [`~trl_ext.hub.uploading.PublishError`]: if the upload fails.
    """
    publication = Publication(
        repo_id, licence, collected, folder, title, language, licence_name, licence_link, tags, private, token
    )
    models = listed(models)
    check_ids(models=models)
    splits = splits_of(rankings, columns=[])  # `describe_rankings` checks them
    content = describe_rankings(splits) | {"models": models}
    return publication.upload(splits, "rankings_dataset.md", content, {"preference", "ranking", "rlhf"})


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
    Publishes the rollouts that a training with `save_rollouts` recorded, which `load_dataset(repo_id)` then gives back.

    Args:
        rollouts ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): From [`~trl_ext.load_rollouts`]; all of it, or
            those splits and rows that should be seen.
        collected (`str`): The policy, prompts, reward and algorithm of the training.
        model (`str`, *optional*): Hub id of the policy that came out of the training.
        reward (`str`, *optional*): Hub id of the reward model.
        All others as in [`publish_rankings`], and so are the results.

    Raises:
        ValueError: for other data than recorded rollouts, or as [`publish_rankings`].
        [`~trl_ext.hub.uploading.PublishError`]: if the upload fails.
    """
    publication = Publication(
        repo_id, licence, collected, folder, title, language, licence_name, licence_link, tags, private, token
    )
    check_ids(model=[model], reward=[reward])
    splits = splits_of(rollouts, ROLLOUT_COLUMNS)
    content = describe_rollouts(splits) | {"model": model, "reward": reward}
    tasks = ["reinforcement-learning", "text-generation"]
    return publication.upload(splits, "rollouts_dataset.md", content, {"rlhf", "rollouts", "token-level"}, tasks)


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
    Publishes completions that were sampled and scored, and those of them that were kept, which `load_dataset(repo_id)`
    then gives back.

    Args:
        samples ([`~datasets.Dataset`] or [`~datasets.DatasetDict`]): From [`~trl_ext.CompletionSampler.sample`] and
            [`~trl_ext.keep_best`], e.g. `DatasetDict(samples=samples, kept=keep_best(samples))`. The card shows how to
            fine-tune on `kept`, or on the first split if there is none. A dataset alone becomes the split `train`.
        collected (`str`): The prompts, the number of completions of each, and the rule by which some were kept.
        model (`str`, *optional*): Hub id of the policy that the completions were sampled from.
        reward (`str`, *optional*): Hub id of the reward model.
        All others as in [`publish_rankings`], and so are the results.

    Raises:
        ValueError: for data without prompts, completions and scores, or as [`publish_rankings`].
        [`~trl_ext.hub.uploading.PublishError`]: if the upload fails.
    """
    publication = Publication(
        repo_id, licence, collected, folder, title, language, licence_name, licence_link, tags, private, token
    )
    check_ids(model=[model], reward=[reward])
    splits = splits_of(samples, ["prompt", "completion", "score"])
    imitated = "kept" if "kept" in splits else next(iter(splits))
    content = describe_samples(splits) | {"model": model, "reward": reward, "imitated": imitated}
    tags = {"best-of-n", "rejection-sampling", "sft"}
    return publication.upload(splits, "samples_dataset.md", content, tags, ["text-generation"])
