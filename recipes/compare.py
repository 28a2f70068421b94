"""
Compare the ways to train a language model by reward: the methods of this package, and TRL's GRPO and RLOO, on the
quickstart's language model, at the same number of sampled tokens, each tuned with the same small budget.

    python recipes/compare.py                  # all of it: hours on two CPU cores
    python recipes/compare.py --seeds 1 --budget 6000 --methods ppo grpo

Two tasks, on the same openings of film reviews:

- `reviews`: the reward model's score at the end, as in the quickstart;
- `words`: one point for each word of praise and minus one for each of blame, by the quickstart's word list. Methods with
  credit for tokens get it at the word (dense); `-delayed` ones get the sum at the end, as the others do.

In both a nat of KL to the language model costs `KL_PRICE` and a review that does not end costs 1. What is compared is
the objective: reward less these prices, on openings that were held out.

Each method is tried with each of its settings on a seed of its own; the best one is run with `--seeds` others. Results lie
in `runs/`, one file per run, and are not computed again: the study goes on where it was stopped.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from quickstart import common_settings, get_task, rank_samples, train_language_model, train_reward_model
from quickstart_data import Task
from quickstart_judges import praise_and_blame
from quickstart_report import quiet
from quickstart_sampling import Samples, load, rewards_of, sample, token_logps
from scipy.stats import t
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    CompletionSampler,
    NLPOConfig,
    NLPOTrainer,
    PPOConfig,
    PPOTrainer,
    QActorCriticConfig,
    QActorCriticTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    keep_best,
)


KL_PRICE = 0.2
END_PRICE = 1.0
TUNING_SEED = 100
NUM_EVALUATIONS = 8  # of a run
GROUP_SIZE = 8  # completions per prompt of the methods that compare them


@dataclass(frozen=True)
class Setting:
    """
    One of what a method is tried with.

    Args:
        learning_rate (`float`): It.
        is_on_policy (`bool`): One update on each 32 completions, or 4 epochs of 2 updates on each 128.
        num_samples (`int`, *optional*, defaults to `4`): n of best-of-n.
        lam (`float`, *optional*): Lambda of generalized advantage estimation, if not the method's default.
    """

    learning_rate: float
    is_on_policy: bool
    num_samples: int = 4
    lam: float | None = None

    def __str__(self):
        lam = "" if self.lam is None else f"-{self.lam:g}"
        return f"{self.learning_rate:g}-{'on' if self.is_on_policy else 'epochs'}-{self.num_samples}{lam}"

    @property
    def updates_per_rollout(self) -> int:
        return 1 if self.is_on_policy else 8

    def arguments(self) -> dict:
        if self.is_on_policy:
            arguments = {"per_device_train_batch_size": 32, "steps_per_generation": 1, "num_iterations": 1}
        else:
            arguments = {"per_device_train_batch_size": 64, "steps_per_generation": 2, "num_iterations": 4}
        return arguments | ({} if self.lam is None else {"lam": self.lam})


ON_POLICY = [Setting(rate, True) for rate in (1e-4, 3e-4, 1e-3)]
EITHER = [Setting(3e-4, True), Setting(1e-3, True), Setting(3e-4, False)]
LAMBDAS = [Setting(3e-4, True), Setting(1e-3, True), Setting(1e-3, True, lam=1.0)]
FILTERING = [Setting(3e-4, True, 4), Setting(1e-3, True, 4), Setting(1e-3, True, 8)]


@dataclass(frozen=True)
class Method:
    """A trainer with what makes it this method, and the settings to choose from."""

    trainer_class: type
    config_class: type
    settings: list[Setting]
    overrides: dict
    is_dense: bool = True  # on the task of words


# Detached: through a trunk this small the value's gradients drown the policy's
WITH_CRITIC = {"critic_detach": True, "critic_learning_rate": 1e-2, "vf_coef": 0.5, "kl_in_reward": KL_PRICE}
METHODS = {
    "reinforce-bandit": Method(
        ReinforceTrainer,
        ReinforceConfig,
        ON_POLICY,
        {"one_step_mdp": True, "baseline": "none", "kl_in_reward": KL_PRICE},
        is_dense=False,
    ),
    "reinforce": Method(ReinforceTrainer, ReinforceConfig, ON_POLICY, {"baseline": "none", "kl_in_reward": KL_PRICE}),
    "reinforce-mean": Method(
        ReinforceTrainer, ReinforceConfig, ON_POLICY, {"baseline": "batch_mean", "kl_in_reward": KL_PRICE}
    ),
    "q-actor-critic": Method(QActorCriticTrainer, QActorCriticConfig, EITHER, {**WITH_CRITIC, "vf_coef": 1.0}),
    "q-all-actions": Method(
        QActorCriticTrainer,
        QActorCriticConfig,
        EITHER,
        {**WITH_CRITIC, "vf_coef": 1.0, "policy_gradient": "all_actions"},
    ),
    # With lambda 1, its default, this is REINFORCE with a value as baseline
    "a2c": Method(A2CTrainer, A2CConfig, ON_POLICY, WITH_CRITIC),
    "ppo": Method(PPOTrainer, PPOConfig, LAMBDAS, WITH_CRITIC),
    "nlpo": Method(NLPOTrainer, NLPOConfig, LAMBDAS, {**WITH_CRITIC, "mask_update_steps": 5}),
    "best-of-n": Method(CompletionSampler, ReinforceConfig, FILTERING, {}, is_dense=False),
    "grpo": Method(GRPOTrainer, GRPOConfig, EITHER, {"num_generations": GROUP_SIZE, "beta": KL_PRICE}, is_dense=False),
    "rloo": Method(RLOOTrainer, RLOOConfig, EITHER, {"num_generations": GROUP_SIZE, "beta": KL_PRICE}, is_dense=False),
}
# On the task of words: those that can tell where in a text a word was, without being told
DELAYED = ["reinforce-mean", "ppo"]
METHODS |= {
    f"{name}-delayed": Method(m.trainer_class, m.config_class, m.settings, m.overrides, is_dense=False)
    for name, m in METHODS.items()
    if name in DELAYED
}
METHODS_OF_TASK = {
    "reviews": [name for name in METHODS if not name.endswith("-delayed")],
    "words": ["reinforce-bandit", "reinforce-mean", "q-actor-critic", "a2c", "ppo", "grpo", "rloo"]
    + [f"{name}-delayed" for name in DELAYED],
}


# --- The tasks ---


@dataclass
class Stage:
    """What all runs start from: the quickstart's openings and judge, its language model and its reward model."""

    task: Task
    paths: dict[str, str]

    @classmethod
    def prepare(cls, output_dir: str, corpus_size: int | None = None) -> "Stage":
        """Train the two models, if they are not there already."""
        task = get_task(argparse.Namespace(reviews=None, corpus_size=corpus_size, rollouts=None, seed=0))
        paths = {name: f"{output_dir}/{name}" for name in ("sft", "reward_model")}
        if not Path(paths["reward_model"], "model.safetensors").is_file():
            tokenizer = train_language_model(task, paths["sft"], 0)
            train_reward_model(task, rank_samples(task, paths["sft"], tokenizer), paths, tokenizer, 0)
        return cls(task, paths)


