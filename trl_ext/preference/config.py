"""The fields that the configurations of the ranking trainers add to TRL's."""

from dataclasses import dataclass, field

from ..compat import take_newer_names
from ..ranking import LISTWISE_MODELS, RANKING_MODELS
from ..training.arguments import check_choices, document_fields


# Beyond it nothing but ties is likely, or none at all, and exp of it leaves what fp32 can hold
MAX_LOG_TIE = 80


@document_fields
@dataclass
class RankingArguments:
    """Arguments of trainers on rankings, beside the TRL config they are mixed with."""

    ranking_model: str = field(
        default="davidson_luce",
        metadata={
            "help": "Likelihood of a ranking with ties, see `trl_ext.ranking`. Pairwise: 'bradley_terry' (ties left out), "
            "'soft_bradley_terry', 'rao_kupper', 'davidson'. Listwise: 'plackett_luce' (no ties), "
            "'plackett_luce_marginal', 'plackett_luce_efron', 'plackett_luce_breslow', 'davidson_luce'.",
            "choices": list(RANKING_MODELS),
        },
    )
    log_tie: list[float] | None = field(
        default=None,
        metadata={
            "help": "Where the tie parameters start: log theta of 'rao_kupper' (above 0), log nu of 'davidson' (nu = "
            "P(tie) / sqrt(P(win) P(lose)), which is twice the nu_D of Chen et al. 2024, "
            "https://huggingface.co/papers/2409.17431), or log delta_2 to log delta_D of 'davidson_luce'. By default "
            "where they fit the training data's tie rates best, with a prior where these say nothing, see "
            "`trl_ext.ranking.initial_log_tie`."
        },
    )
    learn_ties: bool = field(default=True, metadata={"help": "Learn the tie parameters with the model."})
    tie_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of the tie parameters, which are few and start close."}
    )
    max_tie_order: int | None = field(
        default=None,
        metadata={
            "help": "D of 'davidson_luce': the largest group of completions that can tie. By default the largest in "
            "the data."
        },
    )
    on_error: str = field(
        default="raise",
        metadata={
            "help": "What a malformed row does: 'raise' an error that names row and column, or 'drop' it, and report "
            "how many were dropped and why.",
            "choices": ["raise", "drop"],
        },
    )
    overlong: str = field(
        default="prune",
        metadata={
            "help": "What happens to completions that exceed `max_length` with their prompt: 'prune' them from the "
            "ranking, 'drop' the row, or (DPO only) 'truncate' them. Counted in a warning.",
            "choices": ["prune", "drop", "truncate"],
        },
    )
    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "Run the prompt once for all of its completions, see `trl_ext.packing`. 'auto': where the model "
            "gives the same scores so, which is checked on the first batch; 'always': an error where it does not; 'never'.",
            "choices": ["auto", "always", "never"],
        },
    )

    def __post_init__(self):
        check_choices(self)
        if self.max_tie_order is not None and self.max_tie_order < 1:
            raise ValueError(f"`max_tie_order` must be at least 1, got {self.max_tie_order}.")
        if self.tie_learning_rate < 0:
            raise ValueError(f"`tie_learning_rate` must not be negative, got {self.tie_learning_rate}.")
        if self.log_tie is not None and not (
            isinstance(self.log_tie, list | tuple) and all(abs(value) <= MAX_LOG_TIE for value in self.log_tie)
        ):
            raise ValueError(
                f"`log_tie` must be a list of numbers between {-MAX_LOG_TIE} and {MAX_LOG_TIE}, got {self.log_tie!r}."
            )
        num_ties = self._num_tie_parameters
        if self.log_tie is not None and num_ties is not None and len(self.log_tie) != num_ties:
            raise ValueError(
                f"`log_tie` must be a list of {num_ties} for `ranking_model='{self.ranking_model}'`"
                + (f" and `max_tie_order={self.max_tie_order}`" if self.max_tie_order else "")
                + f", got {self.log_tie}."
            )
        if self.ranking_model == "rao_kupper" and self.log_tie is not None and self.log_tie[0] <= 0:
            raise ValueError(f"`log_tie` of 'rao_kupper' is log theta and must be above 0, got {self.log_tie[0]}.")
        take_newer_names(self)
        super().__post_init__()

    @property
    def _num_tie_parameters(self) -> int | None:
        """The number of tie parameters; None where the data will tell."""
        if self.ranking_model == "davidson_luce":
            return None if self.max_tie_order is None else self.max_tie_order - 1
        return int(self.ranking_model in ("rao_kupper", "davidson"))

    @property
    def is_listwise(self) -> bool:
        """True if the likelihood is of whole rankings, not of pairs."""
        return self.ranking_model in LISTWISE_MODELS
