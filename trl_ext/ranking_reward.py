"""Reward models from rankings with ties."""

import textwrap
from dataclasses import dataclass, field

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftModel
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from trl import RewardConfig, RewardTrainer
from trl.data_utils import get_dataset_column_names

from .adapters import AdapterMixin
from .checks import checked_args
from .dropout import stop_dropout
from .pushing import PushMixin
from .ranking import judged_items
from .ranking_card import RankingCardMixin
from .ranking_config import RankingArguments
from .ranking_preparation import has_tied_pairs, tokenize_for_reward
from .ranking_trainer import RankingMixin
from .score_head import scores_of_all_tokens


logger = get_logger(__name__)


@dataclass
class RankingRewardConfig(RankingArguments, RewardConfig):
    __doc__ = f"""
    Configuration of [`RankingRewardTrainer`]: [`~trl.RewardConfig`] and
    {RankingArguments.__doc__.partition("beside the TRL config they are mixed with.")[2]}
    """

    overlong: str = field(
        default="prune",
        metadata={
            "help": "What happens to completions that exceed `max_length` with their prompt: 'prune' them from the "
            "ranking, or 'drop' the row. Counted in a warning.",
            "choices": ["prune", "drop"],
        },
    )


class RankingRewardTrainer(RankingMixin, PushMixin, RankingCardMixin, AdapterMixin, RewardTrainer):
    """
    [`~trl.RewardTrainer`] for rankings with ties. What changes with respect to the parent:

    - a dataset may have columns `prompt`, `completions` and `ranks` (or `ranking`, or `pairs`), see [`ranking_data`];
      all completions of a prompt are one element of the batch, and each is scored once;
    - the loss is the negative log-likelihood of the ranking under `args.ranking_model`, with learned tie parameters;
    - the prompt is run once for all of its completions, where the model allows (`args.shared_prefix`);
    - of pairs (`chosen`, `rejected`) a boolean column `tie` may say that neither was better.

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
    _tokenize_ranking = staticmethod(tokenize_for_reward)

    def __init__(self, model, args: RankingRewardConfig | None = None, data_collator=None, *other_args, **kwargs):
        args = checked_args(args, type(self), model)
        # Accelerate would cut the tensors of a streamed batch, which have not all a row per prompt
        args.accelerator_config.dispatch_batches = False
        super().__init__(model, args, data_collator, *other_args, **kwargs)
        if isinstance(self.model, PeftModel) and not self._trains_head:
            logger.warning(
                "The adapter has no `task_type`, so that the score head stays as it is, as in TRL. Set "
                "`task_type='SEQ_CLS'` in the `peft_config` to train it with the adapter. It is saved either way."
            )
        if args.disable_dropout:
            stop_dropout(self.model)
        self._set_up_rankings(data_collator)

    @property
    def _trains_head(self) -> bool:
        heads = tuple(f".{name}." for name in SEQ_CLS_HEAD_NAMES)
        trained = (name for name, weight in self.model.named_parameters() if weight.requires_grad)
        return any(head in name for name in trained for head in heads)

    def _task_type_of(self, peft_config, train_dataset):
        # Pairs without ties are trained on just as the parent does, which leaves the head as it is
        is_dataset = isinstance(train_dataset, Dataset | IterableDataset)  # the parent refuses what is none
        columns = get_dataset_column_names(train_dataset) if is_dataset else []
        is_of_pairs = "chosen" in columns and not has_tied_pairs(columns)
        return None if peft_config.task_type is None and is_of_pairs else self._task_type

    def _scores(self, model, inputs):
        return self._values(model, inputs, packed=self._use_shared_prefix(model, inputs))

    def _values(self, model, inputs, packed):
        if packed:
            with scores_of_all_tokens(self._model):
                outputs = model(**self._packed_kwargs(model, inputs))
            return outputs.logits.squeeze(-1).gather(1, inputs["ends"]).float(), outputs
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return outputs.logits.squeeze(-1)[inputs["rows"]].float(), outputs

    def _further_loss(self, scores, outputs, inputs):
        coefficient = self.args.center_rewards_coefficient
        if coefficient is None:
            return 0.0
        # The parent's (r_chosen + r_rejected)^2, which is (2 mean)^2, for any number of completions
        present = judged_items(inputs["wins"], inputs["ties"])
        means = torch.where(present, scores, 0).sum(dim=1) / present.sum(dim=1)
        return coefficient * (2 * means).square().mean()

    def _log_scores(self, scores, mode):
        metrics = self._metrics[mode]
        metrics["min_reward"].append(scores.min().item())
        metrics["mean_reward"].append(scores.mean().item())
        metrics["max_reward"].append(scores.max().item())
