"""NLPO: sampling, ratio and KL within the nucleus of a snapshot that is renewed."""

import contextlib
import copy
import functools
import logging
import math
import types

import pytest
import torch
from datasets import Dataset
from helpers import IDS, build_policy, quantization_config, recorded, settings, tiny_settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    TopPLogitsWarper,
)

from trl_ext import NLPOConfig, NLPOTrainer, PPOConfig, PPOTrainer
from trl_ext.algorithms.masking_policy import Mask, MaskingProcessor, refresh, snapshot, trained_weights
from trl_ext.models.lm_head import logits_of
from trl_ext.token_mdp.nucleus import masked_log_probs, nucleus


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def lora(**overrides):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **overrides})


def make(policy_path, tmp_path, prompts, kwargs=None, trainer_class=NLPOTrainer, **overrides):
    overrides = {"top_p_mask": 0.5, "min_tokens_to_keep": 2, "mask_update_steps": 1, **overrides}
    args = NLPOConfig(**settings(tmp_path, **overrides))
    return recorded(trainer_class)(policy_path, length, args, prompts, **(kwargs or {}))


# --- The nucleus ---


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=30), st.floats(0.05, 0.99))
@hypothesis_settings(max_examples=200, deadline=None)
def test_the_nucleus_is_that_of_transformers(logits, top_p):
    logits = torch.tensor([logits])
    probabilities = logits.softmax(-1)
    ours = nucleus(logits, top_p)
    assert probabilities[ours].sum() >= top_p - 1e-5
    # The smallest that reaches p, of the most likely
    assert probabilities[ours].sum() - probabilities[ours].min() < top_p + 1e-5
    assert not (~ours).any() or probabilities[ours].min() >= probabilities[~ours].max() - 1e-7
    sums = probabilities.sort(descending=True).values.cumsum(-1)
    is_ambiguous = (sums - top_p).abs().min() < 1e-4 or len(logits.unique()) < logits.numel()
    if not is_ambiguous:
        assert torch.equal(ours, TopPLogitsWarper(top_p=top_p)(None, logits.clone()).isfinite())


def test_some_tokens_are_always_in():
    logits = torch.tensor([[9.0, 0.0, -1.0, -2.0, -9.0]])
    assert nucleus(logits, 0.5).tolist() == [[True, False, False, False, False]]
    assert nucleus(logits, 0.5, min_tokens_to_keep=3).tolist() == [[True, True, True, False, False]]
    assert nucleus(logits, 0.5, always=torch.tensor([4])).tolist() == [[True, False, False, False, True]]
    assert nucleus(logits, 1.0).all()
    # Of ids that tokenizers have and models no logits of
    assert nucleus(logits, 0.5, always=torch.tensor([5, 4, 999])).tolist() == [[True, False, False, False, True]]


@given(st.lists(st.tuples(st.floats(-8, 8), st.booleans()), min_size=2, max_size=12))
@hypothesis_settings(max_examples=100, deadline=None)
def test_masked_probabilities_sum_to_1(row):
    logits = torch.tensor([x for x, _ in row], dtype=torch.float64)
    allowed = torch.tensor([inside for _, inside in row])
    allowed[0] = True
    tokens = allowed.nonzero()[:, 0]
    log_probs, entropy = masked_log_probs(logits.expand(len(tokens), -1), allowed.expand(len(tokens), -1), tokens)
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert entropy[0].item() == pytest.approx(-(log_probs.exp() * log_probs).sum().item(), abs=1e-5)
    weights = logits.exp()[tokens] / logits.exp()[tokens].sum()
    assert log_probs.exp().tolist() == pytest.approx(weights.tolist(), abs=1e-5)


# --- The snapshot ---


def test_a_snapshot_shares_what_is_frozen_and_keeps_what_was(tokenizer):
    model = get_peft_model(build_policy(tokenizer), lora()).eval()
    before = model(input_ids=IDS).logits
    copied = snapshot(model)
    own = {id(p) for p in copied.parameters()} - {id(p) for p in model.parameters()}
    names = [name for name, p in copied.named_parameters() if id(p) in own]
    assert names and all("lora" in name for name in names)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert torch.equal(copied(input_ids=IDS).logits, before)
    refresh(copied, trained_weights(model))
    assert torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not torch.equal(copied(input_ids=IDS).logits, before)


def put_forward(model):
    """In the way of TRL's `cast_lm_head_to_fp32`: a function that knows the head."""
    head = model.lm_head

    def forward(hidden_states):
        return 2 * torch.nn.functional.linear(hidden_states.double(), head.weight.double()).float()

    head.forward = forward


