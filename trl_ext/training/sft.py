"""Supervised fine-tuning: TRL's trainer, with this package's care for adapters."""

from trl import SFTConfig
from trl import SFTTrainer as ParentSFTTrainer

from .arguments import checked_args
from .base import TrainerBase


class SFTTrainer(TrainerBase, ParentSFTTrainer):
    """
    [`~trl.SFTTrainer`] that keeps what trains on a quantized base in float32, where the parent casts it to bfloat16.
    """

    config_class = SFTConfig
    _task_type = "CAUSAL_LM"
    create_model_card = ParentSFTTrainer.create_model_card

    def __init__(self, model, args=None, *other_args, **kwargs):
        super().__init__(model, checked_args(None, type(self), model) if args is None else args, *other_args, **kwargs)
