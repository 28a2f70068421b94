"""Tables of results, in Markdown."""

import math
import statistics

from .results import Comparison, Run, compare, final, grouped, half_width, worst
from .results import area as area_of


def number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(values: list[float]) -> str:
    """Returns mean and 95% interval over seeds."""
    mean = number(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {number(half_width(values))}"


def difference(comparison: Comparison | None) -> list[str]:
    """Returns the cells of a comparison: its baseline, difference, adjusted interval and p-value."""
    if comparison is None:
        return [""] * 4
    low, high = (comparison.mean + sign * comparison.half_of_all for sign in (-1, 1))
    bounds = f"{number(low)} to {number(high)}" if math.isfinite(low) else ""
    return [comparison.baseline, interval(comparison.differences), bounds, f"{comparison.p_adjusted:.3g}"]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def task_table(runs: list[Run]) -> str:
    """Returns the table of a task: each method at each rate, and its difference to its first baseline."""
    comparisons = {(c.method, c.setting, c.baseline): c for c in compare(runs)}
    extras = [key for key in runs[0].points[-1] if key not in ("tokens", "objective")]
    header = [
        "method",
        "rate",
        "objective",
        "area",
        "baseline",
        "difference",
        "all at once",
        "p (Holm)",
        *extras,
        "CPU s",
    ]
    rows = []
    for (method, setting), group in grouped(runs).items():
        of_group = [c for (name, at, _), c in comparisons.items() if (name, at) == (method, setting)] or [None]
        cells = [interval([final(run.points) for run in group]), interval([area_of(run.points) for run in group])]
        measures = [interval([final(run.points, key) for run in group]) for key in extras]
        seconds = f"{statistics.mean(run.cpu_seconds for run in group):.0f}"
        rows.append([method, f"{setting:.2g}", *cells, *difference(of_group[0]), *measures, seconds])
        rows += [["", "", "", "", *difference(c), *[""] * len(extras), ""] for c in of_group[1:]]
    return table(header, rows)


def overview(runs_of: dict[str, list[Run]]) -> str:
    """Returns the table of bars: each method on each task at the rate where it does worst against its baseline."""
    worst_of = {task: worst(compare(runs)) for task, runs in runs_of.items()}
    pairs = list(dict.fromkeys(pair for comparisons in worst_of.values() for pair in comparisons))
    rows = [
        [f"{method} - {baseline}", *(bar(comparisons.get((method, baseline))) for comparisons in worst_of.values())]
        for method, baseline in pairs
    ]
    return table(["", *runs_of], rows)


def bar(comparison: Comparison | None) -> str:
    """Returns a verdict with the difference, the interval that holds with all others of the task, and the rate."""
    if comparison is None:
        return ""
    _, _, bounds, _ = difference(comparison)
    bounds = f" ({bounds})" if bounds else ""
    return f"{comparison.verdict}: {number(comparison.mean)}{bounds} at {comparison.setting:.2g}"


def sweep_table(runs: list[Run], name: str) -> str:
    """Returns the table of a sweep: a column for each of its values, and under each method its differences."""
    groups = grouped(runs)
    values = sorted({setting for _, setting in groups})
    comparisons = {(c.method, c.baseline, c.setting): c for c in compare(runs)}
    rows = []
    for method in dict.fromkeys(method for method, _ in groups):
        cells = [groups.get((method, value), []) for value in values]
        rows.append([method, *(interval([final(run.points) for run in cell]) if cell else "" for cell in cells)])
        for baseline in dict.fromkeys(b for m, b, _ in comparisons if m == method):
            row = [comparisons.get((method, baseline, value)) for value in values]
            rows.append([f"{method} - {baseline}", *(difference(c)[1] for c in row)])
    return table([name, *(f"{value:g}" for value in values)], rows)
