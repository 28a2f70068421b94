"""Pictures of results."""

from pathlib import Path

import matplotlib
import numpy as np

from .results import Run, compare, grouped


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


COLORS = plt.get_cmap("tab20").colors
GRID_POINTS = 25


def curve(group: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Returns thousands of tokens, `(25,)`, and the objective of each run there, `(seeds, 25)`."""
    grid = np.linspace(0, min(run.points[-1]["tokens"] for run in group), GRID_POINTS)
    columns = [[[point[key] for point in run.points] for key in ("tokens", "objective")] for run in group]
    return grid / 1000, np.stack([np.interp(grid, tokens, objective) for tokens, objective in columns])


def draw_task(runs: list[Run], title: str, path: Path) -> None:
    """Draws learning curves, a panel for each rate: means over seeds, with the range between least and greatest."""
    groups = grouped(runs)
    methods = list(dict.fromkeys(method for method, _ in groups))
    settings = sorted({setting for _, setting in groups})
    figure, axes = plt.subplots(
        1, len(settings), figsize=(5 * len(settings) + 2, 4.5), sharey=True, squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for axis, setting in zip(axes[0], settings, strict=True):
        for method, color in zip(methods, COLORS, strict=False):
            if (method, setting) not in groups:
                continue
            x, values = curve(groups[method, setting])
            style = "--" if method.startswith(("grpo", "rloo")) else "-"
            axis.plot(x, values.mean(axis=0), style, color=color, label=method, linewidth=1.6)
            axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.1)
        axis.set_title(f"{setting:.2g} x the learning rate")
        axis.set_xlabel("thousand tokens sampled")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("objective")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_overview(runs_of: dict[str, list[Run]], path: Path) -> None:
    """
    Draws the differences to each method's baseline: a panel for each task, a dot for each rate, with its own interval
    (thick) and the one that holds together with all others of the task (thin).
    """
    comparisons_of = {task: compare(runs) for task, runs in runs_of.items()}
    pairs = list(dict.fromkeys((c.method, c.baseline) for comparisons in comparisons_of.values() for c in comparisons))
    num_columns = min(len(runs_of), 5)
    num_rows = -(-len(runs_of) // num_columns)
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(3.4 * num_columns + 2, (0.4 * len(pairs) + 1.2) * num_rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(runs_of) :]:
        axis.axis("off")
    handles = {}
    for axis, (task, comparisons) in zip(axes.flat, comparisons_of.items(), strict=False):
        settings = sorted({c.setting for c in comparisons})
        for c in comparisons:
            place = settings.index(c.setting)
            y = -pairs.index((c.method, c.baseline)) - (place - (len(settings) - 1) / 2) * 0.22
            color = plt.get_cmap("viridis")(0.15 + 0.7 * place / max(len(settings) - 1, 1))
            axis.plot(c.mean, y, "o", color=color, markersize=4, label=f"{c.setting:.2g} x")
            if len(c.differences) > 1:
                axis.plot([c.mean - c.half, c.mean + c.half], [y, y], color=color, linewidth=2)
                axis.plot([c.mean - c.half_of_all, c.mean + c.half_of_all], [y, y], color=color, linewidth=0.6)
        widest = max((abs(c.mean) + (c.half if len(c.differences) > 1 else 0) for c in comparisons), default=0)
        axis.set_xlim(-1.1 * widest - 1e-3, 1.1 * widest + 1e-3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(task)
        axis.set_yticks([-i for i in range(len(pairs))], [f"{method} - {baseline}" for method, baseline in pairs])
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.3)
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", title="learning rate")
    figure.savefig(path, dpi=90)
    plt.close(figure)
