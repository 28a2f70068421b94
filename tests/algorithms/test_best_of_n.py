"""Sampling, filtering, and what the best of n is."""

import json
import math
import random

import pytest
import torch
from datasets import Dataset
from helpers import settings

from trl_ext import CompletionSampler, ReinforceConfig, keep_best


def sampler_of(policy_path, prompts, tmp_path, reward_funcs, num_generations=4, **kwargs):
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_generations": num_generations}
    args = ReinforceConfig(**settings(tmp_path, **sizes, num_generations_eval=num_generations, **kwargs))
    return CompletionSampler(policy_path, reward_funcs, args, prompts)


def test_each_prompt_has_n_scored_completions(policy_path, reward_model_path, chats, tmp_path):
    def length(completions, column, **kwargs):
        return [
            None if value == 2 else float(len(c[0]["content"])) for c, value in zip(completions, column, strict=True)
        ]

    def nothing(completions, column, **kwargs):
        return [None if value == 2 else 1.0 for value in column]

    prompts = chats.add_column("column", list(range(len(chats))))
    sampler = sampler_of(policy_path, prompts, tmp_path, [length, nothing], reward_weights=[2.0, 0.5])
    samples = sampler.sample(prompts.select(range(5)))
    assert samples["prompt_index"] == [i for i in range(5) for _ in range(4)]
    assert samples["prompt"] == [prompts[i]["prompt"] for i in range(5) for _ in range(4)]
    assert len({json.dumps(c) for c in samples["completion"]}) > 10  # and they are samples
    for row in samples:
        if row["prompt_index"] == 2:
            assert row["score"] is row["reward/length"] is None
        else:
            expected = len(row["completion"][0]["content"])
            assert row["reward/length"] == expected and row["score"] == pytest.approx(2 * expected + 0.5)
    assert "eval_reward" in sampler.evaluate(prompts.select(range(2)))
    with_model = sampler_of(policy_path, prompts, tmp_path, reward_model_path).sample(prompts.select(range(2)))
    assert len(set(with_model["score"])) > 1


def test_samples_can_be_sampled_from_again(policy_path, prompts, tmp_path):
    """Their own `prompt_index` goes to the reward functions, and what is returned counts the rows that were given."""
    seen = []

    def constant(completions, prompt_index=None, **kwargs):
        seen.append(prompt_index)
        return [1.0] * len(completions)

    sampler = sampler_of(policy_path, prompts, tmp_path, constant, num_generations=2)
    first = sampler.sample(prompts.select([3, 1]))
    second = sampler.sample(first)
    assert first["prompt_index"] == [0, 0, 1, 1] and second["prompt_index"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert second["prompt"] == [first[i]["prompt"] for i in second["prompt_index"]]
    assert (
        second.column_names == first.column_names and seen[0] is None and sorted(seen[1]) == sorted([0, 0, 1, 1] * 2)
    )


def samples_of(scores, completions=None):
    rows = [(i, n) for i, group in enumerate(scores) for n in range(len(group))]
    return Dataset.from_dict(
        {
            "prompt_index": [i for i, _ in rows],
            "prompt": [f"prompt {i}" for i, _ in rows],
            "completion": [completions[i][n] if completions else f"{i} {n}" for i, n in rows],
            "score": [scores[i][n] for i, n in rows],
        }
    )


def test_the_best_are_kept():
    samples = samples_of([[1.0, 3.0, 2.0], [None, 0.5, 0.7], [None, None, None]])
    assert keep_best(samples)["completion"] == ["0 1", "1 2"]
    assert keep_best(samples, num_kept=2)["completion"] == ["0 1", "0 2", "1 2", "1 1"]
    assert keep_best(samples, num_kept=None, threshold=0.7)["completion"] == ["0 1", "0 2", "0 0", "1 2"]
    assert keep_best(samples, threshold=1.5)["completion"] == ["0 1"]
    assert (
        keep_best(samples_of([[1.0, 3.0]]).with_format("torch")).to_list()
        == keep_best(samples_of([[1.0, 3.0]])).to_list()
    )
    same = samples_of([[1.0, 1.0, 0.0]], [["a", "a", "b"]])
    assert keep_best(same, num_kept=2)["completion"] == ["a"]
    with pytest.raises(
        ValueError, match=r"No completion reaches `threshold=4`; the best has a score of 3.0. Lower it"
    ):
        keep_best(samples, threshold=4)


def test_the_best_of_n_is_as_far_from_the_policy_as_theory_says():
    """log n - (n - 1) / n nats, and its mean the (n / (n + 1))-quantile of uniform scores."""
    draw, n, num_prompts, num_bins = random.Random(0), 4, 20000, 20
    kept = keep_best(samples_of([[draw.random() for _ in range(n)] for _ in range(num_prompts)]))["score"]
    assert sum(kept) / len(kept) == pytest.approx(n / (n + 1), abs=0.005)
    shares = torch.histc(torch.tensor(kept), num_bins, 0, 1) / num_prompts
    kl = sum(p * math.log(p * num_bins) for p in shares.tolist() if p)
    assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=0.02)
