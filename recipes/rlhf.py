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
import signal
import sys
from pathlib import Path

from loop.namespace import check_licence_is_known, check_token, check_visibility
from loop.options import parse
from loop.plan import Plan
from loop.records import check_unchanged, is_done
from loop.running import duration, run_stage
from loop.stages import INDENT, LoopError
from loop.start import (
    again,
    begin_again,
    check_arguments,
    choose_launcher,
    folder_of,
    make_environment,
    position_of,
    wait_for_people,
)


LAST_WORDS = """
      In {output}:
        sft, reward_model, policy      the models, with cards
        rankings.parquet               what the reward model learned from
        policy/rollouts                what the policy sampled while it was trained, token by token
        evaluation.md, evaluation.png  how it answers, beside the model before"""


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


def print_last_words(output: Path, args: argparse.Namespace) -> None:
    print(LAST_WORDS.format(output=output))
    if args.push_to_hub:
        print(f"{INDENT}On the Hub: {args.namespace}/{args.name}, whose card links to the others.")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, which ends what was started as well
    try:
        args, config = parse(sys.argv[1:], __doc__)
        run_loop(args, config)
    except LoopError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. To go on: {again()}")


if __name__ == "__main__":
    main()
