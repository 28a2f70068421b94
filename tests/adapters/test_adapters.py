"""Adapters in a trainer: task type, precision, the base they are on, the head that goes with them."""

import copy
import logging
import warnings
from types import SimpleNamespace

import bitsandbytes.functional
import bitsandbytes.nn.modules
import pytest
import torch
import trl
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from helpers import (
    IDS,
    RANKINGS,
    build_encoder,
    build_policy,
    build_reward_model,
    count_good,
    quantization_config,
    ranking_settings,
    settings,
)
from hub_server import HubServer, connect
from huggingface_hub import HfApi
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig

from trl_ext import (
    PPOConfig,
    PPOTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    SFTTrainer,
    compat,
    load_critic,
    merge_adapter,
    token_values,
)
from trl_ext.adapters.merging import merged
from trl_ext.adapters.reward_adapters import reward_model_of_its_own, reward_model_on_base
from trl_ext.critic.start import shared_critic


OURS = {
    "reward": (RankingRewardTrainer, RankingRewardConfig),
    "dpo": (RankingDPOTrainer, RankingDPOConfig),
    "ppo": (PPOTrainer, PPOConfig),
}
TRL = {
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "ppo": (GRPOTrainer, GRPOConfig),
}
PAIRS = {"prompt": ["the film was", "a", "it"], "chosen": [" good"] * 3, "rejected": [" bad", " dull", " sad"]}


def lora(**overrides):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **overrides})


def make(task, model, tmp_path, prompts, classes=OURS, dataset=None, kwargs=None, **overrides):
    trainer_class, config_class = classes[task]
    kwargs = {"peft_config": lora()} if kwargs is None else kwargs
    if task == "ppo":
        if trainer_class is GRPOTrainer:
            own = settings(tmp_path, num_generations=2, **overrides)
            own.pop("critic_learning_rate")
            return GRPOTrainer(model, count_good, GRPOConfig(**own), prompts, **kwargs)
        return PPOTrainer(model, count_good, PPOConfig(**settings(tmp_path, **overrides)), prompts, **kwargs)
    dataset = Dataset.from_dict(PAIRS if classes is TRL else RANKINGS) if dataset is None else dataset
    args = config_class(**ranking_settings(tmp_path, **overrides))
    return trainer_class(model, args=args, train_dataset=dataset, **kwargs)


# --- Precision ---


def share_that_moved(trainer):
    """Returns a share of the elements of the adapter's A matrices, which start at random, of ordinary size."""
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_A" in name}
    trainer.train()
    moved = [(p != start[name]).float().mean().item() for name, p in trainer.model.named_parameters() if name in start]
    return sum(moved) / len(moved)


