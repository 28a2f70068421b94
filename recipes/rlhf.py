r"""
The whole of RLHF as one program: demonstrations, supervised fine-tuning, samples, rankings with ties, a reward model,
PPO against it, and an evaluation of what came out; then, if you like, all of it on the Hub.

    python recipes/rlhf.py

runs offline on two CPU cores, in minutes: a tiny model learns to write film reviews, and then to write positive ones.
With a model and data of your own (local files or Hub ids) and the judge of your choice the same loop runs on them:

    python recipes/rlhf.py --config recipes/rlhf_qwen.yaml --output_dir outputs/rlhf-qwen \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --demonstrations demonstrations.jsonl --prompts prompts.jsonl \
        --judge_model Qwen/Qwen2.5-7B-Instruct --rubric "Is the answer right and short?" \
        --push_to_hub --namespace your-name --name qwen-helpful --licence cc-by-4.0

Each stage is a recipe of this folder. `--config` has a section of its arguments for each (so `use_peft`, `load_in_4bit`
and all else that the recipes can do is there), one for all three trainings, `training`, and one, `loop`, for arguments of
this program.

    stage           recipe                                  leaves in OUTPUT_DIR
    prepare         rlhf_prompts.py, or rlhf_reviews.py     data
    sft             sft.py                                  sft, or with an adapter sft-adapter
    merge           merge.py, after an adapter              sft
    sample          sample_completions.py                   completions
    rank            judge_completions.py, or people with    completions/judgements-*.jsonl, rankings.parquet
                    rank_completions.py
    reward_model    ranking_reward.py                       reward_model
    policy          actor_critic.py                         policy
    answer          sample_completions.py                   evaluation
    evaluate        judge or people, rlhf_evaluate.py       evaluation.md, evaluation.json, evaluation.png
    publish         rlhf_publish.py                         published

Stopped at any point, it goes on where it was when it is started again: stages that are done are skipped, trainings go on
from their last checkpoint. `--redo STAGE` does a stage and all after it again; what was there is kept in
`superseded-1`, and so on. With `--people` it stops where people are to judge, and says how (exit status 3).
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from rlhf_plan import LEAVES, Plan, stages_left
from rlhf_stages import (
    INDENT,
    RECIPES,
    LoopError,
    Stage,
    check_unchanged,
    duration,
    flags,
    record_of,
    run_stage,
    set_aside,
    write_record,
)


SECTIONS = ["loop", "training", *(name for name in LEAVES if name != "publish")]
NOT_CONFIGURED = ("rank_completions.py", "rlhf_publish.py")  # have no section
WAITS_FOR_PEOPLE = 3  # exit status
ON_CPU = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAST_WORDS = """
      In {output}:
        sft, reward_model, policy      the models, with cards
        rankings.parquet               what the reward model learned from
        policy/rollouts                what the policy sampled while it was trained, token by token
        evaluation.md, evaluation.png  how it answers, beside the model before"""


# --- What is asked for ---


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, dict]]:
    """
    The arguments, and the sections of the configuration.

    Raises:
        LoopError: for what cannot work.
    """
    parser = make_parser()
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
    judges = [name for name in ("judge_func", "judge_model", "judge_reward_model", "people") if getattr(args, name)]
    if len(judges) > 1:
        raise LoopError(f"Give one judge, not {' and '.join(f'--{name}' for name in judges)}.")
    if not judges and args.model_name_or_path is not None:
        raise LoopError(
            "Who judges? Pass --judge_func, --judge_model (with --rubric), --judge_reward_model or --people."
        )
    if args.rubric and not args.judge_model:
        raise LoopError("--rubric is for --judge_model.")


# --- Publishing, before anything is trained ---


def check_names(args: argparse.Namespace) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    missing = [f"--{name}" for name in ("namespace", "name", "licence") if not getattr(args, name)]
    if missing:
        raise LoopError(f"--push_to_hub needs {' and '.join(missing)} as well.")
    try:
        validate_repo_id(f"{args.namespace}/{args.name}-reward-model")  # the longest
    except HFValidationError as error:
        raise LoopError(f"--namespace {args.namespace} --name {args.name}: {error}") from None


def check_licence_is_known(args: argparse.Namespace) -> None:
    """Raises [`LoopError`] for a licence that the Hub would refuse when all is trained."""
    from trl_ext.hub.metadata import check_licence

    try:
        check_licence(args.licence, args.licence_name, "--licence", "--licence_name")
    except ValueError as error:
        raise LoopError(str(error)) from None


def check_visibility(namespace: str, name: str) -> None:
    """Raises [`LoopError`] if one of the five, which should be private, is there already and public."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from rlhf_publish import hub_ids

    from trl_ext.hub.uploading import cause_of, compare_visibility

    for what, repo_id in hub_ids(namespace, name).items():
        try:
            compare_visibility(HfApi(), repo_id, "dataset" if what in ("rankings", "rollouts") else "model", True)
        except RepositoryNotFoundError:  # it will be created
            pass
        except Exception as error:  # the client's own errors have no class in common
            raise LoopError(f"--private: {cause_of(error, repo_id)}") from None


