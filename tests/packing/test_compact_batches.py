"""Batches without padding, repeated prompts and unscored positions give what whole ones give."""

import inspect
import itertools
from collections import defaultdict
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from helpers import PROMPTS, count_good, scripted_rollout, settings, tiny_settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import _ChunkedLogProbFunction

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    PPOConfig,
    PPOTrainer,
    ReinforceConfig,
    ReinforceTrainer,
)
from trl_ext.actor_critic.compact import CompactForwards
from trl_ext.actor_critic.forward import ForwardPlan
from trl_ext.algorithms import ALGORITHMS
from trl_ext.packing.layout import packed_layout, rows_layout
from trl_ext.packing.micro_batches import by_length, join, select, sizes_by_tokens, sort_windows, trim


OFF = {"length_batches": False, "compact_scoring": False, "compact_generation": False}


def length(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


# --- A training is the same ---


CASES = {
    "a2c": ("a2c", {}),
    "ppo, windows": ("ppo", {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    "ppo": ("ppo", {"num_iterations": 2, "kl_in_reward": 0.1}),
    "ppo, kl in the loss": ("ppo", {"num_iterations": 2, "beta": 0.1}),
    "ppo, bnpo": ("ppo", {"loss_type": "bnpo", "gradient_accumulation_steps": 4}),
    "ppo, entropy": ("ppo", {"entropy_coef": 0.1, "gradient_accumulation_steps": 4}),
    "ppo, masked": ("ppo", {"truncation": "mask", "gradient_accumulation_steps": 4}),
    "ppo, bootstrap": ("ppo", {"truncation": "bootstrap", "num_iterations": 2}),
    "ppo, separate": ("ppo", {"critic": "separate", "gradient_accumulation_steps": 2}),
    "ppo, checkpointing": ("ppo", {"gradient_checkpointing": True, "num_iterations": 2}),
    "ppo, lora": ("ppo", {"num_iterations": 2, "beta": 0.1}),
    "ppo, lora, adapter": ("ppo", {"critic": "adapter", "gradient_checkpointing": True}),
    "q": ("q_actor_critic", {"q_rank": 4, "gradient_accumulation_steps": 2}),
    "q, all actions": ("q_actor_critic", {"q_rank": 4, "policy_gradient": "all_actions"}),
    "nlpo": ("nlpo", {"top_p_mask": 0.8, "num_iterations": 2, "mask_update_steps": 1}),
    "reinforce": ("reinforce", {"gradient_accumulation_steps": 4, "loss_type": "grpo"}),
}


def train(case, policy_path, folder, prompts, **overrides):
    algorithm, own = CASES[case]
    config_class, trainer_class = ALGORITHMS[algorithm]
    # Plain steps: Adam makes much of the rounding in gradients of next to nothing
    common = {
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    args = config_class(**settings(folder, **common) | {"compact_generation": False} | own | overrides)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if "lora" in case else None
    rollout = {} if case == "nlpo" else {"rollout_func": by_row}
    trainer = trainer_class(policy_path, length, args, prompts, peft_config=lora, **rollout)
    trainer.train()
    return trainer


def by_row(prompts, trainer):
    """[`scripted_rollout`] whose completions of one prompt differ."""
    rollout = scripted_rollout(prompts, trainer)
    for row, ids in enumerate(rollout["completion_ids"]):
        rollout["completion_ids"][row] = [5 + (token + row) % 16 for token in ids[:-1]][: 1 + row % 5] + ids[-1:]
    return rollout


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_what_it_is_without(policy_path, prompts, tmp_path, case):
    plain = train(case, policy_path, tmp_path, prompts, **OFF)
    compact = train(case, policy_path, tmp_path, prompts)
    assert plain.compact.prefix_check.verdict is None and compact.compact.prefix_check.verdict is True
    steps = [[entry for entry in t.state.log_history if "grad_norm" in entry] for t in (plain, compact)]
    for before, after in zip(*steps, strict=True):
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    for name, weight in plain.model.named_parameters():
        torch.testing.assert_close(compact.model.get_parameter(name), weight, atol=5e-5, rtol=1e-4)


def test_the_loss_of_grpo_is_that_of_trl(policy_path, prompts, tmp_path):
    """REINFORCE with whole completions, against TRL's own GRPO without its division by the deviation."""
    common = {"num_generations": 4, "gradient_accumulation_steps": 4, "max_steps": 3}
    given = settings(tmp_path, **common)
    own = ReinforceConfig(**given, scale_rewards="group", num_iterations=1)
    del given["critic_learning_rate"]
    ours = ReinforceTrainer(policy_path, length, own, prompts, rollout_func=by_row)
    theirs = GRPOTrainer(policy_path, length, GRPOConfig(**given), prompts, rollout_func=by_row)
    for trainer in (ours, theirs):
        trainer.train()
    entropies = [[e["entropy"] for e in t.state.log_history if "entropy" in e] for t in (ours, theirs)]
    assert entropies[0][0] == pytest.approx(entropies[1][0], rel=0.2)  # means of micro-batches, cut in other ways
    assert ours.state.global_step == theirs.state.global_step == 3


def test_experts_are_balanced_over_the_tokens_that_trl_balances(tokenizer, prompts, tmp_path):
    """The balancing loss counts a prompt as often as it is completed, so that prompts are not shared then."""
    own = {"decoder_sparse_step": 1, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 1}
    found = []
    for options in (OFF | {"shared_prefix": "never"}, {}):
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            **tiny_settings(tokenizer),
            **own,
            output_router_logits=True,
            router_aux_loss_coef=1.0,
            initializer_range=0.2,
        )
        common = {"num_generations": 4, "max_steps": 2, "gradient_checkpointing": False} | options
        args = ReinforceConfig(**settings(tmp_path, **common))
        model = Qwen3MoeForCausalLM(config)
        trainer = ReinforceTrainer(model, length, args, prompts, processing_class=tokenizer, rollout_func=by_row)
        trainer.train()
        found.append(trainer)
    plain, compact = found
    routers = [name for name, _ in plain.model.named_parameters() if "mlp.gate.weight" in name]
    args = ReinforceConfig(**settings(tmp_path, shared_prefix="always"))
    with pytest.raises(ValueError, match="the loss that balances experts.*Set `shared_prefix='auto'`"):
        ReinforceTrainer(model, length, args, prompts, processing_class=tokenizer)
    assert plain.aux_loss_enabled and routers and compact.compact.prefix_check.verdict is None  # never asked
    for name in routers:
        expected, actual = (trainer.model.get_parameter(name) for trainer in found)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["ppo", "ppo, kl in the loss", "ppo, lora", "nlpo", "ppo, bootstrap"])
def test_the_first_epoch_scores_what_a_pass_would(policy_path, prompts, tmp_path, case, monkeypatch):
    own = {"gradient_accumulation_steps": 1, "num_iterations": 3, "max_steps": 6}
    without = train(case, policy_path, tmp_path, prompts, **own)
    assert without.forward_plan.first_update_scores
    plan = ForwardPlan.of
    monkeypatch.setattr(ForwardPlan, "of", lambda *args, **kw: replace(plan(*args, **kw), first_update_scores=False))
    with_pass = train(case, policy_path, tmp_path, prompts, **own)
    for name, weight in with_pass.model.named_parameters():
        torch.testing.assert_close(without.model.get_parameter(name), weight, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "own, expected",
    [
        ({}, True),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 1}, False),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 1, "scale_advantages": False}, False),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2}, False),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "scale_advantages": False}, False),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 2, "gate_critic": False}, False),
        (
            {
                "steps_per_generation": 2,
                "gradient_accumulation_steps": 2,
                "scale_advantages": False,
                "gate_critic": False,
            },
            True,
        ),
    ],
)
def test_minibatches_and_statistics_over_micro_batches_need_their_pass(policy_path, prompts, tmp_path, own, expected):
    args = PPOConfig(**settings(tmp_path, **{"num_iterations": 2, "scale_advantages": True} | own))
    assert PPOTrainer(policy_path, length, args, prompts).forward_plan.first_update_scores == expected


