"""
Trainers on the Hub: a push that fails is tried again, loses nothing and stops no training; tokens are kept out of
`training_args.bin`, which is published.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import CommitInfo, HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..hub.uploading import PublishError, cause_of, how_to_finish, is_lasting, persist, prepare_repo, upload
from .resuming import LAST_CHECKPOINT


logger = get_logger(__name__)

# What the parent uploads with the rest of `output_dir`, and nobody means to publish: secrets, and who judged what
NOT_FOR_THE_HUB = (".env", ".env.*", ".netrc", "judgements*.jsonl")
# What the parent leaves out when it uploads `output_dir`, and that
IGNORED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", *NOT_FOR_THE_HUB, *(f"*/{pattern}" for pattern in NOT_FOR_THE_HUB))


class Pusher:
    """
    Sees the pushes of a trainer through. A push that fails is tried again, with growing pauses; one in the middle of
    training that fails for good leaves a warning with the command that finishes it, and training goes on. The last one
    raises [`~trl_ext.hub.uploading.PublishError`], with that command, once all is on disk.

    Args:
        args (`TrainingArguments`): The arguments of the trainer.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args
        self._asked: dict | None = None  # token, revision and `private` of the `push_to_hub` under way
        self._is_seen_private = False  # the repository, where it should be
        self._uploads: ThreadPoolExecutor | None = None  # the thread in which pushes are seen through

    @property
    def repo_id(self) -> str:
        """Name of the repository as the arguments have it, which may lack its owner's."""
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    @contextmanager
    def asked(self, token: str | None, private: bool | None, revision: str | None) -> Iterator[dict]:
        """Remembers what the user asks of `push_to_hub` within the context, completed by the arguments."""
        private = self.args.hub_private_repo if private is None else private
        self._asked = {
            "token": token or self.args.hub_token,
            "private": private,
            "revision": revision or self.args.hub_revision,
        }
        try:
            yield self._asked
        finally:
            self._asked = None

    # --- The repository ---

    def make_private_repo(self, token: str | None, private: bool | None) -> None:
        """Makes the repository if it is to be private: the parent asks for what `hub_private_repo` says alone."""
        if self._asked is None:
            refuse_to_publish(self.args.output_dir)
        if self.args.hub_private_repo if private is None else private:
            HfApi(token=token).create_repo(self.repo_id, private=True, exist_ok=True)
            if self._asked is None:  # otherwise this is for later, when all is on disk
                self._see_private(self.repo_id, token)

    def put_off(self, error: Exception) -> None:
        """Warns that the repository is still to be made, or raises PublishError where that is no use."""
        cause = cause_of(error, self.repo_id)
        if is_lasting(error) and self.args.push_to_hub:  # in `__init__`: there is nothing to be lost yet
            raise PublishError(f"{cause} Or set `push_to_hub=False`, and push when the training is over.") from error
        logger.warning(f"{cause} {self.repo_id} will be created when something is pushed.")

    def completed(self, repo_id: str | None) -> str | None:
        """Returns the repository's name with its owner's, which is unknown if the Hub was down when training began."""
        if repo_id is not None and "/" not in repo_id:
            token = self.args.hub_token if self._asked is None else self._asked["token"]
            with suppress(Exception):  # asked again for the next card
                return f"{HfApi(token=token).whoami()['name']}/{repo_id}"
        return repo_id

    def _see_private(self, repo_id: str, token: str | None) -> None:
        """Raises ValueError if the repository is public."""
        prepare_repo(HfApi(token=token), repo_id, "model", private=True)
        self._is_seen_private = True

    # --- The last push ---

    def check_asked(self, repo_id: str | None) -> None:
        """Raises ValueError if what is pushed, or where to, is more public than was meant. All is on disk by now."""
        if self._asked is None:
            return
        token, private, revision = (self._asked[name] for name in ("token", "private", "revision"))
        rest = how_to_finish(
            self.args.output_dir, repo_id, "model", private, {"--exclude": IGNORED}, revision=revision
        )
        persist(lambda _: self._check(repo_id, private, token), repo_id, rest)

    def _check(self, repo_id: str, private: bool | None, token: str | None) -> None:
        refuse_to_publish(self.args.output_dir)
        if private:
            self._see_private(repo_id, token)

    def see_through(self, begun: Future, repo_id: str, commit_message: str, asked: dict) -> Future[CommitInfo]:
        """Returns the push that has begun, tried again if it fails."""
        return self._submit(
            upload,
            begun,
            repo_id,
            self.args.output_dir,
            ignore_patterns=IGNORED,
            commit_message=commit_message,
            **asked,
        )

    def _submit(self, how: Callable, begun: Future, repo_id: str, folder: str, **settings) -> Future:
        if self._uploads is None:
            self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        return self._uploads.submit(how, folder, repo_id, "model", begun=begun, **settings)

    # --- Pushes in the middle of training ---

    def may_push(self, repo_id: str, step: int) -> bool:
        """Warns, and returns False, if what is to be pushed, or where to, is more public than was meant."""
        try:
            self._check(repo_id, self.args.hub_private_repo and not self._is_seen_private, self.args.hub_token)
        except Exception as error:  # the client's own errors have no class in common
            logger.warning(f"Training goes on, but step {step} was not pushed. {cause_of(error, repo_id)}")
            return False
        return True

    def is_free(self, last_push) -> bool:
        """
        Returns True if the parent pushes a checkpoint now.

        Args:
            last_push (`PushInProgress`, *optional*): The parent's last push; None before the first.
        """
        is_free = self.args.hub_always_push or last_push is None or last_push.is_done()
        return is_free and self.args.hub_strategy != "end"

    def copy_beside_model(self, names: Iterable[str], checkpoint: str) -> None:
        """Copies files and folders of a checkpoint to `output_dir`: of what the parent pushes, it copies a fixed list."""
        for name in names:
            source, target = Path(checkpoint) / name, Path(self.args.output_dir) / name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, target)

    def see_checkpoint_through(self, jobs: list[Future], earlier: list[Future], repo_id, checkpoint: str, step: int):
        """Puts in place of the `jobs` that are not among `earlier` ones others, which try again if these fail."""
        settings = {
            "private": self.args.hub_private_repo,
            "token": self.args.hub_token,
            "revision": self.args.hub_revision,
            "commit_message": f"Training in progress, step {step}",
        }
        name = LAST_CHECKPOINT if self.args.hub_strategy == "checkpoint" else Path(checkpoint).name
        sources = [  # the second only with the strategies that push whole checkpoints
            (self.args.output_dir, {"ignore_patterns": IGNORED}),
            (checkpoint, {"path_in_repo": name}),
        ]
        begun = [job for job in jobs if job not in earlier]  # none if not in this process, now, or with this strategy
        for job, (folder, files) in zip(begun, sources, strict=False):
            jobs[jobs.index(job)] = self._submit(upload_or_warn, job, repo_id, folder, **files, **settings)


def refuse_to_publish(folder: str | Path) -> None:
    """Raises ValueError if secrets or judgements lie in a folder that is to be published."""
    found = sorted(str(file) for pattern in NOT_FOR_THE_HUB for file in Path(folder).rglob(pattern))
    if found:
        raise ValueError(f"All of {folder} is published, and {', '.join(found)} with it: move it elsewhere.")


def upload_or_warn(*args, **kwargs) -> CommitInfo | None:
    """Uploads as [`~trl_ext.hub.uploading.upload`] in the middle of training, which goes on whatever happens to it."""
    try:
        return upload(*args, **kwargs)
    except Exception as error:
        logger.warning(f"Training goes on, but a push failed. {error}")


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
    """Keeps the tokens in the arguments usable, but out of what is saved of them."""
    if args.hub_token is not None:
        args.hub_token = HiddenToken(args.hub_token)
    init_kwargs = getattr(args, "model_init_kwargs", None)  # a plain TrainingArguments has none
    if isinstance(init_kwargs, dict) and isinstance(init_kwargs.get("token"), str):
        init_kwargs["token"] = HiddenToken(init_kwargs["token"])