def check_token(namespace: str) -> None:
    """Raises [`LoopError`] unless the token may write to the namespace, as far as the Hub tells."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise LoopError("--push_to_hub: there is no token. Log in with `hf auth login`, or set HF_TOKEN.") from None
    except Exception as error:  # the client's own errors have no class in common
        from trl_ext.hub.uploading import cause_of

        raise LoopError(f"--push_to_hub: {cause_of(error, namespace)}") from None
    namespaces = [user["name"], *(organisation["name"] for organisation in user["orgs"])]
    if namespace not in namespaces:
        raise LoopError(
            f"--namespace {namespace}: the token is {user['name']}'s, who may write to {', '.join(namespaces)}."
        )
    if user["auth"].get("accessToken", {}).get("role") == "read":  # OAuth has none
        raise LoopError(
            "--push_to_hub: the token may only read. Make one that may write, on https://hf.co/settings/tokens."
        )


# --- Running them ---


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, which ends what was started as well
    try:
        args, config = parse(sys.argv[1:])
        run_loop(args, config)
    except LoopError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. To go on: {again()}")


def run_loop(args: argparse.Namespace, config: dict[str, dict]) -> None:
    output = folder_of(args.output_dir)
    stages = Plan(args, config, output).stages()
    again_from = position_of(args.redo, stages)
    check_unchanged(output, stages[:again_from])
    if args.push_to_hub and (args.redo or not is_done(output, "publish")):
        check_licence_is_known(args)  # here, as it imports torch, which takes longer than to skip all that is done
        check_token(args.namespace)
        if args.private:
            check_visibility(args.namespace, args.name)
    launcher, environment = None, make_environment(args)
    if args.config:
        check_arguments(output, stages, environment)
    if args.redo:
        begin_again(output, args.redo)
    for number, stage in enumerate(stages, start=1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        if is_done(output, stage.name):
            print(f"{title}: done before, skipped", flush=True)
            continue
        print(f"{title}: {stage.about}", flush=True)
        if stage.judged_by_people is not None:
            wait_for_people(stage.judged_by_people, args.enough)
        launcher = launcher or choose_launcher(args)
        try:
            seconds = run_stage(output, stage, launcher, environment)
        except LoopError as error:
            raise LoopError(f"{error}\nTo go on when that is mended: {again()}") from None
        print(f"{INDENT}took {duration(seconds)}", flush=True)
    print_last_words(output, args)


def folder_of(output_dir: str) -> Path:
    """However it was written, the same."""
    folder, here = Path(os.path.abspath(output_dir)), Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) and folder != here else folder


def is_done(folder: Path, name: str) -> bool:
    record = record_of(folder, name)
    return record is not None and record["is_finished"]


def position_of(redo: str | None, stages: list[Stage]) -> int:
    """Of the first stage that is done again; the number of stages where none is."""
    names = [stage.name for stage in stages]
    if redo is not None and redo not in names:
        raise LoopError(f"--redo {redo}: there is no such stage. The stages are {', '.join(names)}.")
    return len(names) if redo is None else names.index(redo)


def begin_again(folder: Path, name: str) -> None:
    records = [pattern for n in stages_left(name) for pattern in (*LEAVES[n], f"stages/{n}.json", f"logs/{n}.log")]
    kept = set_aside(folder, records)
    if kept is not None:
        print(f"What {name} and the stages after it left is kept in {kept}.")


def check_arguments(folder: Path, stages: list[Stage], environment: dict[str, str]) -> None:
    """
    Ask the recipes whether they understand the configuration, unless they did so before.

    Raises:
        LoopError: with what the first that does not says.
    """
    configured = [c for stage in stages for c in stage.commands if c.script not in NOT_CONFIGURED]
    everything = Stage("arguments", "", configured)
    record = record_of(folder, everything.name)
    if record is not None and record["settings"] == everything.settings:
        return
    program = [sys.executable, str(RECIPES / "rlhf_arguments.py")]
    commands = json.dumps([[c.script, flags(c.arguments)] for c in configured])
    asked = subprocess.run(program, input=commands, env=environment, capture_output=True, text=True)
    if asked.returncode != 0:
        raise LoopError(f"The configuration is not understood. {asked.stderr.strip().splitlines()[-1]}")
    write_record(folder, everything, [program], is_finished=True)


def make_environment(args: argparse.Namespace) -> dict[str, str]:
    """For a model this small a second thread costs more than it gives, and bars of a blink say nothing."""
    tiny = {"OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # What TRL's and transformers' own code sets off in a newer transformers
    names = ("gradient_checkpointing", "is_gradient_checkpointing")
    quiet = {"PYTHONWARNINGS": ",".join(f"ignore:`{name}` is deprecated:FutureWarning" for name in names)}
    return quiet | (tiny if args.model_name_or_path is None else {}) | os.environ


def choose_launcher(args: argparse.Namespace) -> list[str]:
    """Arguments of `accelerate launch`."""
    if args.config_file:
        return ["--config_file", args.config_file]
    if args.model_name_or_path is None:
        return ON_CPU
    import torch

    has_gpu = torch.cuda.is_available()
    return ["--config_file", str(RECIPES / "accelerate_configs" / "single_gpu.yaml")] if has_gpu else ON_CPU


def wait_for_people(folder: Path, enough: float) -> None:
    """Ends the program, with the command that opens the page, unless they have judged enough."""
    from trl_ext.data.collection import all_judgements
    from trl_ext.data.items import read_items

    items, everybody = read_items(folder), all_judgements(folder)
    done = sum(any(item in theirs for theirs in everybody) for item in items)
    if done >= enough * len(items):
        print(f"{INDENT}people have judged {done} of {len(items)}", flush=True)
        return
    share = "" if enough == 1 else f" ({enough:.0%} are enough)"
    print(f"{INDENT}people have judged {done} of {len(items)}{share}. To judge, open the page of\n")
    print(shlex.join(["python", str(RECIPES / "rank_completions.py"), "--folder", str(folder)]), end="\n\n")
    print(f"{INDENT}and then go on with\n\n{again()}")
    sys.exit(WAITS_FOR_PEOPLE)


def again() -> str:
    """The command that goes on: this one, but for what it does again."""
    command = shlex.join(["python", *sys.argv])
    return re.sub(r" --redo[ =]\S+", "", command)


def print_last_words(output: Path, args: argparse.Namespace) -> None:
    print(LAST_WORDS.format(output=output))
    if args.push_to_hub:
        print(f"{INDENT}On the Hub: {args.namespace}/{args.name}, whose card links to the others.")


if __name__ == "__main__":
    main()
