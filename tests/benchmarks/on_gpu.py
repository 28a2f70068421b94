r"""
Everything that waits for a GPU, by one command:

    python tests/benchmarks/on_gpu.py --output gpu

    exact       tests/contract/test_gpu.py: FlexAttention, bfloat16, 4 bits
    fixed       PPO against TRL's GRPO, completions of one length (goal: 0.75 of its time)
    geometric   the same, lengths as they come (goal: 0.60)
    prompts     8 completions to a prompt of 512 tokens, training alone (goal: 0.50)
    flex        the same with FlexAttention
    off         the geometric lengths again, one option of trl_ext less at a time: what does not pay, is slower with it
    lora        LoRA, critic shared, merged or not for generation, and with an adapter of its own
    memory      peaks of GRPO and PPO, full, LoRA and on a 4-bit base (goal: 8B under 24 GiB and half of GRPO's)
    qlora       time of PPO on a 4-bit base of 8B (goal: 1.05 of GRPO's, 1.5 with an adapter critic)
    rankings    reward models from rankings, against pairs

Each part is a command of its own, whose report goes to OUTPUT/NAME.md as it comes; a part that fails or takes longer
than its limit is said so at the end and does not stop the others. `--list` prints the commands.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm


HERE = Path(__file__).parent
SPEED = [sys.executable, str(HERE / "actor_critic_vs_grpo.py"), "--bf16"]
MEMORY = [sys.executable, str(HERE / "memory.py")]
GEOMETRIC = ["--completion_length", "128", "--mean_length", "32", "--prompts", "8", "--num_generations", "8"]
PROMPTS = ["--prompts", "4", "--num_generations", "8", "--prompt_length", "512", "--completion_length", "128"]
ONE_UPDATE = ["grpo-1epoch-4micro", "ppo-1epoch-4micro-unwhitened"]


def parts(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """The commands of each part."""
    sizes = {name: [] for name in args.shapes}
    for shape, arguments in sizes.items():
        arguments += (
            ["--shape", shape] if shape != "tiny" else ["--hidden_size", "64", "--layers", "2", "--vocab_size", "500"]
        )
        arguments += ["--rounds", str(args.rounds), "--steps", "4"]

    def speed(contenders: list[str], *arguments: str, shapes=None) -> list[list[str]]:
        return [[*SPEED, "--contenders", *contenders, *arguments, *sizes[shape]] for shape in shapes or sizes]

    largest = args.shapes[-1:]
    options = [
        *({name: False} for name in ("length_batches", "compact_scoring", "compact_generation")),
        {"shared_prefix": "never"},
    ]
    return {
        "exact": [[sys.executable, "-m", "pytest", "-q", "-rs", str(HERE.parent / "contract" / "test_gpu.py")]],
        "fixed": speed(["grpo-1epoch", "ppo-1epoch"], "--prompts", "8"),
        "geometric": speed(ONE_UPDATE, *GEOMETRIC, "--profile"),
        "prompts": speed(["grpo-1epoch", "ppo-1epoch"], *PROMPTS),
        "flex": speed(["grpo-1epoch", "ppo-1epoch"], *PROMPTS, "--attn_implementation", "flex_attention"),
        "off": [
            command
            for option in options
            for command in speed(ONE_UPDATE, *GEOMETRIC, "--overrides", json.dumps(option), shapes=largest)
        ],
        "lora": speed(["grpo-lora", "ppo-lora", "ppo-lora-unmerged", "ppo-lora-adapter"], *GEOMETRIC, shapes=largest),
        "memory": [[*MEMORY, "measure", "--shapes", *args.memory_shapes]],
        "qlora": [[*MEMORY, "time", "--rounds", str(args.rounds), "--shapes", args.memory_shapes[-1]]],
        "rankings": [[sys.executable, str(HERE / "ranking_vs_pairs.py"), "--rounds", str(args.rounds)]],
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder of the reports (default: gpu)")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="which to run (default: all)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=["tiny", "0.5b", "1.5b"],
        default=["0.5b", "1.5b"],
        help="of Qwen2.5, from small to large (default: 0.5b 1.5b); 'tiny' tries the script out on a CPU",
    )
    parser.add_argument(
        "--memory_shapes",
        nargs="+",
        choices=["tiny", "60m", "1b", "3b", "8b"],
        default=["1b", "3b", "8b"],
        help="of Llama 3, from small to large (default: 1b 3b 8b)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--minutes", type=float, default=20, help="limit of each command (default: 20)")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    return parser.parse_args()


def run(command: list[str], report: Path, minutes: float) -> str | None:
    """Append what the command prints to `report`; what went wrong, if something did."""
    with report.open("a") as file:
        file.write(f"`python {' '.join(command[1:])}`\n\n")
        file.flush()
        try:
            done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            return f"not done after {minutes:g} minutes"
        file.write("\n")
    return None if done.returncode == 0 else f"exit status {done.returncode}: {done.stderr.strip()[-500:]}"


def main() -> None:
    args = parse_args()
    commands = parts(args)
    unknown = set(args.parts or ()) - set(commands)
    if unknown:
        raise SystemExit(f"--parts: there is no {sorted(unknown)}. Choose from {', '.join(commands)}.")
    commands = {name: commands[name] for name in args.parts or commands}
    if args.list:
        for name, group in commands.items():
            print(name, *(" ".join(command[1:]) for command in group), sep="\n    ")
        return
    if not torch.cuda.is_available() and set(args.shapes + args.memory_shapes) != {"tiny"}:
        raise SystemExit("There is no GPU. `--shapes tiny --memory_shapes tiny` tries the script out without one.")
    args.output.mkdir(parents=True, exist_ok=True)
    failures = {}
    with tqdm(total=sum(map(len, commands.values())), unit="command") as progress:
        for name, group in commands.items():
            report = args.output / f"{name}.md"
            report.unlink(missing_ok=True)
            started = time.monotonic()
            for command in group:
                progress.set_description(name)
                failure = run(command, report, args.minutes)
                if failure is not None:
                    failures.setdefault(name, []).append(failure)
                progress.update()
            progress.write(f"{name}: {time.monotonic() - started:.0f} s, see {report}")
    for name, messages in failures.items():
        print(f"{name} failed:", *messages, sep="\n    ")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
