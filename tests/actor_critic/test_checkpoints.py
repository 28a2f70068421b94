"""Nothing is lost: the critic, the optimizer, the KL controller, an unfinished rollout, and the plain policy."""

import signal
from unittest.mock import MagicMock

import pytest
import torch
import transformers.trainer
from datasets import load_dataset
from helpers import build_policy, count_good, recorded, run_script, settings
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig
from processes import resuming
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    PPOConfig,
    PPOTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    load_critic,
    load_rollouts,
    token_values,
)


def flatten(state, prefix=""):
    """Every tensor and number of a nested state, by path."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flatten(value, f"{prefix}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return flatten(dict(enumerate(state)), prefix)
    return {prefix: state}


def assert_equal_states(first, second):
    first, second = flatten(first), flatten(second)
    assert first.keys() == second.keys()
    for name in first:
        same = (
            torch.equal(first[name], second[name])
            if isinstance(first[name], torch.Tensor)
            else first[name] == second[name]
        )
        assert same, name


@pytest.mark.slow
def test_a_run_killed_twice_resumes_bit_for_bit(policy_path, tmp_path):
    whole, broken, last = tmp_path / "whole", tmp_path / "broken", "checkpoint-18"
    resuming.train(policy_path, whole)
    # After the first update of a rollout's four; at the end of an epoch, where the prompts' order is drawn anew
    for step, flags in ((5, []), (16, ["--resume"])):
        killed = run_script("resuming.py", policy_path, broken, step, *flags)
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
        assert (broken / f"checkpoint-{step}").exists() and not (broken / f"checkpoint-{step + 1}").exists()
    resuming.train(policy_path, broken, resume=True)
    for file in ("model.safetensors", "value_head.safetensors"):
        first, second = (load_file(folder / last / file) for folder in (whole, broken))
        assert_equal_states(first, second)
    for file in ("optimizer.pt", "scheduler.pt", "kl_controller.pt", "rollout_0.pt"):
        first, second = (torch.load(folder / last / file) for folder in (whole, broken))
        assert_equal_states(first, second)
    first, second = (torch.load(folder / last / "rng_state.pth", weights_only=False) for folder in (whole, broken))
    assert torch.equal(first["cpu"], second["cpu"]) and first["python"] == second["python"]
    assert torch.load(whole / last / "kl_controller.pt")["coef"] != 0.1
    first, second = (load_rollouts(folder) for folder in (whole, broken))
    assert (
        first["train"].to_list() == second["train"].to_list() and first["eval"].to_list() == second["eval"].to_list()
    )
    assert first["train"]["step"] == [step for step in (0, 4, 8, 12, 16) for _ in range(4)]
    assert first["eval"]["step"] == [step for step in (3, 6, 9, 12, 15, 18) for _ in range(8)]


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_a_checkpoint_is_a_plain_model_with_a_critic_beside_it(policy_path, prompts, tmp_path, critic, use_peft):
    args = A2CConfig(**settings(tmp_path, critic=critic, save_strategy="steps", save_steps=2))
    peft_config = LoraConfig(r=4, target_modules="all-linear") if use_peft else None
    trainer = A2CTrainer(policy_path, count_good, args, prompts, peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(ids).logits
    values = token_values(trainer.model, trainer.critic, ids, torch.ones_like(ids))
    assert values.abs().max() > 1e-3
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        auto_class = AutoPeftModelForCausalLM if use_peft else AutoModelForCausalLM
        if use_peft:
            loaded = auto_class.from_pretrained(folder)
        else:
            loaded, info = auto_class.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, logits, atol=0, rtol=0)
        critic = load_critic(loaded, str(folder))
        torch.testing.assert_close(token_values(loaded, critic, ids, torch.ones_like(ids)), values, atol=0, rtol=0)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_resuming_restores_the_critic(policy_path, prompts, tmp_path, critic, caplog):
    args = A2CConfig(**settings(tmp_path, critic=critic, save_strategy="steps", save_steps=2))
    trainer = A2CTrainer(policy_path, count_good, args, prompts)
    trainer.train()
    again = A2CTrainer(policy_path, count_good, args, prompts)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for (name, weight), restored in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(weight, restored), name
    assert "missing keys" not in caplog.text


def test_the_best_model_comes_back_with_its_critic(policy_path, prompts, tmp_path):
    args = A2CConfig(
        **settings(
            tmp_path,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            max_steps=3,
            load_best_model_at_end=True,
            metric_for_best_model="eval_num_tokens",  # never rises in evaluation, so the first checkpoint is the best
            greater_is_better=False,
        )
    )
    trainer = A2CTrainer(policy_path, count_good, args, prompts, eval_dataset=prompts)
    trainer.train()
    assert trainer.state.best_global_step == 1
    saved = load_file(tmp_path / "checkpoint-1" / "value_head.safetensors")
    assert torch.equal(trainer.critic.value_head.weight, saved["weight"])
    assert saved["weight"].abs().max() > 0


def test_a_value_head_that_does_not_fit_is_refused(tokenizer, tmp_path):
    model = build_policy(tokenizer)
    save_file({"weight": torch.zeros(1, 99), "bias": torch.zeros(1)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"value_head.safetensors does not fit.*\(1, 99\).*\(1, 16\)"):
        load_critic(model, str(tmp_path))


def test_a_checkpoint_without_critic_says_so(policy_path, prompts, tmp_path):
    trainer = A2CTrainer(policy_path, count_good, A2CConfig(**settings(tmp_path)), prompts)
    with pytest.raises(FileNotFoundError, match="no critic was saved"):
        trainer._load_from_checkpoint(policy_path)


def test_pushing_a_checkpoint_takes_the_critic_along(policy_path, prompts, tmp_path, monkeypatch):
    """TRL's hub strategies copy a fixed list of files out of the checkpoint."""
    pushed = MagicMock()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: pushed)
    args = A2CConfig(**settings(tmp_path, save_strategy="steps", save_steps=2))
    trainer = A2CTrainer(policy_path, count_good, args, prompts)
    trainer.train()
    assert not (tmp_path / "value_head.safetensors").exists()
    trainer.hub_model_id, trainer.push_in_progress = "someone/something", None
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-2"))
    assert pushed.upload_folder.call_args.kwargs["folder_path"] == str(tmp_path)
    assert (tmp_path / "value_head.safetensors").exists()


