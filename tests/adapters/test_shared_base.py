"""Several models on one frozen base: the same memory, and gradients as if each had a base of its own."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from helpers import (
    IDS,
    RANKINGS,
    build_encoder,
    build_policy,
    count_good,
    quantization_config,
    ranking_settings,
    recorded,
    settings,
    tiny_config,
)
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer.utils import use_adapter

from trl_ext import A2CConfig, A2CTrainer, PPOConfig, PPOTrainer, RankingRewardConfig, RankingRewardTrainer
from trl_ext.adapters.shared_base import frozen_base
from trl_ext.critic.critic import Critic
from trl_ext.critic.reading import token_values
from trl_ext.critic.start import critic_as_adapter, load_critic
from trl_ext.packing.layout import last_states


SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
DECODERS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, intermediate_size=32, num_key_value_heads=1)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, intermediate_size=32, num_key_value_heads=1)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8, sliding_window=4),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
}


def lora(**overrides):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **overrides})


def tensors_of(model):
    return {id(t): t for t in [*model.parameters(), *model.buffers()]}


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens"], ["lm_head"]])
def test_the_base_is_what_it_was_before_any_adapter(family, modules_to_save):
    if family == "gpt2" and modules_to_save == ["embed_tokens"]:
        modules_to_save = ["wte"]
    torch.manual_seed(0)
    model_class, config = DECODERS[family]
    model = model_class(copy.deepcopy(config)).eval()
    before = model.base_model(input_ids=IDS).last_hidden_state
    policy = get_peft_model(model, lora(modules_to_save=modules_to_save)).eval()
    base = frozen_base(policy)
    assert torch.equal(base(input_ids=IDS).last_hidden_state, before)
    adapted = policy.get_base_model().base_model(input_ids=IDS).last_hidden_state
    assert not torch.allclose(adapted, before, atol=1e-3)
    # The very same tensors: not a byte more
    assert tensors_of(base).keys() <= tensors_of(policy).keys()


@pytest.mark.parametrize("method", ["4bit", "8bit"])
def test_a_quantized_base_is_shared(policy_path, method):
    model = AutoModelForCausalLM.from_pretrained(policy_path, quantization_config=quantization_config(method))
    before = model.base_model(input_ids=IDS).last_hidden_state
    policy = get_peft_model(model, lora())
    base = frozen_base(policy)
    assert torch.equal(base(input_ids=IDS).last_hidden_state, before)
    assert tensors_of(base).keys() <= tensors_of(policy).keys()
    layer, own = (m.layers[0].mlp.up_proj for m in (base, policy.get_base_model().model))
    assert layer is own.base_layer  # with what a quantized layer keeps beside its weight
    critic = get_peft_model(base, lora())
    assert type(critic.get_base_model().layers[0].mlp.up_proj) is type(own)


def test_a_base_that_trains_is_refused(policy):
    with pytest.raises(ValueError, match="bias='none'"):
        frozen_base(get_peft_model(build_biased(), lora(bias="all")))


def build_biased():
    model_class, config = DECODERS["qwen2"]
    return model_class(copy.deepcopy(config))


def test_dropout_is_each_models_own():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.9))
    policy = get_peft_model(model, lora()).train()
    base = frozen_base(policy).eval()
    assert torch.equal(base(input_ids=IDS).last_hidden_state, base(input_ids=IDS).last_hidden_state)
    assert policy.training and policy.get_base_model().transformer.h[0].mlp.dropout.training


# --- Gradients ---


def loss_of(logits, values):
    """Sums the policy's log-probabilities and the critic's values, each weighted at random."""
    generator = torch.Generator().manual_seed(3)
    weights, targets = torch.randn(2, *IDS[:, 1:].shape, generator=generator)
    logps = logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None]).squeeze(2)
    return (weights * logps).sum(), (values[:, 1:] - targets).square().sum()


def policy_with_critic(tokenizer):
    """A policy with an adapter, and a critic with one on the same base, both far from their start."""
    torch.manual_seed(5)
    policy = get_peft_model(build_policy(tokenizer), lora())
    critic = critic_as_adapter(policy)
    with torch.no_grad():
        for parameter in critic.own_parameters():
            parameter.normal_(0, 0.2)
    return policy, critic


def own_gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def reference_gradients(policy, critic):
    """Each model with a copy of the base of its own, and its backward pass by itself, without checkpointing."""
    policy, critic = copy.deepcopy(policy), copy.deepcopy(critic)
    policy.zero_grad(), critic.zero_grad()
    loss_of(policy(input_ids=IDS).logits, torch.zeros(IDS.shape))[0].backward()
    loss_of(torch.zeros(*IDS.shape, 27), critic(None, None, last_states(IDS, torch.ones_like(IDS), IDS.size(1))))[
        1
    ].backward()
    return own_gradients(policy), own_gradients(critic)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradients_are_those_of_two_bases(tokenizer, checkpointing):
    policy, critic = policy_with_critic(tokenizer)
    expected = reference_gradients(policy, critic)
    for model in (policy, critic.trunk):
        model.train()
        if checkpointing is not None:
            model.activation_checkpointing_enable(checkpointing)
            model.enable_input_require_grads()
    for _ in range(2):  # accumulated over two micro-batches
        logits = policy(input_ids=IDS, use_cache=False).logits
        sum(loss_of(logits, critic(policy, None, last_states(IDS, torch.ones_like(IDS), IDS.size(1))))).backward()
    for gradients, module in zip(expected, (policy, critic), strict=True):
        actual = own_gradients(module)
        assert actual.keys() == gradients.keys() and len(gradients) > 10
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e-4
            torch.testing.assert_close(
                actual[name], 2 * gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def naive_policy_with_critic(tokenizer):
    """The same two adapters in one tree of PEFT, between which it switches."""
    policy, critic = policy_with_critic(tokenizer)
    expected = reference_gradients(policy, critic)
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    policy.add_adapter("critic", lora())
    prefix = "base_model.model."
    own = dict(critic.trunk.named_parameters())
    with torch.no_grad():
        for name in names:
            there = name.replace(f"{prefix}model.", prefix)
            policy.get_parameter(name.replace(".default.", ".critic.")).copy_(own[there])

    def values():
        return critic.value_head(policy.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state)

    named = {
        name.replace(".default.", ".critic."): expected[1]["trunk." + name.replace(f"{prefix}model.", prefix)]
        for name in names
    }
    return policy, values, named


def test_leaving_an_adapters_context_loses_gradients(tokenizer):
    """The first silent failure of switching, which is why nothing is switched."""
    policy, values, expected = naive_policy_with_critic(tokenizer)
    policy.train()
    with use_adapter(policy, "critic"):
        value = values()
    sum(loss_of(policy(input_ids=IDS).logits, value)).backward()
    assert all(policy.get_parameter(name).grad is None for name in expected)


def test_checkpointing_recomputes_under_the_wrong_adapter(tokenizer):
    """The second: with both kept trainable gradients do come, but of the wrong function."""
    policy, values, expected = naive_policy_with_critic(tokenizer)
    policy.train()

    def gradients():
        policy.zero_grad()
        policy.base_model.set_adapter("critic")
        policy.base_model.set_requires_grad(["default", "critic"])
        value = values()
        policy.base_model.set_adapter("default")
        policy.base_model.set_requires_grad(["default", "critic"])
        sum(loss_of(policy(input_ids=IDS, use_cache=False).logits, value)).backward()
        grads = {name: policy.get_parameter(name).grad for name in expected}
        return {name: torch.zeros(()) if g is None else g for name, g in grads.items()}

    right = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(right[name], gradient, atol=1e-5, rtol=1e-4)
    policy.activation_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    wrong = gradients()
    errors = [(wrong[name] - gradient).abs().max() / gradient.abs().max() for name, gradient in expected.items()]
    assert max(errors) > 0.1


def test_policy_and_critic_do_not_feel_each_other(policy_path, prompts, tmp_path):
    """With the critic's learning rate at 0 the policy is trained the same whatever `vf_coef` is; with a `shared` trunk not."""
    results = {}
    for critic in ("adapter", "shared"):
        for vf_coef in (0.1, 10.0):
            args = settings(tmp_path, critic=critic, vf_coef=vf_coef, critic_learning_rate=0.0, max_steps=3)
            args |= {"max_grad_norm": 0.0, "scale_advantages": False, "critic_detach": critic != "shared"}
            torch.manual_seed(0)
            trainer = PPOTrainer(policy_path, count_good, PPOConfig(**args), prompts, peft_config=lora())
            with torch.no_grad():
                trainer.critic.value_head.weight.fill_(0.3)
            trainer.train()
            weights = {n: p.detach() for n, p in trainer.model.named_parameters() if "lora" in n and "critic" not in n}
            results.setdefault(critic, []).append(weights)
    assert all(torch.equal(w, results["adapter"][1][name]) for name, w in results["adapter"][0].items())
    assert not all(torch.equal(w, results["shared"][1][name]) for name, w in results["shared"][0].items())


