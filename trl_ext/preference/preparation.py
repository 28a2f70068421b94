"""From rankings as text to rankings as tokens that a likelihood can learn from."""

from collections.abc import Callable

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import extract_prompt, get_dataset_column_names, is_conversational

from ..compat import global_then_local_main_first, tokenize
from ..data.rankings import prepare_rankings
from ..data.rows import first_row, plain, report_dropped
from ..models.reward_inputs import RewardInput, input_in_training, reward_input_ids, template_kwargs_of, text_tokenizer
from ..packing.prefix import common_prefix_length
from ..ranking import initial_log_tie, max_tie_order
from .collator import judged_indices
from .config import RankingArguments
from .lengths import fit_lengths


logger = get_logger(__name__)

# Where all completions of a prompt are tied, their likelihood does not depend on the scores
MODELS_THAT_SKIP_TIES = ("bradley_terry", "plackett_luce_marginal")
# Rows of a stream that tie rates are taken from
NUM_STREAMED_ROWS = 1000


def has_tied_pairs(columns: list[str]) -> bool:
    """Returns True if rows of TRL's preference type say of each pair if it is a tie."""
    return "chosen" in columns and "rejected" in columns and "tie" in columns


def why_no_pair_with_tie(row: dict) -> str | None:
    """Returns the reason why a row of `chosen`, `rejected` and `tie` is malformed, None if it is not."""
    if not isinstance(row["tie"], bool):
        return f"column `tie`: must say true or false for every pair, got {row['tie']!r}."
    if row.get("margin") is not None:
        return "column `margin`: does not go with `tie`, as a likelihood with ties has none. Remove one."
    return None


def ranking_of_pair(row: dict) -> dict:
    """Makes a ranking of two of a row with `chosen`, `rejected` and `tie`."""
    return {"completions": [row["chosen"], row["rejected"]], "ranks": [1, 1 if row["tie"] else 2]}


def prepare_ranking_dataset(
    dataset: Dataset | IterableDataset,
    processing_class,
    args: RankingArguments,
    dataset_name: str,
    tokenize_row: Callable[[dict, object], dict],
    tokenized_columns: list[str],
    max_tie_order: int | None,
) -> Dataset | IterableDataset:
    """
    Checks, tokenizes and cuts a dataset of rankings. One with all `tokenized_columns` is taken to be tokenized.

    Args:
        dataset (`Dataset` or `IterableDataset`): Rows of the ranking type, see [`~trl_ext.data.rankings`], or of the preference type with a `tie` column.
        processing_class: The tokenizer, or the processor that has it.
        args ([`RankingArguments`]): The arguments of the trainer.
        dataset_name (`str`): The dataset's name in messages.
        tokenize_row (`Callable`): Gives the `tokenized_columns` of a row, one list of ids for each completion in the
            last of them.
        tokenized_columns (`list[str]`): The columns that the trainer reads.
        max_tie_order (`int`, *optional*): The largest tie that Davidson-Luce allows, if that is known by now.

    Returns:
        The dataset with `ranks`, `pairs` where the data has them, and the tokenized columns.

    Raises:
        ValueError: which names row and column, for malformed rows unless `args.on_error` drops them.
    """
    dataset = plain(dataset)
    columns = get_dataset_column_names(dataset)
    is_map_style = isinstance(dataset, Dataset)
    map_kwargs = {"num_proc": args.dataset_num_proc} if is_map_style else {}

    def named(description: str) -> dict:
        return map_kwargs | ({"desc": f"{description} {dataset_name} dataset"} if is_map_style else {})

    with global_then_local_main_first():
        if not set(tokenized_columns) <= set(columns):
            if has_tied_pairs(columns):
                if "prompt" not in columns:
                    dataset = dataset.map(extract_prompt, **named("Extracting prompts of"))
                dataset = keep_valid(dataset, why_no_pair_with_tie, args.on_error, dataset_name, named)
                dataset = dataset.map(ranking_of_pair, **named("Reading pairs of"))
            dataset = prepare_rankings(dataset, args.on_error, dataset_name, args.dataset_num_proc)
            check_not_empty(dataset, dataset_name, "no row is a ranking of two or more completions.")
            dataset = keep_learnable(dataset, args, max_tie_order, dataset_name, named)
            dataset = dataset.map(
                tokenize_row, fn_kwargs={"processing_class": processing_class}, **named("Tokenizing")
            )
        elif "ranks" not in columns:
            raise ValueError(
                f"The {dataset_name} dataset is tokenized (it has {tokenized_columns}), but has no column `ranks`. Give "
                "it one, null where a row has `pairs` that are no ranking; `prepare_rankings` makes it of `ranking`."
            )
        dataset = fit_lengths(dataset, args, dataset_name, tokenized_columns, named)
        check_not_empty(
            dataset,
            dataset_name,
            f"no two completions of a prompt fit into `max_length` ({args.max_length}). Raise it.",
        )
        return keep_learnable(dataset, args, max_tie_order, dataset_name, named)


