"""Rewards of turns: what an environment says before the first turn and after each."""

import inspect
from collections.abc import Callable

from ..token_mdp import rewards_of_turns
from .dense import described, number_of
from .rollout import Completed


class Turns:
    """
    Asks the environments of a rollout what their reward would be, turn by turn.

    Args:
        environment_classes (`list[type]`): The classes of environments that have rewards.
        run (`Callable`): Runs a coroutine and returns its result.
    """

    def __init__(self, environment_classes: list[type], run: Callable):
        self.environment_classes, self.run = environment_classes, run
        self.totals: list[list[float | None]] = []

    def begin(self, num_completions: int) -> None:
        """Forgets the last rollout."""
        self.totals = [[] for _ in range(num_completions)]

    def ask(self, environments: list) -> None:
        """
        Asks each environment, before a turn or after the last one.

        Raises:
            TypeError: for a reward that is no number.
        """
        for environment, totals in zip(environments, self.totals, strict=True):
            if type(environment) not in self.environment_classes:
                continue
            total = environment.get_reward()
            if inspect.isawaitable(total):
                total = self.run(total)
            try:
                totals.append(None if total is None else number_of(total))
            except TypeError:
                raise TypeError(
                    f"`get_reward` of the environment {type(environment).__name__} returned {described(total)}. With "
                    "`turn_rewards` it is asked before the first turn and after each, and must return a number: the "
                    "reward up to then, or None while there is none."
                ) from None


def turn_reward(environment_class: type, completed: Completed) -> Callable:
    """Makes a reward function that pays what each turn adds to what environments of this class say."""

    def reward(environments, **kwargs):
        return [
            rewards_of_turns(totals, mask)
            if type(environment) is environment_class and totals[-1] is not None
            else None
            for environment, totals, mask in zip(environments, completed.turn_totals, completed.is_chosen, strict=True)
        ]

    return reward
