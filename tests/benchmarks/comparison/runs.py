"""Runs: a method is trained with a setting until its tokens are spent, and measured on the way."""

from collections.abc import Callable

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from film_reviews.measures import load
from film_reviews.training import common_settings
from trl_ext import CompletionSampler, ReinforceConfig, keep_best

from .methods import METHODS, Setting
from .tasks import Counter, Stage, dense_praise, ends, evaluate, praise


NUM_EVALUATIONS = 8  # of a run


class Curve(TrainerCallback):
    """A callback that measures the policy now and then, and ends the run when its tokens are spent."""

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
    """Trains, and returns the learning curve."""
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
    """Trains by best-of-n, in rounds that sample as many tokens as the others do between two measurements."""
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
