r"""
Measures what PPO's four models need in memory: policy, reference, critic and reward model, full, on LoRA and on a 4-bit base.

    python tests/benchmarks/memory.py table
    python tests/benchmarks/memory.py measure --json /tmp/memory.json
    python tests/benchmarks/memory.py time --rounds 4 --json /tmp/memory_time.json

and on a CUDA machine, where these are the defaults:

    python tests/benchmarks/memory.py measure --shapes 1b 3b 8b
    python tests/benchmarks/memory.py time --shapes 8b

Eight setups, each compared with TRL's GRPO of the same kind, which has a reward model of its own in all of them:

    ppo-full-separate   policy, reference, critic and reward model are a model each; the first and third are trained
    ppo-lora-shared     one frozen base; on it the policy's adapter with the value head, and the reward adapter; the
                        reference is the base
    ppo-lora-adapter    the same with an adapter for the critic
    ppo-qlora-shared, ppo-qlora-adapter    the same on a base in nf4
    grpo-full           policy, reference and reward model are a model each
    grpo-lora           frozen base with the policy's adapter, which is also the reference; a reward model
    grpo-qlora          the same on a base in nf4; the reward model is not quantized

Weights that are trained in full are float32, as TRL loads them, and so is their reference; frozen bases and reward
models are bfloat16 (float32 on a CPU). Adapters are of rank 16 on all linear layers, in float32, but in bfloat16 where
TRL casts them (grpo-qlora). nf4 is bitsandbytes' default: without double quantization, embeddings and the LM head as
they are.

`table` computes weights, gradients and AdamW's moments of published shapes, from models on the meta device: nothing is
run. Activations, logits, autocast's copies and whatever else lasts for less than a step come on top.

`measure` trains random Llama models for a few steps, a process for each setup, on scripted completions, with gradient
checkpointing and `beta=0.05` (PPO: `kl_in_reward=0.05`), in bf16 (float32 on a CPU). The peak is
`torch.cuda.max_memory_allocated`, or on a CPU (Linux) the highest resident memory less what is resident after imports.
On a CPU that holds libraries at their first use, too (`--shapes tiny` shows how much), but not the copy of a base that
is kept in host memory for merged generation (`generate_merged=False`), nor loading. A random model of each shape is first
written to the temporary folder (`TMPDIR`), with 2 bytes per parameter (`tiny` and `60m` on a CPU: 4), and a reward model
of the same size if a setup needs one.

`time` lets the models on a 4-bit base generate, too, and takes the contenders in turns. Seconds per rollout with its
update are wall-clock seconds between synchronizations, or CPU seconds of all threads. A run's first rollout does not
count. Training is forward, losses, backward and optimizer; the rest is rewards and passes without gradient.

The paths for CUDA have not been run yet.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from actor_critic_vs_grpo import (
    SECTIONS,
    Stopwatch,
    build_tokenizer,
    memory_bytes,
    synchronized_time,
    time_sections,
)
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from trl_ext import PPOConfig, PPOTrainer


GIB = 2**30
RANK = 16
KL_COEFFICIENT = 0.05
ON_GPU = torch.cuda.is_available()


# --- Shapes and setups ---


@dataclass
class Shape:
    """The part of a model's configuration that its memory depends on."""

    config_class: type[PretrainedConfig]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def config(self, max_length: int) -> PretrainedConfig:
        settings = dict(vars(self))
        config_class = settings.pop("config_class")
        return config_class(
            **settings, max_position_embeddings=max_length, pad_token_id=0, eos_token_id=1, bos_token_id=None
        )


PUBLISHED = {
    "Llama-3.2-1B": Shape(LlamaConfig, 2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True),
    "Llama-3.2-3B": Shape(LlamaConfig, 3072, 8192, 28, 24, 8, 128_256, tie_word_embeddings=True),
    "Llama-3.1-8B": Shape(LlamaConfig, 4096, 14_336, 32, 32, 8, 128_256),
    "Qwen2.5-14B": Shape(Qwen2Config, 5120, 13_824, 48, 40, 8, 152_064),
    "Qwen2.5-32B": Shape(Qwen2Config, 5120, 27_648, 64, 40, 8, 152_064),
    "Llama-3.1-70B": Shape(LlamaConfig, 8192, 28_672, 80, 64, 8, 128_256),
}
MEASURED = {
    "tiny": Shape(LlamaConfig, 64, 256, 2, 2, 1, 1000),
    "60m": Shape(LlamaConfig, 512, 2048, 14, 8, 2, 8000),
    "1b": PUBLISHED["Llama-3.2-1B"],
    "3b": PUBLISHED["Llama-3.2-3B"],
    "8b": PUBLISHED["Llama-3.1-8B"],
}


