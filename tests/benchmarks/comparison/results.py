"""Results: a file per run, and a table and a picture of all."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t
from trl import GRPOTrainer, RLOOTrainer

from .methods import METHODS, Setting


@dataclass(frozen=True)
class Job:
    """A run, and the place of its result."""

    output_dir: str
    task: str
    method: str
    setting: Setting
    seed: int
    budget: int
    corpus_size: int | None

    @property
    def file(self) -> Path:
        return Path(
            self.output_dir, "runs", f"{self.task}_{self.method}_{self.setting}_{self.seed}_{self.budget}.json"
        )

    def result(self) -> list[dict]:
        return json.loads(self.file.read_text(encoding="utf-8"))["points"]


def final(points: list[dict], key: str = "objective") -> float:
    """Returns the mean of the last two measurements, which is less noisy than the last."""
    return statistics.mean(point[key] for point in points[-2:])


def on_the_way(points: list[dict]) -> float:
    """Returns the mean objective of all measurements but the first: higher for who learns sooner."""
    return statistics.mean(point["objective"] for point in points[1:])


def interval(values: list[float]) -> str:
    """Returns mean and 95% interval by Student's t, over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.2f} ± {half:.2f}"


def table(jobs_of: dict[str, list[Job]]) -> str:
    keys = ["objective", "reward", "judge", "kl", "perplexity", "length"]
    lines = [
        "| method | setting | objective | on the way | reward | judge | KL of a review | perplexity | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    means = {name: statistics.mean(final(job.result()) for job in jobs) for name, jobs in jobs_of.items()}
    for name in sorted(jobs_of, key=lambda name: -means[name]):
        jobs = jobs_of[name]
        setting = jobs[0].setting
        schedule = (
            f"n={setting.num_samples}" if name == "best-of-n" else "1 x 32" if setting.is_on_policy else "8 x 128"
        )
        cells = [interval([final(job.result(), key) for job in jobs]) for key in keys]
        cells.insert(1, interval([on_the_way(job.result()) for job in jobs]))
        schedule += "" if setting.lam is None else f", lambda {setting.lam:g}"
        lines.append(f"| {name} | {setting.learning_rate:g}, {schedule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(jobs_of: dict[str, list[Job]], title: str, path: Path) -> None:
    """Draws learning curves: means over seeds, with the range between the least and the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("Objective", "objective"), ("Reward", "reward"), ("Judge's score", "judge"), ("KL of a review", "kl")]
    panels.append(("Perplexity under the language model", "perplexity"))
    figure, axes = plt.subplots(2, 3, figsize=(17, 9), layout="constrained")
    figure.suptitle(title)
    colors = plt.get_cmap("tab20").colors
    for axis, (name, key) in zip(axes.flat, panels, strict=False):
        for (method, jobs), color in zip(jobs_of.items(), colors, strict=False):
            curves = [job.result() for job in jobs]
            length = min(map(len, curves))
            x = [statistics.mean(curve[i]["tokens"] for curve in curves) / 1000 for i in range(length)]
            values = [[curve[i][key] for curve in curves] for i in range(length)]
            style = "--" if METHODS[method].trainer_class in (GRPOTrainer, RLOOTrainer) else "-"
            axis.plot(x, [statistics.mean(v) for v in values], style, color=color, label=method, linewidth=1.6)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12)
        axis.set_title(name)
        axis.set_xlabel("thousand tokens sampled")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center", ncols=2, fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)