def check_not_empty(dataset: Dataset | IterableDataset, dataset_name: str, reason: str) -> None:
    # What is streamed has no length, and its columns may have been forgotten on the way
    if next(iter(dataset), None) is None:
        raise ValueError(f"The {dataset_name} dataset has no rankings to learn from: {reason}")


def check_can_end(dataset: Dataset | IterableDataset, processing_class, dataset_name: str) -> None:
    """Refuses pairs of texts that TRL would put an end-of-sequence token after, where the tokenizer has none."""
    columns = get_dataset_column_names(dataset)
    is_tokenized = any(name.endswith("_ids") for name in columns)
    if text_tokenizer(processing_class).eos_token is not None or is_tokenized or "chosen" not in columns:
        return
    if not is_conversational(first_row(dataset)):
        raise ValueError(
            f"The {dataset_name} dataset has pairs of texts, and TRL puts an end-of-sequence token after each, of which "
            "the tokenizer has none. Set `tokenizer.eos_token`; or, for a reward model, give the pairs a column `tie`, "
            "false where one is better."
        )


def tokenize_for_reward(row: dict, processing_class, how: RewardInput) -> dict:
    """Returns `group_ids`: each completion with its prompt, texts read as `how` says."""
    return {"group_ids": tokenize_completions(row, processing_class, how)}


def tokenize_completions(row: dict, processing_class, how: RewardInput) -> list[list[int]]:
    """Returns the tokens of each completion after its prompt."""
    kwargs = template_kwargs_of(row)
    return [reward_input_ids(row["prompt"], c, processing_class, how, **kwargs) for c in row["completions"]]


def tokenize_for_dpo(row: dict, processing_class) -> dict:
    """Returns `prompt_ids` and `completion_ids`, which start where the first of them leaves the prompt."""
    whole = tokenize_completions(row, processing_class, input_in_training(processing_class, "text"))
    if is_conversational(row):
        prompt = tokenize(processing_class, row["prompt"], add_generation_prompt=True, **template_kwargs_of(row))
    else:
        prompt = tokenize(processing_class, row["prompt"])
    length = min(common_prefix_length([prompt["input_ids"], ids]) for ids in whole)
    if length < len(prompt["input_ids"]):
        logger.warning_once(
            "The tokens of a prompt are not those that prompt and completion start with: the tokenizer merges across "
            "their border, or the chat template puts something between. They were split where they differ."
        )
    if text_tokenizer(processing_class).eos_token is None and not is_conversational(row):
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the policy would not learn where its answers end. Set "
            "`tokenizer.eos_token`, or give conversations, whose chat template ends them."
        )
    return {"prompt_ids": prompt["input_ids"][:length], "completion_ids": [ids[length:] for ids in whole]}


# --- What a likelihood can learn from ---