@pytest.mark.parametrize("method", ["4bit", "8bit"])
@pytest.mark.parametrize("task", OURS)
def test_small_steps_on_a_quantized_base_are_made(policy_path, prompts, tmp_path, task, method):
    """AdamW at 1e-6, where TRL's bfloat16 rounds nearly all of them away."""
    shares = {}
    for name, classes in (("ours", OURS), ("trl", TRL)):
        torch.manual_seed(0)
        kwargs = {
            "peft_config": lora(init_lora_weights=False, task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM"),
            "quantization_config": quantization_config(method),
        }
        # In the autocast that TRL's casts need
        overrides = {"learning_rate": 1e-6, "max_steps": 8, "bf16": task == "reward"}
        trainer = make(task, policy_path, tmp_path, prompts, classes, None, kwargs, **overrides)
        dtypes = {p.dtype for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert dtypes == {torch.float32 if name == "ours" else torch.bfloat16}
        shares[name] = share_that_moved(trainer)
    assert shares["ours"] > 0.98
    assert shares["trl"] < 0.15


def test_demonstrations_are_learned_in_small_steps_too(policy_path, tmp_path):
    data = Dataset.from_dict({"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"]})
    shares = {}
    for name, trainer_class in (("ours", SFTTrainer), ("trl", trl.SFTTrainer)):
        own = ranking_settings(tmp_path, learning_rate=1e-6, max_steps=8)
        kwargs = {"peft_config": lora(init_lora_weights=False), "quantization_config": quantization_config("4bit")}
        torch.manual_seed(0)
        trainer = trainer_class(policy_path, SFTConfig(**own), train_dataset=data, **kwargs)
        shares[name] = share_that_moved(trainer)
        trainer.save_model()
    assert shares["ours"] > 0.98 and shares["trl"] < 0.15


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_trained_adapter_on_a_4bit_base_goes_on_as_it_was(policy_path, prompts, tmp_path, use_dora):
    """To the bit: TRL's cast would round it. Its reference is its copy, so the first KL is 0."""
    base = AutoModelForCausalLM.from_pretrained(policy_path, quantization_config=quantization_config("4bit"))
    model = get_peft_model(base, lora(init_lora_weights=False, use_dora=use_dora, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in start.values())
    overrides = {"kl_in_reward": 0.1, "learning_rate": 0.0, "max_steps": 1}
    trainer = make("ppo", model, tmp_path, prompts, kwargs={"processing_class": None}, **overrides)
    for name, parameter in start.items():
        assert torch.equal(trainer.model.get_parameter(name), parameter)
    trainer.train()
    assert trainer.state.log_history[0]["first_step/kl"] == 0.0


def test_a_trained_head_on_a_4bit_base_goes_on_as_it_was(tokenizer, prompts, tmp_path):
    path = str(tmp_path / "reward_model")
    build_reward_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    kwargs = {"peft_config": lora(), "quantization_config": quantization_config("4bit")}
    trainer = make("reward", path, tmp_path, prompts, kwargs=kwargs)
    head = trainer.model.get_base_model().score
    assert torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert not torch.equal(head.original_module.weight, head.original_module.weight.bfloat16().float())


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_a_half_precision_base_meets_a_head_in_full_precision(policy_path, prompts, tmp_path, task):
    """Without autocast, which these settings leave out, TRL's own casts would not fit together either."""
    kwargs = {
        "peft_config": lora(modules_to_save=None if task == "reward" else ["lm_head"]),
        "quantization_config": quantization_config("4bit"),
    }
    trainer = make(task, policy_path, tmp_path, prompts, kwargs=kwargs, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.get_base_model().model.norm.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("use_peft", [False, True])
def test_continuous_batching_leaves_what_trains_in_full_precision(policy_path, prompts, tmp_path, use_peft):
    """For which TRL casts the model to bfloat16, and leaves it so."""
    kwargs = {"peft_config": lora()} if use_peft else {}
    overrides = {"use_transformers_continuous_batching": True, "bf16": True, "learning_rate": 1e-6}
    trainer = make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs, **overrides)
    seen = []

    def generate_batch(prompt_ids, **kwargs):
        seen.extend({p.dtype for p in trainer.model.parameters() if p.requires_grad})
        return {i: SimpleNamespace(generated_tokens=[8, 9 + i % 3, 1]) for i in range(len(prompt_ids))}

    (trainer.model.get_base_model() if use_peft else trainer.model).generate_batch = generate_batch
    trainer.train()
    assert torch.bfloat16 in seen
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


# --- Task type and head ---


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("task", OURS)
def test_the_task_type_is_the_models(policy_path, prompts, tmp_path, task, task_type):
    given = lora(task_type=task_type)
    trainer = make(task, policy_path, tmp_path, prompts, kwargs={"peft_config": given})
    assert given.task_type == task_type
    assert trainer.model.peft_config["default"].task_type == ("SEQ_CLS" if task == "reward" else "CAUSAL_LM")
    trainer.train()


@pytest.mark.parametrize("how", ["peft_config", "peft_model"])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_a_head_that_is_not_trained_is_saved_all_the_same(policy_path, prompts, tmp_path, caplog, how, targets):
    """TRL leaves it as it is, and out of what is saved, so that a random one takes its place."""
    config = lora(target_modules=targets)
    model, kwargs = policy_path, {"peft_config": config}
    if how == "peft_model":
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1)
        model, kwargs = get_peft_model(base, config), {}
    trainer = make("reward", model, tmp_path, prompts, dataset=Dataset.from_dict(PAIRS), kwargs=kwargs)
    # Without a task type PEFT takes the head for one of all linear layers
    assert ("so that the score head stays as it is" in caplog.text) == (targets != "all-linear")
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(input_ids=IDS).logits
        for _ in range(2):  # each with another random head at first
            base = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1)
            loaded = PeftModel.from_pretrained(base, str(tmp_path))
            assert torch.equal(loaded.eval()(input_ids=IDS).logits, expected)
            loaded = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path), num_labels=1)
            torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, expected, atol=1e-6, rtol=1e-5)


