r"""
Measures what a critic costs: PPO and A2C of trl_ext (value head on the policy's trunk) against TRL's own GRPO at equal settings.

    python tests/benchmarks/actor_critic_vs_grpo.py --rounds 4 --json /tmp/actor_critic_vs_grpo.json

All contenders train the same random Qwen2 model on the same prompts, with the same number and lengths of completions,
the same batches, epochs and optimizer, `beta=0` and no gradient checkpointing. Weights are float32; `--bf16` runs them
under autocast, as TRL does by default, and `--shape` has those of Qwen2.5-0.5B and -1.5B. Every run is a process of
its own, and contenders take turns in rounds, so that whatever else the machine does meets all of them. Reported per
completion token, training alone:

- on a CPU: CPU seconds of all threads (which neither wait for a busy core nor spin), and the peak of resident memory
  less what is resident after imports (Linux);
- on a CUDA machine (chosen if there is one): wall-clock seconds between synchronizations, and
  `torch.cuda.max_memory_allocated`. This path has not been run yet.

Time is divided by section; each second counts for the innermost one:

    rollout     generation                       forward    the policy's (and critic's) forward with gradient
    reward      reward functions                 loss       what follows it: the losses and their metrics
    scoring     passes without gradient:         backward   gradients
                old log-probabilities, values    optimizer  clipping and the step
    advantages  those of trl_ext, and metrics    other      GRPO's advantages, padding, the Trainer's loop

Memory is that of a run, not per token. Beside it stand the positions that the policy's trunk was run on, per completion
token: where nothing but they cost anything, training would take their ratio of the time. `--profile` adds the
operations that took longest.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from trl_ext import ActorCriticTrainer
from trl_ext.algorithms import ALGORITHMS


SECTIONS = ["rollout", "reward", "scoring", "advantages", "forward", "loss", "backward", "optimizer", "other"]


@dataclass
class Contender:
    """One trainer and its settings; `baseline` is the contender it is compared with."""

    trainer: str
    num_iterations: int = 1
    accumulation: int = 1
    baseline: str | None = None
    lora: bool = False
    overrides: dict = field(default_factory=dict)


CONTENDERS = {
    "grpo-1epoch": Contender("grpo"),
    "ppo-1epoch": Contender("ppo", baseline="grpo-1epoch"),
    "grpo-2epochs": Contender("grpo", num_iterations=2),
    "ppo-2epochs": Contender("ppo", num_iterations=2, baseline="grpo-2epochs"),
    "grpo-1epoch-4micro": Contender("grpo", accumulation=4),
    "a2c-1epoch-4micro": Contender("a2c", accumulation=4, baseline="grpo-1epoch-4micro"),
    "ppo-1epoch-4micro-unwhitened": Contender(
        "ppo", accumulation=4, baseline="grpo-1epoch-4micro", overrides={"scale_advantages": False}
    ),
    "grpo-2epochs-4micro": Contender("grpo", num_iterations=2, accumulation=4),
    "ppo-2epochs-4micro": Contender("ppo", num_iterations=2, accumulation=4, baseline="grpo-2epochs-4micro"),
    # Whitening over 4 micro-batches of one on-policy update is the one case that takes a pass GRPO does not make
    "ppo-1epoch-4micro": Contender("ppo", accumulation=4, baseline="grpo-1epoch-4micro"),
    "grpo-lora": Contender("grpo", lora=True),
    "ppo-lora": Contender("ppo", lora=True, baseline="grpo-lora"),
    "ppo-lora-unmerged": Contender("ppo", lora=True, baseline="grpo-lora", overrides={"generate_merged": False}),
    "ppo-lora-adapter": Contender("ppo", lora=True, baseline="grpo-lora", overrides={"critic": "adapter"}),
}
# Of Qwen2.5: hidden_size, intermediate_size, layers, heads, key-value heads
VOCAB_SIZE = 151_936
SHAPES = {"0.5b": (896, 4864, 24, 14, 2), "1.5b": (1536, 8960, 28, 12, 2)}
DEFAULT_CONTENDERS = [
    "grpo-1epoch",
    "ppo-1epoch",
    "grpo-2epochs",
    "ppo-2epochs",
    "grpo-1epoch-4micro",
    "a2c-1epoch-4micro",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=DEFAULT_CONTENDERS,
        metavar="NAME",
        help=f"which to run, of {', '.join(CONTENDERS)}; default: {', '.join(DEFAULT_CONTENDERS)}. Name a baseline too",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--steps", type=int, default=3, help="rollouts per run (default: 3)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts per rollout (default: 4)")
    parser.add_argument("--num_generations", type=int, default=4, help="completions per prompt (default: 4)")
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens per prompt (default: 64)")
    parser.add_argument("--completion_length", type=int, default=64, help="longest completion (default: 64)")
    parser.add_argument(
        "--mean_length",
        type=float,
        help="geometric lengths of this mean, cut at --completion_length (default: all of that length)",
    )
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--shape", choices=SHAPES, help="of Qwen2.5, in place of the three above")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--attn_implementation", default="sdpa", help="of the policy (default: sdpa)")
    parser.add_argument(
        "--reward_model", action="store_true", help="a reward model like the policy, in place of a function"
    )
    parser.add_argument(
        "--overrides", type=json.loads, default={}, help="JSON of further arguments of trl_ext's configs"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print the operations that take longest, of one run more"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads per run (default: 2)")
    parser.add_argument("--json", type=Path, help="write settings and every run's measurements to this file")
    parser.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)  # one measurement, in this process
    args = parser.parse_args()
    if args.shape is not None:
        args.vocab_size = VOCAB_SIZE
    return args


# --- One run, in a process of its own ---


class Stopwatch:
    """Seconds per section; a section within another interrupts it."""

    def __init__(self, clock):
        self.clock = clock
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        self._stack = ["other"]
        self._since = clock()

    def _charge(self) -> None:
        now = self.clock()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @property
    def current(self) -> str:
        return self._stack[-1]

    def start(self, section: str) -> None:
        self._charge()
        self._stack.append(section)

    def stop(self) -> None:
        self._charge()
        self._stack.pop()

    @contextmanager
    def section(self, name: str):
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def timed(self, function, section: str):
        """`function`, its time charged to `section`."""

        def wrapper(*args, **kwargs):
            with self.section(section):
                return function(*args, **kwargs)

        return wrapper


def memory_bytes(field: str) -> int:
    """This process's resident memory: `"VmRSS"` now, `"VmHWM"` at its highest."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` words: <pad>, <eos>, w2, w3, ..."""
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def model_config(args: argparse.Namespace) -> Qwen2Config:
    hidden_size = args.hidden_size
    own = (hidden_size, 3 * hidden_size, args.layers, hidden_size // 64, max(1, hidden_size // 256))
    hidden_size, intermediate_size, layers, heads, key_value_heads = SHAPES.get(args.shape, own)
    return Qwen2Config(
        vocab_size=args.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=args.prompt_length + args.completion_length,
        tie_word_embeddings=args.shape is not None,
        num_labels=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
        attn_implementation=args.attn_implementation,
    )


def build_model(model_class: type[PreTrainedModel], args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return model_class(model_config(args))


def build_prompts(args: argparse.Namespace) -> Dataset:
    """Random prompts of exactly `prompt_length` tokens, enough for every rollout."""
    draw = random.Random(0)
    texts = [
        " ".join(f"w{draw.randrange(2, args.vocab_size)}" for _ in range(args.prompt_length))
        for _ in range(args.prompts * args.steps)
    ]
    return Dataset.from_dict({"prompt": texts})


def share_of_even_words(completions, **columns):
    """A reward that costs nothing and differs within a group."""
    return [sum(int(word[1:]) % 2 == 0 for word in text.split()) / max(1, len(text.split())) for text in completions]


def end_at_random(model: Qwen2ForCausalLM, mean_length: float) -> None:
    """
    Make `model` end a completion with a probability of one in `mean_length` at each token: geometric lengths. A random
    model would never end by itself, and with `mean_length=inf` it cannot.
    """
    probability = 1 / mean_length

    def set_end(module, args, logits):
        others = logits.float().index_fill(-1, torch.tensor([1], device=logits.device), -math.inf)
        end = others.logsumexp(dim=-1) + (math.log(probability / (1 - probability)) if probability else -math.inf)
        return logits.index_copy(-1, torch.tensor([1], device=logits.device), end.unsqueeze(-1).to(logits.dtype))

    model.lm_head.register_forward_hook(set_end)  # scoring, which reads the weights, is not concerned


def build_trainer(args: argparse.Namespace, contender: Contender, output_dir: str) -> GRPOTrainer:
    config_class, trainer_class = (ALGORITHMS | {"grpo": (GRPOConfig, GRPOTrainer)})[contender.trainer]
    completions = args.prompts * args.num_generations
    config = config_class(
        output_dir=output_dir,
        per_device_train_batch_size=completions // contender.accumulation,
        gradient_accumulation_steps=contender.accumulation,
        num_iterations=contender.num_iterations,
        num_generations=args.num_generations,
        max_completion_length=args.completion_length,
        max_steps=args.steps * contender.num_iterations,
        gradient_checkpointing=False,
        disable_dropout=True,
        beta=0.0,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **contender.overrides,
        **(args.overrides if contender.trainer != "grpo" else {}),
    )
    model = build_model(Qwen2ForCausalLM, args)
    end_at_random(model, args.mean_length or math.inf)
    tokenizer = build_tokenizer(args.vocab_size)
    reward = build_model(Qwen2ForSequenceClassification, args) if args.reward_model else share_of_even_words
    return trainer_class(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=build_prompts(args),
        processing_class=tokenizer,
        reward_processing_classes=tokenizer if args.reward_model else None,
        peft_config=LoraConfig(r=16, target_modules="all-linear") if contender.lora else None,
    )


class OptimizerTimer(TrainerCallback):
    def __init__(self, stopwatch: Stopwatch):
        self.stopwatch = stopwatch

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.stopwatch.start("optimizer")

    def on_optimizer_step(self, *args, **kwargs):
        self.stopwatch.stop()


def time_sections(trainer: GRPOTrainer, stopwatch: Stopwatch) -> None:
    """Charge what `trainer` does to the sections of `stopwatch`."""
    forward = GRPOTrainer._get_per_token_logps_and_entropies

    def timed_forward(self, *args, **kwargs):
        with stopwatch.section("forward" if torch.is_grad_enabled() else "scoring"):
            return forward(self, *args, **kwargs)

    # On the parent's class: what a subclass does around the forward is not the forward's
    GRPOTrainer._get_per_token_logps_and_entropies = timed_forward
    sections = {
        "_generate_single_turn": "rollout",
        "_calculate_rewards": "reward",
        "_compute_loss": "loss",
    }
    if isinstance(trainer, ActorCriticTrainer):  # GRPO has no method for its advantages
        sections["credited"] = "advantages"
    for name, section in sections.items():
        setattr(trainer, name, stopwatch.timed(getattr(trainer, name), section))
    trainer.accelerator.backward = stopwatch.timed(trainer.accelerator.backward, "backward")
    trainer.accelerator.clip_grad_norm_ = stopwatch.timed(trainer.accelerator.clip_grad_norm_, "optimizer")
    trainer.add_callback(OptimizerTimer(stopwatch))


def count_tokens(trainer: GRPOTrainer) -> list[int]:
    """A list that will hold the number of completion tokens of each rollout."""
    tokens = []
    generate_and_score = trainer._generate_and_score_completions

    def counted(inputs):
        batch = generate_and_score(inputs)
        tokens.append(int(batch["completion_mask"].sum()))
        return batch

    trainer._generate_and_score_completions = counted
    return tokens


def count_positions(trainer: GRPOTrainer, stopwatch: Stopwatch) -> dict[str, int]:
    """Will hold the positions that the policy's trunk is run on, by section."""
    positions = dict.fromkeys(SECTIONS, 0)

    def count(module, args, kwargs):
        positions[stopwatch.current] += (args[0] if args else kwargs["input_ids"]).numel()

    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return positions


def synchronized_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(args: argparse.Namespace) -> dict:
    """Train the contender `args.run` and say what it took."""
    on_gpu = torch.cuda.is_available()
    after_imports = memory_bytes("VmRSS")
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(args, CONTENDERS[args.run], output_dir)
        stopwatch = Stopwatch(synchronized_time if on_gpu else time.process_time)
        time_sections(trainer, stopwatch)
        tokens = count_tokens(trainer)
        positions = count_positions(trainer, stopwatch)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        profiler = profile(activities=activities) if args.profile else nullcontext()
        with profiler, stopwatch.section("other"):
            trainer.train()
    by = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    return {
        "profile": profiler.key_averages().table(sort_by=by, row_limit=15) if args.profile else None,
        "positions": positions,
        "seconds": sum(stopwatch.seconds.values()),
        "training_seconds": sum(stopwatch.seconds.values()) - stopwatch.seconds["rollout"],
        "sections": stopwatch.seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else memory_bytes("VmHWM") - after_imports,
        "tokens": sum(tokens),
        "tokens_per_rollout": sum(tokens) / len(tokens),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()}, {args.threads} threads)",
    }