def test_a_critics_adapter_costs_its_own_weights_only(policy_path, prompts, tmp_path):
    counts = {}
    for critic in ("shared", "adapter"):
        args = A2CConfig(**settings(tmp_path, critic=critic))
        trainer = A2CTrainer(policy_path, count_good, args, prompts, peft_config=lora())
        counts[critic] = sum(t.numel() for t in tensors_of(trainer.model).values())
    policy = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora" in n and "critic" not in n)
    assert counts["adapter"] - counts["shared"] == policy


# --- Saving ---


def test_a_critics_adapter_is_restored_to_the_bit(tokenizer, tmp_path):
    policy, critic = policy_with_critic(tokenizer)
    critic.save(tmp_path)
    other = critic_as_adapter(policy)
    other.restore(tmp_path)
    mask = torch.ones_like(IDS)
    assert torch.equal(token_values(policy, other, IDS, mask), token_values(policy, critic, IDS, mask))
    larger = critic_as_adapter(get_peft_model(build_policy(tokenizer), lora(r=8)))
    with pytest.raises(ValueError, match="does not fit the critic's.*Use the same rank"):
        larger.restore(tmp_path)
    Critic(16, trunk=build_policy(tokenizer).model).save(tmp_path)  # of another kind, in the same folder
    with pytest.raises(FileNotFoundError, match="critic of kind 'adapter'"):
        other.restore(tmp_path)


