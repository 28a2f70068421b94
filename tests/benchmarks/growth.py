r"""
Measures how time and memory grow: PPO of trl_ext and TRL's GRPO as there are more completions, longer ones, more words and a
larger model, one at a time, everything else as in `actor_critic_vs_grpo.py`.

    python tests/benchmarks/growth.py --output growth.png --json growth.json

Each point is a run of both in turn, in processes of their own. Lengths are geometric, of a quarter of the longest as
mean, in 4 micro-batches with 4 completions per prompt.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
from actor_critic_vs_grpo import run
from tqdm import tqdm


matplotlib.use("Agg")
import matplotlib.pyplot as plt


CONTENDERS = {"grpo-1epoch-4micro": "GRPO of TRL", "ppo-1epoch-4micro-unwhitened": "PPO of trl_ext"}
# The argument that grows, its title and its values; the others stay as in BASE
BASE = {"prompts": 4, "prompt_length": 64, "completion_length": 64, "vocab_size": 32_000, "hidden_size": 512}
AXES = {
    "prompts": ("prompts per rollout, 4 completions each", [1, 2, 4, 8]),
    "completion_length": ("longest completion, tokens", [32, 64, 128, 256]),
    "vocab_size": ("vocabulary", [8_000, 32_000, 64_000, 128_000]),
    "hidden_size": ("hidden size, 8 layers", [256, 512, 768]),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("growth.png"), help="the picture (default: growth.png)")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--steps", type=int, default=2, help="rollouts per run (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads per run (default: 2)")
    return parser.parse_args()


def measure(axis: str, value: int, contender: str, args: argparse.Namespace) -> dict:
    point = BASE | {axis: value}
    point |= {"mean_length": point["completion_length"] / 4, "steps": args.steps}
    arguments = [text for name, x in point.items() for text in (f"--{name}", str(x))]
    result = run(contender, args.threads, arguments)
    return {"axis": axis, "value": value, "contender": contender} | result


def plot(results: list[dict], path: Path) -> None:
    figure, rows = plt.subplots(2, len(AXES), figsize=(4 * len(AXES), 6.5), layout="constrained")
    for column, (axis, (title, _)) in enumerate(AXES.items()):
        for row, (label, quantity) in enumerate(
            {
                "ms per token": lambda r: 1000 * r["seconds"] / r["tokens"],
                "peak GiB": lambda r: r["peak_bytes"] / 2**30,
            }.items()
        ):
            plane = rows[row, column]
            for contender, name in CONTENDERS.items():
                points = [r for r in results if r["axis"] == axis and r["contender"] == contender]
                plane.plot([p["value"] for p in points], [quantity(p) for p in points], marker="o", label=name)
            plane.set_xscale("log", base=2)
            plane.set_xticks(AXES[axis][1], [f"{value:,}" for value in AXES[axis][1]])
            plane.minorticks_off()
            plane.set_ylim(bottom=0)
            plane.grid(alpha=0.3)
            plane.set_xlabel(title)
            plane.set_ylabel(label)
    rows[0, 0].legend()
    figure.suptitle(f"Time and memory, {results[0]['device']}")
    figure.savefig(path, dpi=110)


def main() -> None:
    args = parse_args()
    points = [(axis, value) for axis, (_, values) in AXES.items() for value in values]
    results = []
    for number, (axis, value) in enumerate(tqdm(points, file=sys.stderr)):
        order = list(CONTENDERS) if number % 2 == 0 else list(CONTENDERS)[::-1]
        results += [measure(axis, value, contender, args) for contender in order]
        if args.json:
            args.json.write_text(json.dumps(results, indent=2))
    plot(results, args.output)
    print(f"| {' | '.join(['axis', 'value', 'time ratio', 'memory ratio'])} |\n| --- | --- | --- | --- |")
    for axis, value in points:
        theirs, ours = (
            next(r for r in results if (r["axis"], r["value"], r["contender"]) == (axis, value, contender))
            for contender in CONTENDERS
        )
        time = (ours["seconds"] / ours["tokens"]) / (theirs["seconds"] / theirs["tokens"])
        print(f"| {axis} | {value} | {time:.2f} | {ours['peak_bytes'] / theirs['peak_bytes']:.2f} |")


if __name__ == "__main__":
    main()