# --- All runs, and the report ---


def run(name: str, threads: int, arguments: list[str]) -> dict:
    """[`measure`] the contender `name` in a new process, with these arguments of this script."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while they wait would count as work
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, *arguments, "--threads", str(threads), "--run", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_rounds(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Every contender once per round, every other round backwards, so that a drift of the machine cancels."""
    runs = {name: [] for name in args.contenders}
    for number in range(args.rounds):
        order = args.contenders if number % 2 == 0 else args.contenders[::-1]
        for name in order:
            result = run(name, args.threads, [argument for argument in sys.argv[1:] if argument != "--profile"])
            runs[name].append(result)
            print(f"round {number + 1}: {name}: {result['seconds']:.1f} s", file=sys.stderr)
    return runs


def spread(values: list[float]) -> str:
    """Median, and from least to greatest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def per_token(results: list[dict], quantity: str) -> list[float]:
    return [result[quantity] / result["tokens"] for result in results]


def ratios(runs: dict[str, list[dict]], name: str, quantity: str) -> list[float] | None:
    """A contender over its baseline, per completion token and round by round; None if the baseline was not run."""
    baseline = CONTENDERS[name].baseline
    if baseline not in runs:
        return None
    measured = per_token if quantity != "peak_bytes" else lambda results, _: [r["peak_bytes"] for r in results]
    ours, theirs = measured(runs[name], quantity), measured(runs[baseline], quantity)
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def print_comparison(runs: dict[str, list[dict]]) -> None:
    print("| contender | ms per token | peak MiB | time ratio | without generation | memory ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, results in runs.items():
        milliseconds = 1000 * statistics.median(per_token(results, "seconds"))
        mebibytes = statistics.median(result["peak_bytes"] for result in results) / 2**20
        compared = [ratios(runs, name, quantity) for quantity in ("seconds", "training_seconds", "peak_bytes")]
        columns = ["1"] * 3 if None in compared else [spread(values) for values in compared]
        row = [name, f"{milliseconds:.3f}", f"{mebibytes:.0f}", *columns]
        print("| " + " | ".join(row) + " |")


def print_positions(runs: dict[str, list[dict]]) -> None:
    """Prints positions of the passes that train and score, and those of generation apart."""
    print("| positions per token | rollout | training | ratio |\n| --- | --- | --- | --- |")

    def of(name: str) -> tuple[float, float]:
        generated, trained = [], []
        for result in runs[name]:
            generated.append(result["positions"]["rollout"] / result["tokens"])
            trained.append(sum(result["positions"].values()) / result["tokens"] - generated[-1])
        return statistics.median(generated), statistics.median(trained)

    for name in runs:
        generated, trained = of(name)
        baseline = CONTENDERS[name].baseline
        ratio = f"{trained / of(baseline)[1]:.3f}" if baseline in runs else "1"
        print(f"| {name} | {generated:.2f} | {trained:.2f} | {ratio} |")


def print_breakdown(runs: dict[str, list[dict]]) -> None:
    print("| ms per token | " + " | ".join(runs) + " |")
    print("| --- |" + " --- |" * len(runs))
    for section in SECTIONS:
        medians = [
            statistics.median(1000 * result["sections"][section] / result["tokens"] for result in results)
            for results in runs.values()
        ]
        print(f"| {section} | " + " | ".join(f"{median:.3f}" for median in medians) + " |")


def report(args: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    first = next(iter(runs.values()))[0]
    clock = "wall-clock" if torch.cuda.is_available() else "CPU"
    names = ("trl_ext", "trl", "transformers", "torch")
    mean, longest = args.mean_length, args.completion_length
    lengths = str(longest) if mean is None else f"geometric lengths of mean {mean:g} cut at {longest}"
    print(f"Device: {first['device']}. " + ", ".join(f"{name} {version(name)}" for name in names) + ".")
    precision = "autocast to bfloat16" if args.bf16 else "float32"
    rewards = "a reward model like the policy" if args.reward_model else "a reward function"
    print(
        f"{first['parameters'] / 1e6:.0f}M parameters, {precision}, {args.attn_implementation}, {rewards}; {args.prompts} x {args.num_generations} completions per "
        f"rollout, {args.steps} rollouts per run, {args.rounds} rounds; prompts of {args.prompt_length} tokens, completions of "
        f"{lengths}, {first['tokens_per_rollout']:.0f} tokens per rollout. Time is "
        f"{clock} time. Ratios: median over rounds (least-greatest).\n"
    )
    print_comparison(runs)
    print()
    print_positions(runs)
    print()
    print_breakdown(runs)
    if args.profile:
        for name in args.contenders:
            print(f"\n{name}:\n\n{run(name, args.threads, sys.argv[1:])['profile']}")


def main() -> None:
    args = parse_args()
    if args.run:
        print(json.dumps(measure(args)))
        return
    runs = run_rounds(args)
    report(args, runs)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "run")}
        args.json.write_text(json.dumps({"settings": settings, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