@dataclass
class Setup:
    """A trainer, how its policy is trained (`"full"`, `"lora"` or `"qlora"`), and where its critic is."""

    trainer: str
    kind: str
    critic: str | None = None

    @property
    def baseline(self) -> str:
        return f"grpo-{self.kind}"

    @property
    def has_reward_adapter(self) -> bool:
        return self.trainer == "ppo" and self.kind != "full"


SETUPS = {
    "grpo-full": Setup("grpo", "full"),
    "ppo-full-separate": Setup("ppo", "full", "separate"),
    "grpo-lora": Setup("grpo", "lora"),
    "ppo-lora-shared": Setup("ppo", "lora", "shared"),
    "ppo-lora-adapter": Setup("ppo", "lora", "adapter"),
    "grpo-qlora": Setup("grpo", "qlora"),
    "ppo-qlora-shared": Setup("ppo", "qlora", "shared"),
    "ppo-qlora-adapter": Setup("ppo", "qlora", "adapter"),
}
QUANTIZED = [name for name, setup in SETUPS.items() if setup.kind == "qlora"]


# --- What is computed ---


@dataclass
class Sizes:
    """Numbers of weights of one shape."""

    model: int  # with its LM head
    trunk: int  # without
    linear: int  # of the trunk, in linear layers: what is quantized
    adapter: int
    head: int  # for one number per token: a score or a value