def put_wrapper(model):
    """In the way of TRL's fused LM head and of accelerate: around what was there."""
    forward = model.forward

    @functools.wraps(forward)
    def doubled(self, *args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = types.MethodType(doubled, model)


def put_partial(model):
    model.lm_head.forward = functools.partial(scaled, model.lm_head, scale=2)


def scaled(head, hidden_states, scale):
    return torch.nn.functional.linear(hidden_states, scale * head.weight)


GLOBAL = {}


def put_script(model):
    """In the way of a script, whose functions know the model by a global name."""
    exec("model.lm_head.forward = lambda x: 2 * (x @ model.lm_head.weight.T)", scope := {"model": model})
    GLOBAL["scope"] = scope


def put_hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * model.lm_head.weight.norm())


@pytest.mark.parametrize("put", [put_forward, put_wrapper, put_partial, put_script, put_hook])
def test_a_snapshot_has_what_was_put_on_the_model(tokenizer, put):
    """And it runs on the snapshot's own weights."""
    model = build_policy(tokenizer).eval()
    plain = model(input_ids=IDS).logits
    put(model)
    before = model(input_ids=IDS).logits
    assert not torch.allclose(before, plain)
    copied = snapshot(model)
    assert torch.equal(copied(input_ids=IDS).logits, before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(copied(input_ids=IDS).logits, before)
    refresh(copied, trained_weights(model))
    assert torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not torch.equal(copied(input_ids=IDS).logits, before)


def test_a_snapshot_does_not_copy_what_its_hooks_are_methods_of(tokenizer):
    class Recorder:
        calls = 0

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def record(self, module, args, output):
            self.calls += 1

    model, recorder = build_policy(tokenizer), Recorder()
    model.lm_head.register_forward_hook(recorder.record)
    handle = model.lm_head.register_forward_hook(lambda *args: pytest.fail("left out"))
    copied = snapshot(model, left_out={handle.id})
    copied(input_ids=IDS)
    assert recorder.calls == 1


def test_the_snapshot_is_of_a_head_in_float32(tokenizer, prompts, tmp_path):
    """`cast_lm_head_to_fp32` puts a forward on the head and, of tied embeddings, a hook on these."""
    policy = build_policy(tokenizer, tie_word_embeddings=True).to(torch.bfloat16)
    args = NLPOConfig(
        **settings(tmp_path, top_p_mask=0.5, max_steps=2, mask_update_steps=5, cast_lm_head_to_fp32=True)
    )
    trainer = NLPOTrainer(policy, length, args, prompts, processing_class=tokenizer)
    states = torch.ones(1, 16, dtype=torch.bfloat16)
    before = logits_of(trainer._mask.model, states)
    trainer.train()
    after, live = logits_of(trainer._mask.model, states), logits_of(trainer.model, states)
    assert torch.equal(before, after) and not torch.equal(before, live)
    assert trainer._mask.model.model.embed_tokens(IDS).dtype == torch.bfloat16


# --- Sampling and scoring ---


METHODS = ["full", "lora", "4bit"]


def kwargs_of(method):
    return {} if method == "full" else {"peft_config": lora(), "quantization_config": quantization_config(method)}


def sequence_of(batch, row):
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
    return torch.cat([prompt, completion])[None], len(prompt)


@torch.no_grad()
def distributions(trainer, batch, row, temperature=1.0):
    """Returns for a row's completion tokens those allowed, and the masked policy, by whole models (both `(T, V)`)."""
    ids, start = sequence_of(batch, row)
    trainer.model.eval()
    states = (
        trainer._mask.model.get_base_model() if hasattr(trainer._mask.model, "get_base_model") else trainer._mask.model
    )
    masking_logits = states.lm_head(states.model(input_ids=ids).last_hidden_state)[0, start - 1 : -1]
    probabilities = masking_logits.softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True)
    allowed = torch.zeros_like(probabilities, dtype=torch.bool)
    for t in range(len(probabilities)):  # by the definition, one token after the other
        total, kept = 0.0, 0
        for token in order[t].tolist():
            if total < trainer.args.top_p_mask or kept < trainer.args.min_tokens_to_keep:
                allowed[t, token] = True
                total, kept = total + probabilities[t, token].item(), kept + 1
    allowed[:, trainer.processing_class.all_special_ids] = True
    policy = (trainer.model(input_ids=ids).logits[0, start - 1 : -1] / temperature).softmax(-1) * allowed
    return ids[0, start:], allowed, policy / policy.sum(-1, keepdim=True)


