r"""
How much better one model answers than another, by the judgements of both models' answers to the same prompts: what
`rlhf.py` ends with. After

    python recipes/sample_completions.py --dataset_name test_prompts.jsonl --output_dir outputs/evaluation \
        --model_name_or_path my-sft-model my-policy --num_completions 2
    python recipes/judge_completions.py --folder outputs/evaluation ...    # or people: rank_completions.py

this prints how often the second wins, ties and loses, and what a reward model says of both:

    python recipes/rlhf_evaluate.py --folder outputs/evaluation --reward_model my-reward-model --output_dir outputs

and writes `evaluation.json`, `evaluation.md` and `evaluation.png`. Intervals are of 95%, from resampling the prompts.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from judge_completions import reward_model_scores
from matplotlib.figure import Figure
from rank_completions import as_text
from transformers import AutoTokenizer

from trl_ext.data.collection import all_judgements
from trl_ext.data.items import Item, read_items
from trl_ext.data.records import read_lines


RESAMPLES = 10_000
MAX_SHOWN = 400  # characters of a prompt or an answer
COLORS = {"better": "#3b7dd8", "tied": "#c9ced6", "worse": "#d8703b"}


@dataclass
class Answers:
    """What both models said to a prompt, first the baseline; `rewards` and `lengths` (tokens) are of each answer."""

    prompt: str | list[dict]
    texts: tuple[list, list]
    outcomes: list[int]  # of each judged pair: 1 where the second model is better, 0 for a tie, -1
    rewards: tuple[list[float], list[float]] = ((), ())
    lengths: tuple[list[int], list[int]] = ((), ())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where sample_completions.py sampled from two models")
    parser.add_argument("--reward_model", required=True, help="a folder or Hub id")
    parser.add_argument("--output_dir", required=True, help="where the results go")
    parser.add_argument("--num_examples", type=int, default=4, help="prompts to show with both answers")
    return parser.parse_args()


# --- What is on disk ---


def read_answers(folder: Path) -> tuple[list[str], list[str], list[Answers]]:
    """
    The models' names, the judges' names, and the answers to all prompts that were judged.

    Raises:
        ValueError: if there are not two models, or nothing was judged.
    """
    models = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["model_name_or_path"]
    if len(models) != 2:
        raise ValueError(f"{folder} has completions of {len(models)} models. Sample from two.")
    samples = [{key(row["prompt"]): row for row in read_lines(folder / f"samples-{i}.jsonl")} for i in range(2)]
    judges = all_judgements(folder)
    ranks = ranks_by_prompt(folder, judges)
    answers = []
    for prompt, row in samples[0].items():
        texts = row["completions"], samples[1][prompt]["completions"]
        outcomes = compare(*texts, ranks[prompt])
        if outcomes:
            answers.append(Answers(row["prompt"], texts, outcomes))
    if not answers:
        raise ValueError(f"Nothing was judged in {folder} yet. Start judge_completions.py or rank_completions.py.")
    return [Path(name).name for name in models], [judge.annotator for judge in judges], answers


def key(message) -> str:
    return json.dumps(message, sort_keys=True)


def ranks_by_prompt(folder: Path, judges: list) -> dict[str, list[dict[str, int | None]]]:
    """For each prompt the rankings of its judges, as the rank of each text."""
    ranks = defaultdict(list)
    for item in read_items(folder):
        for judge in judges:
            if item in judge and judge[item.id]["ranks"] is not None:
                texts = map(key, item.completions)
                ranks[key(item.prompt)].append(dict(zip(texts, judge[item.id]["ranks"], strict=True)))
    return ranks


def compare(baseline: list, other: list, rankings: list[dict[str, int | None]]) -> list[int]:
    """Of each pair of answers by each judge; two equal texts are tied, and nobody is asked about them."""
    outcomes = []
    for first, second in ((key(a), key(b)) for a in baseline for b in other):
        if first == second:
            outcomes.append(0)
            continue
        for ranks in rankings:
            a, b = ranks.get(first), ranks.get(second)
            if a is not None and b is not None:
                outcomes.append((a > b) - (a < b))
    return outcomes


def add_rewards_and_lengths(answers: list[Answers], reward_model: str) -> None:
    score = reward_model_scores(reward_model, [row.prompt for row in answers])
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for row in answers:
        row.rewards = tuple(score(Item("", row.prompt, texts, [])) for texts in row.texts)
        if None in itertools.chain(*row.rewards):
            raise ValueError(
                f"{reward_model} has too few positions for an answer to {as_text(row.prompt)!r:.80}. Evaluate by another."
            )
        row.lengths = tuple([num_tokens(tokenizer, text) for text in texts] for texts in row.texts)


def num_tokens(tokenizer, completion: str | list[dict]) -> int:
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- Numbers ---


def interval(values: list[float]) -> dict[str, float]:
    """The mean over prompts, with an interval of 95% from resampling them."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def measure(names: list[str], judges: list[str], answers: list[Answers]) -> dict:
    """`evaluation.json`."""

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


# --- What is shown ---


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


VERBS = {"wins against": "win_rate", "ties with": "tie_rate", "loses to": "lose_rate"}


def summary(results: dict) -> str:
    return (
        f"{results['num_comparisons']} pairs of answers to {results['num_prompts']} held-out prompts, judged by "
        f"{', '.join(results['judges'])}; in brackets 95% intervals from resampling the prompts."
    )


def verdict(outcomes: list[int]) -> str:
    total = sum(outcomes)
    return "better" if total > 0 else "worse" if total < 0 else "tied"


def one_line(message: str | list[dict]) -> str:
    """A text, or the content of messages (with their roles where there are several), not too long."""
    alone = message[0]["content"] if not isinstance(message, str) and len(message) == 1 else as_text(message)
    return textwrap.shorten(alone, MAX_SHOWN, placeholder=" ...")


def examples(names: list[str], answers: list[Answers], count: int) -> str:
    """Prompts with the first answer of each model, and the reward model's score of it."""
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


def main() -> None:
    args = parse_args()
    output = Path(args.output_dir)
    try:
        names, judges, answers = read_answers(Path(args.folder))
        add_rewards_and_lengths(answers, args.reward_model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = measure(names, judges, answers)
    shown = examples(names, answers, args.num_examples)
    output.mkdir(parents=True, exist_ok=True)
    draw(results, answers, output / "evaluation.png")
    (output / "evaluation.md").write_text(as_markdown(results, shown), encoding="utf-8")
    (output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{shown}\n\n{summary(results)}\n")
    for name, value in rows_of(results):
        print(f"{name:38}{value}")


if __name__ == "__main__":
    main()