def test_pairs_under_a_plain_lora_config_train_as_in_trl(policy_path, prompts, tmp_path):
    """As TRL's tests ask of its trainer: the base is as it was, head included, and everything else has changed."""
    base_names = {f"base_model.model.{name}" for name, _ in build_reward_model_names(policy_path)}
    pairs = Dataset.from_dict(PAIRS)
    trainer = make("reward", policy_path, tmp_path, prompts, dataset=pairs, kwargs={"peft_config": LoraConfig()})
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in start.items():
        if name in base_names or "base_layer" in name:
            assert torch.equal(parameter, trainer.model.get_parameter(name))
        else:
            assert not torch.equal(parameter, trainer.model.get_parameter(name))


def build_reward_model_names(path):
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).named_parameters()


@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_saving_leaves_a_quantized_base_as_it_is(policy_path, prompts, tmp_path, method):
    """Also where an adapter is on the head, which is saved as their sum."""
    kwargs = {
        "peft_config": lora(target_modules="all-linear", init_lora_weights=False),
        "quantization_config": quantization_config(method),
    }
    trainer = make("reward", policy_path, tmp_path, prompts, dataset=Dataset.from_dict(PAIRS), kwargs=kwargs)
    trainer.model.eval()
    with torch.no_grad():
        before = trainer.model(input_ids=IDS).logits
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.save_model()
        assert torch.equal(trainer.model(input_ids=IDS).logits, before)
    assert all(torch.equal(weight, trainer.model.get_parameter(name)) for name, weight in weights.items())


def test_heads_of_other_names_are_saved_too(tokenizer, prompts, tmp_path):
    """An encoder's, and one of several layers; under an adapter of another name."""
    encoder = build_encoder(tokenizer)
    deep = build_reward_model(tokenizer)
    deep.score = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    for name, model, targets in (("classifier", encoder, ["query"]), ("score", deep, ["q_proj"])):
        peft_model = get_peft_model(model, lora(target_modules=targets), adapter_name="mine")
        kwargs = {"processing_class": tokenizer}
        dataset = Dataset.from_dict(PAIRS)
        trainer = make("reward", peft_model, tmp_path / name, prompts, dataset=dataset, kwargs=kwargs)
        trainer.save_model()
        saved = load_file(tmp_path / name / "mine" / "adapter_model.safetensors")
        head = {f"base_model.model.{name}.{key}": w for key, w in getattr(model, name).state_dict().items()}
        assert len(head) >= 1 and all(torch.equal(saved[key], weight) for key, weight in head.items())


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_an_adapter_loaded_to_be_evaluated_keeps_its_head(policy_path, prompts, tmp_path, task):
    """`PeftModel.from_pretrained` freezes it, so the trainer has nothing to remember."""
    config = lora(modules_to_save=None if task == "reward" else ["lm_head"])
    kwargs = {"peft_config": config, "quantization_config": quantization_config("4bit")}
    trainer = make(task, policy_path, tmp_path, prompts, kwargs=kwargs)
    trainer.train()
    trainer.save_model()
    auto_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if task == "reward" else {}
    base = auto_class.from_pretrained(policy_path, quantization_config=quantization_config("4bit"), **labels)
    model = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        again = make(task, model, tmp_path / "again", prompts, kwargs={})
        assert torch.equal(again.model.eval()(input_ids=IDS).logits, expected)