@pytest.mark.parametrize(
    "peft_config",
    [
        lora(init_lora_weights=True),
        lora(init_lora_weights=True, use_dora=True),
        lora(init_lora_weights=True, target_modules=["q_proj", "embed_tokens"]),
        lora(init_lora_weights=True, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 6]}),
        lora(init_lora_weights=True, target_modules=r".*layers\.1\..*_proj", rank_pattern={"q_proj": 2}),
        IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    ],
    ids=["lora", "dora", "embeddings", "tokens", "patterns", "ia3", "vera"],
)
def test_resuming_equals_not_stopping(policy_path, prompts, tmp_path, peft_config):
    def trainer(**overrides):
        torch.manual_seed(0)
        args = PPOConfig(**settings(tmp_path, critic="adapter", max_steps=6, seed=3, **overrides))
        return PPOTrainer(policy_path, count_good, args, prompts, peft_config=copy.deepcopy(peft_config))

    straight = trainer(save_strategy="steps", save_steps=3)
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert set(resumed.model.peft_config) == {"default"}  # the critic's is not taken for one of the policy's
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    straight.save_model()
    base = AutoModelForCausalLM.from_pretrained(policy_path)
    policy = PeftModel.from_pretrained(base, str(tmp_path))
    critic = load_critic(policy, str(tmp_path))
    values = [
        token_values(m.eval(), c.eval(), IDS, torch.ones_like(IDS))
        for m, c in ((policy, critic), (straight.model, straight.critic))
    ]
    assert torch.equal(*values)


