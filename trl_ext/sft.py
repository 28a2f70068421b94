"""Supervised fine-tuning: TRL's trainer, with this package's care for adapters."""

from trl import SFTTrainer as ParentSFTTrainer

from .adapters import AdapterMixin
from .pushing import PushMixin


class SFTTrainer(PushMixin, AdapterMixin, ParentSFTTrainer):
    """
    [`~trl.SFTTrainer`] that keeps what trains on a quantized base in float32, where the parent casts it to bfloat16.
    """

    _task_type = "CAUSAL_LM"