def sizes_of(shape: Shape) -> Sizes:
    """Counted on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(max_length=8192))
        trunk = model.base_model
        linear = sum(module.weight.numel() for module in trunk.modules() if isinstance(module, nn.Linear))
        weights = [sum(p.numel() for p in module.parameters()) for module in (model, trunk)]
        adapted = get_peft_model(model, lora_config())
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return Sizes(*weights, linear, adapter, shape.hidden_size)


def computed_bytes(setup: Setup, sizes: Sizes, frozen: int = 2) -> dict[str, float]:
    """
    Returns what is there from the first optimizer step on, by model. AdamW has a gradient and two moments per trained weight,
    of its dtype. `frozen` is the number of bytes of a frozen weight that is not quantized.
    """
    trained = 4 * 4
    adapter = 4 * 2 if setup.baseline == "grpo-qlora" and setup.trainer == "grpo" else trained
    # Half a byte per weight, and a float32 scale for each 64
    quantized = sizes.linear * (0.5 + 4 / 64) + (sizes.model - sizes.linear) * frozen
    own_model = frozen * (sizes.trunk + sizes.head)
    return {
        "policy": {
            "full": trained * sizes.model,
            "lora": frozen * sizes.model + adapter * sizes.adapter,
            "qlora": quantized + adapter * sizes.adapter,
        }[setup.kind],
        "reference": 4 * sizes.model if setup.kind == "full" else 0,
        "critic": {
            None: 0,
            "shared": trained * sizes.head,
            "adapter": trained * (sizes.adapter + sizes.head),
            "separate": trained * (sizes.trunk + sizes.head),
        }[setup.critic],
        "reward model": 4 * (sizes.adapter + sizes.head) if setup.has_reward_adapter else own_model,
    }


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


def print_header(cells: list[str]) -> None:
    print_row(cells)
    print_row(["---"] * len(cells))


def print_computed(args: argparse.Namespace) -> None:
    all_sizes = {name: sizes_of(PUBLISHED[name]) for name in args.models}
    print("GiB of weights, gradients and AdamW's moments, and in brackets the ratio to GRPO's of the same kind:\n")
    print_header(["model", "parameters", *SETUPS])
    for model, sizes in all_sizes.items():
        totals = {name: sum(computed_bytes(setup, sizes).values()) for name, setup in SETUPS.items()}
        cells = [model, f"{sizes.model / 1e9:.2f}B"]
        for name, setup in SETUPS.items():
            ratio = "" if name == setup.baseline else f" ({totals[name] / totals[setup.baseline]:.2f})"
            cells.append(f"{totals[name] / GIB:.1f}{ratio}")
        print_row(cells)
    for model, sizes in all_sizes.items():
        print(f"\n{model} ({sizes.adapter / 1e6:.1f}M weights per adapter), GiB by model:\n")
        parts = {name: computed_bytes(setup, sizes) for name, setup in SETUPS.items()}
        print_header(["setup", *parts["grpo-full"], "total"])
        for name, part in parts.items():
            print_row([name, *(f"{value / GIB:.2f}" for value in [*part.values(), sum(part.values())])])


# --- One run, in a process of its own ---


def base_dtype() -> torch.dtype:
    return torch.bfloat16 if ON_GPU else torch.float32


def placement() -> dict:
    """Returns arguments that load a model whole: one which does not fit is an error, not spread to other memory."""
    return {"device_map": {"": 0}} if ON_GPU else {}


def lora_config(task_type: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type=task_type)


def build_models(args: argparse.Namespace) -> None:
    """Write a random language model, a reward model and a reward adapter on that language model."""
    shape = MEASURED[args.run_shape]
    tokenizer = build_tokenizer(shape.vocab_size)
    config = shape.config(args.prompt_length + args.completion_length)
    config.num_labels = 1
    config.dtype = torch.bfloat16 if shape in PUBLISHED.values() else base_dtype()
    torch.manual_seed(0)
    write_random(AutoModelForCausalLM, config, args.run_folder / "base")
    if not all(SETUPS[name].has_reward_adapter for name in args.setups):
        write_random(AutoModelForSequenceClassification, config, args.run_folder / "reward")
    write_random_adapter(config, args.run_folder / "base", args.run_folder / "reward_adapter")
    for folder in args.run_folder.iterdir():
        tokenizer.save_pretrained(folder)


def write_random(auto_class: type, config: PretrainedConfig, folder: Path) -> None:
    """A model with random weights, one file for each module that holds some: never all of them in memory."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    folder.mkdir()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    modules = {name.rpartition(".")[0]: {} for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():  # tied ones once
        modules[name.rpartition(".")[0]][name] = weight
    files = {}
    for number, weights in enumerate(modules.values()):
        file = f"model-{number:05d}-of-{len(modules):05d}.safetensors"
        save_file(
            {name: random_weight(w, config.dtype) for name, w in weights.items()}, folder / file, {"format": "pt"}
        )
        files |= dict.fromkeys(weights, file)
    size = sum(w.numel() * config.dtype.itemsize for w in model.parameters())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_random_adapter(config: PretrainedConfig, base: Path, folder: Path) -> None:
    """A reward adapter on the model in `base`."""
    with torch.device("meta"):
        adapted = get_peft_model(AutoModelForSequenceClassification.from_config(config), lora_config("SEQ_CLS"))
    weights = get_peft_model_state_dict(adapted)
    folder.mkdir()
    save_file(
        {name: random_weight(w, torch.float32) for name, w in weights.items()}, folder / "adapter_model.safetensors"
    )
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.peft_config["default"].save_pretrained(folder)


def random_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Draws a weight of the shape of `weight`; a norm's are 1."""
    return (
        torch.ones(weight.shape, dtype=dtype) if weight.dim() == 1 else torch.randn(weight.shape).mul_(0.02).to(dtype)
    )


def build_prompts(args: argparse.Namespace) -> Dataset:
    """Random prompts of exactly `prompt_length` tokens, with a space before what follows; one for each rollout."""
    draw = random.Random(0)
    words = range(2, MEASURED[args.run_shape].vocab_size)
    texts = ["".join(f"w{word} " for word in draw.choices(words, k=args.prompt_length)) for _ in range(args.rollouts)]
    return Dataset.from_dict({"prompt": texts})


