"""Cards of the five things that a loop publishes, which link to each other."""

import argparse
import json
import re
from pathlib import Path

from huggingface_hub import EvalResult


NOT_OF_THE_HUB = "a model that was not loaded from the Hub"  # as the trainers' cards have it


def link(repo_id: str, is_dataset: bool = False) -> str:
    return f"[{repo_id}](https://huggingface.co/{'datasets/' if is_dataset else ''}{repo_id})"


def link_or(text: str, repo_id: str | None, is_dataset: bool = False) -> str:
    return text if repo_id is None else link(repo_id, is_dataset)


def the_loop(ids: dict[str, str], args: argparse.Namespace) -> str:
    """Returns the section that is the same in all five cards."""
    base = link_or(NOT_OF_THE_HUB, args.base_model)
    demonstrations, prompts = (
        link_or("demonstrations", args.demonstrations, True),
        link_or("prompts", args.prompts, True),
    )
    steps = {
        "sft": f"{base}, fine-tuned on {demonstrations}",
        "rankings": f"its answers to {prompts}, ranked by {args.judge}",
        "reward_model": "learned from those rankings",
        "policy": "the fine-tuned model after reinforcement learning against the reward model",
        "rollouts": "what it sampled meanwhile, token by token",
    }
    rows = [f"| {link(ids[what], what in ('rankings', 'rollouts'))} | {text} |" for what, text in steps.items()]
    about = f"{args.about} " if args.about else ""
    return f"{about}Five things came out of one run of RLHF, in this order:\n\n| | |\n| --- | --- |\n" + "\n".join(
        rows
    )


def evaluation_section(folder: Path, ids: dict[str, str]) -> str:
    text = (folder / "evaluation.md").read_text(encoding="utf-8")
    return (
        f"## Evaluation\n\nHere `sft` is {link(ids['sft'])}, `policy` is this model, scores are those of "
        f"{link(ids['reward_model'])}, and the judgements are the split `test` of {link(ids['rankings'], True)}.\n\n{text}"
    )


def evaluation_results(folder: Path, ids: dict[str, str]) -> list[EvalResult]:
    """Returns the rates of the evaluation, for the metadata."""
    results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=ids["rankings"],
            dataset_name=ids["rankings"],
            dataset_split="test",
            metric_type=name,
            metric_name=f"{name.replace('_', ' ')} against {ids['sft']}",
            metric_value=round(results[name]["mean"], 4),
        )
        for name in ("win_rate", "tie_rate", "lose_rate")
    ]


def rewritten(text: str, repo_id: str, base: str, names: dict[str, str], sections: list[str]) -> str:
    """Rewrites a trainer's card: `names` of the Hub for those of this machine, and more sections before that on training."""
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"{re.escape(name)}(?![\w-])", names[name], text)
    text = text.replace("[None](https://huggingface.co/None)", base)  # TRL's, of a model from a folder
    text = text.replace('model="None"', f'model="{repo_id}"')
    text = re.sub(
        r"^# .*$", f"# {repo_id.split('/')[1]}", text.replace(NOT_OF_THE_HUB, base), count=1, flags=re.MULTILINE
    )
    training = re.search(r"^## Training", text, re.MULTILINE)
    position = training.start() if training else len(text)
    return text[:position] + "".join(f"{section.rstrip()}\n\n" for section in sections) + text[position:]
