"""Judges that score the completions of an item: a reward model, a function, or a language model that gives grades."""

import re
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from transformers import set_seed

from shared.rewards import import_reward
from trl_ext.adapters.reward_models import RewardModel, load_reward_model
from trl_ext.data.items import Item

from .sampling import context_of, load_model, num_tokens, sample
from .text import as_text


logger = get_logger(__name__)

QUESTION = """{rubric}

Question:
{prompt}

Answer:
{completion}

Grade the answer from 1 (worst) to 10 (best). Reply with the number alone."""

Scores = list[float | None]


def reward_model_scores(path: str, prompts: list) -> Callable[[Item], Scores]:
    """
    Returns a reward model's scores: prompt and completion are read as in its training, None where they are too long.

    Args:
        path (`str`): Folder or Hub id.
        prompts (`list`): All whose completions are to be scored.
    """
    model, tokenizer = load_reward_model(path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    reward_model = RewardModel(model, tokenizer, path)
    for is_chat in {not isinstance(prompt, str) for prompt in prompts}:
        reward_model.check(is_chat)

    def score(item):
        return reward_model.score([reward_model.input_ids(item.prompt, completion) for completion in item.completions])

    return score


def function_scores(path: str) -> Callable[[Item], Scores]:
    """Returns the scores of a reward function, 'module.function', and refuses what is no score."""
    reward = import_reward(path)

    def score(item):
        scores = reward(prompts=[item.prompt] * len(item.completions), completions=item.completions)
        try:
            numbers = [None if s is None else float(s) for s in scores]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(item.completions):
            raise ValueError(
                f"{path} returned {scores!r:.80} for {len(item.completions)} completions. Return a list with a number, or "
                "None, for each."
            )
        return numbers

    return score


def grades(path: str, rubric: str) -> Callable[[Item], Scores]:
    """Returns a language model's grades, decoded greedily; None where there is none, or the question is too long."""
    model, tokenizer = load_model(path, "auto")
    greedy = {"temperature": 1e-6, "top_p": 1.0, "max_completion_length": 8}
    context = context_of(model.config)
    PartialState()  # the logger asks it which process this is

    def fits(question):
        if context is None or num_tokens(tokenizer, question) + greedy["max_completion_length"] <= context:
            return True
        logger.warning_once(
            f"{path} has a context of {context} tokens, and some questions are longer. Their answers have no grade. Rank "
            "shorter ones, or ask another model."
        )
        return False

    def score(item):
        questions = [
            QUESTION.format(rubric=rubric, prompt=as_text(item.prompt), completion=as_text(completion))
            for completion in item.completions
        ]
        if tokenizer.chat_template is not None:
            questions = [[{"role": "user", "content": question}] for question in questions]
        set_seed(0)
        fit = [fits(question) for question in questions]
        asked = [question for question, is_asked in zip(questions, fit, strict=True) if is_asked]
        replies = [as_text(reply) for (reply,) in sample(model, tokenizer, asked, 1, **greedy)] if asked else []
        numbers = (re.search(r"\b(10|[1-9])\b", reply) for reply in replies)
        given = [float(number[0]) if number else None for number in numbers]
        return [given.pop(0) if is_asked else None for is_asked in fit]

    return score
