"""
Compare the ways to train a language model by reward: the methods of this package, and TRL's GRPO and RLOO, on the
quickstart's language model, at the same number of sampled tokens, each tuned with the same small budget.

    python tests/benchmarks/compare.py      # all of it: hours on two CPU cores
    python tests/benchmarks/compare.py --seeds 1 --budget 6000 --methods ppo grpo

Two tasks, on the same openings of film reviews:

- `reviews`: the reward model's score at the end, as in the quickstart;
- `words`: one point for each word of praise and minus one for each of blame, by the quickstart's word list. Methods with
  credit for tokens get it at the word (dense); `-delayed` ones get the sum at the end, as the others do.

In both a nat of KL to the language model costs `KL_PRICE` and a review that does not end costs 1. What is compared is
the objective: reward less these prices, on openings that were held out.

Each method is tried with each of its settings on a seed of its own; the best one is run with `--seeds` others. Results lie
in `runs/`, one file per run, and are not computed again: the study goes on where it was stopped.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from comparison.methods import METHODS, METHODS_OF_TASK
from comparison.results import Job, final, plot, table
from comparison.runs import run
from comparison.tasks import Stage
from tqdm import tqdm

from shared.progress import quiet


TUNING_SEED = 100


def perform(job: Job) -> None:
    quiet()
    torch.set_num_threads(1)
    stage = Stage.prepare(job.output_dir, job.corpus_size)
    points = run(stage, job.output_dir, job.task, job.method, job.setting, job.seed, job.budget)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    partial = job.file.with_suffix(".partial")
    partial.write_text(json.dumps({**asdict(job), "points": points}), encoding="utf-8")
    partial.rename(job.file)


def perform_all(jobs: list[Job], num_workers: int, title: str) -> None:
    missing = [job for job in jobs if not job.file.is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures = [pool.submit(perform, job) for job in missing]
        for future in tqdm(as_completed(futures), desc=title, initial=len(jobs) - len(missing), total=len(jobs)):
            future.result()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/compare", help="where models, runs, tables and pictures go")
    parser.add_argument("--tasks", nargs="+", choices=list(METHODS_OF_TASK), default=list(METHODS_OF_TASK))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method, after tuning")
    parser.add_argument("--budget", type=int, default=24_000, help="tokens that a run samples")
    parser.add_argument("--corpus_size", type=int, metavar="N", help="how many reviews the language model learns from")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, of one thread each")
    args = parser.parse_args()
    if min(args.seeds, args.budget, args.jobs) < 1:
        parser.error("--seeds, --budget and --jobs must be at least 1.")
    return args


def main() -> None:
    args = parse_args()
    quiet()
    Stage.prepare(args.output_dir, args.corpus_size)
    for task in args.tasks:
        names = [name for name in METHODS_OF_TASK[task] if args.methods is None or name in args.methods]
        if not names:
            sys.exit(f"error: none of --methods is compared on {task}, only {', '.join(METHODS_OF_TASK[task])}.")

        def job(name, setting, seed, task=task):
            return Job(args.output_dir, task, name, setting, seed, args.budget, args.corpus_size)

        tuning = {name: [job(name, s, TUNING_SEED) for s in METHODS[name].settings] for name in names}
        perform_all([job for jobs in tuning.values() for job in jobs], args.jobs, f"{task}: settings")
        best = {name: max(jobs, key=lambda job: final(job.result())).setting for name, jobs in tuning.items()}
        jobs_of = {name: [job(name, best[name], seed) for seed in range(args.seeds)] for name in names}
        perform_all([job for jobs in jobs_of.values() for job in jobs], args.jobs, f"{task}: seeds")
        text = table(jobs_of)
        Path(args.output_dir, f"{task}.md").write_text(text + "\n", encoding="utf-8")
        plot(jobs_of, f"{task}: {args.seeds} seeds, {args.budget} tokens", Path(args.output_dir, f"{task}.png"))
        print(f"\n{task}\n\n{text}\n\nCurves: {args.output_dir}/{task}.png")


if __name__ == "__main__":
    main()
