"""Every kind of adapter under every trainer: one step, saved, loaded in a new process, merged."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import (
    IDS,
    build_policy,
    outputs_of,
    quantization_config,
    ranking_settings,
    run_script,
    run_snippets,
    settings,
)
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model
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
        trainer.create_model_card("a model")
        results[what, method] = {
            "folder": folder,
            "outputs": outputs_of(trainer.model, getattr(trainer, "critic", None)),
            "dtypes": {p.dtype for p in trainer.model.parameters() if p.requires_grad},
            "moved": [name for name in start if not torch.equal(start[name], trainer.model.get_parameter(name))],
            "ties": trainer.model.config.log_tie if what in ("reward", "dpo") else None,
        }
    return results


@pytest.fixture(scope="module")
def reloaded(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reloaded")
    cases = {f"{what}-{method}": (what, method, case["folder"]) for (what, method), case in saved.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    run = run_script("reloading.py", folder / "cases.json", folder / "outputs.pt")
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(folder / "outputs.pt")


@pytest.mark.parametrize("what, method", CASES)
def test_a_new_process_computes_the_same(saved, reloaded, what, method):
    """To the bit, on the same processor: everything that matters was saved, in full precision."""
    before, after = saved[what, method]["outputs"], reloaded[f"{what}-{method}"]
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    # transformers alone leaves DoRA's magnitudes where they began and, in earlier versions, heads
    loses_heads = Version(transformers.__version__) < Version("5.23")
    if "plain" in after and method != "dora" and not (what == "reward" and loses_heads):
        torch.testing.assert_close(after["plain"], before["logits"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("what, method", CASES)
def test_the_card_says_what_is_adapted(saved, what, method):
    card = (Path(saved[what, method]["folder"]) / "README.md").read_text()
    assert ("| adapter: peft_type | LORA |" in card) == ("| adapter: r | 4 |" in card) == (method != "full")
    assert ("| adapter: use_dora | True |" in card) == (method == "dora")
    quantization = {"4bit": "4bit (nf4)", "8bit": "8bit (int8)"}.get(method)
    assert ("base model: quantization" in card) == (quantization is not None)
    assert quantization is None or f"| base model: quantization | {quantization} |" in card
    assert ("- PEFT " in card) == (method != "full")


@pytest.mark.parametrize("what, method", CASES)
def test_the_cards_snippets_load_what_was_trained(saved, what, method, monkeypatch):
    """To the bit, also where the processor and the version would have bitsandbytes repack 4-bit weights."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True, raising=False)
    scope = run_snippets(saved[what, method]["folder"])
    assert len(scope["printed"]) == 1
    model = scope["model"] if "model" in scope else scope["score" if what == "reward" else "generator"].model
    outputs = outputs_of(model, scope.get("critic"))
    for name, tensor in saved[what, method]["outputs"].items():
        assert torch.equal(tensor, outputs[name]), name


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
def test_merged_models_compute_nearly_the_same(saved, policy_path, what, method, tmp_path):
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
        if what in ("reward", "dpo"):
            assert model.config.ranking_model == "davidson_luce" and model.config.log_tie == case["ties"]
    # By the weights that were written: what rounding changes over what merging changed
    auto_class = AutoModelForSequenceClassification if what == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if what == "reward" else {}
    before = auto_class.from_pretrained(policy_path, dtype=torch.float32, **labels).state_dict()
    merged = auto_class.from_pretrained(tmp_path / "float32").state_dict()
    adapted = [name for name in merged if "proj" in name and not torch.equal(merged[name], before[name])]
    lost = sum((merged[name].bfloat16().float() - merged[name]).square().sum() for name in adapted)
    changed = sum((merged[name] - before[name]).square().sum() for name in adapted)
    assert losses["bfloat16"]["precision_loss"] == pytest.approx((lost / changed).sqrt().item(), rel=1e-3)
    assert ("critic_precision_loss" in losses["bfloat16"]) == (what == "adapter")


def test_tied_weights_are_parted_when_merged(tokenizer, prompts, tmp_path):
    """An adapter on the embeddings, or on the head, changes one of the two."""
    path = str(tmp_path / "tied")
    build_policy(tokenizer, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    for target in ("embed_tokens", "lm_head"):
        folder, merged = tmp_path / target, tmp_path / f"{target}-merged"
        config = LoraConfig(r=4, target_modules=["q_proj", target], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config).eval()
        with torch.no_grad():
            expected = model(input_ids=IDS).logits
            model.save_pretrained(folder, save_embedding_layers=False)
            assert merge_adapter(str(folder), str(merged), "float32") == {"precision_loss": 0.0}
            actual = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=IDS).logits
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_merged_is_refused(policy_path, saved, tmp_path):
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        merge_adapter(policy_path, str(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(saved["shared", "lora"]["folder"], str(tmp_path / "full"))
    model = AutoModelForCausalLM.from_pretrained(policy_path)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "prompt"
    )
    with pytest.raises(ValueError, match="a learned prompt"):
        merge_adapter(str(tmp_path / "prompt"), str(tmp_path / "out"))
    quantized = AutoModelForCausalLM.from_pretrained(policy_path, quantization_config=quantization_config("4bit"))
    quantized.save_pretrained(tmp_path / "quantized")
    config = json.loads((Path(saved["shared", "4bit"]["folder"]) / "adapter_config.json").read_text())
    (tmp_path / "adapter").mkdir()
    config["base_model_name_or_path"] = str(tmp_path / "quantized")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is stored quantized, and merging into it would lose"):
        merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "out"))
