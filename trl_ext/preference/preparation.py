"""From rankings as text to rankings as tokens: tokenization, lengths, and what a likelihood can learn from."""

from collections.abc import Callable

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import extract_prompt, get_dataset_column_names, is_conversational

from ..adapters.reward_models import max_text_length
from ..compat import global_then_local_main_first, tokenize
from ..data.rankings import prepare_rankings
from ..data.rows import first_row, plain, report_dropped
from ..models.reward_inputs import RewardInput, input_in_training, reward_input_ids, template_kwargs_of, text_tokenizer
from ..packing.prefix import common_prefix_length
from ..ranking import initial_log_tie, max_tie_order
from .collator import judged_indices
from .config import RankingArguments


logger = get_logger(__name__)

# Where all completions of a prompt are tied, their likelihood does not depend on the scores
MODELS_THAT_SKIP_TIES = ("bradley_terry", "plackett_luce_marginal")
# Rows of a stream that tie rates are taken from
NUM_STREAMED_ROWS = 1000


def has_tied_pairs(columns: list[str]) -> bool:
    """Whether rows of TRL's preference type say of each pair if it is a tie."""
    return "chosen" in columns and "rejected" in columns and "tie" in columns


def why_no_pair_with_tie(row: dict) -> str | None:
    """What is wrong with a row of `chosen`, `rejected` and `tie`."""
    if not isinstance(row["tie"], bool):
        return f"column `tie`: must say true or false for every pair, got {row['tie']!r}."
    if row.get("margin") is not None:
        return "column `margin`: does not go with `tie`, as a likelihood with ties has none. Remove one."
    return None


def ranking_of_pair(row: dict) -> dict:
    """A row with `chosen`, `rejected` and `tie` as a ranking of two."""
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
    Check, tokenize and cut a dataset of rankings. One with all `tokenized_columns` is taken to be tokenized.

    Args:
        dataset: Of the ranking type, see [`~trl_ext.data.rankings`], or of the preference type with a `tie` column.
        processing_class: The tokenizer, or the processor that has it.
        args ([`RankingArguments`]): The trainer's.
        dataset_name (`str`): What messages call it.
        tokenize_row (`Callable`): Gives the `tokenized_columns` of a row, one list of ids for each completion in the
            last of them.
        tokenized_columns (`list[str]`): What the trainer reads.
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
    """Refuse pairs of texts that TRL would put an end-of-sequence token after, where the tokenizer has none."""
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
    """`group_ids`: each completion with its prompt, texts read as `how` says."""
    return {"group_ids": tokenize_completions(row, processing_class, how)}


def tokenize_completions(row: dict, processing_class, how: RewardInput) -> list[list[int]]:
    """Each completion after its prompt."""
    kwargs = template_kwargs_of(row)
    return [reward_input_ids(row["prompt"], c, processing_class, how, **kwargs) for c in row["completions"]]


def tokenize_for_dpo(row: dict, processing_class) -> dict:
    """`prompt_ids` and `completion_ids`. The completions start where the first of them leaves the prompt."""
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


# --- Lengths ---


def fit_lengths(dataset, args: RankingArguments, dataset_name: str, tokenized_columns: list[str], named):
    """Do with completions beyond `args.max_length` what `args.overlong` says, and report it."""
    *prompt_columns, ids_column = tokenized_columns

    def fit(row: dict) -> dict:
        prompt_length = sum(len(row[column]) for column in prompt_columns)
        ids, ranks, pairs = row[ids_column], row["ranks"], row.get("pairs")
        limit = None if args.max_length is None else args.max_length - prompt_length
        judged = judged_indices(ranks, pairs)
        overlong = [i for i in judged if limit is not None and len(ids[i]) > limit]
        if overlong and args.overlong == "truncate":
            ids = [row_ids[: max(limit, 0)] for row_ids in ids]
        elif overlong and args.overlong == "drop":
            ranks, pairs = None if ranks is None else [-1] * len(ids), None if pairs is None else []
        elif overlong:
            ranks = None if ranks is None else [-1 if i in overlong else rank for i, rank in enumerate(ranks)]
            pairs = None if pairs is None else [pair for pair in pairs if not {*pair[:2]} & set(overlong)]
        left = [tuple(ids[i]) for i in judged_indices(ranks, pairs)]
        fitted = {ids_column: ids, "ranks": ranks, "num_overlong": len(overlong)}
        fitted["num_left"] = 0 if left and not all(left) else len(left)  # truncated to nothing: no completion
        fitted["num_identical"] = len(left) - len(set(left)) if fitted["num_left"] > 1 else 0
        return fitted | ({"pairs": pairs} if "pairs" in row else {})

    dataset = dataset.map(fit, **named("Fitting lengths of"))
    if isinstance(dataset, Dataset):
        report_lengths(dataset, args, dataset_name)
    dataset = dataset.filter(lambda row: row["num_left"] >= 2, **named("Keeping rankings of two or more of"))
    return dataset.remove_columns(["num_overlong", "num_left", "num_identical"])