def test_model_card_says_what_how_and_on_what(policy_path, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, num_iterations=2, save_strategy="steps", gamma=0.987))
    trainer = PPOTrainer(policy_path, [count_good], args, prompts)
    trainer.train()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and "ppo" in card.data.tags
    last = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    for expected in [
        "trained with PPO",
        "2 optimizer steps on 8 prompts",
        "`count_good`",
        "| gamma | 0.987 |",
        "| num_iterations | 2 |",
        f"| reward | {last['reward']:.4g} |",
        f"| explained_variance | {last['explained_variance']:.4g} |",
        "schulman2017ppo",
        "load_critic",
    ]:
        assert expected in card.text, expected
    assert "{{" not in card.text.split("```bibtex")[0] and str(policy_path) not in card.text


def test_the_cards_snippet_runs(policy_path, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, num_iterations=2))
    trainer = PPOTrainer(policy_path, count_good, args, prompts)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("tiny")
    snippets = ModelCard.load(tmp_path / "README.md").text.split("```python")[1:]
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet.split("```")[0], scope := {})
    assert scope["values"].shape == (1, 2)


def test_completions_parquet_is_written(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, log_completions=True, max_steps=1))
    A2CTrainer(policy_path, count_good, args, prompts).train()
    rows = load_dataset("parquet", data_files=str(tmp_path / "completions" / "*.parquet"), split="train")
    assert {"prompt", "completion", "count_good", "advantage", "value", "decisive_token"} <= set(rows.column_names)


def test_resuming_another_layout_samples_anew(policy_path, prompts, tmp_path):
    def config(**overrides):
        overrides = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 3, **overrides}
        return PPOConfig(**settings(tmp_path, **overrides))

    PPOTrainer(policy_path, count_good, config(), prompts).train()
    overrides = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = PPOTrainer(policy_path, count_good, config(**overrides), prompts)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 3