def test_heads_that_the_adapter_holds_are_left_alone(policy_path, prompts, tmp_path):
    trainer = make("reward", policy_path, tmp_path, prompts)
    trainer.train()
    trainer.save_model()
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "score" in name]
    assert names == ["base_model.model.score.weight"]


# --- Refusals ---


@pytest.mark.parametrize("task", OURS)
def test_a_quantized_base_needs_an_adapter(policy_path, prompts, tmp_path, task):
    quantized = {"quantization_config": quantization_config("4bit")}
    with pytest.raises(ValueError, match="base model is quantized.*there is no adapter.*`peft_config`.*--use_peft"):
        make(task, policy_path, tmp_path, prompts, kwargs=quantized)
    auto_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if task == "reward" else {}
    model = auto_class.from_pretrained(policy_path, **quantized, **labels)
    with pytest.raises(ValueError, match="base model is quantized"):
        make(task, model, tmp_path, prompts, kwargs={})


@pytest.mark.parametrize("method", ["4bit", "8bit"])
@pytest.mark.parametrize("task", OURS)
def test_a_quantized_module_cannot_be_saved_whole(policy_path, prompts, tmp_path, task, method):
    kwargs = {
        "quantization_config": quantization_config(method),
        "peft_config": lora(target_modules=["v_proj"], modules_to_save=["q_proj"]),
    }
    with pytest.raises(ValueError, match=r"modules_to_save=\[.*'q_proj'.*\]. is quantized.*llm_int8_skip_modules"):
        make(task, policy_path, tmp_path, prompts, kwargs=kwargs)


def test_vllm_on_a_quantized_base_is_refused(policy_path, prompts, tmp_path):
    kwargs = {"quantization_config": quantization_config("4bit"), "peft_config": lora()}
    with pytest.raises(ValueError, match="Set `use_vllm=False`, or load the base in bfloat16"):
        make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs, use_vllm=True)


