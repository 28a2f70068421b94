"""Training curves as small multiples, the picture beside a model card."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger

from .record import is_number


logger = get_logger(__name__)

CURVES_FILE = "training_curves.png"
# The first is that of training, the others are those of evaluations; the first two differ in grey as well
COLORS = ["#1f6fb4", "#f08a24", "#2f8f4e", "#8f4fb0", "#7a7a7a"]
# From so many points on, a running mean is drawn over them
NOISY = 40


@dataclass(frozen=True)
class Panel:
    """
    One of the small plots.

    Args:
        title (`str`): Its heading.
        unit (`str`): Label of its axis.
        metric (`str`): Name under which the quantity is logged.
        dotted (`str`, *optional*): Name of a quantity to compare with, for which the title must have a word.
    """

    title: str
    unit: str
    metric: str
    dotted: str | None = None


@dataclass(frozen=True)
class Line:
    """The finite values of a metric in a run."""

    run: int  # its place among the runs
    is_dotted: bool
    steps: list[int]
    values: list[float]


def draw_training_curves(runs: dict[str, list[dict]], panels: list[Panel], folder: str | Path) -> bool:
    """
    Draws the logged metrics over the optimizer steps to `training_curves.png`.

    Args:
        runs (`dict[str, list[dict]]`): Logged entries, each with its `step`, by name: training, then evaluations.
        panels (`list[Panel]`): The small plots; those without logged values are left out.
        folder (`str` or `Path`): Folder of the file.

    Returns:
        `bool`: True if the picture was drawn; False without matplotlib or any curve.
    """
    drawn = [(panel, lines) for panel in panels if (lines := lines_of(panel, runs))]
    if not drawn:
        return False
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning_once("The model card has no training curves: `pip install matplotlib` for them.")
        return False
    num_columns = 2 if len(drawn) == 4 else min(len(drawn), 3)
    num_rows = math.ceil(len(drawn) / num_columns)
    with matplotlib.style.context("default"):  # the user's settings may be of any kind
        # The backend and open figures of pyplot are the user's, so that the figure is made without it
        figure = Figure(figsize=(3.3 * num_columns, 2.3 * num_rows + 0.3), layout="constrained")
        for index, (panel, lines) in enumerate(drawn):
            axis = figure.add_subplot(num_rows, num_columns, index + 1)
            _draw_panel(axis, panel, lines)
            if index + num_columns >= len(drawn):
                axis.set_xlabel("optimizer step", fontsize=9)
        _draw_legend(figure, list(runs), {line.run for _, lines in drawn for line in lines})
        figure.savefig(Path(folder) / CURVES_FILE, dpi=150)
    return True


def lines_of(panel: Panel, runs: dict[str, list[dict]]) -> list[Line]:
    """Returns a line for each metric of a panel and run; none if no line of its metric has two points."""
    lines = []
    for metric in (panel.metric, panel.dotted):
        for run, entries in enumerate(runs.values()):
            points = [(entry["step"], entry[metric]) for entry in entries if is_number(entry.get(metric))]
            if points:
                lines.append(Line(run, metric == panel.dotted, *map(list, zip(*points, strict=True))))
    return lines if any(len(line.steps) > 1 and not line.is_dotted for line in lines) else []


def running_mean(values: list[float], window: int) -> np.ndarray:
    """Returns the mean over the `window` values around each, fewer at the ends; `window` is at most their number."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")


def _draw_panel(axis, panel: Panel, lines: list[Line]) -> None:
    axis.set_title(panel.title, fontsize=9.5, loc="left")
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", nbins=5, integer=True)
    axis.locator_params(axis="y", nbins=5)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    for line in lines:
        style = {"color": COLORS[line.run % len(COLORS)], "linestyle": ":" if line.is_dotted else "-"}
        values = line.values
        if len(values) >= NOISY:
            axis.plot(line.steps, values, color=style["color"], alpha=0.2, linewidth=0.7)
            values = running_mean(values, window=len(values) // 20 | 1)
        marker = "." if len(values) < NOISY else None  # an evaluation may be a single point
        axis.plot(line.steps, values, marker=marker, markersize=4, linewidth=1.5, **style)


def _draw_legend(figure, names: list[str], drawn: set[int]) -> None:
    from matplotlib.lines import Line2D

    if len(drawn) > 1:
        handles = [Line2D([], [], color=COLORS[run % len(COLORS)], label=names[run]) for run in sorted(drawn)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
