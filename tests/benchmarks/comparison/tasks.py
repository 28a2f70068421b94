"""The two tasks: their models, their rewards, and the measures of a policy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from film_reviews.judges import praise_and_blame
from film_reviews.measures import rewards_of
from film_reviews.samples import sample, token_logps
from film_reviews.tasks import Task, get_task
from film_reviews.training import rank_samples, train_language_model, train_reward_model

from .methods import END_PRICE, KL_PRICE


@dataclass
class Stage:
    """The start of all runs: the quickstart's openings and judge, its language model and its reward model."""

    task: Task
    paths: dict[str, str]

    @classmethod
    def prepare(cls, output_dir: str, corpus_size: int | None = None) -> "Stage":
        """Trains the two models, if they are not there already."""
        task = get_task(None, corpus_size, None, seed=0)
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
    """Rewards words of praise and blame at the end."""
    return [sum(value for *_, value in praise_and_blame(text)) for text in completions]


def dense_praise(completions, **kwargs):
    """Rewards words of praise and blame at the words."""
    return [[*praise_and_blame(text)] or 0.0 for text in completions]


def evaluate(model, stage: Stage, task_name: str, reference, reward_model, tokenizer) -> dict[str, float]:
    """Measures a policy on the same held-out openings and with the same random numbers each time."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = stage.task.test_prompts[:200]
        samples = sample(model, tokenizer, prompts, stage.task.max_completion_length, stage.task.temperature)
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
