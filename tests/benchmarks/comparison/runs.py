"""Runs: a method is trained on a task until its tokens are spent, and measured on the way."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from .methods import GROUP_SIZE, METHODS
from .tasks import TASKS
from .tasks.base import Places, Recorder, Start


@dataclass(frozen=True)
class Job:
    """
    A run, and the place of its result.

    Args:
        task (`str`): The name of a task.
        method (`str`): The name of a method.
        learning_rate (`float`): The policy's.
        seed (`int`): The seed of start, prompts and samples.
        budget (`int`): Tokens to sample.
        options (`tuple[tuple[str, object], ...]`): What is set otherwise than in the study, by name.
    """

    task: str
    method: str
    learning_rate: float
    seed: int
    budget: int
    options: tuple[tuple[str, object], ...] = ()

    def file(self, output_dir: str) -> Path:
        options = [f"{name}={value}".replace("/", "-") for name, value in self.options]
        parts = [self.task, self.method, f"{self.learning_rate:g}", str(self.seed), str(self.budget), *options]
        return Path(output_dir, "runs", "_".join(parts) + ".json")

    def result(self, output_dir: str) -> dict:
        """Returns what [`run`] left: the job's own fields, `points` and `cpu_seconds`."""
        return json.loads(self.file(output_dir).read_text(encoding="utf-8"))


class Evaluations(TrainerCallback):
    """A callback that measures the policy now and then, and ends the run when its tokens are spent."""

    def __init__(self, start: Start, recorder: Recorder, budget: int, num_evaluations: int, updates_per_rollout: int):
        self.start, self.recorder, self.budget = start, recorder, budget
        self.num_evaluations, self.updates_per_rollout = num_evaluations, updates_per_rollout

    def evaluate(self, model) -> None:
        self.recorder.points.append({"tokens": self.recorder.tokens, **self.start.measure(model)})

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.num_evaluations > 0:
            self.evaluate(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.updates_per_rollout != 0:
            return
        is_over = self.recorder.tokens >= self.budget or control.should_training_stop
        due = len(self.recorder.points) * self.budget / max(self.num_evaluations, 1)
        if self.num_evaluations > 0 and (is_over or self.recorder.tokens >= due):
            self.evaluate(model)
        control.should_training_stop = is_over


def arguments(job: Job, output_dir: str) -> dict:
    """Returns what the study sets for the job's method, of the names of its configuration."""
    task, method = TASKS[job.task], METHODS[job.method]
    num_generations = GROUP_SIZE if method.compares_groups else task.num_generations
    given = {
        "learning_rate": job.learning_rate,
        "per_device_train_batch_size": task.rollout_size,
        "steps_per_generation": 1,
        "num_generations": num_generations,
        "max_completion_length": task.max_completion_length,
        method.kl_option: task.kl_price,
        **method.overrides,
        **dict(job.options),
    }
    # Minibatches are parts of a rollout, whose size is the task's
    given["per_device_train_batch_size"] //= given["steps_per_generation"]
    return given | {
        "output_dir": str(Path(output_dir, "scratch")),
        "seed": job.seed,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }


def train(job: Job, places: Places) -> list[dict]:
    """Trains, and returns the learning curve."""
    task, method = TASKS[job.task], METHODS[job.method]
    start = task.begin(places, job.seed, not method.compares_groups)
    recorder = Recorder(start.objective)
    settings = arguments(job, places.output_dir)
    config = method.config_class(**settings, reward_weights=[1.0] * len(start.rewards) + [0.0])
    updates = config.num_iterations * config.steps_per_generation
    config.max_steps = task.max_rollouts * updates
    trainer = method.trainer_class(
        model=start.model,
        reward_funcs=[*start.rewards, recorder],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": start.prompts}),
        processing_class=start.tokenizer,
        peft_config=start.peft_config,
        callbacks=[Evaluations(start, recorder, job.budget, task.num_evaluations, updates)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return recorder.points


def run(job: Job, places: Places) -> None:
    """Trains, and leaves the learning curve in the job's file."""
    before = time.process_time()
    points = train(job, places)
    file = job.file(places.output_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    content = {**asdict(job), "cpu_seconds": round(time.process_time() - before, 1), "points": points}
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.rename(file)
