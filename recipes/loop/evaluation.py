"""An evaluation of one model against another: numbers with intervals, as a table, as examples and as a picture."""

import random
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from collecting.text import as_text

from .answers import Answers


RESAMPLES = 10_000
MAX_SHOWN = 400  # characters of a prompt or an answer
COLORS = {"better": "#3b7dd8", "tied": "#c9ced6", "worse": "#d8703b"}
VERBS = {"wins against": "win_rate", "ties with": "tie_rate", "loses to": "lose_rate"}


def interval(values: list[float]) -> dict[str, float]:
    """Returns the mean over prompts, with an interval of 95% from resampling them."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def measure(names: list[str], judges: list[str], answers: list[Answers]) -> dict:
    """Returns what `evaluation.json` holds."""

    def over_prompts(value: Callable[[Answers], float]) -> dict[str, float]:
        return interval([value(row) for row in answers])

    results = {
        "baseline": names[0],
        "model": names[1],
        "judges": judges,
        "num_prompts": len(answers),
        "num_comparisons": sum(len(row.outcomes) for row in answers),
    }
    for name, outcome in (("win_rate", 1), ("tie_rate", 0), ("lose_rate", -1)):
        results[name] = over_prompts(lambda row, outcome=outcome: row.outcomes.count(outcome) / len(row.outcomes))
    for name in ("rewards", "lengths"):
        results[name] = {
            model: over_prompts(lambda row, name=name, i=i: statistics.mean(getattr(row, name)[i]))
            for i, model in enumerate(names)
        }
        results[name]["difference"] = over_prompts(
            lambda row, name=name: statistics.mean(getattr(row, name)[1]) - statistics.mean(getattr(row, name)[0])
        )
    return results


def percent(rate: dict[str, float]) -> str:
    return f"{rate['mean']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def number(value: dict[str, float]) -> str:
    return f"{value['mean']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def rows_of(results: dict) -> list[tuple[str, str]]:
    baseline, model = results["baseline"], results["model"]
    rates = [(f"{model} {verb} {baseline}", percent(results[name])) for verb, name in VERBS.items()]
    means = [
        (f"{what}, {name}", number(results[key][name]))
        for key, what in (("rewards", "reward model's score"), ("lengths", "tokens per completion"))
        for name in (baseline, model)
    ]
    return rates + means


def summary(results: dict) -> str:
    return (
        f"{results['num_comparisons']} pairs of answers to {results['num_prompts']} held-out prompts, judged by "
        f"{', '.join(results['judges'])}; in brackets 95% intervals from resampling the prompts."
    )


def verdict(outcomes: list[int]) -> str:
    total = sum(outcomes)
    return "better" if total > 0 else "worse" if total < 0 else "tied"


def one_line(message: str | list[dict]) -> str:
    """Returns a text, or the content of messages (with their roles where there are several), not too long."""
    alone = message[0]["content"] if not isinstance(message, str) and len(message) == 1 else as_text(message)
    return textwrap.shorten(alone, MAX_SHOWN, placeholder=" ...")


def examples(names: list[str], answers: list[Answers], count: int) -> str:
    """Returns some prompts with the first answer of each model and its reward."""
    blocks = []
    for row in random.Random(0).sample(answers, min(count, len(answers))):
        marks = ["", f", {verdict(row.outcomes)}"]
        lines = [f"prompt: {one_line(row.prompt)}"]
        for name, texts, rewards, mark in zip(names, row.texts, row.rewards, marks, strict=True):
            lines.append(f"  {name} ({rewards[0]:+.2f}{mark}): {one_line(texts[0])}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(results: dict, shown: str) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in rows_of(results))
    return (
        f"{summary(results)}\n\n| | |\n| --- | --- |\n{table}\n\n![Evaluation](evaluation.png)\n\n"
        f"Answers to some of the prompts, with the reward model's score of each:\n\n```text\n{shown}\n```\n"
    )


def draw(results: dict, answers: list[Answers], file: Path) -> None:
    baseline, model = results["baseline"], results["model"]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for (label, color), name in zip(COLORS.items(), VERBS.values(), strict=True):
        rate = results[name]
        error = [[rate["mean"] - rate["low"]], [rate["high"] - rate["mean"]]]
        axes[0].bar([label], [rate["mean"]], yerr=error, capsize=6, color=color)
        axes[0].text(label, rate["high"] + 0.02, f"{rate['mean']:.0%}", ha="center")
    axes[0].set(ylim=(0, 1.1), ylabel="share of the pairs")
    axes[0].set_title(f"{model}'s answers against {baseline}'s")
    for axis, name, unit in (
        (axes[1], "rewards", "reward model's score"),
        (axes[2], "lengths", "tokens of an answer"),
    ):
        values = [[value for row in answers for value in getattr(row, name)[i]] for i in range(2)]
        bins = np.histogram_bin_edges(values[0] + values[1], bins=24)
        for i, (label, color) in enumerate(((baseline, COLORS["worse"]), (model, COLORS["better"]))):
            axis.hist(values[i], bins=bins, alpha=0.55, color=color, label=label)
            axis.axvline(statistics.mean(values[i]), color=color, linestyle="--", linewidth=1.5)
        axis.set(xlabel=unit, ylabel="answers")
        axis.legend(frameon=False)
    axes[1].set_title("Scores (dashed: means)")
    axes[2].set_title("Lengths (dashed: means)")
    figure.savefig(file, dpi=110)
