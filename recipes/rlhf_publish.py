r"""
Publish what `rlhf.py` made: three models and two datasets, which link to each other.

    python recipes/rlhf_publish.py --output_dir outputs/rlhf --namespace user --name films --licence cc-by-4.0 \
        --judge "two friends"

What is uploaded lies in `OUTPUT_DIR/published`, a folder for each repository: without checkpoints, without paths of
this machine, with cards that tell of the others. Run again, it uploads what is missing or has changed.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import sys
from pathlib import Path

from datasets import DatasetDict
from huggingface_hub import EvalResult, ModelCard

from trl_ext import load_rollouts
from trl_ext.data.collection import collected_rankings
from trl_ext.hub import publish_rankings, publish_rollouts
from trl_ext.hub.metadata import check_licence
from trl_ext.hub.uploading import PublishError, upload


SUFFIXES = {  # of the repositories' names, in the order of the loop
    "sft": "-sft",
    "rankings": "-rankings",
    "reward_model": "-reward-model",
    "policy": "",
    "rollouts": "-rollouts",
}
# Checkpoints, recorded rollouts (a dataset of their own), what is full of this machine's paths, and what no trainer wrote
LEFT_OUT = ("checkpoint-*", "_*", "rollouts", "runs", "training_args.bin", ".*", "*.jsonl", "*.parquet", "*.log")
ADAPTER_CONFIG = "adapter_config.json"
NOT_OF_THE_HUB = "a model that was not loaded from the Hub"  # as the trainers' cards have it


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="of rlhf.py")
    parser.add_argument("--namespace", required=True, help="user or organisation")
    parser.add_argument("--name", required=True, help="of the policy; the others are NAME-sft, NAME-rankings, ...")
    parser.add_argument("--licence", required=True, help="of models and datasets, by the Hub's identifier")
    parser.add_argument("--licence_name", help="of a licence that the Hub does not know, with --licence other")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--judge", required=True, help="who ranked, in a few words")
    parser.add_argument("--rubric", help="what the judge was told")
    parser.add_argument("--base_model", help="Hub id of the model it began with, if it is there")
    parser.add_argument("--demonstrations", help="Hub id of the dataset, if it is there")
    parser.add_argument("--prompts", help="likewise")
    parser.add_argument("--about", help="a sentence or two on what it is all about")
    args = parser.parse_args()
    try:
        check_licence(args.licence, args.licence_name, "--licence", "--licence_name")
    except ValueError as error:
        parser.error(str(error))
    return args


def hub_ids(namespace: str, name: str) -> dict[str, str]:
    return {what: f"{namespace}/{name}{suffix}" for what, suffix in SUFFIXES.items()}


# --- What the cards say ---


def link(repo_id: str, is_dataset: bool = False) -> str:
    return f"[{repo_id}](https://huggingface.co/{'datasets/' if is_dataset else ''}{repo_id})"


def link_or(text: str, repo_id: str | None, is_dataset: bool = False) -> str:
    return text if repo_id is None else link(repo_id, is_dataset)


def the_loop(ids: dict[str, str], args: argparse.Namespace) -> str:
    """The same in all five cards."""
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
    """For the metadata."""
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
    """A trainer's card with the `names` on the Hub for those on this machine, and more sections before that on training."""
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


# --- Files ---


