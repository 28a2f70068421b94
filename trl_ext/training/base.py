"""[`TrainerBase`]: what all trainers here share."""

import inspect
from concurrent.futures import Future
from contextlib import nullcontext

from huggingface_hub import CommitInfo
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from ..adapters.heads import save_heads
from ..compat import parallel_walks_within, take_newer_names
from ..hub.model_card import CardContent
from ..hub.record import TrainingClock
from ..models.companion import Companion, give_settings, split_state_dict, without_child
from .adapters import check_something_trains, prepare_start
from .card import write_card
from .pushing import Pusher, hide_tokens
from .resuming import local_checkpoint


class TrainerBase:
    """
    The base of all trainers here, which comes right before TRL's own among their bases. What it changes:

    - of models with adapters: the adapter's task type is that of the model, whatever the `peft_config` says; one whose
      folder or Hub id is given as `model` is trained further, with a copy of its start as reference; what trains is
      what the user left to train, and is kept in float32 under a quantized base; the head of a classifier, and
      whatever else of it was drawn anew when it was loaded, is trained and saved with the adapter;
    - a [`Companion`] of the model trains with it, with settings of its own in the optimizer, and is saved beside it and
      restored with it, while the model is saved, loaded and averaged as if it were alone;
    - pushes that fail are tried again and stop no training, see [`Pusher`]; what should be private (`private`,
      `hub_private_repo`) is not pushed to a public repository, and nothing is where secrets or judgements lie in
      `output_dir`; `train(resume_from_checkpoint="user/name")` resumes from a repository of the Hub;
    - the model card is written from a template of this package's.
    """

    config_class: type  # of `args`
    _task_type: str  # of PEFT
    _pipeline_tag: str | None = None  # of the Hub; None where TRL's card is written
    _saved_beside_model: tuple[str, ...] = ()  # files and folders of a checkpoint that transformers does not know of
    evaluated_own_data = True  # the last time, not data given to `evaluate`

    def __init__(self, model, *args, **kwargs):
        trl_class = next(base for base in type(self).__mro__ if base.__module__.startswith("trl."))
        try:
            arguments = inspect.signature(trl_class.__init__).bind(self, model, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__() {error}") from None
        given = arguments.arguments
        peft_config = given.get("peft_config")
        start = prepare_start(given, self._task_type, self._task_type_of)
        self._new_layers = start.new_layers
        self._pusher = Pusher(given["args"])
        with start.into_trainer(trl_class, peft_config):
            super().__init__(*arguments.args[1:], **arguments.kwargs)
        self._model = self.model  # before any distributed wrapper
        take_newer_names(self.args)  # TRL sets them by the older ones, under ZeRO-3
        start.mend(self.model)
        if self._pipeline_tag is not None:
            self.add_callback(TrainingClock())

    def _task_type_of(self, peft_config: PeftConfig, train_dataset) -> str | None:
        """Returns the task type of a new adapter whose config has another."""
        return self._task_type

    @property
    def companion(self) -> Companion | None:
        """The module that trains as a child of the model, if there is one."""
        return None

    @property
    def _companion_settings(self) -> dict:
        """Settings of the companion's own in the optimizer, such as `lr`."""
        return {}

    def _without_companion(self):
        """Makes the model, within the context, a plain one for others to save, load, serve or copy."""
        return nullcontext() if self.companion is None else without_child(self._model, self.companion.child_name)

    # --- Training ---

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        check_something_trains(self.model)
        resume_from_checkpoint = local_checkpoint(resume_from_checkpoint, self.args)
        with parallel_walks_within(self.callback_handler.callbacks, lambda model: self._without_companion()):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model=None):
        is_given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not is_given and self.companion is not None:
            give_settings(optimizer, self.companion.own_parameters(), self._companion_settings)
        return optimizer

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        self.evaluated_own_data = eval_dataset is None or isinstance(eval_dataset, str)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # --- Saving and loading ---

    def _save(self, output_dir=None, state_dict=None):
        hide_tokens(self.args)
        output_dir = output_dir or self.args.output_dir
        companion_state = None
        if state_dict is not None and self.companion is not None:  # gathered by FSDP or DeepSpeed, both in one
            state_dict, companion_state = split_state_dict(state_dict, self.companion.child_name)
        with self._without_companion():
            super()._save(output_dir, state_dict)
            if self.args.should_save and isinstance(self.model, PeftModel):
                save_heads(self.model, output_dir, {*SEQ_CLS_HEAD_NAMES, *self._new_layers})
        if self.args.should_save and self.companion is not None:
            self.companion.save(output_dir, companion_state)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:  # one sharded state for model and companion
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with self._without_companion():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.companion is not None:
            self.companion.restore(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        with self._without_companion():
            super()._load_best_model()
        if self.companion is not None:
            self.companion.restore(self.state.best_model_checkpoint)

    # --- The Hub ---

    def init_hf_repo(self, token=None, private=None):
        token = token or self.args.hub_token
        try:
            if self.is_world_process_zero():
                self._pusher.make_private_repo(token, private)
            super().init_hf_repo(token)
        except HFValidationError:  # a name that no repository can have
            raise
        except Exception as error:  # the client's own errors have no class in common
            self._pusher.put_off(error)
            # The parent's, of a repository that is there
            self.hub_model_id = self._pusher.repo_id
            self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.hub_model_id is not None and self._pusher.is_free(self.push_in_progress):
            if not self._pusher.may_push(self.hub_model_id, self.state.global_step):
                return
            self._pusher.copy_beside_model(self._saved_beside_model, checkpoint_folder)
        earlier = list(self._push_jobs)
        super()._push_from_checkpoint(checkpoint_folder)
        self._pusher.see_checkpoint_through(
            self._push_jobs, earlier, self.hub_model_id, checkpoint_folder, self.state.global_step
        )

    @property
    def _push_jobs(self) -> list[Future]:
        """The parent's last pushes; none before the first, and in processes that do not push."""
        last = None if self.hub_model_id is None else self.push_in_progress
        return [] if last is None else last.jobs

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future[CommitInfo] | None:
        with self._pusher.asked(token, private, revision) as asked:
            if self.hub_model_id is None:  # the parent's own call knows of no `private` in older versions
                self.init_hf_repo(asked["token"], asked["private"])
            begun = super().push_to_hub(commit_message, False, asked["token"], asked["revision"], **kwargs)
        if begun is None:  # not the process that pushes
            return None
        pushed = self._pusher.see_through(begun, self.hub_model_id, commit_message, asked)
        return pushed.result() if blocking else pushed

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | list[str] | None = None,
        language: str | list[str] | None = None,
        license_name: str | None = None,
        license_link: str | None = None,
    ) -> None:
        """
        Writes `README.md`, with `training_curves.png` beside it, to the output folder. `push_to_hub` takes the same
        arguments: TRL's, two that [`~transformers.Trainer`] has, and two more.

        Args:
            model_name (`str`, *optional*): By default that of the repository or the output folder.
            dataset_name (`str`, *optional*): Hub id of the training data. Local files have no page to link to.
            tags (`str` or `list[str]`, *optional*): Tags beside those of the trainer.
            license (`str` or `list[str]`, *optional*): The model's license, by the Hub's identifier, such as
                `"apache-2.0"`. Yours to choose: there is no default.
            language (`str` or `list[str]`, *optional*): Language of the data, as codes such as `"en"`.
            license_name, license_link (`str`, *optional*): Name and address of a license that the Hub does not know,
                with `license="other"`.

        Raises:
            ValueError: for a license or language that the Hub does not take. `push_to_hub` has saved the model by then,
                and uploads nothing.
        """
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self._pusher.completed(self.hub_model_id)
        of_license = {"license": license, "license_name": license_name, "license_link": license_link}
        write_card(self, self._card_content(), model_name, dataset_name, tags, language=language, **of_license)

    def _card_content(self) -> CardContent:
        """Returns what the card says of this training."""
        raise NotImplementedError

    def _finish_current_push(self):
        super()._finish_current_push()
        self._pusher.check_asked(self.hub_model_id)  # the parent's last step before it uploads