def why_not_learnable(row: dict, args: RankingArguments, max_order: int | None) -> str | None:
    """Returns the reason why `args.ranking_model` cannot learn from a row, and the mend; None if it can."""
    if args.is_listwise and row["ranks"] is None:
        return (
            f"column `pairs`: must amount to a ranking for '{args.ranking_model}', which is listwise. Use a pairwise "
            "`ranking_model` such as 'davidson', or leave such rows out with `on_error='drop'`."
        )
    largest = max_tie_order([row["ranks"] or []])
    if args.ranking_model == "plackett_luce" and largest > 1:
        return (
            "column `ranks`: 'plackett_luce' has no ties. Use a `ranking_model` that has, such as 'davidson_luce', or "
            "leave such rows out with `on_error='drop'`."
        )
    if args.ranking_model == "davidson_luce" and max_order is not None and largest > max_order:
        return (
            f"column `ranks`: must have no more completions tied than `max_tie_order` ({max_order}), got {largest}. "
            "Raise it, or leave such rows out with `on_error='drop'`."
        )
    return None


def teaches(row: dict) -> bool:
    """Returns True if not all completions of a row are tied."""
    if row.get("pairs"):
        return any(preferred != 0 for _, _, preferred in row["pairs"])
    return len({row["ranks"][i] for i in judged_indices(row["ranks"], None)}) > 1


def keep_valid(dataset, why_not: Callable[[dict], str | None], on_error: str, dataset_name: str, named):
    """Keeps the rows for which `why_not` finds nothing; others are errors, or dropped and counted by reason."""

    def check(row: dict, index: int) -> bool:
        reason = why_not(row)
        if reason is not None and on_error == "raise":
            raise ValueError(f"{dataset_name} row {index}, {reason}")
        return reason is None

    if on_error == "drop" and isinstance(dataset, Dataset):
        judgements = {"ranks", "pairs", "tie", "margin"} & set(dataset.column_names)
        report_dropped([why_not(row) for row in dataset.select_columns(sorted(judgements))], dataset_name)
    return dataset.filter(check, with_indices=True, **named("Checking"))


def keep_learnable(dataset, args: RankingArguments, max_order: int | None, dataset_name: str, named):
    dataset = keep_valid(
        dataset, lambda row: why_not_learnable(row, args, max_order), args.on_error, dataset_name, named
    )
    check_not_empty(dataset, dataset_name, f"none has a probability under '{args.ranking_model}'. Use another.")
    if args.ranking_model not in MODELS_THAT_SKIP_TIES:
        return dataset
    learnable = dataset.filter(teaches, **named("Keeping what teaches of"))
    check_not_empty(
        learnable,
        dataset_name,
        f"in each all are tied, from which '{args.ranking_model}' can learn nothing. Use a `ranking_model` that learns "
        "from ties, such as 'davidson_luce'.",
    )
    if isinstance(dataset, Dataset) and len(learnable) < len(dataset):
        logger.warning(
            f"{dataset_name}: left out {len(dataset) - len(learnable)} of {len(dataset)} rankings, from which "
            f"'{args.ranking_model}' can learn nothing: in each all are tied."
        )
    return learnable


def ranks_of(dataset: Dataset | IterableDataset) -> list[list[int]]:
    """Returns the ranks in a prepared dataset, to take tie rates from; of a stream, those of its first rows."""
    if isinstance(dataset, Dataset):
        return [ranks for ranks in dataset["ranks"] if ranks is not None]
    return [row["ranks"] for row in dataset.take(NUM_STREAMED_ROWS) if row["ranks"] is not None]


def starting_log_tie(
    args: RankingArguments, train_ranks: list[list[int]], all_ranks: list[list[int]]
) -> tuple[list[float], int]:
    """Returns `(log_tie, D)` from the arguments, or else from the data: the tie rates of what is trained on."""
    largest = max_tie_order(all_ranks)
    max_order = args.max_tie_order or (len(args.log_tie) + 1 if args.log_tie else largest)
    if args.ranking_model == "davidson_luce" and largest > max_order:
        raise ValueError(
            f"`log_tie` is a list of {len(args.log_tie or [])}, but the data has ties of {largest}. Give {largest - 1}."
        )
    if args.log_tie is not None:
        return args.log_tie, max_order
    return initial_log_tie(train_ranks, args.ranking_model, max_order), max_order
