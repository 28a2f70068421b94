"""Results depend neither on how the batch is accumulated nor on padding."""

import pytest
import torch
from helpers import build_policy, count_good, recorded, scripted_rollout, settings
from peft import LoraConfig

from trl_ext import (
    A2CConfig,
    A2CTrainer,
)
from trl_ext.algorithms import ALGORITHMS


def trained(trainer_class, args, tokenizer, prompts, rollout_func=None):
    torch.manual_seed(0)
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = trainer_class(
        build_policy(tokenizer),
        count_good,
        args,
        prompts,
        processing_class=tokenizer,
        rollout_func=rollout_func,
        peft_config=peft_config if args.critic == "adapter" or args.kl_in_reward else None,
    )
    trainer.train()
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


# The critic begins at the mean return: its bias's first gradient is rounding, of which Adam would make much
ADAM_EPSILON = 1e-4
CASES = [
    ("ppo", {"num_iterations": 2}),
    ("ppo", {"num_iterations": 1}),  # the baseline spans micro-batches: a scoring pass of our own
    ("a2c", {}),
    ("a2c", {"num_generations": 2}),  # groups, of which a micro-batch holds parts
    ("reinforce", {}),
    ("reinforce", {"baseline": "batch_mean", "kl_in_reward": 0.1}),  # its mean spans micro-batches, too
    ("a2c", {"loss_type": "grpo", "critic": "separate"}),
    ("q_actor_critic", {"q_rank": 4}),
    ("q_actor_critic", {"q_rank": 4, "policy_gradient": "all_actions", "num_iterations": 2}),
    ("ppo", {"num_iterations": 2, "critic": "adapter", "gradient_checkpointing": True}),
]


@pytest.mark.parametrize("algorithm, overrides", CASES)
def test_accumulation_equals_batch_size(tokenizer, prompts, tmp_path, algorithm, overrides):
    config_class, trainer_class = ALGORITHMS[algorithm]
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        args = config_class(
            **settings(
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=4,
                adam_epsilon=ADAM_EPSILON,
                **overrides,
            )
        )
        results.append(trained(trainer_class, args, tokenizer, prompts))
    for other in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(weight, other[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("algorithm, overrides", CASES)
def test_padding_changes_nothing(tokenizer, prompts, tmp_path, algorithm, overrides):
    config_class, trainer_class = ALGORITHMS[algorithm]
    results = []
    for multiple in (None, 16):
        truncation = "penalty" if algorithm == "reinforce" else "bootstrap"  # which takes a critic
        args = config_class(
            **settings(tmp_path, pad_to_multiple_of=multiple, max_steps=4, truncation=truncation, **overrides),
            adam_epsilon=ADAM_EPSILON,
        )
        results.append(trained(trainer_class, args, tokenizer, prompts, scripted_rollout))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_advantages_from_the_training_forward_equal_those_of_a_pass(tokenizer, prompts, tmp_path):
    """One on-policy update needs no scoring pass; making one anyway must change nothing."""

    class WithPass(A2CTrainer):
        _has_batch_statistics = True

    results, passes = [], []
    for trainer_class in (A2CTrainer, WithPass):
        args = A2CConfig(
            **settings(tmp_path, gradient_accumulation_steps=2, max_steps=3, gate_critic=False, scale_advantages=False)
        )
        trainer = recorded(trainer_class)(
            build_policy(tokenizer), count_good, args, prompts, processing_class=tokenizer
        )
        trainer.train()
        results.append({name: p.detach() for name, p in trainer.model.named_parameters()})
        passes.append([batch["advantages"] is not None for batch in trainer.rollouts])
    assert passes == [[False] * 3, [True] * 3]
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], atol=1e-5, rtol=1e-4)