def scripted_completions(args: argparse.Namespace):
    """A `rollout_func` of random completions of exactly `completion_length` tokens."""
    draw = random.Random(1)
    words = range(2, MEASURED[args.run_shape].vocab_size)

    def rollout(prompts, trainer):
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [draw.choices(words, k=args.completion_length) for _ in prompts],
            "logprobs": None,
        }

    return rollout


def build_trainer(args: argparse.Namespace, setup: Setup, output_dir: str) -> GRPOTrainer:
    settings = {
        "output_dir": output_dir,
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": args.completions // args.micro_batch,
        "num_generations": args.completions,
        "num_iterations": args.epochs,
        "max_steps": args.rollouts * args.epochs,
        "max_completion_length": args.completion_length,
        "generation_kwargs": {"min_new_tokens": args.completion_length},
        "model_init_kwargs": placement() | ({} if setup.kind == "full" else {"dtype": base_dtype()}),
        "gradient_checkpointing": True,
        "disable_dropout": True,
        "bf16": ON_GPU,
        "use_cpu": not ON_GPU,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if setup.trainer == "ppo":
        trainer_class = PPOTrainer
        config = PPOConfig(critic=setup.critic, kl_in_reward=KL_COEFFICIENT, generate_merged=ON_GPU, **settings)
    else:
        trainer_class = GRPOTrainer
        config = GRPOConfig(beta=KL_COEFFICIENT, **settings)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=base_dtype())
    trainer = trainer_class(
        model=str(args.run_folder / "base"),
        reward_funcs=str(args.run_folder / ("reward_adapter" if setup.has_reward_adapter else "reward")),
        args=config,
        train_dataset=build_prompts(args),
        peft_config=None if setup.kind == "full" else lora_config(),
        quantization_config=nf4 if setup.kind == "qlora" else None,
        rollout_func=scripted_completions(args) if args.mode == "measure" else None,
    )
    if setup.has_reward_adapter:
        check_shares_base(trainer)
    if not ON_GPU:
        leave_files(trainer)
    return trainer


def check_shares_base(trainer: PPOTrainer) -> None:
    """Checks that nothing but the reward model's adapter and score head is its own."""
    known = {id(parameter) for parameter in trainer.model.parameters()}
    own = [name for name, p in trainer.reward_funcs[0].named_parameters() if id(p) not in known]
    assert all("lora_" in name or ".score." in name for name in own), f"not shared: {own}"


def leave_files(trainer: GRPOTrainer) -> None:
    """
    Copy weights out of the files that they are mapped from: for the sake of the embeddings of a 4-bit base, all of its
    file would count as resident.
    """
    for model in (trainer.model, trainer.ref_model, *trainer.reward_funcs):
        for parameter in [] if model is None else model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()


class SkipFirstRollout(TrainerCallback):
    """Starts the stopwatch anew after the first rollout's updates."""

    def __init__(self, stopwatch: Stopwatch, epochs: int):
        self.stopwatch = stopwatch
        self.epochs = epochs

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.epochs:
            with self.stopwatch.section("other"):  # charges what has passed
                self.stopwatch.seconds = dict.fromkeys(SECTIONS, 0.0)


def train(args: argparse.Namespace) -> dict:
    """Train the setup `args.run` and say what it took."""
    after_imports = memory_bytes("VmRSS")
    setup = SETUPS[args.run]
    with tempfile.TemporaryDirectory() as output_dir:
        try:
            trainer = build_trainer(args, setup, output_dir)
            if not ON_GPU:  # what was mapped to be loaded is not what training takes
                Path("/proc/self/clear_refs").write_text("5")
            stopwatch = Stopwatch(synchronized_time if ON_GPU else time.process_time)
            time_sections(trainer, stopwatch)
            trainer.add_callback(SkipFirstRollout(stopwatch, args.epochs))
            with stopwatch.section("other"):
                trainer.train()
        except torch.OutOfMemoryError:
            return {"out_of_memory": True, "device": device_name(args)}
    return {
        "out_of_memory": False,
        "peak_bytes": torch.cuda.max_memory_allocated() if ON_GPU else memory_bytes("VmHWM") - after_imports,
        "sections": {name: seconds / (args.rollouts - 1) for name, seconds in stopwatch.seconds.items()},
        "device": device_name(args),
    }