@pytest.mark.parametrize("method", METHODS)
def test_sampled_tokens_lie_inside_and_are_scored_within(policy_path, prompts, tmp_path, method):
    overrides = {
        "max_steps": 1,
        "learning_rate": 0.0,
        "critic_learning_rate": 0.0,
        "temperature": 0.7,
        "kl_in_reward": 0.1,
    }
    trainer = make(policy_path, tmp_path, prompts, kwargs_of(method), num_iterations=2, **overrides)
    trainer.train()
    (batch,) = trainer.rollouts
    for row in range(len(batch["completion_ids"])):
        tokens, allowed, policy = distributions(trainer, batch, row, temperature=0.7)
        assert allowed[torch.arange(len(tokens)), tokens].all()
        assert allowed.sum(1).max() < allowed.size(1)  # it did mask
        expected = policy[torch.arange(len(tokens)), tokens].log()
        actual = batch["old_per_token_logps"][row][: len(tokens)]
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
        if method != "full":  # whose reference is a model of its own; both within the mask
            with trainer.model.disable_adapter():
                _, _, reference = distributions(trainer, batch, row, temperature=0.7)
            expected = reference[torch.arange(len(tokens)), tokens].log()
            torch.testing.assert_close(
                batch["ref_per_token_logps"][row][: len(tokens)], expected, atol=2e-5, rtol=1e-4
            )
    logs = trainer.state.log_history[0]
    assert logs["first_step/ratio_deviation"] == 0 and logs["ratio/max"] == 1
    assert logs["mask/forced"] == 0
    if method == "full":
        assert abs(logs["kl/k3"]) < 1e-9


def test_the_mask_is_needed(policy_path, prompts, tmp_path):
    """Without it the same policy leaves the nucleus: the test above can fail."""
    trainer = make(policy_path, tmp_path, prompts, max_steps=1, learning_rate=0.0, critic_learning_rate=0.0)
    args = PPOConfig(**settings(tmp_path, max_steps=1, learning_rate=0.0, critic_learning_rate=0.0))
    free = recorded(PPOTrainer)(policy_path, length, args, prompts)
    free.train()
    outside = 0
    for row in range(len(free.rollouts[0]["completion_ids"])):
        tokens, allowed, _ = distributions(trainer, free.rollouts[0], row)
        outside += (~allowed[torch.arange(len(tokens)), tokens]).sum().item()
    assert outside > 3


def state_space_models(tokenizer):
    common = tiny_settings(tokenizer)
    recurrent = {"lru_width": 16, "head_dim": 8, "block_types": ("recurrent", "attention"), "logits_soft_cap": 30.0}
    both = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}
    return {
        "mamba": lambda: MambaForCausalLM(MambaConfig(**common, state_size=4)),
        "recurrent": lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**common, **recurrent)),
        "hybrid": lambda: FalconH1ForCausalLM(FalconH1Config(**common, **both)),
    }


def test_special_tokens_without_logits_are_no_actions(policy_path, tokenizer, prompts, tmp_path):
    """As Gemma 3 1B's `<image_soft_token>`, or a token that was added and never used."""
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert max(larger.all_special_ids) == len(tokenizer)
    trainer = make(policy_path, tmp_path, prompts, {"processing_class": larger}, max_steps=1)
    trainer.train()
    assert trainer.rollouts[0]["completion_ids"].max() < len(tokenizer)


