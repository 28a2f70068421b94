"""[`RankingTrainer`]: the base that [`RankingRewardTrainer`] and [`RankingDPOTrainer`] share."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.modeling_outputs import ModelOutput
from trl.data_utils import get_dataset_column_names, is_conversational

from ..compat import requires_grad_kept
from ..data.rankings import is_ranking
from ..data.rows import first_row
from ..models.reward_inputs import RewardInput
from ..models.tie_parameters import TIE_PARAMETERS_FILE, TieParameters, save_beside_adapter, write_to_config
from ..packing.check import PrefixCheck
from ..packing.layout import packed_inputs
from ..ranking import judged_items
from ..training.arguments import checked_args
from ..training.base import TrainerBase
from .card import ranking_card
from .collator import DataCollatorForRanking
from .config import RankingArguments
from .lengths import check_positions
from .loss import ranking_loss
from .metrics import batch_sums, gathered, metrics_of, named_ties
from .preparation import (
    check_can_end,
    has_tied_pairs,
    prepare_ranking_dataset,
    ranks_of,
    starting_log_tie,
)


class KeepConfig(TrainerCallback):
    """Keeps the model's config up to date with the tie parameters, for who saves the model without the trainer."""

    def __init__(self, trainer: "RankingTrainer"):
        self.trainer = trainer

    def on_log(self, args, state, control, **kwargs):
        self.trainer._write_ties_to_config()

    on_train_end = on_log