def test_the_critics_adapter_is_of_the_policys_kind_and_size():
    model_class, config = DECODERS["qwen2"]
    patterns = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"q_proj": 20}}
    policy = get_peft_model(model_class(copy.deepcopy(config)), lora(use_rslora=True, **patterns))
    critic = critic_as_adapter(policy)
    own = dict(critic.trunk.get_base_model().named_modules())
    layers = {n: m for n, m in policy.get_base_model().model.named_modules() if isinstance(m, LoraLayer)}
    assert len({(m.r["default"], m.scaling["default"]) for m in layers.values()}) == 3
    for name, layer in layers.items():
        assert (own[name].r, own[name].scaling) == (layer.r, layer.scaling)


def test_a_critics_adapter_is_tied_to_no_head(tokenizer):
    """PEFT notes in the config what it tied, and would tie it again in a trunk that has no head."""
    base = build_policy(tokenizer, tie_word_embeddings=True)
    policy = get_peft_model(base, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    trunk = critic_as_adapter(policy).trunk
    assert trunk.get_input_embeddings().weight is base.get_input_embeddings().original_module.weight
    assert sum("lora_A" in name for name, _ in trunk.named_parameters()) == 14


def test_experts_that_are_parameters_are_left_as_they_are(prompts, tmp_path, tokenizer):
    """By `target_parameters`; the critic's adapter has them too."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **{**SIZES, "vocab_size": len(tokenizer)},
        intermediate_size=32,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )
    peft_config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    policy = get_peft_model(Qwen3MoeForCausalLM(config), peft_config)
    critic = critic_as_adapter(policy)
    trained = {name for name, p in critic.trunk.get_base_model().named_parameters() if p.requires_grad}
    assert any("experts" in name for name in trained) and any("q_proj" in name for name in trained)
    assert trained == {
        name.removeprefix("model.") for name, p in policy.get_base_model().named_parameters() if p.requires_grad
    }


def test_saving_the_model_oneself_leaves_the_critic_out(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, critic="adapter"))
    trainer = A2CTrainer(policy_path, count_good, args, prompts, peft_config=lora())
    trainer.model.save_pretrained(tmp_path / "own")
    assert not [name for name in load_file(tmp_path / "own" / "adapter_model.safetensors") if "critic" in name]


# --- Reward adapters ---


@pytest.fixture(scope="module")
def reward_adapter(policy_path, tmp_path_factory):
    """Folder of a trained reward adapter on the policy's base, and its trainer."""
    folder = str(tmp_path_factory.mktemp("reward_adapter"))
    args = RankingRewardConfig(**ranking_settings(folder, max_steps=4))
    trainer = RankingRewardTrainer(
        policy_path, args, train_dataset=Dataset.from_dict(RANKINGS), peft_config=lora(init_lora_weights=True)
    )
    trainer.train()
    trainer.save_model()
    return folder, trainer


def test_a_reward_adapter_is_put_on_the_policys_base(reward_adapter, policy_path, prompts, tmp_path):
    folder, trained = reward_adapter
    args = PPOConfig(**settings(tmp_path, kl_in_reward=0.05, critic="adapter", max_steps=2))
    trainer = recorded(PPOTrainer)(
        policy_path,
        [folder, count_good],
        args,
        prompts,
        peft_config=lora(),
    )
    reward_model = trainer.reward_funcs[0]
    own = tensors_of(reward_model).keys() - tensors_of(trainer.model).keys()
    names = {n for n, t in [*reward_model.named_parameters(), *reward_model.named_buffers()] if id(t) in own}
    assert names and all("lora" in name or "score" in name for name in names)
    trainer.train()
    assert [f"rewards/{name}/mean" in trainer.state.log_history[0] for name in trainer.reward_func_names] == [True] * 2
    trained.model.eval()
    with torch.no_grad():
        expected = trained.model(input_ids=IDS).logits
        assert torch.equal(reward_model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("policy_kind", ["full", "other base"])
def test_a_reward_adapter_elsewhere_is_a_model_of_its_own(
    reward_adapter, policy_path, tokenizer, prompts, tmp_path, policy_kind
):
    """A policy that trains its base shares nothing of it, nor does one on another base."""
    folder, trained = reward_adapter
    if policy_kind == "other base":
        policy_path = str(tmp_path / "base")
        build_policy(tokenizer, seed=9).save_pretrained(policy_path)
        tokenizer.save_pretrained(policy_path)
    peft_config = lora() if policy_kind == "other base" else None
    trainer = PPOTrainer(policy_path, folder, PPOConfig(**settings(tmp_path)), prompts, peft_config=peft_config)
    assert not tensors_of(trainer.reward_funcs[0]).keys() & tensors_of(trainer.model).keys()
    trained.model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.reward_funcs[0](input_ids=IDS).logits, trained.model(input_ids=IDS).logits)
    trainer.train()


@pytest.mark.parametrize("by_name", [False, True])
def test_a_critic_starts_from_a_reward_adapter(reward_adapter, policy_path, prompts, tmp_path, by_name):
    """Then V of a whole text is its reward, whatever size and scaling the policy's adapter has."""
    folder, trained = reward_adapter
    path = "reward_model" if by_name else folder
    args = A2CConfig(**settings(tmp_path, critic="adapter", critic_model_name_or_path=path))
    peft_config = lora(r=2, lora_alpha=1, target_modules=["q_proj"])
    trainer = A2CTrainer(policy_path, [count_good, folder], args, prompts, peft_config=peft_config)
    trained.model.eval(), trainer.model.eval()
    with torch.no_grad():
        rewards = trained.model(input_ids=IDS).logits.squeeze(1)
    values = token_values(trainer.model, trainer.critic, IDS, torch.ones_like(IDS))
    torch.testing.assert_close(values[:, -1], rewards, atol=1e-6, rtol=1e-5)


def test_bits_that_the_reward_was_not_trained_on_are_told(reward_adapter, policy_path, prompts, tmp_path, caplog):
    folder, _ = reward_adapter
    for method, is_told in (("lora", False), ("4bit", True)):
        kwargs = {"peft_config": lora(), "quantization_config": quantization_config(method)}
        trainer = PPOTrainer(policy_path, folder, PPOConfig(**settings(tmp_path)), prompts, **kwargs)
        assert tensors_of(trainer.reward_funcs[0]).keys() & tensors_of(trainer.model).keys()
        assert ("was trained on its base in full precision" in caplog.text) == is_told
    assert "with the policy's, in 4bit (nf4)" in caplog.text


def test_a_base_that_was_changed_is_not_shared(reward_adapter, policy_path, prompts, tmp_path):
    """PiSSA takes the adapter's start off the base."""
    folder, trained = reward_adapter
    args = PPOConfig(**settings(tmp_path))
    trainer = PPOTrainer(policy_path, folder, args, prompts, peft_config=lora(init_lora_weights="pissa"))
    trained.model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.reward_funcs[0](input_ids=IDS).logits, trained.model(input_ids=IDS).logits)


