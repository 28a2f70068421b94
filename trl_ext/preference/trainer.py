"""What [`RankingRewardTrainer`] and [`RankingDPOTrainer`] share: data, likelihood, shared prefix, metrics, saving."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.modeling_outputs import ModelOutput
from trl.data_utils import get_dataset_column_names, is_conversational

from ..adapters.reward_models import max_text_length
from ..data.rankings import is_ranking
from ..data.rows import first_row
from ..models.reward_inputs import RewardInput
from ..models.tie_parameters import (
    TIE_PARAMETERS_FILE,
    TieParameters,
    save_beside_adapter,
    write_to_config,
)
from ..packing.check import PrefixCheck
from ..packing.layout import packed_inputs
from ..ranking import MAX_ENUMERATED, PAIRWISE_MODELS, judged_items, judgements_nll, ranking_nll
from ..ranking.metrics import baseline_nll, means_of_sums, ranking_sums
from ..training.base import TrainerBase
from .card import ranking_card
from .collator import DataCollatorForRanking
from .preparation import check_can_end, has_tied_pairs, prepare_ranking_dataset, ranks_of, starting_log_tie


logger = get_logger(__name__)


class KeepConfig(TrainerCallback):
    """Keeps the model's config up to date with the tie parameters, for who saves the model without the trainer."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._write_ties_to_config()


