r"""
Supervised fine-tuning with TRL's trainer: the stage before reinforcement learning. Every option of `SFTConfig` and `ModelConfig`
is an argument here, and `--config FILE.yaml` sets many at once (the command line wins over the file).

From a file, on one GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/sft.py --config recipes/sft.yaml

A LoRA adapter on a 4-bit base model, on one GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/sft.py \
        --model_name_or_path Qwen/Qwen2.5-7B --dataset_name trl-lib/Capybara --output_dir qwen-7b-sft \
        --use_peft --load_in_4bit --learning_rate 2e-4 --eos_token '<|im_end|>'

Own data (columns as TRL's SFT takes them: `messages`, `text`, or `prompt` and `completion`), eight sharded GPUs:

    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/sft.py \
        --model_name_or_path Qwen/Qwen2.5-7B --dataset_name demonstrations.jsonl --output_dir qwen-7b-sft --push_to_hub
"""

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_ext import SFTTrainer


FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class RecipeArguments(ScriptArguments):
    """Arguments common to the recipes."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "The dataset: a name on the Hub, a .json, .jsonl, .parquet or .csv file, or a folder (of such "
            "files, or written by `save_to_disk`)."
        },
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the commands in a script's docstring as they are."""


def load_split(args: RecipeArguments, split: str) -> Dataset | IterableDataset:
    """The split `split` of `--dataset_name`. Data without splits is all training data."""
    if args.dataset_name is None:
        raise ValueError("No data: pass --dataset_name, a name on the Hub, a data file or a folder.")
    path = Path(args.dataset_name)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # what `save_to_disk` leaves
        splits = load_from_disk(path)
        splits = splits if isinstance(splits, DatasetDict) else {args.dataset_train_split: splits}
    elif path.is_file():
        kind = next((FILE_KINDS[suffix] for suffix in path.suffixes if suffix in FILE_KINDS), None)
        if kind is None:
            raise ValueError(f"--dataset_name {path}: unknown kind of file, expected one of {', '.join(FILE_KINDS)}.")
        splits = load_dataset(kind, data_files={args.dataset_train_split: str(path)}, streaming=args.dataset_streaming)
    else:
        splits = load_dataset(args.dataset_name, args.dataset_config, streaming=args.dataset_streaming)
    if split not in splits:
        raise ValueError(
            f"{args.dataset_name} has no split {split!r}, only {', '.join(splits)}. Set --dataset_train_split, or "
            "--dataset_test_split if it was wanted for evaluation."
        )
    return splits[split]


def prepare_model_args(model_args: ModelConfig, training_args) -> None:
    """
    Refuse what would fail after minutes of loading, give `--use_peft` and `--load_in_4bit` the meaning they need where
    nothing more is said, and tell the trainer how to load the model (what `--model_init_kwargs` says goes first).
    """
    if model_args.model_name_or_path is None:
        raise ValueError("No model: pass --model_name_or_path, a Hub id or a local folder.")
    is_quantized = model_args.load_in_4bit or model_args.load_in_8bit
    if is_quantized and not model_args.use_peft:
        raise ValueError(
            "--load_in_4bit and --load_in_8bit freeze the model's weights, so there would be nothing to train. Add "
            "--use_peft to train an adapter on them."
        )
    # Adapters on all linear layers learn what full fine-tuning does; on the attention alone, PEFT's default for many
    # models, they do not (Dettmers et al. 2023, https://huggingface.co/papers/2305.14314, section 4)
    if model_args.use_peft and model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"
    # TRL's default is float32, for what is frozen and for computing under 4 bits, whatever training computes in
    if is_quantized and model_args.dtype in (None, "float32"):
        model_args.dtype = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    from_flags = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = from_flags | (training_args.model_init_kwargs or {})


def save(trainer, script_args: RecipeArguments) -> None:
    """Write the final model with its card, push them if asked to, and end training: the last thing a recipe does."""
    dataset_name = None if Path(script_args.dataset_name).exists() else script_args.dataset_name
    trainer.save_model()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    else:
        model_name = Path(trainer.args.hub_model_id or trainer.args.output_dir).name
        trainer.create_model_card(model_name=model_name, dataset_name=dataset_name)
    # Several processes on CPU often hang when they destroy Gloo's group, whose threads are then joined by DDP's reducer
    # while it holds the interpreter lock, and sometimes abort when they end without (torch 2.13): they leave as they are
    if trainer.accelerator.device.type != "cpu":
        trainer.accelerator.end_training()
    elif trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def parse_arguments(
    description: str, classes: tuple[type, ...], args: list[str], usage="%(prog)s [--config FILE.yaml] [OPTIONS]"
) -> tuple:
    """An instance of each of `classes`, of the command line and the YAML file it names."""
    parser = TrlParser(classes, usage=usage, description=description, formatter_class=HelpFormatter)
    return parser.parse_args_and_config(args)


def parse(args: list[str]) -> tuple:
    """The arguments of this script, of the training and of the model."""
    return parse_arguments(__doc__, (RecipeArguments, SFTConfig, ModelConfig), args)


def main() -> None:
    script_args, training_args, model_args = parse(sys.argv[1:])
    prepare_model_args(model_args, training_args)
    has_eval = training_args.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_split(script_args, script_args.dataset_train_split),
        eval_dataset=load_split(script_args, script_args.dataset_test_split) if has_eval else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save(trainer, script_args)


if __name__ == "__main__":
    main()
