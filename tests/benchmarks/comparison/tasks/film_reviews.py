"""
The tasks `reviews` and `words`: the quickstart's language model goes on from openings of film reviews.

- `reviews`: the reward model's score at the end, as in the quickstart;
- `words`: one point for each word of praise and minus one for each of blame, by the quickstart's word list, for methods
  with credit for tokens at the word.

In both a nat of KL to the language model costs `KL_PRICE` and a review that does not end costs `END_PRICE`; the
objective is the reward less these prices, on openings that were held out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from film_reviews.judges import praise_and_blame
from film_reviews.measures import load, rewards_of
from film_reviews.samples import sample, token_logps
from film_reviews.tasks import Task as Reviews
from film_reviews.tasks import get_task
from film_reviews.training import rank_samples, train_language_model, train_reward_model

from .base import Places, Start, Task


KL_PRICE = 0.2
END_PRICE = 1.0
MAX_LENGTH = 48  # the quickstart's
NUM_EVALUATED = 200


@dataclass
class Stage:
    """The start of all runs: the quickstart's openings and judge, its language model and its reward model."""

    reviews: Reviews
    paths: dict[str, str]

    @classmethod
    def prepare(cls, places: Places) -> "Stage":
        """Trains the two models, if they are not there already."""
        reviews = get_task(None, places.corpus_size, None, seed=0)
        paths = {name: f"{places.output_dir}/{name}" for name in ("sft", "reward_model")}
        if not Path(paths["reward_model"], "model.safetensors").is_file():
            tokenizer = train_language_model(reviews, paths["sft"], 0)
            train_reward_model(reviews, rank_samples(reviews, paths["sft"], tokenizer), paths, tokenizer, 0)
        return cls(reviews, paths)


def ends(eos_token_id: int) -> Callable:
    def ended(completion_ids, **columns):
        return [0.0 if ids[-1] == eos_token_id else -END_PRICE for ids in completion_ids]

    return ended


def praise(completions, **columns):
    """Rewards words of praise and blame at the end."""
    return [sum(value for *_, value in praise_and_blame(text)) for text in completions]


def dense_praise(completions, **columns):
    """Rewards words of praise and blame at the words."""
    return [[*praise_and_blame(text)] or 0.0 for text in completions]


def begin(places: Places, seed: int, is_dense: bool, counts_words: bool) -> Start:
    """Returns the language model with the openings; the seed is that of the samples alone."""
    stage = Stage.prepare(places)
    tokenizer = AutoTokenizer.from_pretrained(stage.paths["sft"])
    reference = load(AutoModelForCausalLM, stage.paths["sft"])
    reward_model = load(AutoModelForSequenceClassification, stage.paths["reward_model"])
    words = dense_praise if is_dense else praise

    def measure(model):
        return evaluate(model, stage.reviews, counts_words, reference, reward_model, tokenizer)

    return Start(
        model=stage.paths["sft"],
        tokenizer=tokenizer,
        prompts=stage.reviews.train_prompts,
        rewards=[words if counts_words else stage.paths["reward_model"], ends(tokenizer.eos_token_id)],
        measure=measure,
    )


def evaluate(model, reviews: Reviews, counts_words: bool, reference, reward_model, tokenizer) -> dict[str, float]:
    """Measures a policy on the same held-out openings and with the same random numbers each time."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prompts = reviews.test_prompts[:NUM_EVALUATED]
        samples = sample(model, tokenizer, prompts, MAX_LENGTH, reviews.temperature)
    logps, reference_logps = (token_logps(m, samples, reviews.temperature) for m in (model, reference))
    model.train(was_training)
    if counts_words:
        rewards = torch.tensor(praise(samples.completions))
    else:
        rewards = rewards_of(reward_model, tokenizer, samples)
    rewards = rewards - END_PRICE * (~samples.ended).float()
    kl = (logps - reference_logps).sum(dim=1)
    scores = reviews.judge.score(samples.completions)
    tokens = samples.completion_mask.sum().item()
    return {
        "objective": (rewards - KL_PRICE * kl).mean().item(),
        "reward": rewards.mean().item(),
        "judge": sum(scores) / len(scores),
        "KL": kl.mean().item(),
        "perplexity": math.exp(-reference_logps.sum().item() / tokens),
        "length": tokens / len(prompts),
    }


def film_reviews(name: str, counts_words: bool) -> Task:
    return Task(
        name,
        partial(begin, counts_words=counts_words),
        max_completion_length=MAX_LENGTH,
        budget=24_000,
        max_rollouts=200,
        rollout_size=32,
        kl_price=KL_PRICE,
        num_evaluations=8,
        prepare=Stage.prepare,
    )
