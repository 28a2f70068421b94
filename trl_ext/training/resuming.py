"""Training that resumes from the last checkpoint of a repository of the Hub, by its name."""

import os
import re

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


LAST_CHECKPOINT = "last-checkpoint"  # the parent's name for it with `hub_strategy="checkpoint"`
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local_checkpoint(resume_from_checkpoint, args: TrainingArguments):
    """Returns `resume_from_checkpoint`, or the downloaded folder if that is the name of a repository of the Hub."""
    is_path = isinstance(resume_from_checkpoint, str | os.PathLike)
    if not is_path or os.path.isdir(resume_from_checkpoint) or not REPO_ID.fullmatch(str(resume_from_checkpoint)):
        return resume_from_checkpoint
    return checkpoint_from_hub(str(resume_from_checkpoint), args.hub_token, args.hub_revision)


def checkpoint_from_hub(repo_id: str, token: str | None = None, revision: str | None = None) -> str:
    """
    Downloads the last checkpoint of a repository.

    Args:
        repo_id (`str`): The repository, to which a trainer pushed with `hub_strategy="checkpoint"` or `"all_checkpoints"`.
        token (`str`, *optional*): By default the one that `hf auth login` stored.
        revision (`str`, *optional*): Branch that it pushed to; by default `main`.

    Returns:
        `str`: The folder to resume from.

    Raises:
        ValueError: if it holds no checkpoint, or is not there.
    """
    try:
        files = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"`resume_from_checkpoint={repo_id!r}` is no folder here, and no repository on the Hub that can be read "
            f"({type(error).__name__}). Check the name, the token and `hub_revision`."
        ) from error
    folders = {file.split("/")[0] for file in files if "/" in file}
    numbered = [name for name in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", name)]
    if LAST_CHECKPOINT not in folders and not numbered:
        raise ValueError(
            f"`resume_from_checkpoint={repo_id!r}` is no folder here, and a repository without checkpoints on the Hub. "
            "They are pushed with `hub_strategy='checkpoint'` or 'all_checkpoints'."
        )
    newest = max(numbered, key=lambda name: int(name.split("-")[1]), default=None)
    name = LAST_CHECKPOINT if LAST_CHECKPOINT in folders else newest
    return os.path.join(snapshot_download(repo_id, revision=revision, allow_patterns=f"{name}/*", token=token), name)