def test_biases_of_quantized_layers_are_refused(tmp_path, prompts, tokenizer):
    path = str(tmp_path / "biased")
    build_policy(tokenizer, attention_bias=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    kwargs = {"quantization_config": quantization_config("4bit"), "peft_config": lora(bias="lora_only")}
    with pytest.raises(ValueError, match="base_layer.bias is trained, but its layer is quantized.*bias='none'"):
        make("ppo", path, tmp_path, prompts, kwargs=kwargs)


def test_vllm_on_a_base_quantized_by_model_init_kwargs_is_refused(policy_path, prompts, tmp_path):
    quantized = {"quantization_config": quantization_config("4bit")}
    with pytest.raises(ValueError, match="Set `use_vllm=False`"):
        make("ppo", policy_path, tmp_path, prompts, use_vllm=True, model_init_kwargs=quantized)
    stored = AutoModelForCausalLM.from_pretrained(policy_path, quantization_config=quantization_config("4bit"))
    stored.save_pretrained(tmp_path / "stored")
    with pytest.raises(ValueError, match="of a checkpoint that is stored quantized, take the original"):
        make("ppo", str(tmp_path / "stored"), tmp_path, prompts, use_vllm=True)


def test_what_is_no_peft_config_is_refused_as_in_trl(policy_path, prompts, tmp_path):
    with pytest.raises(TypeError, match="must be a `peft.PeftConfig` instance"):
        make("reward", policy_path, tmp_path, prompts, kwargs={"peft_config": {"r": 4}})


def test_arguments_may_go_through_classes_in_between(policy_path, prompts, tmp_path):
    """And be given by position, as TRL's are."""

    class Logged(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.was_logged = True

    class Mine(PPOTrainer, Logged):
        pass

    args = PPOConfig(**settings(tmp_path))
    rest = (None, None, None, None, (None, None), quantization_config("4bit"), lora(task_type=None))
    trainer = Mine(policy_path, count_good, args, prompts, *rest)
    assert trainer.was_logged and trainer.model.peft_config["default"].task_type == "CAUSAL_LM"
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


# --- Adapters that transformers loads ---


@pytest.fixture
def loaded_by_transformers(policy_path, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_path), lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.mark.parametrize("task", ["dpo", "ppo"])
def test_an_adapter_that_could_not_be_saved_is_not_trained(
    loaded_by_transformers, prompts, tmp_path, monkeypatch, task
):
    """transformers 5.24 asks for PEFT 0.22 when it saves an adapter that it loaded itself."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    with pytest.raises(ValueError, match=r"cannot save it \(.*99.0\).*AutoPeftModelForCausalLM"):
        make(task, loaded_by_transformers, tmp_path, prompts, kwargs={})


def test_an_adapter_that_can_be_saved_is_trained(loaded_by_transformers, policy_path, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.1")
    start = loaded_by_transformers(input_ids=IDS).logits
    trainer = make("ppo", loaded_by_transformers, tmp_path, prompts, kwargs={})
    trainer.train()
    trainer.save_model()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy_path), tmp_path)
    logits = loaded(input_ids=IDS).logits
    assert torch.equal(logits, trainer.model.eval()(input_ids=IDS).logits) and not torch.equal(logits, start)


# --- 4 bits on CPU ---


@pytest.fixture
def processor_with_avx512bf16(monkeypatch):
    """Pretends a processor on which bitsandbytes repacks; the kernel that would need it is not called."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


@pytest.fixture
def repacked(monkeypatch):
    """Calls of bitsandbytes's repacking, which here spoils the weights: gradients after it are wrong."""
    calls = []

    def repack(weight, quant_state):
        calls.append(1)
        return torch.zeros_like(weight), quant_state

    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repack)
    return calls


@pytest.mark.parametrize("task", OURS)
def test_4bit_weights_are_never_repacked(processor_with_avx512bf16, repacked, policy_path, prompts, tmp_path, task):
    kwargs = {"quantization_config": quantization_config("4bit"), "peft_config": lora(init_lora_weights=False)}
    if task != "ppo":
        kwargs["eval_dataset"] = Dataset.from_dict(RANKINGS)
    else:
        kwargs["eval_dataset"] = prompts
    trainer = make(task, policy_path, tmp_path, prompts, kwargs=kwargs, max_steps=1)

    def gradients():
        trainer.model.train()
        trainer.model.zero_grad()
        batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        trainer.model(**batch).logits.sum().backward()
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    before = gradients()
    trainer.evaluate()
    assert not repacked
    after = gradients()
    assert len(before) > 4 and all(torch.equal(gradient, after[name]) for name, gradient in before.items())


def run_plainly(path, adapter=None):
    """A 4-bit model, as a user of transformers and PEFT alone loads it and asks it."""
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization_config("4bit"))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


CHECK_OF_THE_PROCESSOR = bitsandbytes.nn.modules.has_avx512bf16


def test_the_import_switches_repacking_off():
    assert CHECK_OF_THE_PROCESSOR is not bitsandbytes.functional.has_avx512bf16 and not CHECK_OF_THE_PROCESSOR()


def test_nothing_is_repacked_once_the_package_is_imported(processor_with_avx512bf16, repacked, policy_path, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy_path), lora()).save_pretrained(tmp_path)
    compat.stop_repacking()
    logits = run_plainly(policy_path)
    assert torch.equal(run_plainly(policy_path, tmp_path), logits) and not repacked