# --- What is run ---


def test_the_trunk_runs_prompts_once_and_the_head_tokens_alone(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, num_generations=4, per_device_train_batch_size=4, max_steps=1))
    trainer = A2CTrainer(policy_path, length, args, prompts, rollout_func=by_row)
    trainer.compact.prefix_check.verdict = True  # the comparison would be counted, too
    positions, scored = [], []
    trainer.model.model.register_forward_hook(
        lambda module, args, kwargs, output: positions.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with patch("trl.trainer.utils._ChunkedLogProbFunction.apply", side_effect=_ChunkedLogProbFunction.apply) as head:
        trainer.train()
    batch = trainer._buffered_inputs[0]
    prompt, completions = batch["prompt_mask"].sum(dim=1), batch["completion_mask"].sum(dim=1)
    assert len(set(prompt.tolist())) == 1 and len(set(completions.tolist())) > 1
    # The last token of the prompt is each completion's own
    assert positions == [prompt[0].item() - 1 + (completions + 1).sum().item()]
    scored = [len(call.args[0]) for call in head.call_args_list]
    assert scored == [completions.sum().item()]


def test_micro_batches_are_cut_to_their_own_longest(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=1))
    trainer = A2CTrainer(policy_path, length, args, prompts, rollout_func=by_row)
    trainer.train()
    lengths = []
    for batch in trainer._buffered_inputs:
        total = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
        assert batch["prompt_ids"].size(1) == batch["prompt_mask"].sum(dim=1).max()
        assert batch["completion_ids"].size(1) == batch["completion_mask"].sum(dim=1).max()
        lengths += total.tolist()
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2


