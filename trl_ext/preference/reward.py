"""Reward models from rankings with ties."""

import textwrap
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from trl import RewardConfig, RewardTrainer
from trl.data_utils import get_dataset_column_names, is_conversational

from ..data.rankings import is_ranking
from ..data.rows import first_row
from ..models.dropout import stop_dropout
from ..models.reward_inputs import input_in_training, write_reward_input
from ..models.score_head import scores_of_all_tokens
from ..ranking import judged_items
from ..training.arguments import document_fields
from .config import RankingArguments
from .preparation import has_tied_pairs, tokenize_for_reward
from .trainer import RankingTrainer


logger = get_logger(__name__)

# Columns of pairs that are tokenized, as TRL calls and called them
IDS_OF_PAIRS = {"chosen_ids", "rejected_ids"}
LEGACY_IDS_OF_PAIRS = {"chosen_input_ids", "rejected_input_ids"}


@document_fields
@dataclass
class RankingRewardConfig(RankingArguments, RewardConfig):
    """Configuration of [`RankingRewardTrainer`]: what it adds to [`~trl.RewardConfig`]."""

    bare_texts: bool = field(
        default=False,
        metadata={
            "help": "Read plain texts without special tokens and without an end-of-sequence token, as TRL's GRPOTrainer "
            "asks a reward model about them. By default they have both, as in TRL's RewardTrainer. The saved config says "
            "which, and everything in trl_ext asks so. Conversations are read by the chat template either way."
        },
    )
    overlong: str = field(
        default="prune",
        metadata={
            "help": "What happens to completions that exceed `max_length` with their prompt: 'prune' them from the "
            "ranking, or 'drop' the row. Counted in a warning.",
            "choices": ["prune", "drop"],
        },
    )


class RankingRewardTrainer(RankingTrainer, RewardTrainer):
    """
    [`~trl.RewardTrainer`] for rankings with ties. What changes with respect to the parent:

    - a dataset may have columns `prompt`, `completions` and `ranks` (or `ranking`, or `pairs`), see [`~trl_ext.data.rankings`];
      all completions of a prompt are one element of the batch, and each is scored once;
    - the loss is the negative log-likelihood of the ranking under `args.ranking_model`, with learned tie parameters;
    - the prompt is run once for all of its completions, where the model allows (`args.shared_prefix`);
    - of pairs (`chosen`, `rejected`) a boolean column `tie` may say that neither was better;
    - the saved config says what was read (`reward_input`), for those who ask the model, see
      [`~trl_ext.models.reward_inputs`].

    Args:
        All are [`~trl.RewardTrainer`]'s; `args` is a [`RankingRewardConfig`].
    """

    _tag_names = ["trl", "trl_ext", "reward-trainer", "ranking"]
    _name = "Ranking Reward"
    _paper = {
        "title": "Modelling rankings in R: the PlackettLuce package",
        "id": "1810.12068",
        "citation": textwrap.dedent("""\
            @article{turner2020plackettluce,
                title     = {{Modelling rankings in R: the PlackettLuce package}},
                author    = {Heather L. Turner and Jacob van Etten and David Firth and Ioannis Kosmidis},
                journal   = {Computational Statistics},
                year      = 2020,
                eprint    = {arXiv:1810.12068},
            }"""),
    }
    config_class = RankingRewardConfig
    _task_type = "SEQ_CLS"
    _pipeline_tag = "text-classification"
    _template_file = "reward_model.md"
    _tokenized_columns = ["group_ids"]

    def __init__(self, model, args: RankingRewardConfig | None = None, data_collator=None, *other_args, **kwargs):
        args = self._checked_args(args, model)
        super().__init__(model, args, data_collator, *other_args, **kwargs)
        if isinstance(self.model, PeftModel) and not self._trains_head:
            logger.warning(
                "The adapter has no `task_type`, so that the score head stays as it is, as in TRL. Set "
                "`task_type='SEQ_CLS'` in the `peft_config` to train it with the adapter. It is saved either way."
            )
        if args.disable_dropout:
            stop_dropout(self.model)
        self._set_up_rankings(data_collator)
        write_reward_input(self.model.config, self.reward_input)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if self.reward_input is None:  # the training data come first
            kind = self._kind_of(dataset)
            if args.bare_texts and kind == "text" and self._are_plain_pairs(get_dataset_column_names(dataset)):
                raise ValueError(
                    "`bare_texts` is for rankings: pairs go to TRL, which adds an end-of-sequence token. Leave it out, "
                    "or give the pairs a column `tie`, false where one is better."
                )
            self.reward_input = input_in_training(processing_class, kind, args.bare_texts)
        how = input_in_training(processing_class, "text", args.bare_texts)
        self._tokenize_ranking = partial(tokenize_for_reward, how=how)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _kind_of(self, dataset: Dataset | IterableDataset) -> str:
        """Returns the `kind` of [`RewardInput`] that training on a dataset makes."""
        columns = set(get_dataset_column_names(dataset))
        are_ids_of_rankings = set(self._tokenized_columns) <= columns and not self._are_plain_pairs(columns)
        if are_ids_of_rankings or IDS_OF_PAIRS <= columns or LEGACY_IDS_OF_PAIRS <= columns:
            return "tokens"
        return "chat" if is_conversational(first_row(dataset)) else "text"

    @staticmethod
    def _are_plain_pairs(columns) -> bool:
        """Returns True if the parent reads a dataset with these columns."""
        return "chosen" in columns and not has_tied_pairs(columns) and not is_ranking(columns)

    @property
    def _trains_head(self) -> bool:
        heads = tuple(f".{name}." for name in (*SEQ_CLS_HEAD_NAMES, *self._new_layers))
        trained = (name for name, weight in self.model.named_parameters() if weight.requires_grad)
        return any(head in name for name in trained for head in heads)

    def _task_type_of(self, peft_config, train_dataset):
        # Pairs without ties are trained on just as the parent does, which leaves the head as it is
        is_dataset = isinstance(train_dataset, Dataset | IterableDataset)  # the parent refuses what is none
        columns = get_dataset_column_names(train_dataset) if is_dataset else []
        is_of_pairs = "chosen" in columns and not has_tied_pairs(columns)
        return None if peft_config.task_type is None and is_of_pairs else self._task_type

    def _log_worths(self, model, inputs):
        return self._values(model, inputs, packed=self._use_shared_prefix(model, inputs))

    def _values(self, model, inputs, packed):
        """Returns the model's scores, which are the log-worths, `(B, K)`."""
        if packed:
            with scores_of_all_tokens(self._model):
                outputs = model(**self._packed_kwargs(model, inputs))
            return outputs.logits.squeeze(-1).gather(1, inputs["ends"]).float(), outputs
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return outputs.logits.squeeze(-1)[inputs["rows"]].float(), outputs

    def _further_loss(self, log_worths, outputs, inputs):
        loss = super()._further_loss(log_worths, outputs, inputs)
        if self.args.center_rewards_coefficient is None:
            return loss
        # The parent's (r_chosen + r_rejected)^2, which is (2 mean)^2, for any number of completions
        present = judged_items(inputs["wins"], inputs["ties"])
        means = torch.where(present, log_worths, 0).sum(dim=1) / present.sum(dim=1)
        return loss + self.args.center_rewards_coefficient * (2 * means).square().mean()

    def _log_worth_metrics(self, log_worths):
        return {"min_reward": log_worths.min(), "mean_reward": log_worths.mean(), "max_reward": log_worths.max()}
