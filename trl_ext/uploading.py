"""Uploading to the Hub: trying again where it fails for a while, and saying how to finish where it fails for good."""

import logging
import shlex
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled


logger = logging.getLogger(__name__)  # datasets are published without accelerate's state as well

ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds, doubled after each attempt
PERMANENT = (400, 401, 403, 404, 409, 422)


class PublishError(RuntimeError):
    """An upload that did not succeed. Nothing is lost: the message has the command that finishes it from disk."""


def upload(
    folder: str | Path,
    repo_id: str,
    repo_type: str,
    private: bool | None = None,
    token: str | None = None,
    *,
    path_in_repo: str | None = None,
    ignore_patterns: Sequence[str] = (),
    revision: str | None = None,
    commit_message: str | None = None,
    begun: "Future[CommitInfo] | None" = None,
) -> CommitInfo:
    """
    Upload a folder, trying again with growing pauses where the Hub or the network fails for a while.

    Args:
        folder (`str` or `Path`): What to upload.
        repo_id (`str`): Where to; it is created if it is not there.
        repo_type (`str`): `"model"` or `"dataset"`.
        private (`bool`, *optional*): If it is created. By default as the namespace has it.
        token (`str`, *optional*): By default the one that `hf auth login` stored.
        path_in_repo (`str`, *optional*): Folder of the repository that takes it; by default its root.
        ignore_patterns (`Sequence[str]`, *optional*): Of files that are left out.
        revision (`str`, *optional*): Branch that takes it; by default `main`.
        commit_message (`str`, *optional*): Of the commit.
        begun (`Future[CommitInfo]`, *optional*): A first attempt at it, which is already under way.

    Returns:
        `CommitInfo`: With `commit_url` and `repo_url`.

    Raises:
        [`PublishError`]: with what went wrong and the command that finishes the upload.
    """
    api = HfApi(token=token)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            if begun is not None and attempt == 1:
                return begun.result()
            created = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=created.repo_id,
                repo_type=repo_type,
                folder_path=folder,
                path_in_repo=path_in_repo,
                ignore_patterns=list(ignore_patterns),
                revision=revision,
                commit_message=commit_message,
            )
        except HFValidationError:  # a name that no repository can have
            raise
        except Exception as error:  # the client's own errors have no class in common
            # A repository that could not be created before the first attempt is none that is not there
            is_permanent = is_lasting(error) and not (attempt == 1 and begun is not None and status_of(error) == 404)
            if is_permanent or attempt == ATTEMPTS:
                command = finishing_command(
                    folder, repo_id, repo_type, private, path_in_repo, ignore_patterns, revision
                )
                raise PublishError(
                    f"{cause_of(error, repo_id)} What was to be published lies in {folder}. Finish with: {command}"
                ) from error
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            logger.warning(
                f"Upload to {repo_id} failed ({status_of(error) or type(error).__name__}); again in {wait:g} s."
            )
            time.sleep(wait)


def status_of(error: BaseException | None) -> int | None:
    """The Hub's answer, which the client wraps where a large file failed; None if there was none."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return None if error is None else error.response.status_code


def is_lasting(error: BaseException) -> bool:
    """Whether the same would fail again."""
    return status_of(error) in PERMANENT or isinstance(error, OfflineModeIsEnabled | FileNotFoundError | ValueError)


def cause_of(error: BaseException, repo_id: str) -> str:
    """What went wrong and how to mend it, in a sentence or two, without what the client knows of requests."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to publish."
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is no longer there."
    status = status_of(error)
    if status is None and isinstance(error, ValueError):  # such as a folder that is not there
        return str(error)
    causes = {
        401: "The Hub does not know the token. Log in with `hf auth login`, or set HF_TOKEN.",
        403: f"The token may not write to {repo_id}. Use one with write access to that namespace.",
    }
    other = f"The Hub answered {status}." if status else f"The connection failed ({type(error).__name__})."
    return causes.get(status, other)


def finishing_command(
    folder: str | Path,
    repo_id: str,
    repo_type: str,
    private: bool | None,
    path_in_repo: str | None,
    ignore_patterns: Sequence[str],
    revision: str | None,
) -> str:
    """For a shell."""
    parts = ["hf", "upload", repo_id, str(folder), path_in_repo or ".", "--repo-type", repo_type]
    for pattern in ignore_patterns:
        parts += ["--exclude", pattern]
    parts += ["--private"] if private else []
    return shlex.join(parts + (["--revision", revision] if revision else []))
