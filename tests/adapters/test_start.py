"""Trainers that start from an adapter, or from a frozen model, take it up and train it as given, or refuse it."""

import copy

import pytest
import torch
from datasets import Dataset
from helpers import (
    IDS,
    PROMPTS,
    RANKINGS,
    build_policy,
    build_reward_model,
    count_good,
    quantization_config,
    ranking_settings,
    settings,
)
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    XLNetConfig,
    XLNetModel,
)

from trl_ext import (
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    merge_adapter,
)
from trl_ext.adapters import new_layers
from trl_ext.adapters.reward_adapters import reward_model_of_its_own
from trl_ext.algorithms import ALGORITHMS


PAIRS = {"prompt": ["the film was", "a", "it"], "chosen": [" good"] * 3, "rejected": [" bad", " dull", " sad"]}


def make(task, model, tmp_path, dataset=None, kwargs=None, **overrides):
    if task in ALGORITHMS:
        config_class, trainer_class = ALGORITHMS[task]
        args = config_class(**settings(tmp_path, **overrides))
        return trainer_class(model, count_good, args, Dataset.from_dict({"prompt": PROMPTS}), **kwargs or {})
    classes = {
        "reward": (RankingRewardTrainer, RankingRewardConfig),
        "dpo": (RankingDPOTrainer, RankingDPOConfig),
    }
    trainer_class, config_class = classes[task]
    args = config_class(**ranking_settings(tmp_path, **overrides))
    return trainer_class(model, args=args, train_dataset=dataset or Dataset.from_dict(RANKINGS), **kwargs or {})


@pytest.fixture(scope="module")
def sft_path(policy_path, tokenizer, tmp_path_factory):
    """An adapter on `policy_path` that is far from where adapters start, with its tokenizer."""
    path = str(tmp_path_factory.mktemp("sft"))
    base = AutoModelForCausalLM.from_pretrained(policy_path)
    get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def moved(model, start):
    return {name for name, weight in start.items() if not torch.equal(weight, model.get_parameter(name))}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "critic" not in name}


# --- An adapter's folder ---


@pytest.mark.parametrize("method", ["lora", "4bit", "8bit"])
@pytest.mark.parametrize("task", ["reward", "dpo", "ppo"])
def test_an_adapters_folder_is_trained_further(sft_path, policy_path, tmp_path, task, method):
    """From its very weights; all of them move, and nothing of the base; and what is saved loads on that base."""
    quantized = {"quantization_config": quantization_config(method)}
    overrides = {"kl_in_reward": 0.1, "num_iterations": 2, "max_steps": 4} if task == "ppo" else {}
    trainer = make(task, sft_path, tmp_path, kwargs=quantized, **overrides)
    sft = AutoPeftModelForCausalLM.from_pretrained(sft_path)
    adapter = {name: weight for name, weight in sft.named_parameters() if "lora_" in name}
    assert len(adapter) == 8
    for name, weight in adapter.items():
        assert torch.equal(trainer.model.get_parameter(name), weight), name
    start = weights_of(trainer.model)
    trainer.train()
    heads = {name for name in start if "score.modules_to_save" in name}
    assert len(heads) == (task == "reward")
    assert moved(trainer.model, start) - {"tie_parameters.raw"} == set(adapter) | heads
    if task == "ppo":
        assert trainer.state.log_history[0]["first_step/kl"] == pytest.approx(0, abs=1e-9)
    trainer.save_model()
    auto_class = AutoPeftModelForSequenceClassification if task == "reward" else AutoPeftModelForCausalLM
    labels = {"num_labels": 1} if task == "reward" else {}
    loaded = auto_class.from_pretrained(str(tmp_path), **quantized, **labels).eval()
    assert loaded.peft_config["default"].base_model_name_or_path == policy_path
    with torch.no_grad():
        batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


@pytest.mark.parametrize("task", ["reward", "dpo", "ppo"])
def test_no_second_adapter_is_made_beside_one(sft_path, tmp_path, task):
    for model in (sft_path, AutoModelForCausalLM.from_pretrained(sft_path)):
        with pytest.raises(
            ValueError, match="is an adapter on its base.*Leave out `peft_config`.*merge it into its base"
        ):
            make(task, model, tmp_path, kwargs={"peft_config": LoraConfig(r=4)})


