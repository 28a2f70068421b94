"""
The critic in the policy's optimizer: learning rates where it first learns alone, for `critic_warmup_steps` steps, and
gradients that are clipped apart.
"""

from collections.abc import Iterable, Iterator

import torch
from accelerate.logging import get_logger
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType

from ..models.companion import OF_COMPANION, Companion


logger = get_logger(__name__)

# These look at what is measured, not at the number of the step, so there is nothing to shift
BY_MEASUREMENT = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def after_warmup(scheduler: LambdaLR, num_steps: int) -> LambdaLR:
    r"""
    Returns a schedule that begins after the critic's warm-up.

        lr_t = lr_0 factor(t - num_steps)                      from the policy's first update on
             = 0 (the policy's groups), lr_0 (the critic's)    before it

    The policy's rate is 0, and not merely unused, before it: what is logged is what happens, and where a sharded optimizer
    makes zeros of absent gradients, nothing decays.

    Args:
        scheduler (`LambdaLR`): The schedule, over the steps that are left to the policy.
        num_steps (`int`): Steps of the warm-up.
    """

    def later(factor, before: float):
        return lambda step: before if step < num_steps else factor(step - num_steps)

    groups = scheduler.optimizer.param_groups
    factors = [
        later(factor, before=float(group.get(OF_COMPANION, False)))
        for factor, group in zip(scheduler.lr_lambdas, groups, strict=True)
    ]
    return LambdaLR(scheduler.optimizer, factors)


def warn_of_schedule(args, is_given: bool) -> None:
    """
    Warns of a schedule that the critic's warm-up uses up.

    Args:
        args ([`ActorCriticConfig`]): The configuration.
        is_given (`bool`): The user has made the scheduler.
    """
    if args.critic_warmup_steps and (is_given or args.lr_scheduler_type in BY_MEASUREMENT):
        name = "the scheduler in `optimizers`" if is_given else f"`lr_scheduler_type={args.lr_scheduler_type.value!r}`"
        logger.warning(
            f"{name} is left as it is, so it goes on through the {args.critic_warmup_steps} steps of "
            "`critic_warmup_steps`, in which the policy does not move. Let it wait for as many steps, or use a schedule "
            "of steps (`lr_scheduler_type='linear'`, say), which begins after them."
        )


class Rest:
    """Stands, where norms are taken, for a model without what its companion has for itself."""

    def __init__(self, model: nn.Module, companion: Companion):
        self.model, self.companion = model, companion

    def parameters(self) -> Iterator[nn.Parameter]:
        """Returns those of the model but the companion's own."""
        own = {id(parameter) for parameter in self.companion.own_parameters()}
        return (parameter for parameter in self.model.parameters() if id(parameter) not in own)


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clips gradients to a norm, and returns the one that they had; 0 where there are none."""
    norm = torch.nn.utils.clip_grad_norm_(list(parameters), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
