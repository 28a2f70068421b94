"""The stages of `rlhf.py`: the recipes that run, their data, and the places of their results."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from .stages import Command, LoopError, Stage


LEAVES = {  # what `--redo` sets aside, of all stages in their order; what people judged of the same samples stays
    "prepare": ["data"],
    "sft": ["sft", "sft-adapter"],
    "merge": ["sft"],
    "sample": ["completions"],
    "rank": ["rankings.parquet", "completions/judgements-judge-*.jsonl"],
    "reward_model": ["reward_model"],
    "policy": ["policy"],
    "answer": ["evaluation"],
    "evaluate": ["evaluation.*", "evaluation/judgements-judge-*.jsonl"],
    "publish": ["published"],
}
TRAININGS = ("sft", "reward_model", "policy")
TINY_WORLD = (
    "A toy that runs in minutes: film reviews written by a grammar, a judge that is a word list, and a Llama of some "
    "hundred thousand parameters that began with random weights."
)


def stages_left(name: str) -> list[str]:
    """Returns the names of a stage and all after it."""
    names = list(LEAVES)
    return names[names.index(name) :]


class Plan:
    """
    The plan of a loop.

    Args:
        args (`argparse.Namespace`): The arguments of `rlhf.py`.
        config (`dict`): The sections of its configuration.
        output (`Path`): Folder that takes all results.
    """

    def __init__(self, args: argparse.Namespace, config: dict[str, dict], output: Path):
        self.args, self.config, self.output = args, config, output
        self.is_tiny_world = args.model_name_or_path is None
        self.trains_adapter = self._section("sft").get("use_peft", False)

    def stages(self) -> list[Stage]:
        """Returns the stages. Raises [`LoopError`] if the configuration sets what the loop sets."""
        return [
            self._prepare(),
            self._sft(),
            *([self._merge()] if self.trains_adapter else []),
            self._sample(),
            self._rank(),
            self._reward_model(),
            self._policy(),
            self._answer(),
            self._evaluate(),
            *([self._publish()] if self.args.push_to_hub else []),
        ]

    # --- What they share ---

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def sft(self) -> Path:
        """The plain model that reward model and policy begin with."""
        return self.output / "sft"

    @property
    def reward_model(self) -> Path:
        return self.output / "reward_model"

    @property
    def policy(self) -> Path:
        return self.output / "policy"

    @property
    def completions(self) -> Path:
        return self.output / "completions"

    @property
    def rankings(self) -> Path:
        return self.output / "rankings.parquet"

    @property
    def evaluation(self) -> Path:
        return self.output / "evaluation"

    def _section(self, name: str) -> dict[str, Any]:
        shared = self.config.get("training", {}) if name in TRAININGS else {}
        return shared | self.config.get(name, {})

    def _command(self, section: str, script: str, **own) -> Command:
        """Returns a command with the arguments that the loop sets itself, and those of a section."""
        given = self._section(section)
        twice = [name for name in given if name in own]
        if twice:
            raise LoopError(f"The section {section} sets {', '.join(twice)}, which the loop sets itself. Take it out.")
        trains_in = Path(own["output_dir"]) if section in TRAININGS else None
        creates = Path(own["output_dir"]) if section == "merge" else None
        return Command(script, {name: as_text(value) for name, value in own.items()} | given, trains_in, creates)

    # --- One by one ---

    def _prepare(self) -> Stage:
        command = partial(self._command, "prepare", output_dir=self.data)
        if self.is_tiny_world:
            return Stage(
                "prepare", "film reviews, openings of others, a model that knows nothing", [command("rlhf_reviews.py")]
            )
        prompts = command("rlhf_prompts.py", dataset_name=self.args.prompts, test_dataset_name=self.args.test_prompts)
        return Stage("prepare", "prompts to train on, and others to be examined on", [prompts])

    def _sft(self) -> Stage:
        command = self._command(
            *("sft", "sft.py"),
            model_name_or_path=self.data / "model" if self.is_tiny_world else self.args.model_name_or_path,
            dataset_name=self.data / "demonstrations.jsonl" if self.is_tiny_world else self.args.demonstrations,
            output_dir=self.output / "sft-adapter" if self.trains_adapter else self.sft,
        )
        return Stage("sft", "learns from demonstrations", [command], shown=("loss",))

    def _merge(self) -> Stage:
        command = self._command("merge", "merge.py", adapter=self.output / "sft-adapter", output_dir=self.sft)
        return Stage("merge", "the adapter goes into its base", [command])

    def _sample(self) -> Stage:
        command = self._sampling("sample", "prompts.jsonl", [self.sft], self.completions)
        return Stage("sample", "several completions of each prompt", [command])

    def _rank(self) -> Stage:
        about = f"the completions, by {self.judge_in_words}"
        if self.args.people:
            arguments = {"folder": as_text(self.completions), "export": as_text(self.rankings)}
            return Stage("rank", about, [Command("rank_completions.py", arguments)], judged_by_people=self.completions)
        return Stage("rank", about, [self._judging(self.completions, export=self.rankings)])

    def _reward_model(self) -> Stage:
        command = self._command(
            *("reward_model", "ranking_reward.py"),
            model_name_or_path=self.sft,
            dataset_name=self.rankings,
            output_dir=self.reward_model,
        )
        return Stage(
            "reward_model", "learns what makes a ranking likely, ties and all", [command], shown=("loss", "accuracy")
        )

    def _policy(self) -> Stage:
        command = self._command(
            *("policy", "actor_critic.py"),
            model_name_or_path=self.sft,
            reward_model=self.reward_model,
            dataset_name=self.data / "prompts.jsonl",
            output_dir=self.policy,
            save_rollouts=True,
        )
        algorithm = self._section("policy").get("algorithm", "ppo").replace("_", " ").upper()
        shown = ("reward", "kl/k1", "completions/mean_length")
        return Stage("policy", f"learns to please the reward model, by {algorithm}", [command], shown=shown)

    def _answer(self) -> Stage:
        command = self._sampling("answer", "test_prompts.jsonl", [self.sft, self.policy], self.evaluation)
        return Stage("answer", "the models before and after answer prompts that were held out", [command])

    def _evaluate(self) -> Stage:
        report = self._command(
            *("evaluate", "rlhf_evaluate.py"),
            folder=self.evaluation,
            reward_model=self.reward_model,
            output_dir=self.output,
        )
        about = f"the answers, by {self.judge_in_words}"
        if self.args.people:
            return Stage("evaluate", about, [report], judged_by_people=self.evaluation)
        return Stage("evaluate", about, [self._judging(self.evaluation), report])

    def _publish(self) -> Stage:
        args = self.args
        ids = {"base_model": args.model_name_or_path, "demonstrations": args.demonstrations, "prompts": args.prompts}
        arguments = {
            "output_dir": as_text(self.output),
            "namespace": args.namespace,
            "name": args.name,
            "licence": args.licence,
            "licence_name": args.licence_name,
            "private": [] if args.private else None,
            "judge": self.judge_in_words,
            "rubric": args.rubric,
            **{name: value if value and not Path(value).exists() else None for name, value in ids.items()},
            "about": TINY_WORLD if self.is_tiny_world else None,
        }
        return Stage("publish", f"as {args.namespace}/{args.name}", [Command("rlhf_publish.py", arguments)])

    def _sampling(self, section: str, prompts: str, models: list[Path], folder: Path) -> Command:
        names = [as_text(model) for model in models]
        return self._command(
            *(section, "sample_completions.py"),
            dataset_name=self.data / prompts,
            model_name_or_path=names,
            output_dir=folder,
        )

    # --- The judge ---

    def _judging(self, folder: Path, export: Path | None = None) -> Command:
        args = self.args
        if args.judge_model:
            judge = {"judge_model": args.judge_model} | ({"rubric": args.rubric} if args.rubric else {})
        elif args.judge_reward_model:
            judge = {"reward_model": args.judge_reward_model}
        elif args.judge_func:
            judge = {"reward_func": args.judge_func}
        else:
            judge = {"reward_func": "film_reviews.judges.praise", "name": "word-list"}
        return self._command("rank", "judge_completions.py", folder=folder, export=export, **judge)

    @property
    def judge_in_words(self) -> str:
        args = self.args
        if args.people:
            return "people"
        if args.judge_func:
            return f"the function {args.judge_func}"
        model = args.judge_model or args.judge_reward_model
        if model is None:
            return "a word list"
        return f"the model {Path(model).name if Path(model).exists() else model}"


def as_text(value: Any) -> Any:
    """Returns a path as it is written on a command line, and in a record of it; other values as they are."""
    return value.as_posix() if isinstance(value, Path) else value