def test_adapters_that_cannot_be_taken_up_are_refused(policy_path, reward_model_path, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="is the adapter of a reward model, and a language model is to be trained"):
        make("ppo", str(tmp_path / "reward"), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(policy_path)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="is a learned prompt.*which PEFT does not train further"):
        make("dpo", str(tmp_path / "prompt"), tmp_path)


def test_a_reward_models_adapter_goes_on_with_its_head(reward_model_path, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    trainer = make("reward", str(tmp_path / "adapter"), tmp_path)
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(**batch).logits, model.eval()(**batch).logits)


# --- What trains ---


def frozen(how, sft_path, policy_path, task):
    auto_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if task == "reward" else {}
    base = auto_class.from_pretrained(policy_path, **labels)
    if how == "kbit":
        return prepare_model_for_kbit_training(base)
    if how == "quantized kbit":
        quantized = auto_class.from_pretrained(policy_path, quantization_config=quantization_config("4bit"), **labels)
        return prepare_model_for_kbit_training(get_peft_model(quantized, LoraConfig(r=4)))
    if how == "by hand":
        return get_peft_model(base, LoraConfig(r=4)).requires_grad_(False)
    if how == "transformers":
        return auto_class.from_pretrained(sft_path, **labels)
    if task == "reward":
        sft_path = f"{sft_path}-reward"
        head = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, task_type="SEQ_CLS"))
        head.save_pretrained(sft_path)
    model = PeftModel.from_pretrained(base, sft_path)
    return model.merge_and_unload() if how == "merged" else model


@pytest.mark.parametrize("how", ["loaded", "merged", "kbit", "quantized kbit", "by hand"])
@pytest.mark.parametrize("task", ["reward", "dpo", "ppo"])
def test_what_does_not_train_is_refused(sft_path, policy_path, tmp_path, task, how):
    trainer = make(task, frozen(how, sft_path, policy_path, task), tmp_path)
    with pytest.raises(ValueError, match="None of the .* weights of `model` train.*is_trainable=True.*requires_grad_"):
        trainer.train()


@pytest.mark.parametrize("task", ["reward", "dpo", "ppo"])
def test_an_adapter_that_transformers_has_loaded_is_refused(sft_path, policy_path, tmp_path, task):
    """At once where transformers could not save it, and when it is to be trained otherwise: it is frozen."""
    with pytest.raises(ValueError, match="cannot save it.*Load it with PEFT|None of the .* weights of `model` train"):
        make(task, frozen("transformers", sft_path, policy_path, task), tmp_path).train()


@pytest.mark.parametrize("task", ALGORITHMS)
def test_no_actor_critic_trainer_trains_its_critic_alone(sft_path, policy_path, tmp_path, task):
    """Also where the KL has PEFT switch adapters, which leaves their weights to train."""
    for overrides in ({}, {"kl_in_reward": 0.1}):
        trainer = make(task, frozen("by hand", sft_path, policy_path, task), tmp_path, **overrides)
        with pytest.raises(ValueError, match="None of the"):
            trainer.train()


def test_parts_may_train_alone(policy_path, tokenizer, tmp_path):
    """The critic, for a while; a reward model's head."""
    make("ppo", policy_path, tmp_path, critic_warmup_steps=2).train()
    model = build_reward_model(tokenizer).requires_grad_(False)
    model.score.requires_grad_(True)
    trainer = make("reward", model, tmp_path, kwargs={"processing_class": tokenizer})
    start = weights_of(trainer.model)
    trainer.train()
    assert moved(trainer.model, start) == {"score.weight", "tie_parameters.raw"}


