"""Uploads to the Hub: tried again if they fail for a while, and told how to finish if they fail for good."""

import logging
import re
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)


logger = logging.getLogger(__name__)  # not accelerate's, as datasets are published without its state too

ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds, doubled after each attempt
PERMANENT = (400, 401, 402, 403, 404, 409, 410, 413, 422, 451)
REASON_LENGTH = 600  # characters of the Hub's words that are shown
# Words of a 403 that is about something else than the token
NOT_THE_TOKEN = re.compile(
    r"storage|\bspace\b|quota|limit|\bplan\b|billing|\bpa(y|id)|disabled|archived|suspend|blocked|terms|contact", re.I
)


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
    allow_patterns: Sequence[str] | None = None,
    ignore_patterns: Sequence[str] = (),
    delete_patterns: Sequence[str] = (),
    revision: str | None = None,
    commit_message: str | None = None,
    begun: "Future[CommitInfo] | None" = None,
) -> CommitInfo:
    """
    Uploads a folder, trying again with growing pauses if the Hub or the network fails for a while.

    Args:
        folder (`str` or `Path`): Folder to upload.
        repo_id (`str`): Repository that takes the files; created if it does not exist.
        repo_type (`str`): `"model"` or `"dataset"`.
        private (`bool`, *optional*): True refuses an existing public repository, and creates a new one as private. By
            default it is created as the namespace has it.
        token (`str`, *optional*): By default the one that `hf auth login` stored.
        path_in_repo (`str`, *optional*): Folder of the repository that takes it; by default its root.
        allow_patterns (`Sequence[str]`, *optional*): Patterns of files that are uploaded; by default all.
        ignore_patterns (`Sequence[str]`, *optional*): Patterns of files that are left out.
        delete_patterns (`Sequence[str]`, *optional*): Patterns of files that the same commit deletes from the repository,
            unless it uploads them.
        revision (`str`, *optional*): Branch that takes it; by default `main`.
        commit_message (`str`, *optional*): Message of the commit.
        begun (`Future[CommitInfo]`, *optional*): A first attempt at it, which is already under way.

    Returns:
        `CommitInfo`: With `commit_url` and `repo_url`.

    Raises:
        [`PublishError`]: with what went wrong and the command that finishes the upload.
    """
    api = HfApi(token=token)

    def attempt(number: int) -> CommitInfo:
        if begun is not None and number == 1:
            return begun.result()
        return api.upload_folder(
            repo_id=prepare_repo(api, repo_id, repo_type, private),
            repo_type=repo_type,
            folder_path=folder,
            path_in_repo=path_in_repo,
            allow_patterns=None if allow_patterns is None else list(allow_patterns),
            ignore_patterns=list(ignore_patterns),
            delete_patterns=list(delete_patterns),
            revision=revision,
            commit_message=commit_message,
        )

    patterns = {"--include": allow_patterns or (), "--exclude": ignore_patterns, "--delete": delete_patterns}
    rest = how_to_finish(folder, repo_id, repo_type, private, patterns, path_in_repo, revision)
    return persist(attempt, repo_id, rest, is_begun=begun is not None)


def persist(attempt: Callable[[int], Any], repo_id: str, rest: str, is_begun: bool = False) -> Any:
    """
    Calls `attempt` again, with growing pauses, if it fails for a while.

    Args:
        attempt (`Callable`): Takes the attempt's number, from 1.
        repo_id (`str`): Repository that messages name.
        rest (`str`): Text of a [`PublishError`] after the cause.
        is_begun (`bool`, *optional*, defaults to `False`): True if the first attempt supposes that the repository
            exists; the later ones create it.
    """
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt(number)
        except HFValidationError:  # a name that no repository can have
            raise
        except Exception as error:  # the client's own errors have no class in common
            is_missing = is_begun and number == 1 and status_of(error) == 404
            if number == ATTEMPTS or is_lasting(error) and not is_missing:
                raise PublishError(f"{cause_of(error, repo_id)} {rest}") from error
            wait = FIRST_WAIT * 2 ** (number - 1)
            logger.warning(
                f"Upload to {repo_id} failed ({status_of(error) or type(error).__name__}); again in {wait:g} s."
            )
            time.sleep(wait)


