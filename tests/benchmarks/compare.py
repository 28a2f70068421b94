"""
Compare the ways to train a language model by reward: the methods of this package, at their defaults, and TRL's GRPO and
RLOO, with the same starts, prompts, seeds, updates and sampled tokens, at three learning rates.

    python tests/benchmarks/compare.py      # all tasks that need nothing from outside: a day on two CPU cores
    python tests/benchmarks/compare.py --tasks count-end single --methods ppo grpo-epochs --seeds 2
    python tests/benchmarks/compare.py --tasks count-end --methods ppo --set lam=1.0 --first_seed 100 --seeds 2
    python tests/benchmarks/compare.py --tasks smollm2-reviews --smollm2 SmolLM2-135M-Instruct --data reviews.jsonl.gz
    python tests/benchmarks/compare.py --tune       # first chooses learning rates, and GRPO's and RLOO's options, anew
    python tests/benchmarks/compare.py --sweep updates --tasks count-end delayed

What the tasks are, their modules say in `comparison/tasks`; what is measured, and how it is compared, the README beside
this file. Runs lie in `runs/`, one file each, and are not computed again: the study goes on where it was stopped.
"""

import argparse
import ast
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from comparison.methods import METHODS
from comparison.pictures import draw_overview, draw_task
from comparison.results import Run
from comparison.runs import Job, run
from comparison.tables import overview, sweep_table, task_table
from comparison.tasks import TASKS
from comparison.tasks.base import Places
from comparison.tuning import read_tuned, tune
from tqdm import tqdm

from shared.progress import quiet


RATES = (1 / 3, 1.0, 3.0)
# What is swept: the value, and the options that stand for it
SWEEPS = {
    "updates": {
        epochs * minibatches: (("num_iterations", epochs), ("steps_per_generation", minibatches))
        for epochs, minibatches in ((1, 1), (2, 1), (4, 1), (4, 2), (4, 4))
    },
    "completions": {number: (("num_generations", number),) for number in (1, 2, 8)},
}
SWEPT_METHODS = {"updates": ["grpo-epochs", "rloo-epochs", "ppo", "nlpo"], "completions": list(METHODS)}


def perform(job: Job, places: Places) -> None:
    quiet()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(1)
    run(job, places)


