r"""
Best-of-n fine-tuning: sample n completions of each prompt, score them, imitate the best with TRL's SFT, repeat. Every
option of `SFTConfig` and `ModelConfig` is an argument here, and `--config FILE.yaml` sets many at once.

The best of 8 completions by a reward model, in two rounds:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/best_of_n.py \
        --dataset_name prompts.jsonl --reward_model my-reward-model --num_generations 8 --num_rounds 2 \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir qwen-best-of-8 --learning_rate 1e-5

All completions to which a python function gives 1 or more, on a 4-bit base:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/best_of_n.py \
        --dataset_name prompts.jsonl --reward_funcs my_rewards.is_right --keep 16 --threshold 1 --num_generations 16 \
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --use_peft --load_in_4bit --output_dir qwen-7b-filtered

What was sampled and what was kept, with scores, lies in `round-1/samples.parquet`, `round-1/kept.parquet`, and so on,
beside the model. `--publish_samples_to USER/NAME --samples_licence cc-by-4.0` publishes it as a dataset, too.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets
from huggingface_hub.utils import validate_repo_id
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from shared.arguments import parse_arguments, prepare_model_args
from shared.rewards import RewardArguments, get_rewards, load_prompts
from shared.saving import save
from trl_ext import CompletionSampler, ReinforceConfig, SFTTrainer, keep_best
from trl_ext.hub import publish_samples
from trl_ext.hub.metadata import check_licence
from trl_ext.hub.uploading import PublishError


@dataclass
class BestOfNArguments(RewardArguments):
    """Arguments of this script."""

    num_rounds: int = field(default=1, metadata={"help": "How often to sample, filter and imitate."})
    num_generations: int = field(default=8, metadata={"help": "n: completions sampled per prompt."})
    keep: int = field(default=1, metadata={"help": "So many of each prompt are imitated at most, the best."})
    threshold: float | None = field(default=None, metadata={"help": "Only completions with this score or more."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of a completion."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    sample_batch_size: int = field(default=32, metadata={"help": "Completions sampled at once, on each device."})
    publish_samples_to: str | None = field(
        default=None, metadata={"help": "Name on the Hub of a dataset that takes all rounds' samples, and those kept."}
    )
    samples_licence: str | None = field(
        default=None, metadata={"help": "Of that dataset, by the Hub's identifier, e.g. cc-by-4.0."}
    )
    samples_licence_name: str | None = field(
        default=None, metadata={"help": "Of a licence that the Hub does not know, with --samples_licence other."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_rounds < 1 or self.keep < 1:
            raise ValueError(f"--num_rounds and --keep must be at least 1, got {self.num_rounds} and {self.keep}.")
        if self.sample_batch_size % self.num_generations:
            raise ValueError(
                f"--sample_batch_size ({self.sample_batch_size}) must be a multiple of --num_generations "
                f"({self.num_generations})."
            )
        if (self.publish_samples_to is None) != (self.samples_licence is None):
            raise ValueError("--publish_samples_to and --samples_licence need each other: pass both, or none.")
        if self.publish_samples_to is not None:
            validate_repo_id(self.publish_samples_to)
            names = ("--samples_licence", "--samples_licence_name")
            check_licence(self.samples_licence, self.samples_licence_name, *names)


def sampling_config(script_args: BestOfNArguments, training_args: SFTConfig) -> ReinforceConfig:
    """Returns the sampler's arguments, of which some are the training's too."""
    shared = ["use_cpu", "bf16", "fp16", "seed", "output_dir", "report_to", "disable_tqdm", "model_init_kwargs"]
    return ReinforceConfig(
        **{name: getattr(training_args, name) for name in shared},
        per_device_train_batch_size=script_args.sample_batch_size,
        per_device_eval_batch_size=script_args.sample_batch_size,
        num_generations=script_args.num_generations,
        num_generations_eval=script_args.num_generations,
        max_completion_length=script_args.max_completion_length,
        temperature=script_args.temperature,
        save_strategy="no",
    )


def publish(rounds: list[dict[str, Dataset]], script_args: BestOfNArguments, model_name: str, folder: Path) -> None:
    """Publishes all rounds. Whatever the Hub answers, training ends well: what could not be uploaded stays in `folder`."""
    splits = DatasetDict()
    for name in ("samples", "kept"):
        parts = [part[name].add_column("round", [n] * len(part[name])) for n, part in enumerate(rounds, start=1)]
        splits[name] = concatenate_datasets(parts)
    rewards = [*(script_args.reward_model or []), *(script_args.reward_funcs or [])]
    collected = (
        f"{script_args.num_generations} completions of each prompt by {Path(model_name).name} at temperature "
        f"{script_args.temperature:g}, scored by {', '.join(Path(name).name for name in rewards)}. Kept were the "
        f"{script_args.keep} best of each prompt"
        + (f" with a score of at least {script_args.threshold:g}" if script_args.threshold is not None else "")
        + (f", in {len(rounds)} rounds, after each of which the model learned from them" if len(rounds) > 1 else "")
        + "."
    )
    try:
        url = publish_samples(
            splits,
            script_args.publish_samples_to,
            script_args.samples_licence,
            collected,
            folder,
            licence_name=script_args.samples_licence_name,
        )
    except PublishError as error:
        url = error
    print(f"Samples: {url}")


def parse(args: list[str]) -> tuple:
    """Returns the arguments of this script, of the training and of the model."""
    return parse_arguments(__doc__, (BestOfNArguments, SFTConfig, ModelConfig), args)


def main() -> None:
    script_args, training_args, model_args = parse(sys.argv[1:])
    prepare_model_args(model_args, training_args)
    prompts = load_prompts(script_args, script_args.dataset_train_split)
    model = model_args.model_name_or_path
    new = {
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }
    rounds = []
    for number in range(1, script_args.num_rounds + 1):
        folder = Path(training_args.output_dir) / f"round-{number}"
        sampler = CompletionSampler(
            model, get_rewards(script_args), sampling_config(script_args, training_args), prompts, **new
        )
        samples = sampler.sample(prompts)
        kept = keep_best(samples, script_args.keep, script_args.threshold)
        rounds.append({"samples": samples, "kept": kept})
        if sampler.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            samples.to_parquet(folder / "samples.parquet")
            kept.to_parquet(folder / "kept.parquet")
            means = [sum(s for s in part["score"] if s is not None) / len(part) for part in (samples, kept)]
            print(
                f"Round {number}: {len(samples)} completions with a mean score of {means[0]:.4g}; kept {len(kept)} with "
                f"{means[1]:.4g}, of {len(set(kept['prompt_index']))} of {len(prompts)} prompts"
            )
        trainer = SFTTrainer(
            model=sampler.model,  # with the adapter it has by now
            args=training_args,
            train_dataset=kept.select_columns(["prompt", "completion"]),
            processing_class=sampler.processing_class,
        )
        trainer.train()
        model, new = trainer.model, {}
    if script_args.publish_samples_to is not None and trainer.accelerator.is_main_process:
        publish(rounds, script_args, model_args.model_name_or_path, Path(training_args.output_dir) / "dataset")
    save(trainer, script_args)


if __name__ == "__main__":
    main()