def prepare_repo(api: HfApi, repo_id: str, repo_type: str, private: bool | None) -> str:
    """
    Creates a repository unless it exists, and compares its visibility with the one asked for.

    Returns:
        `str`: Its id, with the namespace.
    """
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if private is not None:
        compare_visibility(api, repo_id, repo_type, private)
    return repo_id


def compare_visibility(api: HfApi, repo_id: str, repo_type: str, private: bool) -> None:
    """
    Warns of an existing repository that is more private than asked for.

    Raises:
        ValueError: if the repository should be private and is public.
    """
    is_private = api.repo_info(repo_id, repo_type=repo_type).private
    settings = f"{api.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}/settings"
    if private and not is_private:
        raise ValueError(
            f"{repo_id} is there already and public, but it should be private, so nothing was uploaded. Make it private on "
            f"{settings}, take another name, or do not ask for a private one."
        )
    if is_private and not private:
        logger.warning(f"{repo_id} is there already and private, and stays so. {settings} changes it.")


def full_repo_id(repo_id: str, token: str | None = None) -> str:
    """
    Returns the id with its namespace, by default the token's user.

    Raises:
        [`PublishError`]: if the Hub does not say who that is.
    """
    if "/" in repo_id:
        return repo_id
    rest = f"Nothing was written. With its namespace, such as 'your-name/{repo_id}', `repo_id` need not be asked for."
    return f"{persist(lambda _: HfApi(token=token).whoami()['name'], repo_id, rest)}/{repo_id}"


def answer_of(error: BaseException | None) -> HfHubHTTPError | None:
    """Returns the Hub's answer, which the client wraps if a large file failed; None if there was no answer."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def status_of(error: BaseException | None) -> int | None:
    """Returns the status of the Hub's answer; None if there was no answer."""
    answer = answer_of(error)
    return None if answer is None else answer.response.status_code


def is_lasting(error: BaseException) -> bool:
    """Returns True if the same request would fail again."""
    lasting = OfflineModeIsEnabled | FileNotFoundError | LocalTokenNotFoundError | ValueError
    return status_of(error) in PERMANENT or status_of(error) is None and isinstance(error, lasting)


def cause_of(error: BaseException, repo_id: str) -> str:
    """Says why an upload failed, in the Hub's words if it has any, and how to mend that, without details of requests."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to publish."
    if isinstance(error, LocalTokenNotFoundError):
        return "There is no token. Log in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is no longer there."
    answer = answer_of(error)
    if answer is None and isinstance(error, ValueError):  # such as a folder that is not there
        return str(error)
    if answer is None:
        return f"The connection failed ({type(error).__name__})."
    status, reason = answer.response.status_code, " ".join((answer.server_message or "").split())
    shown = reason.rstrip(".") if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]} .."
    said = f"The Hub answered {status}: {shown}." if shown else f"The Hub answered {status}."
    advice = {
        400: "The same would be refused again: mend it first.",
        401: "The Hub does not know the token. Log in with `hf auth login`, or set HF_TOKEN.",
        403: f"The token may not write to {repo_id}. Use one with write access to that namespace.",
    }
    if status not in advice or status == 403 and NOT_THE_TOKEN.search(reason):
        return said
    return f"{said} {advice[status]}"


def how_to_finish(
    folder: str | Path,
    repo_id: str,
    repo_type: str,
    private: bool | None,
    patterns: dict[str, Sequence[str]],
    path_in_repo: str | None = None,
    revision: str | None = None,
) -> str:
    """Names the folder, and the command for a shell that uploads it, with the patterns of files by the command's options."""
    parts = ["hf", "upload", repo_id, str(folder), path_in_repo or ".", "--repo-type", repo_type]
    for option, given in patterns.items():
        for pattern in given:
            parts += [option, pattern]
    parts += ["--private"] if private else []
    command = shlex.join(parts + (["--revision", revision] if revision else []))
    check = f"See that {repo_id} is not public, if it is there already: the command does not. " if private else ""
    return f"What was to be published lies in {folder}. {check}Finish with: {command}"