def report_lengths(dataset: Dataset, args: RankingArguments, dataset_name: str) -> None:
    num_overlong, lost = sum(dataset["num_overlong"]), sum(n < 2 for n in dataset["num_left"])
    if num_overlong:
        verb = {"prune": "pruned from their rankings", "truncate": "truncated", "drop": "dropped with their rows"}
        logger.warning(
            f"{dataset_name}: {num_overlong} completions exceed `max_length` ({args.max_length}) with their prompt and "
            f"were {verb[args.overlong]}; {lost} of {len(dataset)} rows were left with fewer than two and dropped."
        )
    identical = [i for i, n in enumerate(dataset["num_identical"]) if n]
    if identical:
        logger.warning(
            f"{dataset_name}: in {len(identical)} of {len(dataset)} rankings (row {identical[0]} is the first), "
            "completions are the same token by token"
            + (", some perhaps since they were truncated" if args.overlong == "truncate" else "")
            + ". A model gives them the same score, whatever their ranks."
        )


def check_positions(dataset: Dataset | IterableDataset, model, max_length: int | None, columns: list[str]) -> None:
    """
    Refuses texts beyond the positions that a model has learned, where they can be counted; warns of streams.

    Args:
        dataset (`Dataset` or `IterableDataset`): A prepared dataset.
        model (`PreTrainedModel` or `PeftModel`): The model that reads it.
        max_length (`int`, *optional*): The longest text that was let through.
        columns (`list[str]`): Columns with tokens, the last with those of completions.
    """
    positions = max_text_length(model)
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
    *before, last = (dataset[column] for column in columns)
    lengths = [sum(map(len, prompt)) + max(map(len, ids)) for *prompt, ids in zip(*before, last, strict=True)]
    num_longer = sum(length > positions for length in lengths)
    if num_longer:
        raise ValueError(
            f"{num_longer} of {len(lengths)} rankings have texts beyond the {positions} positions that the model has "
            f"learned, of up to {max(lengths)} tokens. Set `max_length={positions}`, which `overlong` is about."
        )


# --- What a likelihood can learn from ---


def why_not_learnable(row: dict, args: RankingArguments, max_order: int | None) -> str | None:
    """What is wrong with a row for `args.ranking_model`, and how to mend it."""
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
    """Whether not all are tied."""
    if row.get("pairs"):
        return any(preferred != 0 for _, _, preferred in row["pairs"])
    return len({row["ranks"][i] for i in judged_indices(row["ranks"], None)}) > 1


def keep_valid(dataset, why_not: Callable[[dict], str | None], on_error: str, dataset_name: str, named):
    """The rows for which `why_not` finds nothing; others are errors, or dropped and counted by reason."""

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
    """The ranks in a prepared dataset, to take tie rates from; of a stream, those of its first rows."""
    if isinstance(dataset, Dataset):
        return [ranks for ranks in dataset["ranks"] if ranks is not None]
    return [row["ranks"] for row in dataset.take(NUM_STREAMED_ROWS) if row["ranks"] is not None]


def starting_log_tie(
    args: RankingArguments, train_ranks: list[list[int]], all_ranks: list[list[int]]
) -> tuple[list[float], int]:
    """`(log_tie, D)`, from the arguments or else from the data: the tie rates of what is trained on."""
    largest = max_tie_order(all_ranks)
    max_order = args.max_tie_order or (len(args.log_tie) + 1 if args.log_tie else largest)
    if args.ranking_model == "davidson_luce" and largest > max_order:
        raise ValueError(
            f"`log_tie` is a list of {len(args.log_tie or [])}, but the data has ties of {largest}. Give {largest - 1}."
        )
    if args.log_tie is not None:
        return args.log_tie, max_order
    return initial_log_tie(train_ranks, args.ranking_model, max_order), max_order
