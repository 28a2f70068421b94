"""The defaults, on rewards from which nothing can be learned: what is added to every reward must move no policy."""

import pytest
import torch
from helpers import build_policy, settings, variety

from trl_ext import A2CConfig, A2CTrainer
from trl_ext.algorithms import ALGORITHMS


algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def trained(algorithm, tokenizer, prompts, tmp_path, reward, **overrides):
    """The policy's weights after some updates at the defaults, by name."""
    config_class, trainer_class = ALGORITHMS[algorithm]
    batch = {"num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 8}
    args = config_class(**settings(tmp_path, **{**batch, "critic_learning_rate": None, **overrides}))
    policy = build_policy(tokenizer)
    trainer = trainer_class(policy, reward, args, prompts, processing_class=tokenizer)
    trainer.train()
    with trainer._without_companion():
        return {name: weight.detach().clone() for name, weight in policy.named_parameters()}


@algorithms
@pytest.mark.parametrize("num_generations, reward", [(1, 1.0), (4, -0.3)])
def test_the_same_reward_for_everything_moves_nothing(
    tokenizer, prompts, tmp_path, algorithm, num_generations, reward
):
    def constant(completions, **kwargs):
        return [reward] * len(completions)

    weights = trained(algorithm, tokenizer, prompts, tmp_path, constant, num_generations=num_generations)
    for name, start in build_policy(tokenizer).named_parameters():
        assert torch.equal(weights[name], start), name


@algorithms
@pytest.mark.parametrize("offset, scale", [(50.0, 1.0), (0.0, 1000.0)])
def test_neither_an_offset_nor_the_scale_of_rewards_matters(tokenizer, prompts, tmp_path, algorithm, offset, scale):
    def changed(completion_ids, **kwargs):
        return [offset + scale * reward for reward in variety(completion_ids)]

    few = {"max_steps": 3, "learning_rate": 1e-3}
    plain = trained(algorithm, tokenizer, prompts, tmp_path, variety, **few)
    other = trained(algorithm, tokenizer, prompts, tmp_path, changed, **few)
    start = dict(build_policy(tokenizer).named_parameters())
    assert any(not torch.allclose(plain[name], start[name], atol=1e-4) for name in plain)
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, atol=3e-4, rtol=0)


@algorithms
def test_a_rollout_that_nobody_scored_is_not_remembered_as_returns_of_0(tokenizer, prompts, tmp_path, algorithm):
    def unscored(completions, **kwargs):
        return [None] * len(completions)

    config_class, trainer_class = ALGORITHMS[algorithm]
    args = config_class(**settings(tmp_path, max_steps=config_class.num_iterations))
    trainer = trainer_class(build_policy(tokenizer), unscored, args, prompts, processing_class=tokenizer)
    trainer.train()
    assert trainer.baseline.means.value is None and trainer.baseline.past.moments.value is None


def test_a_rollout_that_nobody_scored_does_not_move_the_units_of_values(tokenizer, prompts, tmp_path):
    rollouts = []

    def scored_at_first(completion_ids, **kwargs):
        rollouts.append(completion_ids)
        return variety(completion_ids) if len(rollouts) == 1 else [None] * len(completion_ids)

    def units_after(max_steps):
        rollouts.clear()
        args = A2CConfig(**settings(tmp_path, max_steps=max_steps))
        trainer = A2CTrainer(build_policy(tokenizer), scored_at_first, args, prompts, processing_class=tokenizer)
        trainer.train()
        return trainer.critic.value_head.units

    assert units_after(2) == units_after(1) and units_after(1)["mean"] != 0
