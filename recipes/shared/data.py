"""Data by name, file or folder."""

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from .arguments import RecipeArguments


FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_split(args: RecipeArguments, split: str) -> Dataset | IterableDataset:
    """Returns the split `split` of `--dataset_name`. Data without splits is all training data."""
    if args.dataset_name is None:
        raise ValueError("No data: pass --dataset_name, a name on the Hub, a data file or a folder.")
    path = Path(args.dataset_name)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # what `save_to_disk` leaves
        splits = load_from_disk(path)
        splits = splits if isinstance(splits, DatasetDict) else {args.dataset_train_split: splits}
    elif path.is_file():
        kind = next((FILE_KINDS[suffix] for suffix in path.suffixes if suffix in FILE_KINDS), None)
        if kind is None:
            raise ValueError(f"--dataset_name {path}: unknown kind of file, expected one of {', '.join(FILE_KINDS)}.")
        splits = load_dataset(kind, data_files={args.dataset_train_split: str(path)}, streaming=args.dataset_streaming)
    else:
        splits = load_dataset(args.dataset_name, args.dataset_config, streaming=args.dataset_streaming)
    if split not in splits:
        raise ValueError(
            f"{args.dataset_name} has no split {split!r}, only {', '.join(splits)}. Set --dataset_train_split, or "
            "--dataset_test_split if it was wanted for evaluation."
        )
    return splits[split]