class RankingTrainer(TrainerBase):
    """
    Trains on rankings with ties beside what the parent trains on. Batches of pairs, without a `tie` column, go the
    parent's way untouched.

    A subclass says how a row is tokenized (`_tokenized_columns`, `_tokenize_ranking`) and how completions come by their
    log-worths (`_values`, `_log_worths`). Hooks that it may extend: `_check_for_rankings`, `_further_loss`,
    `_log_worth_metrics`.
    """

    _saved_beside_model = (TIE_PARAMETERS_FILE,)
    _tokenized_columns: list[str]  # the last holds the completions
    _tokenize_ranking: Callable[[dict, object], dict]  # a row and the tokenizer to these
    _metric_names: dict[str, str] = {}  # TRL's names for metrics that TRL logs as well
    # Until `__init__` has seen the data
    ties: TieParameters | None = None
    reward_input: RewardInput | None = None  # the way in which a reward model reads texts
    _has_rankings: bool | None = None
    _max_tie_order: int | None = None  # of Davidson-Luce
    _is_chat = False  # the training data are conversations

    # --- Before and within the parent's `__init__` ---

    @classmethod
    def _checked_args(cls, args, model) -> RankingArguments:
        args = checked_args(args, cls, model)
        # Accelerate would cut the tensors of a streamed batch, which have not all a row per prompt
        args.accelerator_config.dispatch_batches = False
        return args

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = get_dataset_column_names(dataset)
        if dataset_name == "train":
            self._is_chat = is_conversational(first_row(dataset))
        # Without ranks they are an error, unless they are pairs, whose column of that name is about something else
        has_completions = "completions" in columns or set(self._tokenized_columns) <= set(columns)
        holds_rankings = is_ranking(columns) or self._holds_rankings(dataset)
        if not (holds_rankings or has_tied_pairs(columns) or (has_completions and "chosen" not in columns)):
            check_can_end(dataset, processing_class, dataset_name)
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if self._has_rankings is False:
            raise ValueError(
                "This trainer was given no rankings at its start, and has no likelihood of them. Pass rankings as "
                "`train_dataset` or `eval_dataset`."
            )
        self._check_for_rankings(args)
        dataset = prepare_ranking_dataset(
            dataset,
            processing_class,
            args,
            dataset_name,
            self._tokenize_ranking,
            self._tokenized_columns,
            self._max_tie_order or args.max_tie_order,
        )
        if self._has_rankings:  # else the model is not there yet
            self._check_positions(dataset)
        return dataset

    def _check_for_rankings(self, args) -> None:
        """Refuses arguments that mean nothing for rankings."""

    def _holds_rankings(self, prepared: Dataset | IterableDataset) -> bool:
        # Pairs may have a column `ranks` that is about something else
        return {"ranks", *self._tokenized_columns} <= set(get_dataset_column_names(prepared))

    def _check_positions(self, dataset: Dataset | IterableDataset) -> None:
        check_positions(dataset, self._model, self.args.max_length, self._tokenized_columns)

    # --- The end of `__init__` ---

    def _set_up_rankings(self, data_collator) -> None:
        """Makes what rankings need, once the parent's `__init__` has prepared model and data."""
        TieParameters.detach_from(self._model)  # an earlier trainer's
        self._prefix_check = PrefixCheck(self.args, self.accelerator, self._model)
        self._sums = {"train": [], "eval": []}  # of each batch since the last log
        rankings = [dataset for dataset in self._datasets() if self._holds_rankings(dataset)]
        self._has_rankings = bool(rankings)
        if not rankings:  # and never will: see `_prepare_dataset`
            return
        for dataset in rankings:
            self._check_positions(dataset)
        if data_collator is None:
            self.data_collator = DataCollatorForRanking(
                pad_token_id=self.data_collator.pad_token_id,
                pair_collator=self.data_collator,
                pad_to_multiple_of=self.args.pad_to_multiple_of,
            )
        self._set_up_ties(rankings)

    def _datasets(self) -> list[Dataset | IterableDataset]:
        """Returns all prepared datasets, the training data first."""
        evaluated = list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [dataset for dataset in [self.train_dataset, *evaluated] if dataset is not None]

    def _set_up_ties(self, rankings: list[Dataset | IterableDataset]) -> None:
        """Attaches the tie parameters to the model, if the likelihood has any."""
        ranks = [ranks_of(dataset) for dataset in rankings]
        # The training data's come first. Of data to evaluate on only the sizes of ties are taken, their rates being for
        # the model to predict; but where it is trained on pairs alone, nothing else says anything of ties
        log_tie, max_order = starting_log_tie(self.args, ranks[0], [row for rows in ranks for row in rows])
        if self.args.ranking_model == "davidson_luce":
            self._max_tie_order = max_order  # of datasets that `evaluate` may be given
        if log_tie:
            self.ties = TieParameters(self.args.ranking_model, log_tie).requires_grad_(self.args.learn_ties)
            self.ties.attach_to(self._model)
            self.callback_handler.callbacks.insert(0, KeepConfig(self))  # before those of users, which may save
            if self.optimizer is not None and self.args.learn_ties:
                self._add_to_given_optimizer()
        write_to_config(self._model, self.args.ranking_model, log_tie)

    def _add_to_given_optimizer(self) -> None:
        if self.lr_scheduler is not None:
            raise ValueError(
                "The learning rate scheduler in `optimizers` does not know the tie parameters. Pass "
                "`optimizers=(optimizer, None)`, for a scheduler as the arguments say, or set `learn_ties=False`."
            )
        self.optimizer.add_param_group({"params": [self.ties.raw], **self._companion_settings})

    @property
    def companion(self):
        return self.ties

    @property
    def _companion_settings(self):
        return {"lr": self.args.tie_learning_rate, "weight_decay": 0.0}

    # --- Training ---

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("ranks", "pairs", *self._tokenized_columns):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "ranks" not in inputs:
            return self._loss_of_pairs(model, inputs, return_outputs, num_items_in_batch)
        log_worths, outputs = self._log_worths(model, inputs)
        log_tie = None if self.ties is None else checked(outputs["log_tie"])
        loss = ranking_loss(log_worths, inputs, self.args.ranking_model, log_tie)
        loss = loss + self._further_loss(log_worths, outputs, inputs)
        self._record(log_worths.detach(), inputs, None if log_tie is None else log_tie.detach())
        return (loss, ModelOutput(logits=log_worths, ranks=inputs["ranks"])) if return_outputs else loss

    def _loss_of_pairs(self, model, inputs, return_outputs: bool, num_items_in_batch):
        """Returns the parent's loss, and outputs without the tie parameters, which `compute_metrics` would be given."""
        with requires_grad_kept(self._model):  # the parent may switch to the reference's adapter and back
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not return_outputs or self.ties is None:
            return result
        loss, outputs = result
        return loss, ModelOutput(**{name: value for name, value in outputs.items() if name != "log_tie"})

    @abstractmethod
    def _log_worths(self, model, inputs) -> tuple[torch.Tensor, ModelOutput]:
        """Returns log-worths `(B, K)` of a batch's completions, and the output of the model's forward."""

    @abstractmethod
    def _values(self, model, inputs, packed: bool) -> tuple[torch.Tensor, ModelOutput]:
        """Returns a value `(B, K)` of each completion by one forward, in rows or packed after their prefix."""

    def _further_loss(self, log_worths, outputs, inputs) -> torch.Tensor | float:
        """Returns a loss to add to that of rankings."""
        return 0.0

    # --- Shared prefix ---

    def _packed_kwargs(self, model, inputs) -> dict:
        """Returns the forward's arguments for a packed batch."""
        columns = (inputs[f"packed_{name}"] for name in ("input_ids", "positions", "segments"))
        return packed_inputs(model, *columns) | {"use_cache": False}

    @property
    def _packs(self) -> bool | None:
        return self._prefix_check.verdict

    def _use_shared_prefix(self, model, inputs) -> bool:
        """Tells if the model gives completions the same packed as in rows of their own, as the first batch shows."""
        judged = judged_items(inputs["wins"], inputs["ties"])
        return self._prefix_check(lambda is_packed: self._values(model, inputs, is_packed)[0][judged])

    # --- Metrics ---

    def _record(self, log_worths: torch.Tensor, inputs, log_tie: torch.Tensor | None) -> None:
        """Keeps what the next `log` tells of a batch."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            mask = inputs["packed_segments"] >= 0 if self._packs else inputs["attention_mask"]
            num_tokens = self.accelerator.gather_for_metrics(mask.sum()).sum().item()
            self._total_train_tokens += num_tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        batch = gathered(self.accelerator, log_worths, inputs)
        self._sums[mode].append(batch_sums(batch, self.args.ranking_model, log_tie))
        judged = batch["log_worths"][judged_items(batch["wins"], batch["ties"])]
        for name, value in self._log_worth_metrics(judged).items():
            self._metrics[mode][name].append(value.item())

    @abstractmethod
    def _log_worth_metrics(self, log_worths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what the parent logs of its rewards, from log-worths `(N,)`."""

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        if self._sums[mode]:
            prefix = "eval_" if mode == "eval" else ""
            metrics = metrics_of(self._sums[mode])
            self._sums[mode].clear()
            logs.update({f"{prefix}{self._metric_names.get(name, name)}": value for name, value in metrics.items()})
        if mode == "train" and self.ties is not None:
            logs.update(named_ties(self.args.ranking_model, self.ties.tolist()))
        super().log(logs, start_time)

    # --- Saving ---

    def _write_ties_to_config(self) -> None:
        """Notes the tie parameters in the model's config; every process calls this, as they may be sharded."""
        if self.ties is not None:
            write_to_config(self._model, self.args.ranking_model, self.ties.tolist())

    def _save_checkpoint(self, model, trial):
        self._write_ties_to_config()  # for the card, which the parent writes first
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        self._write_ties_to_config()
        super()._save(output_dir, state_dict)
        if isinstance(self._model, PeftModel) and self.args.should_save:
            save_beside_adapter(self._model, output_dir or self.args.output_dir)

    def _card_content(self):
        return ranking_card(self, super()._paper)


def checked(log_tie: torch.Tensor) -> torch.Tensor:
    """Returns tie parameters that are finite, or raises ValueError."""
    if not log_tie.isfinite().all():
        raise ValueError(
            "A gradient was not finite, and has made the tie parameters so too. Lower `learning_rate`, or train a "
            "model that is in float32 or bfloat16, not in float16."
        )
    return log_tie
