"""Every kind of adapter under every trainer: one step, saved, loaded in a new process, merged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ranking_settings, settings
from peft import LoraConfig
from reload_script import outputs_of, quantization_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    load_critic,
    merge_adapter,
)


METHODS = ["full", "lora", "dora", "4bit", "8bit"]
CASES = [
    (what, method)
    for what in ("reward", "shared", "adapter", "separate", "dpo")
    for method in METHODS
    if (what, method) != ("adapter", "full")  # an adapter on what nobody froze
]


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trainer_of(what, method, base, prompts, rankings, folder):
    kwargs = {"quantization_config": quantization_config(method)}
    if method != "full":
        kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", use_dora=method == "dora")
    if what == "reward":
        args = RankingRewardConfig(**ranking_settings(folder, max_steps=1))
        return RankingRewardTrainer(base, args, train_dataset=rankings, **kwargs)
    if what == "dpo":
        args = RankingDPOConfig(**ranking_settings(folder, max_steps=1))
        return RankingDPOTrainer(base, args=args, train_dataset=rankings, **kwargs)
    path = base if what == "separate" and method in ("4bit", "8bit") else None
    args = A2CConfig(**settings(folder, max_steps=1, critic=what, critic_model_name_or_path=path))
    return A2CTrainer(base, length, args, prompts, **kwargs)


@pytest.fixture(scope="module")
def saved(policy_path, prompts, rankings, tmp_path_factory):
    """Folder, outputs before and after training, and names and dtypes of what trained, for every case."""
    results = {}
    for what, method in CASES:
        folder = str(tmp_path_factory.mktemp(f"{what}-{method}"))
        trainer = trainer_of(what, method, policy_path, prompts, rankings, folder)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        trainer.save_model()
        results[what, method] = {
            "folder": folder,
            "outputs": outputs_of(trainer.model, getattr(trainer, "critic", None)),
            "dtypes": {p.dtype for p in trainer.model.parameters() if p.requires_grad},
            "moved": [name for name in start if not torch.equal(start[name], trainer.model.get_parameter(name))],
            "ties": None if what != "reward" else trainer.model.config.log_tie,
        }
    return results


@pytest.fixture(scope="module")
def reloaded(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reloaded")
    cases = {f"{what}-{method}": (what, method, case["folder"]) for (what, method), case in saved.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    script = str(Path(__file__).with_name("reload_script.py"))
    run = subprocess.run(
        [sys.executable, script, str(folder / "cases.json"), str(folder / "outputs.pt")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "outputs.pt")


@pytest.mark.parametrize("what, method", CASES)
def test_a_new_process_computes_the_same(saved, reloaded, what, method):
    """To the bit, on the same processor: everything that matters was saved, in full precision."""
    before, after = saved[what, method]["outputs"], reloaded[f"{what}-{method}"]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    if "plain" in after and method != "dora":  # transformers 5.23 alone leaves DoRA's magnitudes where they began
        torch.testing.assert_close(after["plain"], before["logits"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("what, method", CASES)
def test_what_trains_is_in_full_precision_and_moves(saved, what, method):
    case = saved[what, method]
    assert case["dtypes"] == {torch.float32}
    moved = " ".join(case["moved"])
    if method != "full":
        assert "lora_B" in moved
    if method == "dora":
        assert "lora_magnitude_vector" in moved
    if what == "reward":
        assert "score" in moved and "tie_parameters.raw" in moved
    if what in ("shared", "adapter", "separate"):
        assert "critic.value_head.weight" in moved and "critic.value_head.bias" in moved


def test_a_critics_adapter_learns(policy_path, prompts, tmp_path):
    """All of it from the third step on: at first the head is 0, then B."""
    args = A2CConfig(**settings(tmp_path, max_steps=3, critic="adapter"))
    trainer = A2CTrainer(policy_path, length, args, prompts, peft_config=LoraConfig(r=4))
    start = {name: p.detach().clone() for name, p in trainer.critic.trunk.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.critic.trunk.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name in start if "lora_" in name}


@pytest.mark.parametrize("what, method", [case for case in CASES if case[1] != "full"])
def test_merged_models_compute_nearly_the_same(saved, what, method, tmp_path):
    """
    In float32, but for rounding, on a base that was not quantized; a quantized one's own error is not merged. What
    bfloat16 loses is what it loses of a sum of base and adapter, at most 2^-9 of each weight.
    """
    case = saved[what, method]
    losses = {}
    for dtype in ("float32", "bfloat16"):
        losses[dtype] = merge_adapter(case["folder"], str(tmp_path / dtype), dtype)
        auto_class = AutoModelForSequenceClassification if what == "reward" else AutoModelForCausalLM
        model = auto_class.from_pretrained(tmp_path / dtype)
        assert model.dtype == getattr(torch, dtype) and not getattr(model, "is_quantized", False)
        critic = load_critic(model, str(tmp_path / dtype)) if "values" in case["outputs"] else None
        outputs = outputs_of(model, critic)
        if dtype == "float32" and method in ("lora", "dora"):
            for name, tensor in case["outputs"].items():
                torch.testing.assert_close(outputs[name], tensor, atol=1e-5, rtol=1e-4)
        if what == "reward":
            assert model.config.ranking_model == "davidson_luce" and model.config.log_tie == case["ties"]
    # A step of 1e-2 changes weights of 0.2 by some 1e-2: rounding these to 8 bits loses percents of the change
    assert max(losses["float32"].values()) < 1e-5
    assert 1e-3 < losses["bfloat16"]["precision_loss"] < 0.2
    assert ("critic_precision_loss" in losses["bfloat16"]) == (what == "adapter")