def test_an_encoders_reward_adapter_is_taken(tokenizer, policy_path, prompts, tmp_path):
    path, folder = str(tmp_path / "encoder"), str(tmp_path / "adapter")
    build_encoder(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    args = RankingRewardConfig(**ranking_settings(folder))
    peft_config = lora(target_modules=["query"], init_lora_weights=True)
    trained = RankingRewardTrainer(path, args, train_dataset=Dataset.from_dict(RANKINGS), peft_config=peft_config)
    trained.train()
    trained.save_model()
    trainer = PPOTrainer(policy_path, folder, PPOConfig(**settings(tmp_path)), prompts, peft_config=lora())
    trained.model.eval()
    with torch.no_grad():
        assert torch.equal(trainer.reward_funcs[0](input_ids=IDS).logits, trained.model(input_ids=IDS).logits)
    trainer.train()


def test_a_head_on_a_half_precision_base_keeps_its_precision(reward_adapter, policy_path, prompts, tmp_path):
    folder, _ = reward_adapter
    args = PPOConfig(**settings(tmp_path, model_init_kwargs={"dtype": "bfloat16"}))
    trainer = PPOTrainer(policy_path, folder, args, prompts, peft_config=lora())
    head = trainer.reward_funcs[0].get_base_model().score.modules_to_save["default"]
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, load_file(f"{folder}/adapter_model.safetensors")["base_model.model.score.weight"])
    with torch.no_grad():
        assert trainer.reward_funcs[0](input_ids=IDS).logits.isfinite().all()


