"""Texts, prompts, judge and sizes of the quickstart: by the grammar, or of somebody's own reviews."""

import random
import sys
from dataclasses import dataclass

from .corpus import distinct_openings, write_continuation
from .files import MAX_WORDS, columns, opening, read_reviews, shortened
from .judges import Judge, learned_judge, lexicon_judge


NEGATIVE_SHARE = 0.8  # of the prompts that are ranked and trained on; those of the evaluation are all negative
MIN_PROMPTS = 128  # one rollout


@dataclass
class Task:
    """Reviews, openings and a judge, and how large things are made for them."""

    source: str
    judge: Judge
    texts: list[str]  # for the tokenizer and the language model
    train_prompts: list[str]  # openings of `texts`, mostly negative
    test_prompts: list[str]  # negative openings that no model has seen

    vocab_size: int
    hidden_size: int
    num_layers: int
    sft_epochs: int
    max_completion_length: int
    temperature: float  # of all sampling; what it samples from is what is trained and measured
    ranked_prompts: int
    rollouts: int
    kl_in_reward: float  # what a nat away from the language model costs, in units of the reward model's scores

    def __post_init__(self):
        if len(self.train_prompts) < MIN_PROMPTS:
            raise ValueError(
                f"{self.source} give {len(self.train_prompts)} different openings to train on, and PPO samples "
                f"{MIN_PROMPTS} at a time. Use more reviews."
            )


def mixed(negative: list[str], positive: list[str], rng: random.Random) -> list[str]:
    """Returns all negative prompts and as many positive ones as `NEGATIVE_SHARE` leaves room for, shuffled."""
    prompts = negative + positive[: round(len(negative) * (1 / NEGATIVE_SHARE - 1))]
    rng.shuffle(prompts)
    return prompts


def get_task(reviews: str | None, corpus_size: int | None, rollouts: int | None, seed: int) -> Task:
    """Returns the task of a file of reviews, or without one that of the grammar; ends the program for a bad file."""
    try:
        if reviews is None:
            return grammar_task(corpus_size, rollouts, seed)
        return reviews_task(reviews, corpus_size, rollouts, seed)
    except ValueError as error:
        sys.exit(f"error: {error}")


def grammar_task(corpus_size: int | None, rollouts: int | None, seed: int) -> Task:
    """Returns reviews written by the grammar, judged by a word list."""
    corpus_size = corpus_size or 5000
    rng = random.Random(seed)
    num_test = min(200, corpus_size // 4)
    negative = distinct_openings(0, corpus_size // 2 + num_test, rng)
    positive = distinct_openings(1, corpus_size // 2, rng)
    test_prompts, negative = negative[:num_test], negative[num_test:]
    texts = [opening + write_continuation(0, rng) for opening in negative]
    texts += [opening + write_continuation(1, rng) for opening in positive]
    return Task(
        source=f"{len(texts)} film reviews written by the grammar in film_reviews/corpus.py",
        judge=lexicon_judge(),
        texts=texts,
        train_prompts=mixed(negative, positive, rng),
        test_prompts=test_prompts,
        vocab_size=1400,
        hidden_size=96,
        num_layers=2,
        sft_epochs=4,
        max_completion_length=48,
        temperature=1.0,
        ranked_prompts=min(1000, corpus_size // 4),
        rollouts=rollouts or 24,
        kl_in_reward=0.2,
    )


def reviews_task(path: str, corpus_size: int | None, rollouts: int | None, seed: int) -> Task:
    """
    Returns reviews from a file, with a judge learned on a part of them that is used for nothing else.

    Rows held out by `split` (or, without one, a tenth of the rows) check the judge and give the test prompts.
    """
    rng = random.Random(seed)
    rows = read_reviews(path)
    rng.shuffle(rows)
    held_out = [row for row in rows if row["split"] == "test"]
    of_judge = [row for row in rows if row["split"] == "judge"]
    of_models = [row for row in rows if row["split"] == "models"][:corpus_size]
    for name, part in (("held-out", held_out), ("judge's", of_judge), ("models'", of_models)):
        if len({row["label"] for row in part}) < 2:
            raise ValueError(
                f"{path}: the {name} part ({len(part)} of {len(rows)} rows) needs reviews with label 0 and with "
                "label 1. Give more reviews, or set the `split` column so that each part has both."
            )
    judge = learned_judge(*columns(of_judge), *columns(held_out))
    texts = [text for row in of_models if (text := shortened(row["text"]))]
    if not texts:
        raise ValueError(f"{path}: no review has a sentence end ('.', '!' or '?') in its first {MAX_WORDS} words.")
    negative, positive = ([opening(row["text"]) for row in of_models if row["label"] == label] for label in (0, 1))
    test_prompts = list(dict.fromkeys(opening(row["text"]) for row in held_out if row["label"] == 0))
    return Task(
        source=f"{len(texts)} of the {len(rows)} reviews in {path}",
        judge=judge,
        texts=texts,
        train_prompts=mixed(list(dict.fromkeys(negative)), list(dict.fromkeys(positive)), rng),
        test_prompts=test_prompts[:400],
        vocab_size=4000,
        hidden_size=192,
        num_layers=3,
        sft_epochs=3,
        max_completion_length=40,
        temperature=0.7,  # so small a model of so few texts makes up many words otherwise
        ranked_prompts=min(4000, len(texts) // 4),
        rollouts=rollouts or 40,
        kl_in_reward=0.1,
    )
