"""Micro-batches of completions of similar length, where the optimizer step stays the same."""

from ..packing.micro_batches import Batch, has_images, sort_windows, trim
from .notices import Notices


class LengthBatches:
    """
    Arranges the micro-batches of a rollout by length.

    Args:
        args ([`ActorCriticConfig`]): The configuration.
        notices ([`Notices`]): Where options that are on and cannot be used say so.
        pad_to_multiple_of (`int`, *optional*): What TRL pads lengths to.
        loss_depends_on_micro_batches (`bool`): TRL takes means, or quantiles, over the tokens of a micro-batch.
    """

    def __init__(self, args, notices: Notices, pad_to_multiple_of: int | None, loss_depends_on_micro_batches: bool):
        self.args, self.notices, self.pad_to_multiple_of = args, notices, pad_to_multiple_of
        self.loss_depends_on_micro_batches = loss_depends_on_micro_batches

    def arranged(self, batches: list[Batch]) -> list[Batch]:
        """Returns the micro-batches of a rollout sorted within each optimizer step, each cut to its own longest."""
        if not self.args.length_batches:
            return batches
        window, num_batches = self.args.gradient_accumulation_steps, len(batches)
        if self.pad_to_multiple_of is not None or has_images(batches[0]):
            length = f"`pad_to_multiple_of={self.pad_to_multiple_of}` says how long batches are"
            self._say_not_arranged("batches hold images" if has_images(batches[0]) else length)
            return batches
        reason = None
        if window % num_batches != 0 and num_batches % window != 0:
            reason = (
                f"optimizer steps of {window} micro-batches and rollouts of {num_batches} do not divide each other"
            )
        elif self.loss_depends_on_micro_batches:
            reason = "the loss takes means, or quantiles, over the tokens of a micro-batch, which would be others"
        if reason is None:
            return sort_windows(batches, window, self.args.balance_tokens)
        if min(window, num_batches) > 1:
            self._say_not_arranged(reason)
        return [trim(batch) for batch in batches]

    def _say_not_arranged(self, reason: str) -> None:
        for option in ("length_batches", *(["balance_tokens"] if self.args.balance_tokens else [])):
            self.notices(
                option,
                reason,
                "completions of different lengths lie in one micro-batch, and more of what is computed is padding",
                f"Change that, or set `{option}=False` to be told no more.",
            )
