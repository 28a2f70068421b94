"""Uploading to the Hub: trying again where it fails for a while, and saying how to finish where it fails for good."""

import time
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


logger = get_logger(__name__)

ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds, doubled after each attempt
PERMANENT = (400, 401, 403, 404, 409, 422)


class PublishError(RuntimeError):
    """An upload that did not succeed. Nothing is lost: the message has the command that finishes it from disk."""


def upload(folder: str | Path, repo_id: str, repo_type: str, private: bool = False, token: str | None = None) -> str:
    """
    Upload a folder, trying again with growing pauses where the Hub or the network fails for a while.

    Args:
        folder (`str` or `Path`): What to upload.
        repo_id (`str`): Where to; it is created if it is not there.
        repo_type (`str`): `"model"` or `"dataset"`.
        private (`bool`, *optional*, defaults to `False`): If it is created.
        token (`str`, *optional*): By default the one that `hf auth login` stored.

    Returns:
        `str`: The commit's address.

    Raises:
        [`PublishError`]: with what went wrong and the command that finishes the upload.
    """
    api = HfApi(token=token)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, repo_type=repo_type, folder_path=folder).commit_url
        except ValueError:  # a name that no repository can have
            raise
        except Exception as error:  # the client's own errors have no class in common
            status = _status_of(error)
            if status in PERMANENT or attempt == ATTEMPTS:
                raise PublishError(_what_to_do(folder, repo_id, repo_type, error, status)) from error
            wait = FIRST_WAIT * 2 ** (attempt - 1)
            logger.warning(f"Upload to {repo_id} failed ({status or type(error).__name__}); again in {wait:g} s.")
            time.sleep(wait)


def _status_of(error: BaseException | None) -> int | None:
    """The Hub's answer, which the client wraps where a large file failed; None if there was none."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return None if error is None else error.response.status_code


def _what_to_do(folder, repo_id: str, repo_type: str, error: Exception, status: int | None) -> str:
    causes = {
        401: "The Hub does not know the token. Log in with `hf auth login`, or set HF_TOKEN.",
        403: f"The token may not write to {repo_id}. Use one with write access to that namespace.",
    }
    other = f"The Hub answered {status}." if status else f"The connection failed ({type(error).__name__})."
    cause = causes.get(status, other)
    command = f"hf upload {repo_id} {folder} --repo-type {repo_type}"
    return f"{cause} What was to be published lies in {folder}. Finish with: {command}"
