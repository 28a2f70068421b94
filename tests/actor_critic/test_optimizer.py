"""The critic in the optimizer: learning rates around its warm-up, and norms that are clipped apart."""

import pytest
import torch
from helpers import build_policy, by_length, settings
from transformers import TrainerCallback

from trl_ext import A2CConfig, A2CTrainer, PPOConfig, PPOTrainer


class Rates(TrainerCallback):
    """Keeps the learning rates of each update, of the policy and of the critic's groups."""

    def __init__(self, trainer):
        self.critics = {id(p) for p in trainer.critic.own_parameters()}
        self.of_policy, self.of_critic = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        rates = {True: set(), False: set()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                rates[id(parameter) in self.critics].add(group["lr"])
        self.of_policy.append(*rates[False])
        self.of_critic.append(*rates[True])


def rates_of(policy, tokenizer, prompts, tmp_path, optimizers=(None, None), resume=None, **overrides):
    args = A2CConfig(**settings(tmp_path, **{"learning_rate": 0.008, "critic_learning_rate": 0.02} | overrides))
    trainer = A2CTrainer(policy, by_length, args, prompts, processing_class=tokenizer, optimizers=optimizers)
    rates = Rates(trainer)
    trainer.add_callback(rates)
    trainer.train(resume)
    return rates, trainer


# --- Learning rates ---

# By hand: two steps of warm-up and five of training, of which two go up, to the whole rate, and three down, to 0
LINEAR = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 7, "critic_warmup_steps": 2}
RISE_AND_FALL = [0, 1 / 2, 1, 2 / 3, 1 / 3]


def test_the_schedule_begins_at_the_policys_first_update(policy, tokenizer, prompts, tmp_path):
    rates, trainer = rates_of(policy, tokenizer, prompts, tmp_path, **LINEAR)
    assert rates.of_policy == pytest.approx([0.008 * x for x in [0, 0, *RISE_AND_FALL]])
    assert rates.of_critic == pytest.approx([0.02 * x for x in [1, 1, *RISE_AND_FALL]])
    assert [logs["learning_rate"] for logs in trainer.state.log_history[:-1]] == rates.of_policy


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "cosine", "polynomial", "inverse_sqrt"])
def test_a_warmup_only_moves_the_policys_schedule(tokenizer, prompts, tmp_path, name):
    """It is that of a training without the critic's warm-up, as long as what is left of this one."""
    common = {"lr_scheduler_type": name, "warmup_steps": 0.5}  # a share of the steps
    whole, _ = rates_of(build_policy(tokenizer), tokenizer, prompts, tmp_path, max_steps=4, **common)
    moved, _ = rates_of(
        build_policy(tokenizer), tokenizer, prompts, tmp_path, max_steps=6, critic_warmup_steps=2, **common
    )
    assert moved.of_policy == [0, 0, *whole.of_policy] and moved.of_critic == [0.02, 0.02, *whole.of_critic]


def test_rates_go_on_where_they_were(policy_path, tokenizer, prompts, tmp_path):
    """From within the warm-up; and a training that is begun anew by the same trainer begins with it, too."""
    run = tokenizer, prompts, tmp_path
    whole, _ = rates_of(policy_path, *run, save_strategy="steps", save_steps=1, **LINEAR)
    resumed, trainer = rates_of(policy_path, *run, resume=str(tmp_path / "checkpoint-1"), **LINEAR)
    assert resumed.of_policy == whole.of_policy[1:] and resumed.of_critic == whole.of_critic[1:]
    trainer.add_callback(rates := Rates(trainer))
    trainer.train()
    assert rates.of_policy == whole.of_policy and rates.of_critic == whole.of_critic


def test_a_critic_in_a_users_group_learns_in_its_warmup(policy, tokenizer, prompts, tmp_path, caplog):
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
    rates, _ = rates_of(policy, tokenizer, prompts, tmp_path, (optimizer, None), **LINEAR)
    assert rates.of_critic == pytest.approx([0.3 * x for x in [1, 1, *RISE_AND_FALL]])
    assert "critic_warmup_steps" not in caplog.text


