"""
Two tasks on a real language model, SmolLM2-135M-Instruct with LoRA:

- `smollm2-reviews`: it goes on from the first words of negative film reviews, and a model of sentiment pays its logit of
  the whole; another one judges openings that were held out;
- `smollm2-sums`: it adds or subtracts two numbers of one digit (`chain_sum` of reasoning-gym), after two examples.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from film_reviews.files import opening
from film_reviews.samples import Samples, sample, token_logps

from .base import Places, Start, Task
from .sentiment import parts, sentiment_judge, sentiment_reward, train_head


LEARNING_RATE = 3e-4  # usual for LoRA, and not tuned
ROLLOUT_SIZE, NUM_ROLLOUTS = 32, 30
REVIEW_LENGTH, SUM_LENGTH, USUAL_SUM_LENGTH = 24, 8, 5
NUM_JUDGED = 100
NUM_PROBLEMS = 2000


def start_of(places: Places, seed: int, **settings) -> Start:
    """Returns SmolLM2 with an adapter to train, whose weights the seed draws."""
    model = AutoModelForCausalLM.from_pretrained(places.smollm2, dtype=torch.float32)
    start = Start(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(places.smollm2),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        **settings,
    )
    set_seed(seed)
    return start


# --- Reviews ---


def head_of(places: Places) -> Path:
    return Path(places.output_dir, "sentiment.pt")


def prepare_reviews(places: Places) -> None:
    if not head_of(places).is_file():
        train_head(places.data, head_of(places))


def openings(rows: list[dict]) -> list[str]:
    """Returns the first words of the negative reviews, each once."""
    return list(dict.fromkeys(opening(row["text"]) for row in rows if row["label"] == 0))


def begin_reviews(places: Places, seed: int, is_dense: bool) -> Start:
    reward_of, judge_of = sentiment_reward(head_of(places)), sentiment_judge(places.data)
    rows = parts(places.data)
    held_out = openings(rows["test"])[:NUM_JUDGED]

    def sentiment(prompts, completions, **columns):
        return reward_of([prompt + text for prompt, text in zip(prompts, completions, strict=True)])

    def measure(model):
        samples = drawn(model, start.tokenizer, held_out)
        texts = [prompt + text for prompt, text in zip(samples.prompts, samples.completions, strict=True)]
        judged = judge_of(texts)
        return {
            "objective": sum(judged) / len(judged),
            "positive": sum(logit > 0 for logit in judged) / len(judged),
            "reward": sum(reward_of(texts)) / len(texts),
            "perplexity": perplexity(model, samples),
            "length": samples.completion_mask.sum().item() / len(texts),
        }

    start = start_of(places, seed, prompts=openings(rows["models"]), rewards=[sentiment], measure=measure)
    return start


def drawn(model, tokenizer, prompts: list[str]) -> Samples:
    """Samples with the same random numbers each time."""
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = sample(model, tokenizer, prompts, REVIEW_LENGTH, temperature=1.0)
    model.train(was_training)
    return samples


def perplexity(model, samples: Samples) -> float:
    """Returns the perplexity of completions under the model without its adapter."""
    was_training = model.training
    model.eval()
    names, size = ("input_ids", "attention_mask", "completion_mask"), 20  # 49,152 logits a token are held at once
    logp = 0.0
    with model.disable_adapter():
        for tensors in zip(*(getattr(samples, name).split(size) for name in names), strict=True):
            part = replace(samples, **dict(zip(names, tensors, strict=True)))
            logp += token_logps(model, part, temperature=1.0).sum().item()
    model.train(was_training)
    return math.exp(-logp / samples.completion_mask.sum().item())


# --- Sums ---


def problems() -> list[dict]:
    """Returns `question` and `answer` of sums and differences of two digits."""
    try:
        import reasoning_gym
    except ImportError:
        raise SystemExit("error: smollm2-sums needs: pip install reasoning-gym") from None
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    return list(reasoning_gym.create_dataset("chain_sum", size=NUM_PROBLEMS, seed=0, **digits))


def is_right(completion: str, answer: str) -> bool:
    """Returns True if the completion begins with the number that is asked for."""
    number = re.match(r"\s*(-?\d+)", completion)
    return number is not None and int(number[1]) == int(answer)


def begin_sums(places: Places, seed: int, is_dense: bool) -> Start:
    first, second, *others = problems()
    examples = "".join(f"{problem['question']} {problem['answer']}\n" for problem in (first, second))
    answers = {examples + problem["question"]: problem["answer"] for problem in others}

    def objective(prompts, completions, completion_ids):
        return [float(is_right(text, answers[p])) for p, text in zip(prompts, completions, strict=True)]

    def right(prompts, completions, completion_ids, **columns):
        return objective(prompts, completions, completion_ids)

    return start_of(places, seed, prompts=list(answers), rewards=[right], objective=objective)


def smollm2(name: str, begin: Callable, length: int, usual_length: int, **settings) -> Task:
    return Task(
        name,
        begin,
        max_completion_length=length,
        budget=NUM_ROLLOUTS * ROLLOUT_SIZE * usual_length,
        max_rollouts=2 * NUM_ROLLOUTS,
        rollout_size=ROLLOUT_SIZE,
        learning_rate=LEARNING_RATE,
        num_seeds=2,
        **settings,
    )