def stage_model(source: Path, target: Path, base: str | None) -> None:
    """The files of a model that are to be published; an adapter's base by its Hub id."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=left_out, copy_function=link_or_copy)
    for file in target.glob("*/**/README.md"):  # a form that PEFT leaves beside the critic's adapter
        file.unlink()
    for file in target.rglob(ADAPTER_CONFIG):
        config = json.loads(file.read_text(encoding="utf-8"))
        replace_text(file, json.dumps(config | {"base_model_name_or_path": base}, indent=2) + "\n")


def left_out(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in LEFT_OUT)}


def link_or_copy(source: str, target: str) -> None:
    """Weights are large, and a second name for them costs nothing."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def replace_text(file: Path, text: str) -> None:
    """Without touching what the file may be a second name of."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


# --- The five ---


class Publisher:
    """Each method prepares a result in `published/`, uploads it and returns the address."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.output_dir)
        self.ids = hub_ids(args.namespace, args.name)
        self.loop = the_loop(self.ids, args)
        folders = {"sft": "sft", "sft-adapter": "sft", "reward_model": "reward_model", "policy": "policy"}
        self.names = {(self.folder / name).as_posix(): self.ids[what] for name, what in folders.items()}
        self.names["`reward_model`"] = link(self.ids["reward_model"])  # as the policy's card calls it

    def target(self, what: str) -> Path:
        return self.folder / "published" / self.ids[what].split("/")[1]

    def sft(self) -> str:
        return self._model("sft", self.args.base_model, self.args.demonstrations, pipeline_tag="text-generation")

    def reward_model(self) -> str:
        return self._model("reward_model", self.ids["sft"], self.ids["rankings"])

    def policy(self) -> str:
        return self._model(
            "policy",
            self.ids["sft"],
            self.args.prompts,
            sections=[evaluation_section(self.folder, self.ids)],
            files=[self.folder / "evaluation.png", self.folder / "evaluation.json"],
            eval_results=evaluation_results(self.folder, self.ids),
        )

    def _model(self, what: str, base: str | None, dataset: str | None, sections=(), files=(), **metadata) -> str:
        """`base` and `dataset` are Hub ids, or None of what is not there."""
        source, target = self.folder / what, self.target(what)
        stage_model(source, target, base)
        for file in files:
            shutil.copy2(file, target)
        is_merged = not (source / "README.md").is_file()  # the card is the adapter's
        card = ModelCard.load((self.folder / "sft-adapter" if is_merged else source) / "README.md")
        merged = "What was trained is an adapter; these are the weights with it merged in.\n\n" if is_merged else ""
        loop = f"## The loop\n\n{merged}{self.loop}"
        base_in_words = link_or(NOT_OF_THE_HUB, base)
        card.text = rewritten(card.text, self.ids[what], base_in_words, self.names, [*sections, loop])
        card.data.pop("licence", None)  # a placeholder of TRL's
        is_adapter = (target / ADAPTER_CONFIG).is_file()
        relation = "adapter" if is_adapter else "finetune"
        metadata |= {
            "base_model": base,
            "base_model_relation": relation if base else None,
            "datasets": [dataset] if dataset else None,
            "library_name": "peft" if is_adapter else "transformers",
            "license": self.args.licence,
            "license_name": self.args.licence_name,
            "model_name": self.ids[what].split("/")[1],
        }
        for name, value in metadata.items():
            setattr(card.data, name, value)
        replace_text(target / "README.md", str(card))
        return upload(target, self.ids[what], "model", self.args.private).commit_url

    def rankings(self) -> str:
        train, test = (collected_rankings(self.folder / name) for name in ("completions", "evaluation"))
        collected = (
            f"Completions of `train` are by {link(self.ids['sft'])}. Those of `test`, on prompts that were held out, are "
            f"by {self._sources('evaluation')}: the evaluation of the latter against the former. Both were ranked by "
            f"{self.args.judge}{f', which was asked: {self.args.rubric}' if self.args.rubric else '.'}"
        )
        return publish_rankings(
            DatasetDict(train=train, test=test.cast(train.features)),
            self.ids["rankings"],
            self.args.licence,
            f"{collected}\n\n**The loop.** {self.loop}",
            self.target("rankings"),
            models=[self.ids["reward_model"]],
            licence_name=self.args.licence_name,
            private=self.args.private,
        )

    def _sources(self, folder: str) -> str:
        """Who the letters in the column `sources` are."""
        letters = json.loads((self.folder / folder / "models.json").read_text(encoding="utf-8"))
        letter_of = {Path(path).name: letter for letter, path in letters.items()}
        return " and ".join(f"{link(self.ids[name])} ({letter_of[name]} in `sources`)" for name in ("sft", "policy"))

    def rollouts(self) -> str:
        collected = f"By the training of {link(self.ids['policy'])}, which began as {link(self.ids['sft'])}."
        return publish_rollouts(
            load_rollouts(self.folder / "policy"),
            self.ids["rollouts"],
            self.args.licence,
            f"{collected}\n\n**The loop.** {self.loop}",
            self.target("rollouts"),
            model=self.ids["policy"],
            reward=self.ids["reward_model"],
            licence_name=self.args.licence_name,
            private=self.args.private,
        )


def main() -> None:
    publisher = Publisher(parse_args())
    failed = []
    for what, repo_id in publisher.ids.items():
        try:
            print(f"{repo_id}: {getattr(publisher, what)()}", flush=True)
        except PublishError as error:
            failed.append(repo_id)
            print(f"{repo_id}: failed. {error}", flush=True)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(publisher.ids)} could not be published: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