class Counter:
    """A reward of weight 0 that counts the tokens which are sampled."""

    __name__ = "tokens"

    def __init__(self):
        self.total = 0

    def __call__(self, completion_ids, **kwargs):
        self.total += sum(map(len, completion_ids))
        return [0.0] * len(completion_ids)


def ends(eos_token_id: int) -> Callable:
    def ended(completion_ids, **kwargs):
        return [0.0 if ids[-1] == eos_token_id else -END_PRICE for ids in completion_ids]

    return ended


def praise(completions, **kwargs):
    """The task of words, at the end."""
    return [sum(value for *_, value in praise_and_blame(text)) for text in completions]


def dense_praise(completions, **kwargs):
    """The task of words, at the words."""
    return [[*praise_and_blame(text)] or 0.0 for text in completions]


def evaluate(model, stage: Stage, task_name: str, reference, reward_model, tokenizer) -> dict[str, float]:
    """How good a policy is, on the same held-out openings and with the same random numbers each time."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = stage.task.test_prompts[:200]
        samples: Samples = sample(model, tokenizer, prompts, stage.task.max_completion_length, stage.task.temperature)
    logps, reference_logps = (token_logps(m, samples, stage.task.temperature) for m in (model, reference))
    model.train(was_training)
    if task_name == "reviews":
        rewards = rewards_of(reward_model, tokenizer, samples)
    else:
        rewards = torch.tensor(praise(samples.completions))
    rewards = rewards - END_PRICE * (~samples.ended).float()
    kl = (logps - reference_logps).sum(dim=1)
    scores = stage.task.judge.score(samples.completions)
    tokens = samples.completion_mask.sum().item()
    return {
        "objective": (rewards - KL_PRICE * kl).mean().item(),
        "reward": rewards.mean().item(),
        "judge": sum(scores) / len(scores),
        "kl": kl.mean().item(),
        "perplexity": math.exp(-reference_logps.sum().item() / tokens),
        "length": tokens / len(prompts),
    }


# --- A run ---


class Curve(TrainerCallback):
    """Measures the policy now and then, and ends the run when its tokens are spent."""

    def __init__(self, measure: Callable, counter: Counter, budget: int, updates_per_rollout: int):
        self.measure, self.counter, self.budget = measure, counter, budget
        self.updates_per_rollout = updates_per_rollout
        self.points = []

    def point(self, model) -> None:
        self.points.append({"tokens": self.counter.total, **self.measure(model)})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.points:
            self.point(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.updates_per_rollout != 0:
            return
        is_over = self.counter.total >= self.budget
        if is_over or self.counter.total >= len(self.points) * self.budget / NUM_EVALUATIONS:
            self.point(model)
        control.should_training_stop = is_over


def arguments(stage: Stage, folder: str, seed: int) -> dict:
    return {
        "max_completion_length": stage.task.max_completion_length,
        "temperature": stage.task.temperature,
        "max_steps": 100_000,  # the tokens end it
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        **common_settings(folder, seed),
    }


def run(
    stage: Stage, output_dir: str, task_name: str, name: str, setting: Setting, seed: int, budget: int
) -> list[dict]:
    """Train, and return the learning curve."""
    method = METHODS[name]
    tokenizer = AutoTokenizer.from_pretrained(stage.paths["sft"])
    reference = load(AutoModelForCausalLM, stage.paths["sft"])
    reward_model = load(AutoModelForSequenceClassification, stage.paths["reward_model"])
    counter = Counter()
    score = stage.paths["reward_model"] if task_name == "reviews" else praise
    if task_name == "words" and method.is_dense:
        score = dense_praise
    rewards = [score, ends(tokenizer.eos_token_id), counter]

    def measure(model):
        return evaluate(model, stage, task_name, reference, reward_model, tokenizer)

    curve = Curve(measure, counter, budget, setting.updates_per_rollout)
    common = arguments(stage, f"{output_dir}/scratch", seed)
    prompts = Dataset.from_dict({"prompt": stage.task.train_prompts})
    if name == "best-of-n":
        filter_and_imitate(stage, common, setting, rewards, prompts, curve, tokenizer)
        return curve.points
    trainer = method.trainer_class(
        model=stage.paths["sft"],
        reward_funcs=rewards,
        processing_class=tokenizer,
        train_dataset=prompts,
        args=method.config_class(
            learning_rate=setting.learning_rate,
            reward_weights=[1.0, 1.0, 0.0],
            **common | setting.arguments() | method.overrides,
        ),
        callbacks=[curve],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return curve.points


def filter_and_imitate(stage, common, setting, rewards, prompts, curve, tokenizer) -> None:
    """Best-of-n, in rounds that sample as many tokens as the others do between two measurements."""
    model, position = stage.paths["sft"], 0
    per_batch = 128 // setting.num_samples
    order = prompts.shuffle(seed=common["seed"])
    while curve.counter.total < curve.budget:
        sampler = CompletionSampler(
            model,
            rewards,
            ReinforceConfig(
                per_device_train_batch_size=128,
                per_device_eval_batch_size=128,
                num_generations=setting.num_samples,
                reward_weights=[1.0, 1.0, 0.0],
                **common,
            ),
            order,
            processing_class=tokenizer,
        )
        sampler.remove_callback(PrinterCallback)
        if not curve.points:
            curve.point(sampler.model)
        rows = []
        until = max(curve.counter.total + 1, len(curve.points) * curve.budget / NUM_EVALUATIONS)
        while curve.counter.total < min(curve.budget, until):
            chosen = [(position + i) % len(order) for i in range(per_batch)]
            position += per_batch
            rows += keep_best(sampler.sample(order.select(chosen))).to_list()
        sft = {
            name: value for name, value in common.items() if name not in ("max_completion_length", "temperature")
        } | {"max_steps": -1, "num_train_epochs": 1}
        trainer = SFTTrainer(
            model=sampler.model,
            args=SFTConfig(learning_rate=setting.learning_rate, per_device_train_batch_size=16, **sft),
            train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in rows]),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model = trainer.model
        curve.point(model)


# --- The study ---


@dataclass(frozen=True)
class Job:
    output_dir: str
    task: str
    method: str
    setting: Setting
    seed: int
    budget: int
    corpus_size: int | None

    @property
    def file(self) -> Path:
        return Path(
            self.output_dir, "runs", f"{self.task}_{self.method}_{self.setting}_{self.seed}_{self.budget}.json"
        )

    def result(self) -> list[dict]:
        return json.loads(self.file.read_text(encoding="utf-8"))["points"]


def perform(job: Job) -> None:
    quiet()
    torch.set_num_threads(1)
    stage = Stage.prepare(job.output_dir, job.corpus_size)
    points = run(stage, job.output_dir, job.task, job.method, job.setting, job.seed, job.budget)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    partial = job.file.with_suffix(".partial")
    partial.write_text(json.dumps({**asdict(job), "points": points}), encoding="utf-8")
    partial.rename(job.file)


def perform_all(jobs: list[Job], num_workers: int, title: str) -> None:
    missing = [job for job in jobs if not job.file.is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        futures = [pool.submit(perform, job) for job in missing]
        for future in tqdm(as_completed(futures), desc=title, initial=len(jobs) - len(missing), total=len(jobs)):
            future.result()


def final(points: list[dict], key: str = "objective") -> float:
    """The mean of the last two measurements, which is less noisy than the last."""
    return statistics.mean(point[key] for point in points[-2:])


def on_the_way(points: list[dict]) -> float:
    """The mean objective of all measurements but the first: higher for who learns sooner."""
    return statistics.mean(point["objective"] for point in points[1:])


def interval(values: list[float]) -> str:
    """Mean and 95% interval by Student's t, over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.2f} ± {half:.2f}"


