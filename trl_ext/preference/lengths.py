"""Lengths of rankings' texts: completions beyond `max_length`, and texts beyond the positions of a model."""

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..adapters.reward_models import max_text_length
from .collator import judged_indices
from .config import RankingArguments


logger = get_logger(__name__)


def fit_lengths(dataset, args: RankingArguments, dataset_name: str, tokenized_columns: list[str], named):
    """Prunes, drops or truncates completions beyond `args.max_length`, as `args.overlong` says, and reports it."""
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
