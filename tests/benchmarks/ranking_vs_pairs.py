r"""
Measures what a ranking of K completions costs: `RankingRewardTrainer` against TRL's `RewardTrainer` on all K (K - 1) / 2 pairs.

    python tests/benchmarks/ranking_vs_pairs.py --rounds 3 --json /tmp/ranking_vs_pairs.json

Both train the same random Qwen2 reward model in float32, one prompt per optimizer step, all completions of equal length.
Every run is a process of its own, and contenders take turns in rounds, so that whatever else the machine does meets all
of them. Reported per prompt, training alone, without the first step (which checks whether the prefix can be shared):

- on a CPU: CPU seconds of all threads, and the peak of resident memory less what is resident before training (Linux);
- on a CUDA machine (chosen if there is one): wall-clock seconds between synchronizations, and
  `torch.cuda.max_memory_allocated`. This path has not been run yet.

With a prompt of P and completions of C tokens, pairs take K (K - 1) (P + C) tokens, rows K (P + C), and a shared prefix
P + K C: the ratio of these counts is the limit that the measured one is compared with. What it cannot reach are the
costs which do not grow with tokens (`fixed`: optimizer, gradient clipping, norms, the loop), measured as the time of
a step less that of its forward and backward.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import torch
from actor_critic_vs_grpo import build_tokenizer, memory_bytes
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer

from trl_ext import RankingRewardConfig, RankingRewardTrainer


CONTENDERS = {"pairs": "TRL, all pairs", "rows": "a row per completion", "shared": "a shared prefix"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, nargs="+", default=[4, 9], help="K (default: 4 9)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per run (default: 3)")
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens per prompt (default: 256)")
    parser.add_argument("--completion_length", type=int, default=64, help="tokens per completion (default: 64)")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads per run (default: 2)")
    parser.add_argument("--json", type=Path, help="write settings and every run's measurements to this file")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # "pairs:4": one measurement, in this process
    return parser.parse_args()


def num_tokens(args: argparse.Namespace, contender: str, k: int) -> int:
    """Tokens that go through the model for a prompt."""
    p, c = args.prompt_length, args.completion_length
    return {"pairs": k * (k - 1) * (p + c), "rows": k * (p + c), "shared": p + k * c}[contender]


# --- One run, in a process of its own ---


def build_dataset(args: argparse.Namespace, k: int, as_pairs: bool) -> Dataset:
    """Random tokens, ranked in the order they stand in."""
    draw = random.Random(0)

    def words(count: int) -> list[int]:
        return [draw.randrange(2, 32_000) for _ in range(count)]

    rows = []
    for _ in range(args.steps + 1):
        prompt = words(args.prompt_length)
        group = [prompt + words(args.completion_length) for _ in range(k)]
        if as_pairs:
            rows += [{"chosen_ids": group[i], "rejected_ids": group[j]} for i, j in combinations(range(k), 2)]
        else:
            rows.append({"group_ids": group, "ranks": list(range(1, k + 1))})
    return Dataset.from_list(rows)


class Meter(TrainerCallback):
    """Seconds of steps and, within them, of forwards and backwards, after the first step."""

    def __init__(self):
        self.steps, self.passes = [], []
        self.is_cuda = torch.cuda.is_available()

    def clock(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def watch(self, trainer) -> None:
        training_step = trainer.training_step

        def timed(*args, **kwargs):
            start = self.clock()
            loss = training_step(*args, **kwargs)
            self.passes.append(self.clock() - start)
            return loss

        trainer.training_step = timed

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.clock() - self.start)


def measure(args: argparse.Namespace, contender: str, k: int) -> dict[str, float]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(
        Qwen2Config(
            vocab_size=32_000,
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 64,
            num_key_value_heads=max(1, args.hidden_size // 256),
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            num_labels=1,
            dtype="float32",
        )
    )
    as_pairs = contender == "pairs"
    config_class, trainer_class = (
        (RewardConfig, RewardTrainer) if as_pairs else (RankingRewardConfig, RankingRewardTrainer)
    )
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            per_device_train_batch_size=k * (k - 1) // 2 if as_pairs else 1,
            max_steps=args.steps + 1,
            gradient_checkpointing=False,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({} if as_pairs else {"shared_prefix": "always" if contender == "shared" else "never"}),
        )
        trainer = trainer_class(
            model=model,
            args=config,
            train_dataset=build_dataset(args, k, as_pairs),
            processing_class=build_tokenizer(32_000),
        )
        meter = Meter()
        meter.watch(trainer)
        trainer.add_callback(meter)
        resident = memory_bytes("VmRSS")
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if meter.is_cuda else memory_bytes("VmHWM") - resident
    step, passes = statistics.median(meter.steps[1:]), statistics.median(meter.passes[1:])
    return {"seconds": step, "fixed": step - passes, "gib": peak / 2**30}


# --- All runs, and what they say ---


def run(args: argparse.Namespace, contender: str, k: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", f"{contender}:{k}"]
    for name in ("steps", "prompt_length", "completion_length", "hidden_size", "layers", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def main() -> None:
    args = parse_args()
    if args.run:
        contender, k = args.run.split(":")
        print(json.dumps(measure(args, contender, int(k))))
        return
    runs = {(contender, k): [] for k in args.completions for contender in CONTENDERS}
    for number in range(args.rounds):
        for (contender, k), results in runs.items():
            results.append(run(args, contender, k))
            print(f"round {number + 1}: {contender}, K={k}: {results[-1]}", file=sys.stderr, flush=True)

    print(f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, trl {version('trl')}")
    print("Median (min-max) over rounds; ratios are of the same round.\n")
    print("| K | contender | tokens | seconds per prompt | of which fixed | peak GiB | times faster | token limit |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (contender, k), results in runs.items():
        columns = [spread([r[name] for r in results]) for name in ("seconds", "fixed", "gib")]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["pairs", k], results, strict=True)]
        limit = num_tokens(args, "pairs", k) / num_tokens(args, contender, k)
        row = [k, CONTENDERS[contender], num_tokens(args, contender, k), *columns, spread(ratios), f"{limit:.3g}"]
        print("| " + " | ".join(map(str, row)) + " |")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "run")}
        results = [{"contender": c, "K": k, "runs": values} for (c, k), values in runs.items()]
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=2))


if __name__ == "__main__":
    main()