def test_a_critics_policy_is_not_repacked(processor_with_avx512bf16, repacked, policy_path, tmp_path):
    """Even if it was loaded before the package was imported."""
    policy = AutoModelForCausalLM.from_pretrained(policy_path, quantization_config=quantization_config("4bit")).eval()
    shared_critic(policy).save(tmp_path)
    values = token_values(policy, load_critic(policy, str(tmp_path)), IDS, torch.ones_like(IDS))
    assert torch.equal(values, torch.zeros(IDS.shape)) and not repacked


@pytest.mark.parametrize("is_nested", [False, True])
def test_repacked_weights_are_unpacked(is_nested):
    """Up to the scales' rounding to bfloat16; unpacked by bitsandbytes alone, un-nested scales are out of order."""
    torch.manual_seed(0)
    layer = Linear4bit(
        128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=is_nested
    )
    layer = layer.to("cpu")
    x = torch.randn(5, 128)
    expected = layer(x)
    with pytest.warns(UserWarning, match="repacked 1 4-bit layers"):
        pack(layer)
        compat.keep_4bit_unpacked(layer)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0.01 * expected.abs().max().item())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.keep_4bit_unpacked(layer)
    state = layer.weight.quant_state
    assert not layer.support_avx512bf16_for_cpu and state.nested == is_nested


def pack(layer):
    """Packs as bitsandbytes does on such a processor; the packing itself runs on any."""
    packed = bitsandbytes.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed


def test_bitsandbytes_still_repacks(processor_with_avx512bf16, repacked, policy_path):
    """The guard is for this; should it go, so can the guard."""
    model = AutoModelForCausalLM.from_pretrained(policy_path, quantization_config=quantization_config("4bit")).eval()
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    with torch.no_grad():
        model(input_ids=IDS)
    assert layers and len(repacked) == len(layers)


# --- Merged for generation ---


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_for_generation_leaves_no_trace(tokenizer, use_dora, dtype):
    model = get_peft_model(build_policy(tokenizer).to(dtype), lora(init_lora_weights=False, use_dora=use_dora)).eval()
    start = copy.deepcopy(model.state_dict())
    unmerged = model(input_ids=IDS).logits
    backup = {}
    for _ in range(2):
        with merged(model, backup):
            assert not torch.equal(
                model.state_dict()[next(name for name in start if "base_layer" in name)],
                start[next(name for name in start if "base_layer" in name)],
            )
            tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
            torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, **tolerance)
    assert all(torch.equal(weight, start[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(input_ids=IDS).logits, unmerged)


def test_generation_runs_merged_and_trains_the_same(policy_path, prompts, tmp_path):
    """In float32 the completions are the same, and so is everything after; a failure in between leaves no trace."""
    results = {}
    for generate_merged in (True, False):
        torch.manual_seed(0)
        kwargs = {"peft_config": lora(init_lora_weights=False)}
        overrides = {"generate_merged": generate_merged, "max_steps": 3, "kl_in_reward": 0.1}
        trainer = make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs, **overrides)
        base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "base_layer" in name}
        was_merged = []
        generate = trainer.model.generate

        def watched(*args, model=trainer.model, seen=was_merged, generate=generate, **kw):
            seen.append(model.get_base_model().model.layers[0].self_attn.q_proj.merged)
            return generate(*args, **kw)

        trainer.model.generate = watched
        trainer.train()
        assert was_merged == [generate_merged] * len(was_merged) and was_merged
        assert base and all(torch.equal(weight, trainer.model.get_parameter(name)) for name, weight in base.items())
        results[generate_merged] = [logs["loss"] for logs in trainer.state.log_history[:-1]]
    assert results[True] == pytest.approx(results[False], rel=1e-4, abs=1e-6)


