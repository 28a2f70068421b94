"""FSDP2 between processes on the CPU, for the scripts that tests launch with it."""

import os

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def allow_fsdp_on_cpu():
    """If FSDP was asked for: Accelerate, which shards on GPUs only, takes processes on the CPU for some with one."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    initialize = PartialState.__init__

    def with_gpus(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = with_gpus


def whole_weights(model):
    """
    Returns what trains in `model`, gathered from all processes, and how many of these weights were sharded. Each process
    has to ask.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward without a backward has left whole
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    num_sharded = sum(isinstance(weight, DTensor) for weight in weights.values())
    return {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in weights.items()}, num_sharded