def table(jobs_of: dict[str, list[Job]]) -> str:
    keys = ["objective", "reward", "judge", "kl", "perplexity", "length"]
    lines = [
        "| method | setting | objective | on the way | reward | judge | KL of a review | perplexity | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    means = {name: statistics.mean(final(job.result()) for job in jobs) for name, jobs in jobs_of.items()}
    for name in sorted(jobs_of, key=lambda name: -means[name]):
        jobs = jobs_of[name]
        setting = jobs[0].setting
        schedule = (
            f"n={setting.num_samples}" if name == "best-of-n" else "1 x 32" if setting.is_on_policy else "8 x 128"
        )
        cells = [interval([final(job.result(), key) for job in jobs]) for key in keys]
        cells.insert(1, interval([on_the_way(job.result()) for job in jobs]))
        schedule += "" if setting.lam is None else f", lambda {setting.lam:g}"
        lines.append(f"| {name} | {setting.learning_rate:g}, {schedule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(jobs_of: dict[str, list[Job]], title: str, path: Path) -> None:
    """Learning curves: means over seeds, with the range between the least and the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("Objective", "objective"), ("Reward", "reward"), ("Judge's score", "judge"), ("KL of a review", "kl")]
    panels.append(("Perplexity under the language model", "perplexity"))
    figure, axes = plt.subplots(2, 3, figsize=(17, 9), layout="constrained")
    figure.suptitle(title)
    colors = plt.get_cmap("tab20").colors
    for axis, (name, key) in zip(axes.flat, panels, strict=False):
        for (method, jobs), color in zip(jobs_of.items(), colors, strict=False):
            curves = [job.result() for job in jobs]
            length = min(map(len, curves))
            x = [statistics.mean(curve[i]["tokens"] for curve in curves) / 1000 for i in range(length)]
            values = [[curve[i][key] for curve in curves] for i in range(length)]
            style = "--" if METHODS[method].trainer_class in (GRPOTrainer, RLOOTrainer) else "-"
            axis.plot(x, [statistics.mean(v) for v in values], style, color=color, label=method, linewidth=1.6)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12)
        axis.set_title(name)
        axis.set_xlabel("thousand tokens sampled")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center", ncols=2, fontsize=11)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/compare", help="where models, runs, tables and pictures go")
    parser.add_argument("--tasks", nargs="+", choices=list(METHODS_OF_TASK), default=list(METHODS_OF_TASK))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="only these")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method, after tuning")
    parser.add_argument("--budget", type=int, default=24_000, help="tokens that a run samples")
    parser.add_argument("--corpus_size", type=int, metavar="N", help="how many reviews the language model learns from")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, of one thread each")
    args = parser.parse_args()
    if min(args.seeds, args.budget, args.jobs) < 1:
        parser.error("--seeds, --budget and --jobs must be at least 1.")
    return args


def main() -> None:
    args = parse_args()
    quiet()
    Stage.prepare(args.output_dir, args.corpus_size)
    for task in args.tasks:
        names = [name for name in METHODS_OF_TASK[task] if args.methods is None or name in args.methods]
        if not names:
            sys.exit(f"error: none of --methods is compared on {task}, only {', '.join(METHODS_OF_TASK[task])}.")

        def job(name, setting, seed, task=task):
            return Job(args.output_dir, task, name, setting, seed, args.budget, args.corpus_size)

        tuning = {name: [job(name, s, TUNING_SEED) for s in METHODS[name].settings] for name in names}
        perform_all([job for jobs in tuning.values() for job in jobs], args.jobs, f"{task}: settings")
        best = {name: max(jobs, key=lambda job: final(job.result())).setting for name, jobs in tuning.items()}
        jobs_of = {name: [job(name, best[name], seed) for seed in range(args.seeds)] for name in names}
        perform_all([job for jobs in jobs_of.values() for job in jobs], args.jobs, f"{task}: seeds")
        text = table(jobs_of)
        Path(args.output_dir, f"{task}.md").write_text(text + "\n", encoding="utf-8")
        plot(jobs_of, f"{task}: {args.seeds} seeds, {args.budget} tokens", Path(args.output_dir, f"{task}.png"))
        print(f"\n{task}\n\n{text}\n\nCurves: {args.output_dir}/{task}.png")


if __name__ == "__main__":
    main()