@pytest.mark.parametrize("name", ["default", "mine"])
@pytest.mark.parametrize("task", ["dpo", "pairs", "ppo"])
def test_with_a_reference_trains_what_was_given(policy_path, sft_path, tmp_path, task, name):
    """Loaded frozen and opened by hand, but for A, which the switching to the reference and back would open as well."""
    base = AutoModelForCausalLM.from_pretrained(policy_path)
    model = PeftModel.from_pretrained(base, sft_path, adapter_name=name)
    opened = {path for path, _ in model.named_parameters() if f"lora_B.{name}" in path}
    for path in opened:
        model.get_parameter(path).requires_grad_(True)
    dataset = Dataset.from_dict(PAIRS) if task == "pairs" else None
    overrides = {"kl_in_reward": 0.1, "num_iterations": 2, "max_steps": 4} if task == "ppo" else {}
    trainer = make("dpo" if task == "pairs" else task, model, tmp_path, dataset, **overrides)
    assert set(trainer.model.peft_config) == {name, "ref"}
    start = weights_of(trainer.model)
    trainer.train()
    assert moved(trainer.model, start) - {"tie_parameters.raw"} == opened
    assert {path for path, p in trainer.model.named_parameters() if p.requires_grad and "critic" not in path} - {
        "tie_parameters.raw"
    } == opened


# --- The reference ---


@pytest.mark.parametrize(
    "config, name",
    [
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "mine"),
        (LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False), "default"),
        (LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7, 8]), "default"),
        (LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7, 8]), "mine"),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "default"),
    ],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_reference_is_a_copy_of_the_start(tokenizer, tmp_path, config, name, is_tied):
    """With adapters of any name and kind the KL is 0 and the ratio 1 before the first update; then all of them move."""
    path = str(tmp_path / "base")
    build_policy(tokenizer, tie_word_embeddings=is_tied).save_pretrained(path)
    tokenizer.save_pretrained(path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config, adapter_name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    overrides = {"kl_in_reward": 0.1, "num_iterations": 2, "max_steps": 4}
    trainer = make("ppo", model, tmp_path, **overrides)
    start = weights_of(trainer.model)
    trained = {path for path in start if trainer.model.get_parameter(path).requires_grad}
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["first_step/kl"] == pytest.approx(0, abs=1e-9) and first["first_step/ratio_deviation"] < 1e-5
    assert moved(trainer.model, start) == trained and all(f".{name}." in f"{path}." for path in trained)


def test_of_two_adapters_the_reference_is_the_active_one(policy_path, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_path), LoraConfig(r=2))
    model.add_adapter("mine", LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    model.set_adapter("mine")
    trainer = make("dpo", model, tmp_path)
    with torch.no_grad():
        own = trainer.model.eval()(input_ids=IDS).logits
        trainer.model.set_adapter("ref")
        assert torch.equal(trainer.model(input_ids=IDS).logits, own)
    assert set(trainer.model.peft_config) == {"default", "mine", "ref"}


@pytest.mark.parametrize("task", ["dpo", "ppo"])
def test_an_adapter_that_reaches_the_head_is_refused_before_its_reference_is_made(tokenizer, tmp_path, task):
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(build_policy(tokenizer, tie_word_embeddings=True), config)
    overrides = {"kl_in_reward": 0.1} if task == "ppo" else {}
    with pytest.raises(ValueError, match="`lm_head` is not supported.*Leave .*`ensure_weight_tying=True`"):
        make(task, model, tmp_path, kwargs={"processing_class": tokenizer}, **overrides)


# --- Newly initialised layers ---


def small(**sizes):
    return {"vocab_size": 27, "pad_token_id": 0, "max_position_embeddings": 64} | sizes


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
# What reward models start from, and the layers that they find missing there
ENCODERS = {
    "deberta-v2": (DebertaV2Model, DebertaV2Config(**small(**SIZES)), {"pooler", "classifier"}),
    "bert": (BertForMaskedLM, BertConfig(**small(**SIZES)), {"bert.pooler", "classifier"}),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**small(**SIZES)), {"classifier"}),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig(**small(dim=16, hidden_dim=32, n_layers=1, n_heads=2)),
        {"pre_classifier", "classifier"},
    ),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig(**small(**SIZES, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)),
        {"head", "classifier"},
    ),
    "xlnet": (
        XLNetModel,
        XLNetConfig(vocab_size=27, d_model=16, n_layer=1, n_head=2, d_inner=32, pad_token_id=0),
        {"sequence_summary", "logits_proj"},
    ),
}


@torch.no_grad()
def scores(model):
    return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