@pytest.mark.parametrize("family", ["mamba", "recurrent", "hybrid"])
def test_models_with_states_are_masked_by_all_they_have_read(tokenizer, tmp_path, caplog, family):
    torch.manual_seed(0)
    policy = state_space_models(tokenizer)[family]()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    # Of one length: RecurrentGemma has states of padding as well
    prompts = Dataset.from_dict(
        {"prompt": ["the film was dull", "it was a good", "the ending is sad", "a slow plot and"]}
    )
    still = {"max_steps": 1, "learning_rate": 0.0, "critic_learning_rate": 0.0, "num_iterations": 2}
    args = NLPOConfig(**settings(tmp_path, top_p_mask=0.3, min_tokens_to_keep=1, **still))
    trainer = recorded(NLPOTrainer)(policy, length, args, prompts, processing_class=tokenizer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (batch,) = trainer.rollouts
    always = torch.tensor(tokenizer.all_special_ids)
    policy.eval()
    inside = []
    for row in range(len(batch["completion_ids"])):
        ids, start = sequence_of(batch, row)
        with torch.no_grad():
            logits = policy(input_ids=ids).logits[0, start - 1 : -1].float()
        allowed, tokens = nucleus(logits, 0.3, 1, always), ids[0, start:]
        inside += [
            sum(p for p, is_in in zip(*x, strict=True) if is_in) for x in zip(logits.softmax(-1), allowed, strict=True)
        ]
        assert allowed.gather(1, tokens.unsqueeze(1)).all() and not allowed.all()
        expected = masked_log_probs(logits, allowed, tokens)[0]
        torch.testing.assert_close(batch["old_per_token_logps"][row][: len(tokens)], expected, atol=1e-4, rtol=1e-4)
    assert trainer.state.log_history[0]["mask/forced"] == 0
    assert trainer.state.log_history[0]["mask/inside"] == pytest.approx(sum(inside).item() / len(inside), abs=1e-4)
    again = [message for message in caplog.messages if "reads the whole text again for each token" in message]
    assert len(again) == (family == "recurrent")


def test_a_cache_that_is_not_taken_up_is_done_without(tokenizer, caplog):
    """A release that renames the argument once more would do so."""
    model = build_policy(tokenizer).eval()
    mask = Mask(model, 0.5, 1, torch.tensor([0]), contextlib.nullcontext)
    processor = MaskingProcessor(mask, torch.ones_like(IDS[:, :2]))
    forward = model.model.forward

    def forgetful(**kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name not in ("cache", "past_key_values")}
        return forward(**kwargs)

    model.model.forward = functools.wraps(forward)(forgetful)
    with caplog.at_level(logging.WARNING):
        for end in range(2, IDS.size(1) + 1):
            scores = processor(IDS[:, :end], torch.zeros(len(IDS), len(tokenizer)))
            expected = nucleus(model(input_ids=IDS[:, :end]).logits[:, -1], 0.5, 1, torch.tensor([0]))
            assert torch.equal(scores == 0, expected)
    (warning,) = [message for message in caplog.messages if "reads the whole text again" in message]
    assert "states" in warning and "`max_completion_length`" in warning


def test_gradients_are_those_of_the_masked_policy(policy_path, prompts, tmp_path):
    """By autograd through the whole vocabulary at once, where the trainer goes chunk by chunk."""
    trainer = make(policy_path, tmp_path, prompts, max_steps=1, learning_rate=0.0, critic_learning_rate=0.0)
    trainer.train()
    (batch,) = trainer.rollouts
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    num_tokens = batch["completion_ids"].size(1)
    trainer.model.train()
    trainer.model.zero_grad()
    weights = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
    weights = weights * batch["completion_mask"]
    outputs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, num_tokens, compute_entropy=True)
    (weights * (outputs[0] + 0.3 * outputs[1])).sum().backward()
    actual = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    trainer.model.zero_grad()
    total = 0
    for row in range(len(ids)):
        tokens, allowed, _ = distributions(trainer, batch, row)
        sequence, start = sequence_of(batch, row)
        logits = trainer.model(input_ids=sequence).logits[0, start - 1 : -1]
        log_probs = logits.masked_fill(~allowed, -1e9).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
        chosen = log_probs[torch.arange(len(tokens)), tokens]
        total = total + (weights[row, : len(tokens)] * (chosen + 0.3 * entropy)).sum()
    total.backward()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, trainer.model.get_parameter(name).grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_whole_vocabulary_is_ppo(policy_path, prompts, tmp_path, use_peft):
    """Bit for bit, with the random numbers of `generate` in both."""
    results = []
    common = {"kl_in_reward": 0.05, "max_steps": 6, "num_iterations": 2, "compact_generation": False}
    for trainer_class, config in (
        (PPOTrainer, PPOConfig(**settings(tmp_path, **common))),
        (NLPOTrainer, NLPOConfig(**settings(tmp_path, top_p_mask=1.0, **common))),
    ):
        torch.manual_seed(0)
        kwargs = {"peft_config": lora()} if use_peft else {}
        trainer = trainer_class(policy_path, length, config, prompts, **kwargs)
        trainer.train()
        results.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(weight, results[1][name]) for name, weight in results[0].items())