def test_biases_that_train_are_not_restored(tokenizer, prompts, tmp_path):
    path = str(tmp_path / "biased")
    build_policy(tokenizer, attention_bias=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    results = []
    for generate_merged in (True, False):
        torch.manual_seed(0)
        kwargs = {"peft_config": lora(bias="lora_only")}
        trainer = make("ppo", path, tmp_path, prompts, kwargs=kwargs, generate_merged=generate_merged, max_steps=4)
        trainer.reward_funcs = [lambda completions, **kwargs: [float(len(text)) for text in completions]]
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "base_layer.bias" in name}
        trainer.train()
        moved = [(trainer.model.get_parameter(name) - p).abs().max().item() for name, p in start.items()]
        results.append(moved)
    assert min(results[0]) > 0 and results[0] == pytest.approx(results[1], rel=0.2)


def test_half_precision_is_merged_only_on_request(policy_path, prompts, tmp_path):
    for dtype, generate_merged, merges in (
        ("float32", None, True),
        ("bfloat16", None, False),
        ("bfloat16", True, True),
        ("float32", False, False),
    ):
        kwargs = {"peft_config": lora()}
        overrides = {"generate_merged": generate_merged, "model_init_kwargs": {"dtype": dtype}, "bf16": True}
        trainer = make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs, **overrides)
        with trainer._merged_adapter():
            assert trainer.model.get_base_model().model.layers[0].self_attn.q_proj.merged == merges


def test_tied_weights_are_not_merged_for_generation(tokenizer, prompts, tmp_path):
    """An addition to the embeddings is not for the head."""
    path = str(tmp_path / "tied")
    build_policy(tokenizer, tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    for targets, merges in ((["q_proj"], True), (["q_proj", "embed_tokens"], False)):
        kwargs = {"peft_config": lora(target_modules=targets, init_lora_weights=False)}
        trainer = make("ppo", path, tmp_path, prompts, kwargs=kwargs, critic="adapter")
        trainer.model.eval()
        with torch.no_grad():
            expected = trainer.model(input_ids=IDS).logits
            with trainer._merged_adapter():
                assert trainer.model.get_base_model().model.layers[0].self_attn.q_proj.merged == merges
                torch.testing.assert_close(trainer.model(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-4)
        trainer.train()


def test_what_cannot_be_merged_runs_unmerged(policy_path, prompts, tmp_path, caplog):
    kwargs = {"peft_config": lora(init_lora_weights=False)}
    trainer = make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs)
    last = trainer.model.get_base_model().model.layers[1].self_attn.v_proj

    def fail(*args, **kwargs):
        raise NotImplementedError("this kind cannot be merged")

    last.merge = fail  # when others have been
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "base_layer" in name}
    trainer.train()
    assert "cannot be merged for generation" in caplog.text
    assert all(torch.equal(weight, trainer.model.get_parameter(name)) for name, weight in start.items())


def test_a_quantized_base_is_never_merged(policy_path, prompts, tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("merged into 4 bits")

    kwargs = {"peft_config": lora(), "quantization_config": quantization_config("4bit")}
    trainer = make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs)
    monkeypatch.setattr(trainer.model, "merge_adapter", fail)
    trainer.train()
    with pytest.raises(ValueError, match="A quantized base cannot hold"), merged(trainer.model, {}):
        pass


# --- The first update ---


@pytest.mark.parametrize("method", ["full", "lora", "4bit", "8bit"])
def test_the_first_update_starts_from_ratio_1_and_kl_0(policy_path, prompts, tmp_path, caplog, method):
    kwargs = {} if method == "full" else {"peft_config": lora(), "quantization_config": quantization_config(method)}
    overrides = {"kl_in_reward": 0.1, "num_iterations": 2, "max_steps": 3}
    trainer = make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs, **overrides)
    trainer.train()
    logs = trainer.state.log_history
    assert logs[0]["first_step/ratio_deviation"] < 1e-5 and abs(logs[0]["first_step/kl"]) < 1e-9
    assert not any("first_step/kl" in entry for entry in logs[1:])
    assert "Before the first update" not in caplog.text