def device_name(args: argparse.Namespace) -> str:
    if not ON_GPU:
        return f"CPU ({platform.machine()}, {args.threads} threads)"
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    return f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)"


# --- All runs, and the report ---


def start(args: argparse.Namespace, shape: str, folder: str, name: str) -> dict | None:
    """The task `name` in a new process, with this process's arguments: a setup to [`train`], or the models."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        # Threads that spin while they wait would count as work
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        # What is freed goes back to the system at once (glibc); it would count as resident
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2**20),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += ["--run", name, "--run_shape", shape, "--run_folder", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} of shape {shape} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def read_cache(args: argparse.Namespace) -> dict:
    ours = ("json", "shapes", "setups", "rounds", "run", "run_shape", "run_folder")
    settings = {name: value for name, value in vars(args).items() if name not in ours} | {"on_gpu": ON_GPU}
    saved = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {"settings": settings}
    if saved["settings"] != settings:
        raise SystemExit(f"{args.json} holds results of other settings: {saved['settings']}.")
    return saved


def run_rounds(args: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """Runs every setup of each shape once per round, every other round backwards: a drift of the machine cancels."""
    saved = read_cache(args)
    for shape in args.shapes:
        runs = saved.setdefault("runs", {}).setdefault(shape, {})
        turns = [
            (number, name)
            for number in range(args.rounds)
            for name in (args.setups if number % 2 == 0 else args.setups[::-1])
            if len(runs.setdefault(name, [])) <= number
        ]
        if not turns:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start(args, shape, folder, "build")
            for number, name in turns:
                result = start(args, shape, folder, name)
                runs[name].append(result)
                print(f"{shape}: round {number + 1}: {name}: {summary(result)}", file=sys.stderr)
                if args.json:
                    args.json.write_text(json.dumps(saved, indent=2))
    return {shape: {name: saved["runs"][shape][name][: args.rounds] for name in args.setups} for shape in args.shapes}


def summary(result: dict) -> str:
    if result["out_of_memory"]:
        return "out of memory"
    return f"{result['peak_bytes'] / GIB:.3f} GiB, {sum(result['sections'].values()):.2f} s per rollout"


def print_settings(args: argparse.Namespace, runs: dict[str, dict[str, list[dict]]]) -> None:
    first = next(iter(next(iter(runs.values())).values()))[0]
    names = ("trl_ext", "trl", "transformers", "peft", "bitsandbytes", "torch")
    print(f"Device: {first['device']}. " + ", ".join(f"{name} {version(name)}" for name in names) + ".")
    print(
        f"{args.rollouts} rollouts of {args.completions} completions in micro-batches of {args.micro_batch}, epochs: "
        f"{args.epochs}; prompts of {args.prompt_length} tokens and completions of {args.completion_length}; gradient "
        f"checkpointing; {'bf16' if ON_GPU else 'float32'}; adapters of rank {RANK} on all linear layers."
    )


def print_measured(args: argparse.Namespace, runs: dict[str, dict[str, list[dict]]]) -> None:
    print("Computed: weights, gradients and AdamW's moments. Ratios are to GRPO's of the same kind.\n")
    print_header(["shape", "parameters", "setup", "computed GiB", "peak GiB", "ratio computed", "ratio measured"])
    for shape, results in runs.items():
        sizes = sizes_of(MEASURED[shape])
        computed = {
            name: sum(computed_bytes(setup, sizes, frozen=base_dtype().itemsize).values())
            for name, setup in SETUPS.items()
        }
        peaks = {name: result["peak_bytes"] for name, (result,) in results.items() if not result["out_of_memory"]}
        for name in results:
            baseline = SETUPS[name].baseline
            has_ratio = name in peaks and baseline in peaks
            print_row(
                [
                    shape,
                    f"{sizes.model / 1e6:.1f}M",
                    name,
                    f"{computed[name] / GIB:.3f}",
                    f"{peaks[name] / GIB:.3f}" if name in peaks else "out of memory",
                    f"{computed[name] / computed[baseline]:.3f}",
                    f"{peaks[name] / peaks[baseline]:.3f}" if has_ratio else "",
                ]
            )


def spread(values: list[float]) -> str:
    """Median, and from least to greatest."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def seconds_of(results: list[dict], sections: list[str]) -> list[float]:
    return [sum(result["sections"][name] for name in sections) for result in results]


