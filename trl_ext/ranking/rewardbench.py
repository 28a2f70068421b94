"""The score of RewardBench 2's subset Ties."""

import math

import torch


def rewardbench2_ties(rows: list[dict]) -> dict[str, float]:
    r"""
    Returns how far correct answers score above wrong ones, and closer together than that.

    In each row let gap = min correct - max wrong score and spread = max correct - min correct score. With mean_N over
    the n that have both rows and g = min(gap_ref, gap_tied),

        ref_accuracy, tied_accuracy = mean[gap > 0] over all rows of the kind
        correctness_preferred       = mean_N[gap_tied > spread_tied]
        correctness_preferred_hard  = mean_N[g > spread_tied]
        correctness_margin_score    = mean_N[tanh(g / spread_tied - 1)], where 0 / 0 gives 0
        overall                     = 0.3 (both accuracies) + 0.2 (both preferred) + 0.01 margin score, at most 1.01

    Args:
        rows (`list[dict]`): With `id` (`ref:<n>`, one correct answer, or `tied:<n>`, several), `scores` (`list[float]`,
            those of the correct answers first) and `num_correct`.

    Returns:
        `dict[str, float]`: The six numbers.

    Raises:
        ValueError: For a row that is not like that or is there twice, and if no n has both rows.

    Reference: Malik et al. 2025, https://huggingface.co/papers/2506.01937; `process_single_model` in
    https://github.com/allenai/reward-bench/blob/main/rewardbench/utils.py.
    """
    margins = {"ref": {}, "tied": {}}
    for row in rows:
        kind, prompt, *margin = _ties_row(row)
        if prompt in margins[kind]:
            raise ValueError(f"There are two rows {row['id']!r}.")
        margins[kind][prompt] = margin
    ref, tied = margins["ref"], margins["tied"]
    both = torch.tensor([[ref[n][0], *tied[n]] for n in ref if n in tied], dtype=torch.float64)
    if not len(both):
        raise ValueError("No n has both a row 'ref:<n>' and a row 'tied:<n>'.")
    gap_ref, gap_tied, spread = both.unbind(dim=1)
    g = torch.minimum(gap_ref, gap_tied)
    result = {f"{kind}_accuracy": sum(gap > 0 for gap, _ in of.values()) / len(of) for kind, of in margins.items()}
    result["correctness_preferred"] = (gap_tied > spread).double().mean().item()
    result["correctness_preferred_hard"] = (g > spread).double().mean().item()
    result["correctness_margin_score"] = (g / spread - 1).tanh().nan_to_num(nan=0).mean().item()
    weights = (0.3, 0.3, 0.2, 0.2, 0.01)
    return result | {"overall": sum(w * value for w, value in zip(weights, result.values(), strict=True))}


def _ties_row(row: dict) -> tuple[str, int, float, float]:
    """Returns kind, number, gap and spread of a row of [`rewardbench2_ties`]."""
    name, scores, num_correct = row["id"], row["scores"], row["num_correct"]
    kind, _, number = str(name).partition(":")
    if kind not in ("ref", "tied") or not number.isdecimal():
        raise ValueError(f"`id` must be 'ref:<n>' or 'tied:<n>', got {name!r}.")
    if not (1 if kind == "ref" else 2) <= num_correct < len(scores) or not all(map(math.isfinite, scores)):
        raise ValueError(f"The row {name!r} has {num_correct} correct answers of {len(scores)}, or scores not finite.")
    correct, wrong = scores[:num_correct], scores[num_correct:]
    return kind, int(number), min(correct) - max(wrong), max(correct) - min(correct)