class RankingTrainer(TrainerBase):
    """
    Trains on rankings with ties beside what the parent trains on. Batches of pairs, without a `tie` column, go the
    parent's way untouched.

    For a prompt with K ranked completions the loss is the negative log-likelihood of its ranking over K - 1 (listwise
    likelihoods), or of its judgements over their number (pairwise ones), so that K = 2 gives the parent's loss. Neither
    divisor depends on the outcome: dividing by the number of stages, which ties make fewer, would weigh rankings with
    many ties more and bias the tie parameters upwards.
    """

    _tokenized_columns: list[str]  # the last holds the completions
    _tokenize_ranking: Callable[[dict, object], dict]  # a row and the tokenizer to these
    _max_tie_order = None  # of Davidson-Luce, once the data has been seen
    _has_rankings = None  # likewise
    _saved_beside_model = (TIE_PARAMETERS_FILE,)
    ties: TieParameters | None = None
    _is_chat = False  # whether what it was trained on are conversations
    reward_input: RewardInput | None = None  # what a reward model reads, once the training data has been seen

    def _set_up_rankings(self, data_collator) -> None:
        """To be called when the parent's `__init__` has prepared model and data."""
        TieParameters.detach_from(self._model)  # an earlier trainer's
        self._prefix_check = PrefixCheck(self.args, self.accelerator, self._model)
        self._sums = {"train": defaultdict(list), "eval": defaultdict(list)}
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
        evaluated = list(self.eval_dataset.values()) if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [dataset for dataset in [self.train_dataset, *evaluated] if dataset is not None]

    def _holds_rankings(self, prepared: Dataset | IterableDataset) -> bool:
        # Pairs may have a column `ranks` that is about something else
        return {"ranks", *self._tokenized_columns} <= set(get_dataset_column_names(prepared))

    def _set_up_ties(self, datasets: list[Dataset | IterableDataset]) -> None:
        ranks = [ranks_of(dataset) for dataset in datasets]
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

    # --- Data ---

    def _check_for_rankings(self, args) -> None:
        """Refuse arguments that mean nothing for rankings."""

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

    def _check_positions(self, dataset: Dataset | IterableDataset) -> None:
        """Refuse texts beyond the positions that the model has learned, where they can be counted; warn of streams."""
        positions, max_length = max_text_length(self._model), self.args.max_length
        if positions is None:
            return
        if not isinstance(dataset, Dataset):
            if max_length is None or max_length > positions:
                logger.warning(
                    f"The model has learned {positions} positions, and `max_length` is {max_length}: a longer text of this "
                    f"stream would end the training with an IndexError. Set `max_length={positions}`, which `overlong` is "
                    "about."
                )
            return
        *before, last = (dataset[column] for column in self._tokenized_columns)
        lengths = [sum(map(len, prompt)) + max(map(len, ids)) for *prompt, ids in zip(*before, last, strict=True)]
        num_longer = sum(length > positions for length in lengths)
        if num_longer:
            raise ValueError(
                f"{num_longer} of {len(lengths)} rankings have texts beyond the {positions} positions that the model has "
                f"learned, of up to {max(lengths)} tokens. Set `max_length={positions}`, which `overlong` is about."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        for column in ("ranks", "pairs", *self._tokenized_columns):
            if column not in self._signature_columns:
                self._signature_columns.append(column)

    # --- Optimization ---

    @property
    def companion(self):
        return self.ties

    @property
    def _companion_settings(self):
        return {"lr": self.args.tie_learning_rate, "weight_decay": 0.0}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "ranks" not in inputs:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if not return_outputs or self.ties is None:
                return result
            loss, outputs = result  # which `compute_metrics` is given
            return loss, ModelOutput(**{name: value for name, value in outputs.items() if name != "log_tie"})
        scores, outputs = self._scores(model, inputs)
        log_tie = outputs["log_tie"] if self.ties is not None else None
        if log_tie is not None and not log_tie.isfinite().all():
            raise ValueError(
                "A gradient was not finite, and has made the tie parameters so too. Lower `learning_rate`, or train a "
                "model that is in float32 or bfloat16, not in float16."
            )
        loss = self._ranking_loss(scores, inputs, log_tie) + self._further_loss(scores, outputs, inputs)
        self._log_rankings(scores.detach(), inputs, None if log_tie is None else log_tie.detach())
        return (loss, ModelOutput(logits=scores, ranks=inputs["ranks"])) if return_outputs else loss

    def _ranking_loss(self, scores, inputs, log_tie) -> torch.Tensor:
        model = self.args.ranking_model
        if model in PAIRWISE_MODELS:
            nll = judgements_nll(scores, inputs["wins"], inputs["ties"], model, log_tie)
            divisor = (inputs["wins"] + inputs["ties"] / 2).sum(dim=(1, 2))
        else:
            nll = ranking_nll(scores, inputs["ranks"], model, log_tie)
            divisor = (inputs["ranks"] >= 0).sum(dim=1) - 1
        return (nll / divisor).mean()

    def _further_loss(self, scores, outputs, inputs) -> torch.Tensor | float:
        return 0.0

    # --- Shared prefix ---

    @abstractmethod
    def _scores(self, model, inputs) -> tuple[torch.Tensor, ModelOutput]:
        """`(B, K)` scores of a batch's completions, and the output of the model's forward."""

    @abstractmethod
    def _values(self, model, inputs, packed: bool) -> tuple[torch.Tensor, ModelOutput]:
        """What one forward of `model` gives each completion, `(B, K)`, run as rows or packed after their prefix."""

    def _packed_kwargs(self, model, inputs) -> dict:
        """The forward's arguments for a packed batch."""
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

    def _log_rankings(self, scores, inputs, log_tie) -> None:
        mode = "train" if self.model.training else "eval"
        model, metrics = self.args.ranking_model, self._metrics[mode]
        if mode == "train":
            mask = inputs["packed_segments"] >= 0 if self._packs else inputs["attention_mask"]
            num_tokens = self.accelerator.gather_for_metrics(mask.sum()).sum().item()
            self._total_train_tokens += num_tokens // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]

        # Of all processes; of an evaluation's last batch, without what only fills it up
        padded = [
            self.accelerator.pad_across_processes(inputs["ranks"], dim=1, pad_index=-1),
            self.accelerator.pad_across_processes(scores, dim=1),
        ]
        for name in ("wins", "ties"):
            once = self.accelerator.pad_across_processes(inputs[name], dim=1)
            padded.append(self.accelerator.pad_across_processes(once, dim=2))
        ranks, scores, wins, ties = self.accelerator.gather_for_metrics(tuple(padded))
        sums = ranking_sums(scores, wins, ties, model, log_tie)
        if sums["pairs"] < sums["strict_pairs"] + sums["tied_pairs"]:
            logger.warning_once(
                f"'{model}' says how likely ties are within rankings of up to {MAX_ENUMERATED} completions; of larger "
                "ones it would take too long. three_way_accuracy, predicted_tie_rate, tie_calibration_error and "
                "pair_log_likelihood leave those out; tie_rate and all other metrics count every ranking."
            )
        sums["margin"] = (wins * (scores.unsqueeze(2) - scores.unsqueeze(1))).sum()
        if model in PAIRWISE_MODELS:
            nlls = [judgements_nll(s, wins, ties, model, log_tie) for s in (scores, torch.zeros_like(scores))]
        else:
            nlls = [ranking_nll(scores, ranks, model, log_tie), baseline_nll(ranks, model, log_tie)]
        sums["rankings"] = torch.tensor(float(len(scores)))
        sums["ranking_log_likelihood"], sums["baseline_log_likelihood"] = (-nll.sum() for nll in nlls)
        for name, value in sums.items():
            self._sums[mode][name].append(value.cpu())
        self._log_scores(scores[judged_items(wins, ties)], mode)

    def _log_scores(self, scores: torch.Tensor, mode: str) -> None:
        """What the parent logs of its rewards, `(N,)`."""

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        if self._sums[mode]:
            sums = {name: torch.stack(values).sum(dim=0) for name, values in self._sums[mode].items()}
            self._sums[mode].clear()
            logs.update({f"{prefix}{name}": value for name, value in self._means(sums).items()})
        if mode == "train" and self.ties is not None:
            self._write_ties_to_config()
            logs.update(self._named_ties())
        super().log(logs, start_time)

    def _means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        means = means_of_sums(sums)
        if "pair_accuracy" in means:
            means["accuracy"] = means.pop("pair_accuracy")
        if sums["strict_pairs"] > 0:
            means["margin"] = (sums["margin"] / sums["strict_pairs"]).item()
        rankings = sums["rankings"]
        means["log_likelihood"] = (sums["ranking_log_likelihood"] / rankings).item()
        means["baseline_log_likelihood"] = (sums["baseline_log_likelihood"] / rankings).item()
        return means

    def _named_ties(self) -> dict[str, float]:
        if self.ties is None:
            return {}
        values = self._log_tie().double().exp().tolist()  # in fp32 what 89 is the logarithm of is infinite
        if self.args.ranking_model == "davidson_luce":
            return {f"tie/delta_{n}": value for n, value in enumerate(values, start=2)}
        return {"tie/theta" if self.args.ranking_model == "rao_kupper" else "tie/nu": values[0]}

    # --- Saving ---

    def _log_tie(self) -> torch.Tensor:
        """As last written to the config: a card is written by one process, which cannot gather what is sharded."""
        return torch.tensor(self._model.config.log_tie)

    def _write_ties_to_config(self) -> None:
        """To be called in every process."""
        write_to_config(self._model, self.args.ranking_model, self.ties.tolist())

    def _save_checkpoint(self, model, trial):
        if self.ties is not None:  # for the card, which the parent writes first
            self._write_ties_to_config()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir=None, state_dict=None):
        if self.ties is not None:
            self._write_ties_to_config()
        super()._save(output_dir, state_dict)
        if isinstance(self._model, PeftModel) and self.args.should_save:
            save_beside_adapter(self._model, output_dir or self.args.output_dir)

    def _card_content(self):
        return ranking_card(self, super()._paper)