def test_a_mask_of_everything_trains_like_ppo(policy_path, prompts, tmp_path):
    """Through the masked path, whose sums run in another order."""
    common = {"kl_in_reward": 0.05, "max_steps": 4, "num_iterations": 2}
    # Both draw from `generate`, which takes random numbers for completions that have ended, too
    ppo = PPOTrainer(policy_path, length, PPOConfig(**settings(tmp_path, compact_generation=False, **common)), prompts)
    ppo.train()
    nlpo = make(policy_path, tmp_path, prompts, top_p_mask=0.5, min_tokens_to_keep=27, **common)
    nlpo.train()
    assert nlpo._mask is not None
    for name, weight in ppo.model.named_parameters():
        torch.testing.assert_close(weight, nlpo.model.get_parameter(name), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mask_in_eval", [False, True])
def test_evaluation_is_unmasked_unless_asked_for(policy_path, prompts, tmp_path, mask_in_eval):
    overrides = {"max_steps": 1, "mask_in_eval": mask_in_eval, "top_p_mask": 0.05, "min_tokens_to_keep": 1}
    trainer = make(policy_path, tmp_path, prompts, {"eval_dataset": prompts}, **overrides)
    trainer.evaluate()
    outside = 0
    for batch in trainer.rollouts:
        for row in range(len(batch["completion_ids"])):
            tokens, allowed, _ = distributions(trainer, batch, row)
            outside += (~allowed[torch.arange(len(tokens)), tokens]).sum().item()
    assert (outside == 0) == mask_in_eval


# --- Renewal ---


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_snapshot_is_renewed_and_survives_a_resume(policy_path, prompts, tmp_path, use_peft):
    def trainer(max_steps, seed=0, **overrides):
        torch.manual_seed(seed)
        kwargs = {"peft_config": lora(init_lora_weights=True)} if use_peft else {}
        overrides = {"max_steps": max_steps, "mask_update_steps": 2, "num_iterations": 1, **overrides}
        return make(policy_path, tmp_path, prompts, kwargs, **overrides)

    weights = []

    class Watched(NLPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            name = next(n for n, p in self.model.named_parameters() if p.requires_grad and "critic" not in n)
            name = name.replace("lora_A", "lora_B")
            weights.append(self._mask.model.get_parameter(name).clone())
            return batch

    torch.manual_seed(0)
    kwargs = {"peft_config": lora(init_lora_weights=True)} if use_peft else {}
    overrides = {
        "max_steps": 6,
        "mask_update_steps": 2,
        "num_iterations": 1,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    straight = make(policy_path, tmp_path, prompts, kwargs, trainer_class=Watched, **overrides)
    straight.train()
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == [False, True, False, True, False]
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    for name, parameter in straight._mask.model.named_parameters():
        assert torch.equal(parameter, resumed._mask.model.get_parameter(name)), name


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_it_trains_with_every_critic(policy_path, prompts, tmp_path, critic):
    overrides = {"critic": critic, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 3}
    trainer = make(policy_path, tmp_path, prompts, {"peft_config": lora()}, **overrides)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(math.isfinite(logs["loss"]) for logs in trainer.state.log_history[:-1])
    assert all(not torch.equal(p, trainer.model.get_parameter(name)) for name, p in start.items() if "lora_B" in name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_runs_in_bf16(policy_path, prompts, tmp_path, dtype):
    overrides = {"bf16": True, "model_init_kwargs": {"dtype": dtype}, "num_iterations": 2, "kl_in_reward": 0.1}
    trainer = make(policy_path, tmp_path, prompts, {"peft_config": lora()}, max_steps=2, **overrides)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert math.isfinite(logs["loss"]) and logs["first_step/ratio_deviation"] < 0.05


# --- Refusals ---


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"top_p_mask": 0.0}, "`top_p_mask` must be above 0"),
        ({"top_p_mask": 1.2}, "`top_p_mask` must be above 0"),
        ({"min_tokens_to_keep": 0}, "`min_tokens_to_keep` must be at least 1"),
        ({"mask_update_steps": 0}, "`mask_update_steps` must be at least 1"),
        ({"use_vllm": True}, "`use_vllm` samples in an engine that takes no such mask"),
        (
            {"use_transformers_continuous_batching": True},
            "`use_transformers_continuous_batching` samples in an engine",
        ),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2. Remove it, or use PPO"),
    ],
)
def test_config_is_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        NLPOConfig(**settings(tmp_path, **overrides))


def test_what_cannot_be_masked_is_refused(policy_path, prompts, tmp_path):
    with pytest.raises(ValueError, match="`rollout_func` samples by itself"):
        make(policy_path, tmp_path, prompts, {"rollout_func": lambda prompts, trainer: {}})
    prompt_tuning = {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}
    with pytest.raises(ValueError, match="virtual tokens of a prompt-tuned policy"):
        make(policy_path, tmp_path, prompts, prompt_tuning)