def perform_all(jobs: list[Job], places: Places, num_workers: int, title: str) -> list[dict]:
    """Runs those jobs that have no result yet, and returns the results of all."""
    missing = [job for job in dict.fromkeys(jobs) if not job.file(places.output_dir).is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures = [pool.submit(perform, job, places) for job in missing]
        try:
            for future in tqdm(as_completed(futures), desc=title, total=len(missing), disable=not missing):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # an error shows now, not when all other runs are over
            raise
    return [job.result(places.output_dir) for job in jobs]


def runs_of(settings: list[tuple[Job, float]], places: Places, num_workers: int, title: str) -> list[Run]:
    """Runs jobs, each with the setting that it stands for in tables."""
    results = perform_all([job for job, _ in settings], places, num_workers, title)
    return [
        Run(job.method, setting, job.seed, result["points"], result["cpu_seconds"])
        for (job, setting), result in zip(settings, results, strict=True)
    ]


def option(text: str) -> tuple[str, object]:
    """Returns name and value of `name=value`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no `name=value`.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, {"nargs": "+", "metavar": "NAME"}
    add("--output_dir", default="outputs/compare", help="where models, runs, tables and pictures go")
    add("--tasks", choices=list(TASKS), help=f"of {', '.join(TASKS)}; default: those whose files are given", **names)
    add("--methods", choices=list(METHODS), help=f"of {', '.join(METHODS)}", **names)
    add("--rates", nargs="+", type=float, default=RATES, help="multiples of a task's learning rate")
    add("--seeds", type=int, help="how many (default: 5, and 2 for SmolLM2)")
    add("--first_seed", type=int, default=0, help="from 100 on, seeds are not those of the study")
    add("--budget", type=int, metavar="TOKENS", help="tokens that a run samples, in place of the task's")
    add("--set", nargs="+", type=option, default=[], metavar="NAME=VALUE", help="options of this package's methods")
    add("--sweep", choices=list(SWEEPS), help="a table over updates per rollout, or completions per prompt")
    add("--tune", action="store_true", help="choose learning rates and options anew, and write them to tuned.json")
    add("--smollm2", metavar="FOLDER", help="SmolLM2-135M-Instruct, for smollm2-reviews and smollm2-sums")
    add("--data", metavar="FILE", help="film reviews with `text` and `label` (JSON lines or CSV), for smollm2-reviews")
    add("--corpus_size", type=int, metavar="N", help="reviews that the quickstart's language model learns from")
    add("--jobs", type=int, default=2, help="runs at the same time, of one thread each")
    args = parser.parse_args()
    for name in ("seeds", "budget", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1.")
    return args


class Study:
    """A study of tasks with the arguments of the command line."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.places = Places(args.output_dir, args.smollm2, args.data, args.corpus_size)
        self.tuned = read_tuned()

    def methods(self) -> list[str]:
        return self.args.methods or SWEPT_METHODS.get(self.args.sweep, list(METHODS))

    def budget(self, task: str) -> int:
        return self.args.budget or TASKS[task].budget

    def job(self, task: str, method: str, multiple: float, seed: int, options: tuple = ()) -> Job:
        given = () if METHODS[method].compares_groups else tuple(self.args.set)
        chosen = self.tuned[task]["options"].get(method, {}) | dict(options) | dict(given)
        rate = self.tuned[task]["learning_rate"] * multiple
        return Job(task, method, rate, seed, self.budget(task), tuple(chosen.items()))

    def seeds(self, task: str) -> range:
        return range(self.args.first_seed, self.args.first_seed + (self.args.seeds or TASKS[task].num_seeds))

    def tune(self, task: str) -> None:
        """Chooses the learning rate and options, and writes them to a file that may take the place of ours."""

        def perform_jobs(jobs):
            return [result["points"] for result in perform_all(jobs, self.places, self.args.jobs, f"{task}: tuning")]

        self.tuned[task] = tune(task, self.methods(), self.budget(task), perform_jobs)
        text = json.dumps(self.tuned, indent=2) + "\n"
        Path(self.args.output_dir, "tuned.json").write_text(text, encoding="utf-8")

    def at_rates(self, task: str) -> list[Run]:
        """Runs all methods at all rates, and writes the task's table and picture."""
        settings = [
            (self.job(task, method, multiple, seed), multiple)
            for method in self.methods()
            for multiple in self.args.rates
            for seed in self.seeds(task)
        ]
        runs = runs_of(settings, self.places, self.args.jobs, task)
        title = f"{task}, learning rate {self.tuned[task]['learning_rate']:g}, {self.budget(task)} tokens"
        draw_task(runs, title, Path(self.args.output_dir, f"compare_{task}.png"))
        self.write(task, f"{title}\n\n{task_table(runs)}")
        return runs

    def sweep(self, task: str, sweep: str) -> None:
        """Runs methods at the learning rate in the middle with each value of the sweep, and writes a table."""
        settings = [
            (self.job(task, method, 1.0, seed, options), value)
            for method in self.methods()
            for value, options in SWEEPS[sweep].items()
            for seed in self.seeds(task)
            if not (METHODS[method].compares_groups and dict(options).get("num_generations") == 1)
        ]
        runs = runs_of(settings, self.places, self.args.jobs, f"{task}, {sweep}")
        self.write(f"{task}_{sweep}", f"{task}\n\n{sweep_table(runs, sweep)}")

    def write(self, name: str, text: str) -> None:
        Path(self.args.output_dir, f"{name}.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n")


def main() -> None:
    args = parse_args()
    quiet()
    study = Study(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    tasks = args.tasks or [name for name, task in TASKS.items() if not task.missing(study.places)]
    for task in tasks:
        if missing := TASKS[task].missing(study.places):
            sys.exit(f"error: the task {task} needs {missing}.")
        TASKS[task].prepare(study.places)
        if args.tune:
            study.tune(task)
    if args.sweep:
        for task in tasks:
            study.sweep(task, args.sweep)
        return
    runs = {task: study.at_rates(task) for task in tasks}
    study.write("overview", overview(runs))
    draw_overview(runs, Path(args.output_dir, "compare_overview.png"))


if __name__ == "__main__":
    main()
