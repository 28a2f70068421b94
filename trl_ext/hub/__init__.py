"""The publication of datasets and models on the Hub."""

from .datasets import publish_rankings, publish_rollouts, publish_samples


__all__ = ["publish_rankings", "publish_rollouts", "publish_samples"]
