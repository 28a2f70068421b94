"""Arguments that the training recipes share, how they are parsed, and how they say to load the model."""

import argparse
from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, TrlParser


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
    """A formatter that shows defaults, and leaves the commands in a script's docstring as they are."""


def parse_arguments(
    description: str, classes: tuple[type, ...], args: list[str], usage="%(prog)s [--config FILE.yaml] [OPTIONS]"
) -> tuple:
    """Returns an instance of each of `classes`, made of the command line and the YAML file that it names."""
    parser = TrlParser(classes, usage=usage, description=description, formatter_class=HelpFormatter)
    return parser.parse_args_and_config(args)


def prepare_model_args(model_args: ModelConfig, training_args) -> None:
    """
    Refuses what would fail after minutes of loading, gives `--use_peft` and `--load_in_4bit` the meaning they need where
    nothing more is said, and tells the trainer how to load the model (what `--model_init_kwargs` says goes first).
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