def test_resuming_keeps_the_kl_settings_of_the_configuration(policy_path, prompts, tmp_path):
    def trainer(**overrides):
        overrides = {"kl_in_reward": 0.1, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, **overrides}
        return A2CTrainer(policy_path, count_good, A2CConfig(**settings(tmp_path, **overrides)), prompts)

    first = trainer(kl_target=1.0, kl_horizon=20)
    first.train()
    fixed = trainer(kl_in_reward=0.7, max_steps=3)
    fixed.train(resume_from_checkpoint=True)
    assert fixed.kl_controller.coef == 0.7
    steered = trainer(kl_target=9.0, kl_horizon=1000, max_steps=3)
    steered.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert steered.kl_controller.target == 9.0 and steered.kl_controller.horizon == 1000
    assert steered.kl_controller.coef == pytest.approx(first.kl_controller.coef, rel=0.21)
    assert steered.kl_controller.coef != 0.1


def test_training_again_starts_a_new_rollout(policy_path, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, num_iterations=4, max_steps=2, learning_rate=5e-2, target_kl=1e-3))
    trainer = recorded(PPOTrainer)(policy_path, count_good, args, prompts)
    trainer.train()
    assert trainer.trust_region.has_ended
    trainer.train()
    assert len(trainer.rollouts) == 2


def test_a_shared_critic_goes_on_where_another_run_left_it(policy_path, prompts, tmp_path):
    first = A2CTrainer(policy_path, count_good, A2CConfig(**settings(tmp_path)), prompts)
    first.train()
    first.save_model()
    args = A2CConfig(**settings(tmp_path / "next", critic_model_name_or_path=str(tmp_path)))
    again = A2CTrainer(str(tmp_path), count_good, args, prompts)
    assert again.critic.value_head.weight.abs().max() > 0
    assert torch.equal(again.critic.value_head.weight, first.critic.value_head.weight)


def test_a_separate_critic_goes_on_where_another_run_left_it(policy_path, prompts, tmp_path):
    first = A2CTrainer(policy_path, count_good, A2CConfig(**settings(tmp_path, critic="separate")), prompts)
    first.train()
    first.save_model()
    args = A2CConfig(**settings(tmp_path / "next", critic="separate", critic_model_name_or_path=str(tmp_path)))
    again = A2CTrainer(policy_path, count_good, args, prompts)
    assert_equal_states(first.critic.state_dict(), again.critic.state_dict())


def test_a_folder_holds_the_critic_of_the_last_run_only(policy_path, prompts, tmp_path):
    for critic in ("separate", "shared", "separate"):
        trainer = A2CTrainer(policy_path, count_good, A2CConfig(**settings(tmp_path, critic=critic)), prompts)
        trainer.save_model()
        assert (load_critic(trainer.model, str(tmp_path)).trunk is None) == (critic == "shared")


def test_a_critic_of_low_precision_on_disk_is_trained_like_the_policy(
    policy_path, reward_model_path, prompts, tmp_path
):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "reward_model")
    for source in (str(tmp_path / "reward_model"), model):
        path, instance = (source, None) if isinstance(source, str) else (None, source)
        args = A2CConfig(**settings(tmp_path, critic="separate", critic_model_name_or_path=path))
        trainer = A2CTrainer(policy_path, count_good, args, prompts, critic_model=instance)
        assert {p.dtype for p in trainer.critic.parameters()} == {torch.float32}


def test_the_trainers_model_saves_without_the_critic(policy_path, prompts, tmp_path):
    """Also by its own `save_pretrained`, and for the next trainer that takes it."""
    model = AutoModelForCausalLM.from_pretrained(policy_path)
    trainer = A2CTrainer(
        model,
        count_good,
        A2CConfig(**settings(tmp_path)),
        prompts,
        processing_class=AutoTokenizer.from_pretrained(policy_path),
    )
    trainer.model.save_pretrained(tmp_path / "own")
    assert not any("critic" in name for name in load_file(tmp_path / "own" / "model.safetensors"))
    assert len(model._forward_hooks) + len(model.model._forward_hooks) == 1  # the critic's
    again = ReinforceTrainer(
        model, count_good, ReinforceConfig(**settings(tmp_path)), prompts, processing_class=trainer.processing_class
    )
    assert not any("critic" in name for name, _ in again.model.named_parameters())
    assert len(model._forward_hooks) + len(model.model._forward_hooks) == 0
