"""Rankings: their notation and formats, and where they come from."""

from .convert import from_pairs, from_scores, to_pairs


__all__ = ["from_pairs", "from_scores", "to_pairs"]
