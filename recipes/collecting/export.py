"""Everybody's rankings in one file, and how far the annotators agree."""

from pathlib import Path

from trl_ext.data.collection import agreement, collected_rankings


def check_export(file: str) -> None:
    """Raises a ValueError for a name that says no format."""
    if Path(file).suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"--export {file}: expected a name that ends in .parquet or .jsonl.")


def export(folder: str, file: str) -> None:
    """Writes the rankings of all annotators, and prints how far they agree."""
    check_export(file)
    dataset = collected_rankings(folder)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(file) if file.endswith(".parquet") else dataset.to_json(file)
    print(f"{len(dataset)} rankings by {len(set(dataset['annotator']))} annotators: {file}")
    between = agreement(folder)
    if between is not None:
        print(
            f"Two annotators agree on {between['agreement']:.1%} of {between['num_pairs']} pairs, and on "
            f"{between['strict_agreement']:.1%} where neither has a tie; Krippendorff's alpha {between['alpha']:.3f}"
        )