def print_timed(args: argparse.Namespace, runs: dict[str, dict[str, list[dict]]]) -> None:
    print(f"Seconds per rollout with its update: median of {args.rounds} rounds (least to greatest).\n")
    print_header(["shape", "setup", "seconds", "ratio to GRPO", "generation", "training", "rest"])
    training = ["forward", "loss", "backward", "optimizer"]
    rest = [name for name in SECTIONS if name != "rollout" and name not in training]
    for shape, results in runs.items():
        for name in results:
            if any(result["out_of_memory"] for result in results[name]):
                print_row([shape, name, "out of memory", "", "", "", ""])
                continue
            totals = seconds_of(results[name], SECTIONS)
            theirs = results.get(SETUPS[name].baseline, [])
            ratio = ""
            if theirs and not any(result["out_of_memory"] for result in theirs):
                ratio = spread([a / b for a, b in zip(totals, seconds_of(theirs, SECTIONS), strict=True)])
            shares = [
                f"{statistics.median(s / total for s, total in zip(seconds_of(results[name], part), totals, strict=True)):.0%}"
                for part in (["rollout"], training, rest)
            ]
            print_row([shape, name, spread(totals), ratio, *shares])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)

    table = modes.add_parser("table", help="compute weights, gradients and optimizer states of published shapes")
    table.add_argument("--models", nargs="+", choices=PUBLISHED, default=list(PUBLISHED), metavar="NAME")

    measure = modes.add_parser("measure", help="train each setup and measure its peak of memory")
    measure.set_defaults(rounds=1)
    timed = modes.add_parser("time", help="generate and train with each setup on a 4-bit base and measure its time")
    timed.add_argument("--rounds", type=int, default=3, help="runs of each setup (default: 3)")

    of_measure = {"completions": 2, "micro_batch": 1, "length": 256, "rollouts": 2}
    of_time = {"completions": 8, "micro_batch": 4, "length": 128, "rollouts": 3}
    shapes_of_measure = ["1b", "3b", "8b"] if ON_GPU else ["60m"]
    shapes_of_time = ["8b"] if ON_GPU else ["tiny"]
    for mode, setups, shapes, default in (
        (measure, list(SETUPS), shapes_of_measure, of_measure),
        (timed, QUANTIZED, shapes_of_time, of_time),
    ):

        def number(name, default, what, mode=mode):
            mode.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")

        mode.add_argument(
            "--shapes",
            nargs="+",
            choices=MEASURED,
            default=shapes,
            metavar="NAME",
            help=f"of {', '.join(MEASURED)} (default here: {' '.join(shapes)}); 1b, 3b and 8b are Llama 3's",
        )
        mode.add_argument(
            "--setups",
            nargs="+",
            choices=setups,
            default=setups,
            metavar="NAME",
            help=f"which to run, of {', '.join(setups)} (default: all)",
        )
        number("completions", default["completions"], "completions per rollout, of one prompt")
        number("micro_batch", default["micro_batch"], "completions in a forward pass")
        number("prompt_length", default["length"], "tokens per prompt")
        number("completion_length", default["length"], "tokens per completion")
        number("rollouts", default["rollouts"], "rollouts per run, at least 2")
        number("epochs", 1, "updates on each rollout")
        number("threads", 1, "CPU threads per run")
        mode.add_argument("--json", type=Path, help="results; those in it already are not run again")
        # One task, in this process
        for name, kind in (("--run", str), ("--run_shape", str), ("--run_folder", Path)):
            mode.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode != "table" and args.rollouts < 2:
        parser.error("--rollouts must be at least 2: only the second one meets the optimizer's moments")
    return args


def main() -> None:
    args = parse_args()
    if args.mode == "table":
        print_computed(args)
    elif args.run == "build":
        build_models(args)
        print("null")
    elif args.run:
        print(json.dumps(train(args)))
    else:
        runs = run_rounds(args)
        print_settings(args, runs)
        (print_measured if args.mode == "measure" else print_timed)(args, runs)


if __name__ == "__main__":
    main()