@pytest.mark.parametrize("method", ["lora", "4bit"])
def test_dropout_between_sampling_and_training_is_told(policy_path, prompts, tmp_path, caplog, method):
    kwargs = {
        "peft_config": lora(lora_dropout=0.9, init_lora_weights=False),
        "quantization_config": quantization_config(method),
    }
    with caplog.at_level(logging.WARNING):
        overrides = {"num_iterations": 2, "disable_dropout": False}
        trainer = make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs, **overrides)
        trainer.train()
    assert trainer.state.log_history[0]["first_step/ratio_deviation"] > 0.05
    assert "`first_step/ratio_deviation` is" in caplog.text and "`lora_dropout=0`" in caplog.text


def test_a_resumed_run_has_no_first_update(policy_path, prompts, tmp_path):
    def trainer(max_steps):
        overrides = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": max_steps}
        return make("ppo", policy_path, tmp_path, prompts, **overrides)

    trainer(2).train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    steps = [entry["step"] for entry in resumed.state.log_history if "first_step/ratio_deviation" in entry]
    assert steps == [1]  # of the run that was resumed


# --- Revisions of the base ---


@pytest.fixture
def base_in_two_revisions(tokenizer, tmp_path, monkeypatch):
    """`user/base` on a local Hub, with other weights on the branch `v2` than on `main`."""
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path / "home")
        HfApi().create_repo("user/base")
        HfApi().create_branch("user/base", branch="v2")
        for seed, revision in enumerate(("main", "v2")):
            build_policy(tokenizer, seed=seed).save_pretrained(tmp_path / revision)
            tokenizer.save_pretrained(tmp_path / revision)
            HfApi().upload_folder(repo_id="user/base", folder_path=tmp_path / revision, revision=revision)
        yield "user/base"


def test_an_adapter_is_loaded_and_merged_on_the_revision_it_was_trained_on(base_in_two_revisions, prompts, tmp_path):
    on_v2 = {"model_init_kwargs": {"revision": "v2"}}
    trainer = make("reward", base_in_two_revisions, tmp_path / "adapter", prompts, max_steps=1, **on_v2)
    trainer.train()
    trainer.save_model()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        merge_adapter(str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="float32")
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        of_its_own = reward_model_of_its_own(str(tmp_path / "adapter"), revision="main")  # a policy's
        for model in (loaded, merged, of_its_own):
            model.config.pad_token_id = trainer.model.config.pad_token_id
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)

    # A policy on it shares that base, one on another revision does not
    for overrides, shares in ((on_v2, True), ({}, False)):
        policy = make("ppo", base_in_two_revisions, tmp_path, prompts, **overrides).model
        assert (reward_model_on_base(policy, str(tmp_path / "adapter")) is not None) is shares


def test_an_adapter_critic_is_merged_on_the_revision_it_was_trained_on(base_in_two_revisions, prompts, tmp_path):
    on_v2 = {"model_init_kwargs": {"revision": "v2"}}
    make("ppo", base_in_two_revisions, tmp_path / "policy", prompts, critic="adapter", **on_v2).save_model()
    merge_adapter(str(tmp_path / "policy"), str(tmp_path / "merged"), dtype="float32")
    critic, base = (AutoModel.from_pretrained(tmp_path / folder) for folder in ("merged/critic", "v2"))
    assert torch.equal(critic.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_the_revision_of_a_model_loaded_before_is_the_adapters(tokenizer, policy_path, prompts, tmp_path):
    kwargs = {"peft_config": LoraConfig(target_modules=["q_proj"], revision="v2")}
    data = {"kwargs": kwargs | {"processing_class": tokenizer}, "dataset": Dataset.from_dict(RANKINGS)}
    trainer = make("reward", build_reward_model(tokenizer), tmp_path, prompts, **data)
    assert trainer.model.active_peft_config.revision == "v2"
    with pytest.raises(ValueError, match="its base is of revision 'v2', and `model_init_kwargs` loads 'main'"):
        make("ppo", policy_path, tmp_path, prompts, kwargs=kwargs)
