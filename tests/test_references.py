"""What the KL penalty is measured to: the policy as it was given, and what `sync_ref_model` makes of it."""

import pytest
import torch
from conftest import count_good, ranking_settings, settings
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SyncRefModelCallback

from trl_ext import PPOConfig, PPOTrainer, RankingDPOConfig, RankingDPOTrainer


class Snapshots(TrainerCallback):
    """Keeps the parameters of the model after each step, its children of our own aside."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        own = ("critic.", "tie_parameters.")
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith(own)})


def ppo_trainer(tmp_path, policy_path, prompts, callbacks, **overrides):
    common = {"kl_in_reward": 0.1, "num_iterations": 1, "max_steps": 4}
    return PPOTrainer(
        policy_path, count_good, PPOConfig(**settings(tmp_path, **common | overrides)), prompts, callbacks=callbacks
    )


def dpo_trainer(tmp_path, policy_path, rankings, callbacks, **overrides):
    args = RankingDPOConfig(**ranking_settings(tmp_path, max_steps=4, ranking_model="davidson", **overrides))
    return RankingDPOTrainer(policy_path, args=args, train_dataset=rankings, callbacks=callbacks)


@pytest.mark.parametrize("by", ["argument", "callback"])
@pytest.mark.parametrize("kind", ["shared", "separate", "ties"])
def test_the_reference_follows_the_policy_alone(policy_path, prompts, rankings, tmp_path, kind, by):
    """Every second step it moves by 0.6 of the way to the policy, which has a child that the reference has not."""
    snapshots = Snapshots()
    following = {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6, "sync_ref_model": by == "argument"}
    if kind == "ties":
        trainer = dpo_trainer(tmp_path, policy_path, rankings, [snapshots], **following)
    else:
        trainer = ppo_trainer(tmp_path, policy_path, prompts, [snapshots], critic=kind, **following)
    if by == "callback":
        trainer.add_callback(SyncRefModelCallback(trainer.ref_model, trainer.accelerator))
    expected = {name: p.detach().clone() for name, p in trainer.ref_model.named_parameters()}
    trainer.train()
    for step in (1, 3):
        expected = {name: 0.4 * p + 0.6 * snapshots.steps[step][name] for name, p in expected.items()}
    reference = dict(trainer.ref_model.named_parameters())
    torch.testing.assert_close(reference, expected, atol=1e-6, rtol=1e-5)
    child = "tie_parameters" if kind == "ties" else "critic"
    assert child in dict(trainer.model.named_children())
    assert not all(torch.equal(p, q) for p, q in zip(expected.values(), snapshots.steps[-1].values(), strict=True))


def test_an_adapters_reference_has_nothing_to_follow(policy_path, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, kl_in_reward=0.1, sync_ref_model=True))
    with pytest.raises(NotImplementedError, match="Use `sync_ref_model=False`"):
        PPOTrainer(policy_path, count_good, args, prompts, peft_config=LoraConfig(target_modules=["q_proj"]))
