"""The learning rates of a training whose critic first learns alone, for `critic_warmup_steps` optimizer steps."""

from accelerate.logging import get_logger
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType

from ..models.companion import OF_COMPANION


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
