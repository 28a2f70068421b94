"""The KL penalty is measured to the policy as it was given, or to what `sync_ref_model` makes of it."""

import copy

import pytest
import torch
from helpers import build_policy, count_good, ranking_settings, settings, variety
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SyncRefModelCallback

from trl_ext import PPOConfig, PPOTrainer, RankingDPOConfig, RankingDPOTrainer
from trl_ext.models.reference import take_up_start


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


def changed_in_memory(tokenizer, path, how, tied=False):
    """A model that is not what lies in `path`, and its tokenizer."""
    build_policy(tokenizer, tie_word_embeddings=tied).save_pretrained(path)
    model, larger = AutoModelForCausalLM.from_pretrained(path), copy.deepcopy(tokenizer)
    if how == "resized":
        larger.add_tokens(["<new>", "<other>"])
        model.resize_token_embeddings(len(larger))
    else:
        model.load_state_dict(build_policy(tokenizer, seed=3).state_dict())
    return model, larger


@pytest.mark.parametrize("how, tied", [("resized", False), ("resized", True), ("trained", False)])
def test_the_reference_is_the_policy_as_it_was_given(tokenizer, prompts, tmp_path, how, tied):
    """The KL to it is 0 before the first update, also of tokens that are not on disk, which are all that is sampled."""
    model, larger = changed_in_memory(tokenizer, tmp_path, how, tied)
    if how == "resized":
        model.generation_config.suppress_tokens = list(range(len(tokenizer)))
    args = PPOConfig(**settings(tmp_path, kl_in_reward=0.1, num_iterations=1))
    trainer = PPOTrainer(model, variety, args, prompts, processing_class=larger)
    given = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("critic.")}
    trainer.train()
    logs = trainer.state.log_history
    assert abs(logs[0]["first_step/kl"]) < 1e-9 and logs[1]["kl/k3"] > 1e-6
    reference = dict(trainer.ref_model.named_parameters())
    assert reference.keys() == given.keys() and all(torch.equal(p, given[name]) for name, p in reference.items())


@pytest.mark.parametrize("how", ["resized", "trained"])
def test_dpos_reference_is_the_policy_as_it_was_given(tokenizer, rankings, tmp_path, how):
    """So that its first rewards are 0; a reference that was given stays as it is."""
    for others in ({}, {"ref_model": build_policy(tokenizer, seed=7)}):
        model, larger = changed_in_memory(tokenizer, tmp_path, "trained" if others else how)
        args = RankingDPOConfig(**ranking_settings(tmp_path, max_steps=1))
        trainer = RankingDPOTrainer(model, args=args, train_dataset=rankings, processing_class=larger, **others)
        trainer.train()
        assert (abs(trainer.state.log_history[0]["rewards/mean"]) < 1e-6) == (not others)


def test_a_sharded_reference_of_another_vocabulary_is_refused(tokenizer):
    policy, reference = (build_policy(tokenizer, seed=seed) for seed in (0, 1))
    take_up_start(reference, policy, is_sharded=True)
    assert not torch.equal(reference.lm_head.weight, policy.lm_head.weight)
    policy.resize_token_embeddings(len(tokenizer) + 3)
    message = (
        f"a vocabulary of {len(tokenizer) + 3} tokens, and the reference.* one of {len(tokenizer)}.*save_pretrained"
    )
    with pytest.raises(ValueError, match=message):
        take_up_start(reference, policy, is_sharded=True)
