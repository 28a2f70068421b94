"""The options of `rlhf.py` and its configuration, and refusals of what cannot work."""

import argparse
from pathlib import Path

import yaml

from .namespace import check_names
from .plan import LEAVES
from .stages import RECIPES, LoopError


SECTIONS = ["loop", "training", *(name for name in LEAVES if name != "publish")]


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/rlhf")
    parser.add_argument("--config", type=Path, help="sections of arguments, as YAML; by default recipes/rlhf.yaml")
    parser.add_argument("--redo", metavar="STAGE", help="do this stage and all after it again")
    parser.add_argument(
        "--config_file",
        help="of accelerate, for the trainings; by default recipes/accelerate_configs/single_gpu.yaml, or one process on "
        "the CPU where there is no GPU or no model is given",
    )
    data = parser.add_argument_group("model and data", "files, folders or Hub ids; without them, the tiny model")
    data.add_argument("--model_name_or_path", help="what to begin with")
    data.add_argument("--demonstrations", help="what sft.py learns from")
    data.add_argument("--prompts", help="what is sampled for, to be ranked, and trained on by PPO")
    data.add_argument(
        "--test_prompts", help="what the models are compared on; by default some of the prompts, held out"
    )
    judge = parser.add_argument_group("judge", "one of these, as in judge_completions.py, or people")
    judge.add_argument("--judge_func", help="'module.function', importable from the working directory")
    judge.add_argument("--judge_model", help="a language model to ask")
    judge.add_argument("--judge_reward_model", help="a sequence classification model with one label")
    judge.add_argument("--rubric", help="what --judge_model is told")
    judge.add_argument("--people", action="store_true", help="who rank on a page (their names are published as typed)")
    judge.add_argument(
        "--enough", type=float, default=1.0, help="the share of prompts that people must have judged to go on"
    )
    hub = parser.add_argument_group("publishing")
    hub.add_argument("--push_to_hub", action="store_true", help="publish three models and two datasets at the end")
    hub.add_argument("--namespace", help="user or organisation")
    hub.add_argument("--name", help="NAME-sft, NAME-rankings, NAME-reward-model, NAME and NAME-rollouts are published")
    hub.add_argument("--licence", help="of all five, by the Hub's identifier, such as cc-by-4.0; yours to choose")
    hub.add_argument("--licence_name", help="of a licence that the Hub does not know, with --licence other")
    hub.add_argument("--private", action="store_true")
    return parser


def parse(argv: list[str], description: str) -> tuple[argparse.Namespace, dict[str, dict]]:
    """
    Returns the arguments, and the sections of the configuration.

    Raises:
        LoopError: for what cannot work.
    """
    parser = make_parser(description)
    config_file = parser.parse_args(argv).config
    config = read_config(config_file or RECIPES / "rlhf.yaml")
    of_loop = config.pop("loop", {})
    unknown = [name for name in of_loop if name not in vars(parser.parse_args([]))]
    if unknown:
        raise LoopError(f"{config_file}: the section loop has no argument {', '.join(unknown)} (see --help).")
    parser.set_defaults(**of_loop)
    args = parser.parse_args(argv)
    check_data(args, config_file)
    check_judge(args)
    if not 0 < args.enough <= 1:
        raise LoopError(f"--enough must be above 0 and at most 1, got {args.enough:g}.")
    if args.push_to_hub:
        check_names(args)
    return args, config


def read_config(file: Path) -> dict[str, dict]:
    """Returns the sections of a configuration. Raises [`LoopError`] for what is none."""
    if not file.is_file():
        raise LoopError(f"--config {file}: there is no such file.")
    config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    for name, section in config.items():
        if name not in SECTIONS:
            raise LoopError(f"{file}: unknown section {name}. The sections are {', '.join(SECTIONS)}.")
        if not isinstance(section, dict):
            raise LoopError(f"{file}: the section {name} must hold `argument: value`, got {section!r}.")
    return config


def check_data(args: argparse.Namespace, config_file: Path | None) -> None:
    """Raises [`LoopError`] unless model and data are given together, with a configuration, or not at all."""
    given = {name: getattr(args, name) for name in ("model_name_or_path", "demonstrations", "prompts")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) not in (0, len(given)):
        raise LoopError(f"Give {', '.join(missing)} as well, or none of model and data for the tiny model.")
    if missing and args.test_prompts:
        raise LoopError("--test_prompts goes with --model_name_or_path, --demonstrations and --prompts.")
    if not missing and config_file is None:
        raise LoopError(
            "A model of yours needs learning rates and batch sizes of its own: pass --config, for example "
            f"{RECIPES / 'rlhf_qwen.yaml'}."
        )


def check_judge(args: argparse.Namespace) -> None:
    """Raises [`LoopError`] unless there is one judge."""
    judges = [name for name in ("judge_func", "judge_model", "judge_reward_model", "people") if getattr(args, name)]
    if len(judges) > 1:
        raise LoopError(f"Give one judge, not {' and '.join(f'--{name}' for name in judges)}.")
    if not judges and args.model_name_or_path is not None:
        raise LoopError(
            "Who judges? Pass --judge_func, --judge_model (with --rubric), --judge_reward_model or --people."
        )
    if args.rubric and not args.judge_model:
        raise LoopError("--rubric is for --judge_model.")
