"""Results of a study: pure functions of what its runs measured."""

import statistics
from dataclasses import dataclass

from scipy.stats import t

from .methods import METHODS


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Run:
    """
    A run that is over.

    Args:
        method (`str`): The name of its method.
        setting (`float`): What it was done at: a multiple of the task's learning rate, or the value of a sweep.
        seed (`int`): Its seed.
        points (`list[dict]`): Measurements in their order, each with `tokens` and `objective`.
        cpu_seconds (`float`): The time it took.
    """

    method: str
    setting: float
    seed: int
    points: list[dict]
    cpu_seconds: float = 0.0


# --- Measures of a run ---


def final(points: list[dict], key: str = "objective") -> float:
    """Returns the mean over the last quarter of the tokens."""
    start = 0.75 * points[-1]["tokens"]
    return statistics.mean(point[key] for point in points if point["tokens"] > start)


def area(points: list[dict]) -> float:
    """Returns the area under the objective, by trapezoids over tokens, as a mean height: more for who learns sooner."""
    if len(points) < 2:
        return points[0]["objective"]
    pairs = list(zip(points, points[1:], strict=False))
    total = sum((b["tokens"] - a["tokens"]) * (a["objective"] + b["objective"]) / 2 for a, b in pairs)
    return total / (points[-1]["tokens"] - points[0]["tokens"])


# --- Statistics over seeds ---


def half_width(values: list[float], num_comparisons: int = 1) -> float:
    """
    Returns half of the interval of the mean by Student's t, infinite for one value; with several comparisons, of
    intervals that hold all at once with a probability of 95% at least (Bonferroni).
    """
    if len(values) < 2:
        return float("inf")
    quantile = t.ppf(1 - (1 - CONFIDENCE) / (2 * num_comparisons), len(values) - 1)
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def p_value(differences: list[float]) -> float:
    """Returns the probability of a mean so far from 0, either way, if there were no difference (paired t)."""
    if len(differences) < 2:
        return 1.0
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation == 0:
        return float(mean == 0)
    return 2 * t.sf(abs(mean) * len(differences) ** 0.5 / deviation, len(differences) - 1)


def holm(p_values: list[float]) -> list[float]:
    """Adjusts p-values for their number by Holm's step-down, https://www.jstor.org/stable/4615733."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


# --- Comparisons ---


@dataclass(frozen=True)
class Comparison:
    """
    A method less its baseline, at one setting.

    Args:
        method (`str`): The name of the method.
        baseline (`str`): The name of the method that it is compared with.
        setting (`float`): What both were run at.
        differences (`list[float]`): One for each seed that both have.
        num_comparisons (`int`): As many were made on the task.
        p_adjusted (`float`): Holm's p-value among these.
    """

    method: str
    baseline: str
    setting: float
    differences: list[float]
    num_comparisons: int = 1
    p_adjusted: float = 1.0

    @property
    def mean(self) -> float:
        return statistics.mean(self.differences)

    @property
    def half(self) -> float:
        """Half of the 95% interval of this comparison alone."""
        return half_width(self.differences)

    @property
    def half_of_all(self) -> float:
        """Half of the interval that holds together with those of all others on the task."""
        return half_width(self.differences, self.num_comparisons)

    @property
    def verdict(self) -> str:
        if self.mean - self.half_of_all > 0:
            return "above"
        return "below" if self.mean + self.half_of_all < 0 else "at"


def grouped(runs: list[Run]) -> dict[tuple[str, float], list[Run]]:
    """Returns runs by method and setting, in the order in which these come."""
    groups = {}
    for run in runs:
        groups.setdefault((run.method, run.setting), []).append(run)
    return groups


def compare(runs: list[Run]) -> list[Comparison]:
    """Compares each method with its baselines, seed by seed, and adjusts for the number of comparisons on the task."""
    finals = {key: {run.seed: final(run.points) for run in group} for key, group in grouped(runs).items()}
    raw = []
    for (method, setting), values in finals.items():
        for baseline in METHODS[method].baselines:
            others = finals.get((baseline, setting), {})
            differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
            if differences:
                raw.append(Comparison(method, baseline, setting, differences))
    adjusted = holm([p_value(comparison.differences) for comparison in raw])
    return [
        Comparison(c.method, c.baseline, c.setting, c.differences, len(raw), p)
        for c, p in zip(raw, adjusted, strict=True)
    ]


def worst(comparisons: list[Comparison]) -> dict[tuple[str, str], Comparison]:
    """Returns for each method and baseline the comparison at the setting where it does worst."""
    result = {}
    for comparison in comparisons:
        key = comparison.method, comparison.baseline
        if key not in result or comparison.mean < result[key].mean:
            result[key] = comparison
    return result
