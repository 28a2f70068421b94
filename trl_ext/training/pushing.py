"""
Trainers on the Hub: a push that fails is tried again, loses nothing and stops no training; a checkpoint there is
resumed from by its repository's name.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.uploading import PublishError, cause_of, how_to_finish, is_lasting, persist, prepare_repo, upload


logger = get_logger(__name__)

# What the parent uploads with the rest of `output_dir`, and nobody means to publish: secrets, and who judged what
NOT_FOR_THE_HUB = (".env", ".env.*", ".netrc", "judgements*.jsonl")
# What the parent leaves out when it uploads `output_dir`, and that
IGNORED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", *NOT_FOR_THE_HUB, *(f"*/{pattern}" for pattern in NOT_FOR_THE_HUB))
LAST_CHECKPOINT = "last-checkpoint"  # the parent's name for it with `hub_strategy="checkpoint"`
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


class PushMixin:
    """
    Comes before the TRL trainer in a trainer's bases. What it changes:

    - a push that fails is tried again, with growing pauses; one in the middle of training that fails for good leaves a
      warning with the command that finishes it, and training goes on;
    - `push_to_hub()` that fails for good raises [`~uploading.PublishError`], with that command, once all is on disk;
    - what should be private (`private`, `hub_private_repo`) is not pushed to a repository that is public, and nothing is
      where secrets or judgements lie in `output_dir`, all of which the parent pushes;
    - `train(resume_from_checkpoint="user/name")` resumes from the last checkpoint of a repository of the Hub;
    - tokens are kept out of `training_args.bin`, which is published.
    """

    _saved_with_model: tuple[str, ...] = ()  # files and folders of a checkpoint that the parent does not know of
    _uploads = None  # the thread in which pushes are seen through, once there are any
    _push = None  # token, revision and `private` of the `push_to_hub` under way
    _is_seen_private = False  # the repository, where it should be

    def init_hf_repo(self, token=None, private=None):
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        try:
            if self._push is None and self.is_world_process_zero():
                refuse_to_publish(self.args.output_dir)
            if private and self.is_world_process_zero():  # the parent asks for what `hub_private_repo` says
                HfApi(token=token).create_repo(repo_id, private=True, exist_ok=True)
                if self._push is None:  # otherwise this is for later, when all is on disk
                    self._see_private(repo_id, token)
            super().init_hf_repo(token)
        except HFValidationError:  # a name that no repository can have
            raise
        except Exception as error:  # the client's own errors have no class in common
            cause = cause_of(error, repo_id)
            if is_lasting(error) and self.args.push_to_hub:  # in `__init__`: there is nothing to be lost yet
                raise PublishError(
                    f"{cause} Or set `push_to_hub=False`, and push when the training is over."
                ) from error
            logger.warning(f"{cause} {repo_id} will be created when something is pushed.")
            # The parent's, of a repository that is there
            self.hub_model_id = repo_id
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        token = token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        revision = revision or self.args.hub_revision
        self._push = {"token": token, "private": private, "revision": revision}
        try:
            if self.hub_model_id is None:  # the parent's own call knows of no `private` in older versions
                self.init_hf_repo(token, private)
            begun = super().push_to_hub(commit_message, False, token, revision, **kwargs)
        finally:
            self._push = None
        if begun is None:  # not the process that pushes
            return None
        pushed = self._see_through(
            upload,
            begun,
            self.args.output_dir,
            private=private,
            token=token,
            ignore_patterns=IGNORED,
            revision=revision,
            commit_message=commit_message,
        )
        return pushed.result() if blocking else pushed

    def _finish_current_push(self):
        super()._finish_current_push()
        if self._push is not None:  # the parent's last step before it uploads
            folder, repo_id = self.args.output_dir, self.hub_model_id
            private, revision = self._push["private"], self._push["revision"]
            rest = how_to_finish(folder, repo_id, "model", private, {"--exclude": IGNORED}, revision=revision)
            persist(lambda _: self._check_push(**self._push), repo_id, rest)

    def _check_push(self, private: bool | None, token: str | None, **others) -> None:
        """Raises ValueError if what is to be pushed, or where to, is more public than was meant."""
        refuse_to_publish(self.args.output_dir)
        if private:
            self._see_private(self.hub_model_id, token)

    def _see_private(self, repo_id: str, token: str | None) -> None:
        """Raises ValueError if the repository is public, in the process that pushes."""
        prepare_repo(HfApi(token=token), repo_id, "model", private=True)
        self._is_seen_private = True

    def _complete_hub_model_id(self) -> None:
        """Find out whose the repository is, if the Hub was down when training began."""
        if self.hub_model_id is not None and "/" not in self.hub_model_id:
            token = self.args.hub_token if self._push is None else self._push["token"]
            with contextlib.suppress(Exception):  # asked again for the next card
                self.hub_model_id = f"{HfApi(token=token).whoami()['name']}/{self.hub_model_id}"

    def _push_from_checkpoint(self, checkpoint_folder):
        earlier = [] if self._last_push is None else list(self._last_push.jobs)
        is_free = self.args.hub_always_push or self._last_push is None or self._last_push.is_done()
        if is_free and self.args.hub_strategy != "end":
            if self.hub_model_id is not None:
                try:
                    self._check_push(self.args.hub_private_repo and not self._is_seen_private, self.args.hub_token)
                except Exception as error:  # the client's own errors have no class in common
                    cause = cause_of(error, self.hub_model_id)
                    logger.warning(f"Training goes on, but step {self.state.global_step} was not pushed. {cause}")
                    return
            self._copy_from_checkpoint(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = [] if self._last_push is None else self._last_push.jobs
        begun = [job for job in jobs if job not in earlier]
        if not begun:  # not this process, not now, or not this strategy
            return
        settings = {
            "private": self.args.hub_private_repo,
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "commit_message": f"Training in progress, step {self.state.global_step}",
        }
        name = LAST_CHECKPOINT if self.args.hub_strategy == "checkpoint" else Path(checkpoint_folder).name
        sources = [  # the second only with the strategies that push whole checkpoints
            (self.args.output_dir, {"ignore_patterns": IGNORED}),
            (checkpoint_folder, {"path_in_repo": name}),
        ]
        for job, (folder, own) in zip(begun, sources, strict=False):
            jobs[jobs.index(job)] = self._see_through(upload_or_warn, job, folder, **own, **settings)

    @property
    def _last_push(self):
        """The parent's `PushInProgress`; None before the first, and in processes that do not push."""
        return None if self.hub_model_id is None else self.push_in_progress

    def _copy_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The parent copies a fixed list of files to `output_dir`, which is what it pushes."""
        for name in self._saved_with_model if self.hub_model_id is not None else ():
            source, target = Path(checkpoint_folder) / name, Path(self.args.output_dir) / name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, target)

    def _see_through(self, how: Callable, begun: Future, folder: str, **settings) -> Future:
        """A push that has begun, tried again if it fails."""
        if self._uploads is None:
            self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        return self._uploads.submit(how, folder, self.hub_model_id, "model", begun=begun, **settings)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        is_path = isinstance(resume_from_checkpoint, str | os.PathLike)
        if is_path and not os.path.isdir(resume_from_checkpoint) and REPO_ID.fullmatch(str(resume_from_checkpoint)):
            resume_from_checkpoint = checkpoint_from_hub(
                str(resume_from_checkpoint), self.args.hub_token, self.args.hub_revision
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        hide_tokens(self.args)
        super()._save(output_dir, state_dict)


def refuse_to_publish(folder: str | Path) -> None:
    """Raises ValueError if secrets or judgements lie in a folder that is to be published."""
    found = sorted(str(file) for pattern in NOT_FOR_THE_HUB for file in Path(folder).rglob(pattern))
    if found:
        raise ValueError(f"All of {folder} is published, and {', '.join(found)} with it: move it elsewhere.")


def upload_or_warn(*args, **kwargs) -> CommitInfo | None:
    """[`~uploading.upload`] in the middle of training, which goes on whatever happens to it."""
    try:
        return upload(*args, **kwargs)
    except Exception as error:
        logger.warning(f"Training goes on, but a push failed. {error}")


def checkpoint_from_hub(repo_id: str, token: str | None = None, revision: str | None = None) -> str:
    """
    Download the last checkpoint of a repository.

    Args:
        repo_id (`str`): To which a trainer pushed with `hub_strategy="checkpoint"` or `"all_checkpoints"`.
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


class HiddenToken(str):
    """A token that no pickle and no `repr` shows."""

    def __repr__(self):
        return "'<hidden>'"

    def __reduce__(self):
        return type(None), ()

    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self


def hide_tokens(args: TrainingArguments) -> None:
    """Keep the tokens in the arguments usable, but out of what is saved of them."""
    if args.hub_token is not None:
        args.hub_token = HiddenToken(args.hub_token)
    init_kwargs = getattr(args, "model_init_kwargs", None)  # a plain TrainingArguments has none
    if isinstance(init_kwargs, dict) and isinstance(init_kwargs.get("token"), str):
        init_kwargs["token"] = HiddenToken(init_kwargs["token"])
