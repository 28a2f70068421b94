"""Demonstrations and prompts: some to train on, and others that are held out."""

import json
import random
from pathlib import Path

from film_reviews.corpus import distinct_openings, write_continuation
from film_reviews.tasks import mixed


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_reviews(folder: Path, corpus_size: int, num_test: int, seed: int) -> list[str]:
    """Writes demonstrations, mostly bad openings to train on, and bad ones that are held out; returns the reviews."""
    rng = random.Random(seed)
    negative = distinct_openings(0, corpus_size // 2 + num_test, rng)
    positive = distinct_openings(1, corpus_size // 2, rng)
    held_out, negative = negative[:num_test], negative[num_test:]
    reviews = [
        (text, write_continuation(label, rng)) for label, part in enumerate((negative, positive)) for text in part
    ]
    write_rows(
        folder / "demonstrations.jsonl",
        [{"prompt": user(text), "completion": assistant(more)} for text, more in reviews],
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": user(text)} for text in mixed(negative, positive, rng)])
    write_rows(folder / "test_prompts.jsonl", [{"prompt": user(text)} for text in held_out])
    return [text + more for text, more in reviews]


def divide(prompts: list, test_prompts: list | None, num_test: int, seed: int) -> tuple[list, list]:
    """
    Returns prompts to train on, and others to be examined on.

    Raises:
        ValueError: where there are none to train on.
    """
    if test_prompts is None:
        if len(prompts) <= num_test:
            raise ValueError(
                f"--num_test {num_test} of {len(prompts)} different prompts leaves none to train on. Lower it, or give "
                "more prompts."
            )
        test_prompts = random.Random(seed).sample(prompts, num_test)
    test_prompts = test_prompts[:num_test]
    held_out = {json.dumps(prompt) for prompt in test_prompts}
    rest = [prompt for prompt in prompts if json.dumps(prompt) not in held_out]
    if not rest:
        raise ValueError("All prompts are held-out ones as well, so there are none to train on. Give others.")
    return rest, test_prompts