# --- Refusals ---


def test_a_critic_cannot_start_from_a_reward_adapter_of_another_base(reward_adapter, tokenizer, prompts, tmp_path):
    path = str(tmp_path / "other")
    build_policy(tokenizer, seed=9).save_pretrained(path)
    tokenizer.save_pretrained(path)
    args = A2CConfig(**settings(tmp_path, critic="adapter", critic_model_name_or_path=reward_adapter[0]))
    with pytest.raises(ValueError, match="was trained on another base than the policy's"):
        A2CTrainer(path, count_good, args, prompts, peft_config=lora())
    args = A2CConfig(**settings(tmp_path, critic="adapter", critic_model_name_or_path="reward_model"))
    with pytest.raises(ValueError, match="takes the critic from a reward adapter in `reward_funcs`"):
        A2CTrainer(path, count_good, args, prompts, peft_config=lora())


def test_reward_adapters_that_do_not_fit_are_refused(reward_adapter, policy_path, tokenizer, prompts, tmp_path):
    headless, wider = tmp_path / "headless", tmp_path / "wider"
    model = LlamaForSequenceClassification.from_pretrained(policy_path, num_labels=1)
    for targets in (["q_proj"], ["q_proj", "score"]):  # with an adapter on a head that is not there
        get_peft_model(copy.deepcopy(model), lora(target_modules=targets)).save_pretrained(headless)
        with pytest.raises(ValueError, match="adapter without a score head.*task_type='SEQ_CLS'"):
            PPOTrainer(policy_path, str(headless), PPOConfig(**settings(tmp_path)), prompts, peft_config=lora())
    # Trained on something else than what it names
    model = LlamaForSequenceClassification(
        tiny_config(tokenizer, num_labels=1, hidden_size=32, name_or_path=policy_path)
    )
    get_peft_model(model, lora(task_type="SEQ_CLS")).save_pretrained(wider)
    tokenizer.save_pretrained(wider)
    with pytest.raises(ValueError, match="does not fit .*which it names as its base"):
        PPOTrainer(policy_path, str(wider), PPOConfig(**settings(tmp_path)), prompts, peft_config=lora())
    config = json.loads((wider / "adapter_config.json").read_text())
    (wider / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="Set `base_model_name_or_path`"):
        PPOTrainer(policy_path, str(wider), PPOConfig(**settings(tmp_path)), prompts, peft_config=lora())


@pytest.mark.parametrize(
    "peft_config", [None, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)], ids=["full", "prefix"]
)
def test_a_critics_adapter_needs_a_frozen_base(policy_path, prompts, tmp_path, peft_config):
    args = A2CConfig(**settings(tmp_path, critic="adapter"))
    with pytest.raises(ValueError, match="this policy has none. Pass a `peft_config`"):
        A2CTrainer(policy_path, count_good, args, prompts, peft_config=peft_config)


def test_an_adapter_is_no_start_of_a_separate_critic(reward_adapter, policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, critic="separate", critic_model_name_or_path=reward_adapter[0]))
    with pytest.raises(ValueError, match="is an adapter, which a separate critic cannot start from"):
        A2CTrainer(policy_path, count_good, args, prompts)


def test_a_critics_adapter_starts_from_nothing_else(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, critic="adapter", critic_model_name_or_path=policy_path))
    with pytest.raises(ValueError, match="neither a critic that is an adapter.*nor a reward adapter"):
        A2CTrainer(policy_path, count_good, args, prompts, peft_config=lora())


def test_other_tuners_have_critics_too(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, critic="adapter", max_steps=4))
    config = IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    trainer = A2CTrainer(policy_path, count_good, args, prompts, peft_config=config)
    start = {name: p.detach().clone() for name, p in trainer.critic.trunk.named_parameters() if p.requires_grad}
    trainer.train()
    assert start and any(not torch.equal(p, trainer.critic.trunk.get_parameter(name)) for name, p in start.items())
