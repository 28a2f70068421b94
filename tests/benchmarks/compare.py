"""
Compare the ways to train a language model by reward: the methods of this package, at their defaults, with TRL's GRPO and
RLOO, on the same tasks, starts, prompts and seeds, and at the same number of sampled tokens.

    python tests/benchmarks/compare.py --tasks count-end delayed --methods ppo grpo-epochs --seeds 1
"""

import argparse
import ast
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from comparison.methods import METHODS
from comparison.runs import Job, run
from comparison.tasks import TASKS
from comparison.tasks.base import Places
from tqdm import tqdm

from shared.progress import quiet


RATES = (1 / 3, 1.0, 3.0)  # multiples of a task's learning rate


def perform(job: Job, places: Places) -> None:
    quiet()
    torch.set_num_threads(1)
    run(job, places)


def perform_all(jobs: list[Job], places: Places, num_workers: int) -> None:
    """Runs those jobs that have no result yet."""
    missing = [job for job in jobs if not job.file(places.output_dir).is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures = [pool.submit(perform, job, places) for job in missing]
        for future in tqdm(as_completed(futures), desc="runs", initial=len(jobs) - len(missing), total=len(jobs)):
            future.result()


def option(text: str) -> tuple[str, object]:
    """Returns `(name, value)` of an option `name=value`."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/compare", help="where models, runs, tables and pictures go")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="multiples of a task's learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, help="how many, or which")
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--budget", type=int, help="tokens that a run samples, in place of the task's")
    parser.add_argument(
        "--set", nargs="+", type=option, default=[], metavar="NAME=VALUE", help="options of our methods"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, of one thread each")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    quiet()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    places = Places(args.output_dir)
    seeds = range(args.first_seed, args.first_seed + (args.seeds or [5])[0])
    jobs = [
        Job(
            task,
            method,
            TASKS[task].learning_rate * rate,
            seed,
            args.budget or TASKS[task].budget,
            () if METHODS[method].compares_groups else tuple(args.set),
        )
        for task in args.tasks
        for method in args.methods
        for rate in args.rates
        for seed in seeds
    ]
    perform_all(jobs, places, args.jobs)
    for job in jobs:
        values = [point["objective"] for point in job.points(places.output_dir)]
        last = values[-max(len(values) // 4, 1) :]
        print(f"{job.task} {job.method} {job.learning_rate:g} {job.seed}: {sum(last) / len(last):.3f}")


if __name__ == "__main__":
    main()
