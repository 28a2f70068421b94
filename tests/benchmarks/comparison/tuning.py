"""The choice of learning rates and of GRPO's and RLOO's options, on seeds that are not reported."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from .methods import METHODS
from .results import final
from .runs import Job
from .tasks import TASKS


SEEDS = (100, 101)
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATE_METHODS = ("grpo", "grpo-epochs")  # one rate for both: what serves the two best together
TUNED_FILE = Path(__file__).with_name("tuned.json")


def read_tuned(file: Path = TUNED_FILE) -> dict:
    """Returns by task `learning_rate`, and `options` by method."""
    return json.loads(file.read_text(encoding="utf-8"))


def candidates(task: str, method: str, option: str) -> tuple:
    """Returns the values to try of an option, the default first; none where the task has no such price."""
    values = METHODS[method].tuned[option]
    if option != METHODS[method].kl_option:
        return values
    price = TASKS[task].kl_price
    return tuple(round(price * multiple, 4) for multiple in values) if price > 0 else ()


def tune(task: str, methods: list[str], budget: int, perform: Callable[[list[Job]], list[list[dict]]]) -> dict:
    """
    Returns `learning_rate`, and `options` by method: first the rate, then one option after the other at that rate.

    Args:
        task (`str`): The name of the task.
        methods (`list[str]`): Those whose options are tuned.
        budget (`int`): Tokens of a run.
        perform (`Callable`): Runs jobs, and returns their learning curves.
    """

    def best(trials: dict[object, list[Job]]) -> object:
        curves = iter(perform([job for jobs in trials.values() for job in jobs]))
        means = {value: statistics.mean(final(next(curves)) for _ in jobs) for value, jobs in trials.items()}
        return max(means, key=means.get)

    rate = TASKS[task].learning_rate
    if rate is None:
        rate = best(
            {
                rate: [Job(task, method, rate, seed, budget) for method in RATE_METHODS for seed in SEEDS]
                for rate in RATES
            }
        )
    options_of = {}
    for method in methods:
        options = {}
        for option in METHODS[method].tuned:
            values = candidates(task, method, option)
            trials = {
                value: [Job(task, method, rate, seed, budget, tuple(changed.items())) for seed in SEEDS]
                for i, value in enumerate(values)
                for changed in [options | ({option: value} if i > 0 else {})]
            }
            if trials and (value := best(trials)) != values[0]:
                options[option] = value
        options_of[method] = options
    return {"learning_rate": rate, "options": options_of}
