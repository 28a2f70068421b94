"""Supervised fine-tuning: TRL's trainer, with this package's care for adapters."""

from trl import SFTConfig
from trl import SFTTrainer as ParentSFTTrainer

from .adapters import AdapterMixin
from .arguments import checked_args
from .pushing import PushMixin


class SFTTrainer(PushMixin, AdapterMixin, ParentSFTTrainer):
    """
    [`~trl.SFTTrainer`] that keeps what trains on a quantized base in float32, where the parent casts it to bfloat16.
    """

    config_class = SFTConfig
    _task_type = "CAUSAL_LM"

    def __init__(self, model, args=None, *other_args, **kwargs):
        super().__init__(model, checked_args(None, type(self), model) if args is None else args, *other_args, **kwargs)