@pytest.mark.parametrize("kind", ENCODERS)
def test_all_that_is_drawn_anew_is_trained_and_saved(tokenizer, tmp_path, caplog, kind):
    """Loaded twice, as each load draws other weights, the model scores as the trainer's."""
    model_class, config, missing = ENCODERS[kind]
    path = str(tmp_path / "base")
    model_class(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    trainer = make("reward", path, tmp_path, kwargs={"peft_config": LoraConfig(target_modules="all-linear", r=2)})
    assert set(trainer._new_layers) == missing
    start = weights_of(trainer.model)
    trainer.train()
    trained = {path for path in moved(trainer.model, start) if "modules_to_save" in path}
    new = {path.removeprefix("base_model.model.").partition(".modules_to_save.")[0] for path in trained}
    assert new == missing
    assert "head stays as it is" not in caplog.text
    trainer.save_model()
    for seed in range(2):
        torch.manual_seed(seed)
        loaded = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path), num_labels=1)
        assert torch.equal(scores(loaded), scores(trainer.model))
        assert torch.equal(scores(reward_model_of_its_own(str(tmp_path))), scores(trainer.model))
    merge_adapter(str(tmp_path), str(tmp_path / "merged"), "float32")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(scores(whole), scores(trainer.model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["pairs", "instance", "peft_model", "4bit", "4bit by model_init_kwargs"])
def test_whatever_way_a_model_comes_its_new_layers_are_saved(tokenizer, tmp_path, how):
    """Also where, as in TRL, they are not trained."""
    model_class, config, _ = ENCODERS["deberta-v2"]
    path = str(tmp_path / "base")
    model_class(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    lora = LoraConfig(target_modules="all-linear" if how == "pairs" else ["query_proj"], r=2)
    model, dataset, kwargs, quantized, overrides = path, None, {"peft_config": lora}, {}, {}
    if how == "pairs":
        dataset = Dataset.from_dict(PAIRS)
    if how in ("instance", "peft_model"):
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
        kwargs["processing_class"] = tokenizer
    if how == "peft_model":
        model = get_peft_model(model, kwargs.pop("peft_config"))
    if how.startswith("4bit"):
        quantized = {"quantization_config": quantization_config("4bit")}
        kwargs, overrides = (
            (kwargs | quantized, {}) if how == "4bit" else (kwargs, {"model_init_kwargs": {**quantized}})
        )
    trainer = make("reward", model, tmp_path, dataset, kwargs, **overrides)
    trainer.train()
    trainer.save_model()
    for seed in range(2):
        torch.manual_seed(seed)
        assert torch.equal(scores(reward_model_of_its_own(str(tmp_path), **quantized)), scores(trainer.model))
        if not quantized:
            base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
            assert torch.equal(scores(PeftModel.from_pretrained(base, str(tmp_path))), scores(trainer.model))


def test_new_layers_that_cannot_be_had_are_refused(tokenizer, tmp_path):
    """A model was loaded with them quantized, or an adapter was saved without one of them."""
    model_class, config, _ = ENCODERS["deberta-v2"]
    path = str(tmp_path / "base")
    model_class(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    for bits in ("4bit", "8bit"):
        config = {"num_labels": 1, "quantization_config": quantization_config(bits)}
        model = AutoModelForSequenceClassification.from_pretrained(path, **config)
        with pytest.raises(ValueError, match=r"llm_int8_skip_modules=\['pooler', 'classifier'\]"):
            make("reward", model, tmp_path, kwargs={"processing_class": tokenizer, "peft_config": LoraConfig(r=2)})
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query_proj"])).save_pretrained(tmp_path)
    for use in (reward_model_of_its_own, lambda folder: merge_adapter(folder, str(tmp_path / "merged"))):
        with pytest.raises(ValueError, match=r"without the layers \['pooler.dense'\].*modules_to_save"):
            use(str(tmp_path))


def test_under_zero_3_new_layers_are_to_be_named(policy_path, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(new_layers, "is_deepspeed_zero3_enabled", lambda: True)
    make("reward", policy_path, tmp_path, kwargs={"peft_config": LoraConfig(r=2)})
    assert "name them in `modules_to_save`" in caplog.text