def test_a_schedule_that_cannot_be_moved_is_named(policy, tokenizer, prompts, tmp_path, caplog):
    args = A2CConfig(**settings(tmp_path, critic_warmup_steps=1, lr_scheduler_type="greedy", eval_strategy="steps"))
    A2CTrainer(policy, by_length, args, prompts, eval_dataset=prompts, processing_class=tokenizer)
    assert "`lr_scheduler_type='greedy'` is left as it is" in caplog.text
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.3)
    own = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates, _ = rates_of(policy, tokenizer, prompts, tmp_path, (optimizer, own), critic_warmup_steps=1, max_steps=3)
    assert "the scheduler in `optimizers` is left as it is" in caplog.text
    assert rates.of_policy == [0.3, 0.15, 0.075]


# --- Norms ---

# Four updates on the one rollout, whose advantages are those of a critic that says 0
CLIPPED = {"max_grad_norm": 0.01, "num_iterations": 4, "max_steps": 4, "optim": "sgd", "learning_rate": 10.0}


def trained(tokenizer, prompts, tmp_path, **overrides):
    """Weights of policy and critic, and what was logged."""
    args = PPOConfig(**settings(tmp_path, **CLIPPED | overrides))
    trainer = PPOTrainer(build_policy(tokenizer), by_length, args, prompts, processing_class=tokenizer)
    trainer.train()
    weights = {True: {}, False: {}}
    for name, weight in trainer.model.named_parameters():
        weights[name.startswith("critic.")][name] = weight
    return weights[False], weights[True], trainer.state.log_history[:-1]


@pytest.mark.parametrize("critic", [{"critic_detach": True}, {"critic": "separate"}])
def test_a_critic_without_a_part_in_the_policy_does_not_scale_its_steps(tokenizer, prompts, tmp_path, critic):
    """SGD, not Adam, which would divide most of a scale out again."""
    first = trained(tokenizer, prompts, tmp_path, vf_coef=0.1, **critic)
    for overrides in ({"vf_coef": 50.0}, {"critic_learning_rate": 1.0}):
        other = trained(tokenizer, prompts, tmp_path, **{"vf_coef": 0.1} | overrides | critic)
        assert all(torch.equal(weight, other[0][name]) for name, weight in first[0].items())
        assert not all(torch.equal(weight, other[1][name]) for name, weight in first[1].items())
    start = dict(build_policy(tokenizer).named_parameters())
    assert not any(torch.equal(weight, start[name]) for name, weight in first[0].items())


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.0])
def test_norms_are_those_of_the_gradients_before_and_after_clipping(tokenizer, prompts, tmp_path, max_grad_norm):
    """With SGD the first step from a known start is the rate times the clipped gradient; 0 clips nothing."""
    rates = {"learning_rate": 0.5, "critic_learning_rate": 0.25, "max_steps": 1}
    start = dict(build_policy(tokenizer).named_parameters())
    policy, critic, (logs,) = trained(tokenizer, prompts, tmp_path, max_grad_norm=max_grad_norm, **rates)
    for weights, rate, name in ((policy, 0.5, "grad_norm"), (critic, 0.25, "critic/grad_norm")):
        moved = torch.stack([(w - start[n] if n in start else w).norm() for n, w in weights.items()]).norm().item()
        expected = min(logs[name], max_grad_norm) if max_grad_norm else logs[name]
        assert moved / rate == pytest.approx(expected, rel=1e-3), name
        assert logs[name] > 0.01


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.0])
def test_norms_are_of_gradients_without_the_scale_of_half_precision(tokenizer, prompts, tmp_path, max_grad_norm):
    """The scaler takes it off when it is asked for the first time, and then no more."""
    logs = []
    for scale in (1.0, 1024.0):
        args = PPOConfig(
            **settings(tmp_path, **CLIPPED | {"max_grad_norm": max_grad_norm, "max_steps": 1, "fp16": True})
        )
        trainer = PPOTrainer(build_policy(tokenizer), by_length, args, prompts, processing_class=tokenizer)
        trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu", scale), True
        trainer.train()
        logs += [trainer.state.log_history[0]]
    for name in ("grad_norm", "critic/grad_norm"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4)
