"""Five repositories, each prepared in a folder and uploaded."""

import argparse
import fnmatch
import json
import os
import shutil
from pathlib import Path

from datasets import DatasetDict
from huggingface_hub import ModelCard

from trl_ext import load_rollouts
from trl_ext.data.collection import collected_rankings
from trl_ext.hub import publish_rankings, publish_rollouts
from trl_ext.hub.uploading import upload

from .cards import NOT_OF_THE_HUB, evaluation_results, evaluation_section, link, link_or, rewritten, the_loop
from .namespace import hub_ids


# Checkpoints, recorded rollouts (a dataset of their own), what is full of this machine's paths, and what no trainer wrote
LEFT_OUT = ("checkpoint-*", "_*", "rollouts", "runs", "training_args.bin", ".*", "*.jsonl", "*.parquet", "*.log")
ADAPTER_CONFIG = "adapter_config.json"


def stage_model(source: Path, target: Path, base: str | None) -> None:
    """Gathers the files of a model that are to be published, with an adapter's base by its Hub id."""
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
    """Gives a file a second name, which costs nothing however large the weights are, or copies it."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def replace_text(file: Path, text: str) -> None:
    """Writes a file anew, without touching the one that it may be a second name of."""
    file.unlink(missing_ok=True)
    file.write_text(text, encoding="utf-8")


class Publisher:
    """A publisher with a method for each result, which prepares it in `published/`, uploads it and returns the address."""

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
        """Publishes a model whose `base` and `dataset` are Hub ids, or None of what is not there."""
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
        """Returns the models behind the letters in the column `sources`."""
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