def test_a_micro_batch_in_which_nothing_is_scored_trains_on(policy_path, tmp_path):
    args = PPOConfig(**settings(tmp_path, truncation="mask", num_iterations=2, max_steps=2))

    def cut(prompts, trainer):
        return scripted_rollout(prompts, trainer) | {"completion_ids": [[5, 6, 7]] * len(prompts)}

    trainer = PPOTrainer(policy_path, length, args, Dataset.from_dict({"prompt": PROMPTS}), rollout_func=cut)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())


# --- Layouts ---


FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"head_dim": 8, "sliding_window": 3}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8}),
    "gpt2": (GPT2Config, {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}),
}


def build(name, tokenizer, **overrides):
    config_class, own = FAMILIES[name] if name in FAMILIES else (MambaConfig, {"state_size": 4, "conv_kernel": 2})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**tiny_settings(tokenizer) | own | overrides))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model.eval()


def batch_of(rows, extra_left=2, extra_right=3):
    """Prompts and completions as TRL pads them, and wider."""
    num_prompt = max(len(p) for p, _ in rows) + extra_left
    num_completion = max(len(c) for _, c in rows) + extra_right
    ids = torch.zeros(len(rows), num_prompt + num_completion, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        both = torch.tensor([*prompt, *completion])
        start = num_prompt - len(prompt)
        ids[row, start : start + len(both)] = both
        mask[row, start : start + len(both)] = 1
    return ids, mask, num_completion


ROWS = [
    ([5, 6, 7, 8], [9, 10]),
    ([11], [12, 13, 14, 15]),
    ([5, 6, 7, 8], [9, 10, 11, 12, 13]),
    ([11], []),
    ([5, 6, 7, 8], [16]),
]


@pytest.mark.parametrize(
    "family, attention", [*((name, "eager") for name in FAMILIES), ("llama", "sdpa"), ("mistral", "sdpa")]
)
def test_a_state_is_that_of_its_prefix_alone(tokenizer, family, attention):
    """In rows and packed, wherever padding is: the trunk's last state of each prefix, run by itself."""
    model = build(family, tokenizer, attn_implementation=attention)
    ids, mask, num_completion = batch_of(ROWS)
    for layout in (rows_layout(ids, mask, num_completion + 1), packed_layout(ids, mask, num_completion + 1)):
        inputs = layout.inputs_of(model)
        states = layout.states(model.base_model(**inputs, use_cache=False).last_hidden_state)
        for row, (prompt, completion) in enumerate(ROWS):
            assert layout.mask[row].tolist() == [t <= len(completion) for t in range(num_completion + 1)]
            assert layout.actions[row, : len(completion)].tolist() == completion
            for t in range(len(completion) + 1):
                alone = model.base_model(torch.tensor([[*prompt, *completion[:t]]])).last_hidden_state[0, -1]
                torch.testing.assert_close(states[row, t], alone, atol=1e-5, rtol=1e-4)


def test_models_without_positions_are_run_in_rows(tokenizer):
    model = build("mamba", tokenizer)
    ids, mask, num_completion = batch_of(ROWS)
    layout = rows_layout(ids, mask, num_completion + 1)
    inputs = layout.inputs_of(model)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == (5, 9)  # the columns that anything lies in
    states = layout.states(model.base_model(**inputs, use_cache=False).last_hidden_state)
    assert states.shape == (5, num_completion + 1, 16)


def test_a_prompt_is_packed_once():
    ids, mask, num_completion = batch_of(ROWS)
    layout = packed_layout(ids, mask, num_completion + 1)
    first, second = layout.inputs["input_ids"].tolist()
    assert first == [5, 6, 7, 8, 9, 10, 8, 9, 10, 11, 12, 13, 8, 16]
    assert second[:6] == [11, 12, 13, 14, 15, 11]
    assert layout.segments[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3]


def test_the_same_text_has_the_same_log_probabilities_wherever_it_is_padded(tokenizer, prompts, tmp_path):
    """A model that learned its positions does so, too: TRL counts padding as such."""
    model = build("gpt2", tokenizer)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    args = PPOConfig(**settings(tmp_path, num_iterations=2, gradient_accumulation_steps=2, max_steps=1))
    trainer = PPOTrainer(str(tmp_path / "gpt2"), length, args, prompts, rollout_func=by_row)
    ids, mask, num_completion = batch_of(ROWS)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, num_completion)
    with torch.no_grad():
        for row, (prompt, completion) in enumerate(ROWS):
            text = torch.tensor([[*prompt, *completion]])
            alone = trainer.model(text).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
            expected = alone.gather(1, torch.tensor(completion, dtype=torch.long).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(logps[row, : len(completion)], expected, atol=1e-5, rtol=1e-4)
    trainer.train()
    assert trainer.state.log_history[0]["ratio/max"] == pytest.approx(1, abs=1e-5)


class OwnPass(PPOTrainer):
    """A trainer of a user, whose hook takes what TRL's takes and nothing else."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).bind(self, *args, **kwargs)
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


def test_policy_and_reference_are_run_by_length_through_a_users_own_hook(policy_path, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, steps_per_generation=2, beta=0.1, max_steps=1))
    trainer = OwnPass(policy_path, length, args, prompts)
    run, lengths = CompactForwards.__call__, defaultdict(list)

    def watched(self, model, *args, attention_mask, **kwargs):
        if not torch.is_grad_enabled():
            lengths[model] += attention_mask.sum(dim=1).tolist()
        return run(self, model, *args, attention_mask=attention_mask, **kwargs)

    with patch.object(CompactForwards, "__call__", watched):
        trainer.train()
    assert {*lengths} == {trainer.model, trainer.ref_model}
    for found in lengths.values():
        assert len(found) == 8 and found == sorted(found, reverse=True) and found[0] > found[-1]


# --- The way back ---


def test_a_model_that_cannot_be_packed_is_run_in_rows(tokenizer, prompts, tmp_path, caplog):
    build("mamba", tokenizer).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    args = {"num_generations": 4, "max_steps": 2, "compact_generation": False}
    trainer = A2CTrainer(str(tmp_path / "mamba"), count_good, A2CConfig(**settings(tmp_path, **args)), prompts)
    trainer.train()
    assert trainer.compact.prefix_check.verdict is False and "the prompt is run again for each" in caplog.text
    trainer = A2CTrainer(
        str(tmp_path / "mamba"), count_good, A2CConfig(**settings(tmp_path, shared_prefix="always", **args)), prompts
    )
    with pytest.raises(ValueError, match="cannot run completions after a shared prefix"):
        trainer.train()


def test_a_batch_in_which_nothing_is_shared_shows_nothing(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, num_generations=2, per_device_train_batch_size=4, max_steps=1))
    trainer = A2CTrainer(policy_path, length, args, prompts)
    ids, mask, num_completion = batch_of([ROWS[0], ROWS[1]])
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, num_completion)
    assert trainer.compact.prefix_check.verdict is None
    ids, mask, num_completion = batch_of([ROWS[0], ROWS[2]])
    trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, num_completion)
    assert trainer.compact.prefix_check.verdict is True


def test_what_a_batch_has_shown_is_not_asked_again(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, num_generations=2, per_device_train_batch_size=4, max_steps=1))
    trainer = A2CTrainer(policy_path, length, args, prompts)
    ids, mask, num_completion = batch_of([ROWS[0], ROWS[2]])
    counts = []
    for _ in range(2):
        with patch("trl_ext.packing.layout.packed_layout", wraps=packed_layout) as packed:
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, num_completion)
        counts.append(packed.call_count)
    assert counts[0] > counts[1] == 1  # the one that is run


def test_a_critic_of_another_kind_is_checked_too(policy_path, tokenizer, prompts, tmp_path):
    """The policy could be packed, and its critic takes no mask of blocks, nor positions."""
    critic = build("mamba", tokenizer)
    trainers = []
    for own in ({}, OFF):
        common = {"num_generations": 4, "critic": "separate", "num_iterations": 2, "compact_generation": False}
        common |= {
            "optim": "sgd",
            "learning_rate": 1.0,
            "critic_learning_rate": 1.0,
        }  # Adam makes steps of what rounding leaves of a gradient
        args = PPOConfig(**settings(tmp_path, **common | own))
        trainer = PPOTrainer(policy_path, length, args, prompts, critic_model=critic, rollout_func=by_row)
        trainer.train()
        trainers.append(trainer)
    assert (
        trainers[0].compact.prefix_check.verdict is True and trainers[0].compact.critic_prefix_check.verdict is False
    )
    for name, weight in trainers[1].model.named_parameters():
        torch.testing.assert_close(trainers[0].model.get_parameter(name), weight, atol=5e-5, rtol=1e-3)


def test_windows_that_a_model_makes_by_itself_are_not_packed(tokenizer, prompts, tmp_path):
    torch.manual_seed(0)
    own = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}
    common = {k: v for k, v in tiny_settings(tokenizer).items() if k in ("vocab_size", "hidden_size", "pad_token_id")}
    model = AutoModelForCausalLM.from_config(
        GPTNeoConfig(**common, **own, max_position_embeddings=64, eos_token_id=1, bos_token_id=None)
    )
    layout = packed_layout(*batch_of(ROWS)[:2], batch_of(ROWS)[2] + 1)
    with pytest.raises(ValueError, match="'local' take no mask"):
        layout.inputs_of(model)


def test_the_critic_runs_with_the_policy_and_not_with_its_reference(policy_path, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, critic="separate", beta=0.1, max_steps=2, gradient_accumulation_steps=1))
    trainer = A2CTrainer(policy_path, length, args, prompts, rollout_func=by_row)
    calls = []
    trainer.critic.trunk.register_forward_hook(lambda *args: calls.append(1))
    trainer.train()
    assert len(calls) == 2


def test_tokens_are_not_balanced_across_processes(policy_path, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(PPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="train in one process"):
        PPOTrainer(policy_path, length, PPOConfig(**settings(tmp_path, balance_tokens=True)), prompts)


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`shared_prefix` must be"):
        A2CConfig(**settings(tmp_path, shared_prefix="sometimes"))


# --- Micro-batches ---


def make_batches(rows, size):
    ids, mask, num_completion = batch_of(rows, 0, 0)
    num_prompt = ids.size(1) - num_completion
    whole = {
        "prompt_ids": ids[:, :num_prompt],
        "prompt_mask": mask[:, :num_prompt],
        "completion_ids": ids[:, num_prompt:],
        "completion_mask": mask[:, num_prompt:],
        "advantages": None,
        "scores": torch.arange(float(len(rows))),
        "names": [str(row) for row in range(len(rows))],
        "num_items_in_batch": torch.tensor(7),
    }
    return whole, [select(whole, rows) for rows in torch.arange(len(rows)).split(size)]


tokens = st.integers(5, 9)
rows_of = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=3), st.lists(tokens, max_size=6)), min_size=8, max_size=8
)


@given(rows_of)
@hypothesis_settings(max_examples=60, deadline=None)
def test_every_window_keeps_its_completions(rows):
    whole, batches = make_batches(rows, 2)
    result = sort_windows(batches, 2)
    assert len(result) == 4 and all(len(batch["scores"]) == 2 for batch in result)
    for start in (0, 2):
        kept = join_texts(result[start : start + 2])
        assert sorted(kept) == sorted((str(row), *rows[row]) for row in range(2 * start, 2 * start + 4))
    assert all(batch["advantages"] is None and batch["num_items_in_batch"] == 7 for batch in result)


def join_texts(batches):
    """Name, prompt and completion of each row, by their masks."""
    texts = []
    for batch in batches:
        for row, name in enumerate(batch["names"]):
            both = [
                batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()].tolist()
                for part in ("prompt", "completion")
            ]
            assert batch["scores"][row] == float(name)
            texts.append((name, *both))
    return texts


@given(rows_of)
@hypothesis_settings(max_examples=60, deadline=None)
def test_equal_prompts_stay_together_and_the_longest_come_first(rows):
    whole, _ = make_batches(rows, 2)
    order = by_length(whole["prompt_ids"], whole["prompt_mask"], whole["completion_mask"]).tolist()
    assert sorted(order) == list(range(8))
    prompts = [tuple(rows[row][0]) for row in order]
    runs = [prompt for i, prompt in enumerate(prompts) if i == 0 or prompts[i - 1] != prompt]
    assert len(runs) == len(set(runs))
    heads = [max(len(p) + len(c) for p, c in rows if tuple(p) == prompt) for prompt in runs]
    assert heads == sorted(heads, reverse=True)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 7))
@hypothesis_settings(max_examples=200, deadline=None)
def test_the_largest_part_is_as_small_as_it_can_be(lengths, num_parts):
    """Against all ways to cut."""
    num_parts = min(num_parts, len(lengths))

    def largest(sizes):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return max(size * max(lengths[start : start + size]) for start, size in zip(starts, sizes, strict=True))

    sizes = sizes_by_tokens(lengths, num_parts)
    assert sum(sizes) == len(lengths) and len(sizes) == num_parts and min(sizes) > 0
    cuts = itertools.combinations(range(1, len(lengths)), num_parts - 1)
    ways = [[b - a for a, b in itertools.pairwise((0, *cut, len(lengths)))] for cut in cuts]
    assert largest(sizes) == min(map(largest, ways))


def test_a_micro_batch_may_take_tokens_in_place_of_completions(policy_path, prompts, tmp_path):
    common = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    trainers = []
    for balance in (False, True):
        args = PPOConfig(**settings(tmp_path, **common), num_iterations=2, balance_tokens=balance)
        trainers.append(PPOTrainer(policy_path, length, args, prompts, rollout_func=by_row))
        trainers[-1].train()
    rows, tokens = trainers
    assert {len(batch["scores"]) for batch in rows._buffered_inputs} == {4}
    assert len({len(batch["scores"]) for batch in tokens._buffered_inputs}) > 1
    for name, weight in rows.model.named_parameters():
        torch.testing.assert_close(tokens.model.get_parameter(name), weight, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", [{"loss_type": "grpo"}, {"length_batches": False}])
def test_tokens_are_balanced_only_where_that_leaves_the_loss_as_it_is(tmp_path, wrong):
    with pytest.raises(ValueError, match="`balance_tokens=True` needs"):
        PPOConfig(**settings(tmp_path, balance_tokens=True, **wrong))


def test_nothing_is_left_to_cut():
    whole, _ = make_batches(ROWS, 5)
    trimmed = trim(select(whole, torch.tensor([0, 4])))
    assert trimmed["prompt_ids"].tolist() == [[5, 6, 7, 8]] * 2
    assert trimmed["completion_ids"].tolist() == [[9, 10], [16, 0]]
    assert join([trimmed, trimmed])["names"] == ["0", "4", "0", "4"]
