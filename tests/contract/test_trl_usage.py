"""Uses of TRL's `GRPOTrainer`, made of its subclasses."""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from helpers import build_policy, count_good, recorded, scripted_rollout, settings, variety
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl import BEMACallback, GRPOConfig, GRPOTrainer

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    ActorCriticConfig,
    ActorCriticTrainer,
    PPOConfig,
    PPOTrainer,
)
from trl_ext.algorithms import ALGORITHMS


def train(trainer):
    """Train, and require that every trainable parameter was moved and every metric of the last step is finite."""
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    moved = {n: not torch.equal(start[n], p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(moved.values()) and all(moved[n] for n in moved if "layers.0.mlp.up_proj" in n or "value_head" in n), (
        moved
    )
    return trainer


def ppo(model, tmp_path, dataset, reward_funcs=variety, trainer_kwargs=None, **overrides):
    args = PPOConfig(**settings(tmp_path, **{"num_iterations": 2, **overrides}))
    return PPOTrainer(model, reward_funcs, args, dataset, **trainer_kwargs or {})


MATRIX = [
    ("ppo", {"num_iterations": 2}),
    ("ppo", {"critic": "separate"}),
    ("a2c", {}),
    ("reinforce", {}),
    ("reinforce", {"baseline": "value", "one_step_mdp": True}),
]


@pytest.mark.parametrize("data", ["text", "chat"])
@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("algorithm, overrides", MATRIX)
def test_matrix(policy_path, prompts, chats, tmp_path, algorithm, overrides, use_peft, data):
    config_class, trainer_class = ALGORITHMS[algorithm]
    dataset = prompts if data == "text" else chats
    args = config_class(
        **settings(tmp_path, eval_strategy="steps", eval_steps=2, gradient_checkpointing=True, **overrides)
    )
    peft_config = LoraConfig(r=4, target_modules="all-linear") if use_peft else None
    trainer = trainer_class(policy_path, variety, args, dataset, eval_dataset=dataset, peft_config=peft_config)
    train(trainer)
    evaluation = next(logs for logs in trainer.state.log_history if "eval_loss" in logs)
    assert 0 <= evaluation["eval_reward"] <= 1 and evaluation["eval_ratio/mean"] > 0


def test_only_model_reward_model_and_dataset(tokenizer, reward_model_path, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_policy(tokenizer, max_position_embeddings=1024).save_pretrained("policy")
    tokenizer.save_pretrained("policy")

    @dataclass
    class OnCPU(PPOConfig):  # the defaults ask for bf16, which only this lets pass without a GPU
        use_cpu: bool = True

    monkeypatch.setattr(PPOTrainer, "config_class", OnCPU)
    trainer = PPOTrainer("policy", reward_model_path, train_dataset=prompts)
    assert trainer.args.output_dir == "policy-PPO" and trainer.args.num_iterations == 4


def test_reward_models_functions_and_weights(policy_path, reward_model_path, prompts, tmp_path):
    async def length(completions, **kwargs):
        return [float(len(c)) for c in completions]

    def sometimes(completions, log_extra, log_metric, **kwargs):
        log_extra("index", list(range(len(completions))))
        log_metric("batch_size", len(completions))
        return [1.0 if i % 2 else None for i in range(len(completions))]

    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    reward_funcs = [model, reward_model_path, count_good, length, sometimes]
    trainer = ppo(policy_path, tmp_path, prompts, reward_funcs, reward_weights=[1.0, 0.5, 2.0, 0.01, 0.1])
    train(trainer)
    logs = trainer.state.log_history[0]
    assert logs["batch_size"] == 4 and logs["rewards/sometimes/mean"] == 1
    means = [logs[f"rewards/{name}/mean"] for name in trainer.reward_func_names]
    assert logs["reward"] == pytest.approx(
        sum(w * m for w, m in zip([1, 0.5, 2, 0.01, 0.05], means, strict=True)), abs=1e-5
    )
    assert trainer.reward_funcs[2] is count_good and trainer.reward_funcs[3] is length


@pytest.mark.parametrize("algorithm, overrides", MATRIX)
def test_batches_without_any_reward_teach_nothing(policy_path, prompts, tmp_path, caplog, algorithm, overrides):
    """As TRL, a warning: of several tasks, a batch may hold only rows that no reward function applies to."""
    config_class, trainer_class = ALGORITHMS[algorithm]
    args = config_class(**settings(tmp_path, max_steps=4, weight_decay=0.0, **overrides))
    reward_funcs = [lambda completions, **kwargs: [None] * len(completions)]
    trainer = trainer_class(policy_path, reward_funcs, args, prompts, eval_dataset=prompts)
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.evaluate()
    assert all(torch.equal(start[n], p) for n, p in trainer.model.named_parameters())
    assert trainer.state.log_history[0]["loss"] == 0 and trainer.state.global_step == 4
    assert "All reward functions returned None" in caplog.text


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_loss_types(policy_path, prompts, tmp_path, loss_type):
    overrides = {"epsilon_high": 5.0} if loss_type == "cispo" else {}
    train(ppo(policy_path, tmp_path, prompts, loss_type=loss_type, gradient_accumulation_steps=2, **overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_generations": 4},
        {"num_generations": 4, "scale_rewards": "group"},
        {"num_generations": 4, "scale_rewards": "batch"},
        {"num_generations": 2, "multi_objective_aggregation": "normalize_then_sum"},
        {"num_generations": 4, "num_generations_eval": 1},
        {"steps_per_generation": 2},
        {"generation_batch_size": 8},
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"epsilon_high": 0.28, "delta": 4.0},
        {"entropy_coef": 0.01, "top_entropy_quantile": 0.5},
        {"use_adaptive_entropy": True, "entropy_target": 1.0},
        {"mask_truncated_completions": True, "max_completion_length": 16},
        {"off_policy_mask_threshold": 0.5},
        {"beta": 0.1},
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"lam_policy": 0.9, "lam_value": 1.0, "length_adaptive_alpha": 0.5},
        {"model_init_kwargs": {"dtype": "float32"}},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 10, "repetition_penalty": 1.1, "generation_kwargs": {"min_new_tokens": 2}},
        {"critic": "separate", "truncation": "bootstrap", "cliprange_value": 0.2},
    ],
)  # fmt: skip
def test_options(policy_path, prompts, tmp_path, overrides):
    train(
        ppo(policy_path, tmp_path, prompts, trainer_kwargs={"eval_dataset": prompts}, max_steps=4, **overrides)
    ).evaluate()


def test_group_scaling_is_grpos_own(policy_path, prompts, tmp_path):
    """With the value 0, lambda 1 and no whitening, the advantage is GRPO's."""
    args = ActorCriticConfig(**settings(tmp_path, num_generations=4, scale_rewards="group", lam=1.0, max_steps=1))
    trainer = recorded(ActorCriticTrainer)(policy_path, count_good, args, prompts)
    trainer.train()
    batch, rewards = trainer.updates[0], torch.tensor(list(trainer._logs["rewards"]["count_good"]))
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    torch.testing.assert_close(batch["advantages"][:, 0], expected[batch["completion_index"]])


def test_streaming_dataset(policy_path, prompts, tmp_path):
    train(ppo(policy_path, tmp_path, prompts.to_iterable_dataset(), max_steps=4))


def test_prompts_in_the_order_of_the_dataset(policy_path, prompts, tmp_path):
    seen = []

    def see(prompts, **kwargs):
        seen.extend(prompts)
        return [float(len(p)) for p in prompts]

    ppo(policy_path, tmp_path, prompts, see, shuffle_dataset=False, num_iterations=1, max_steps=4).train()
    assert seen == [*prompts["prompt"], *prompts["prompt"]]


def test_extra_columns_reach_the_reward(policy_path, prompts, tmp_path):
    def expects(prompts, answer, **kwargs):
        assert all(a == f"answer to {p}" for p, a in zip(prompts, answer, strict=True))
        return [float(len(a)) for a in answer]

    ppo(policy_path, tmp_path, prompts.map(lambda row: {"answer": f"answer to {row['prompt']}"}), expects).train()


def test_bf16_autocast_and_checkpointing(policy_path, prompts, tmp_path):
    trainer = ppo(policy_path, tmp_path, prompts, bf16=True, gradient_checkpointing=True)
    train(trainer)
    assert {p.dtype for p in trainer.critic.parameters()} == {torch.float32}
    assert trainer.state.log_history[0]["ratio/max"] == pytest.approx(1, abs=1e-3)


def test_half_precision_policy_keeps_a_float32_head(policy_path, prompts, tmp_path):
    trainer = ppo(policy_path, tmp_path, prompts, model_init_kwargs={"dtype": "bfloat16"}, max_steps=4)
    train(trainer)
    assert trainer.model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.critic.parameters()} == {torch.float32}


@pytest.mark.parametrize("kl", ["beta", "kl_in_reward"])
def test_peft_model_with_a_trained_adapter_refers_to_its_copy(policy_path, prompts, tmp_path, kl):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(policy_path),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    trainer = ppo(model, tmp_path, prompts, max_steps=4, **{kl: 0.1})
    first = train(trainer).state.log_history[0]
    assert abs(first["kl/k3"]) < 1e-6  # to the starting adapter, not to the base model


def test_four_bit_policy(policy_path, prompts, tmp_path):
    quantized = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
    }
    trainer = ppo(policy_path, tmp_path, prompts, trainer_kwargs=quantized, kl_in_reward=0.1, max_steps=4)
    head = trainer.critic.value_head.weight
    trainer.train()
    assert head.dtype == torch.float32 and head.abs().max() > 0


def test_critic_from_the_reward_model(policy_path, reward_model_path, prompts, tmp_path):
    """Its first values are the reward model's scores of the prefixes."""
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    for source in ("reward_model", reward_model_path):
        args = A2CConfig(
            **settings(
                tmp_path,
                critic="separate",
                critic_model_name_or_path=source,
                learning_rate=0.0,
                critic_learning_rate=0.0,
                max_steps=1,
            )
        )
        trainer = recorded(A2CTrainer)(policy_path, model, args, prompts, rollout_func=scripted_rollout)
        trainer.train()
        batch = trainer.updates[0]
        for i in range(4):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            for t in range(3):
                prefix = torch.cat([prompt, batch["completion_ids"][i, :t]])[None]
                torch.testing.assert_close(batch["values"][i, t], model(prefix).logits[0, 0], atol=1e-5, rtol=1e-4)
    assert not model.training and model.score.weight.grad is None


def test_critic_from_a_model_instance(policy_path, tokenizer, prompts, tmp_path):
    own = build_policy(tokenizer, seed=7, hidden_size=32)
    trainer = ppo(policy_path, tmp_path, prompts, trainer_kwargs={"critic_model": own}, critic="separate")
    train(trainer)
    assert trainer.critic.value_head.weight.shape == (1, 32)


def test_prompts_of_many_lengths_and_callbacks(policy_path, prompts, tmp_path):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    ppo(policy_path, tmp_path, prompts, trainer_kwargs={"callbacks": [Count()]}, max_steps=3).train()
    assert steps == [1, 2, 3]


def test_environment_tokens_are_not_time_steps(policy, tokenizer, prompts, tmp_path):
    """`env_mask` of a custom rollout: the same chosen tokens get the same returns with and without a tool between them."""

    def with_tool_text(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        output["env_mask"] = [[1] + [0] * 3 + [1] * (len(ids) - 1) for ids in output["completion_ids"]]
        output["completion_ids"] = [[ids[0], 9, 9, 9, *ids[1:]] for ids in output["completion_ids"]]
        return output

    def score(prompts, **kwargs):
        return [float(len(p)) for p in prompts]

    returns = []
    for rollout in (scripted_rollout, with_tool_text):
        args = A2CConfig(**settings(tmp_path, gamma=0.5, max_steps=1, max_completion_length=16))
        trainer = recorded(A2CTrainer)(
            build_policy(tokenizer), score, args, prompts, processing_class=tokenizer, rollout_func=rollout
        )
        trainer.train()
        batch = trainer.updates[0]
        own = (
            batch["completion_mask"].bool() & batch.get("tool_mask", torch.ones_like(batch["completion_mask"])).bool()
        )
        assert (batch["advantages"][~own] == 0).all()
        order = batch["completion_index"].argsort()
        returns.append([batch["returns"][i][own[i]] for i in order])
    for without, with_tool in zip(*returns, strict=True):
        torch.testing.assert_close(without, with_tool)


@pytest.mark.parametrize("use_vllm", [False, True])
def test_a_rollout_func_is_given_prompts_by_half_a_trainer(use_vllm):
    """As TRL's own tests of the dispatch do: with no more of the trainer than `GRPOTrainer` needs there."""
    trainer = object.__new__(PPOTrainer)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, gather=lambda x: x)
    trainer.args = SimpleNamespace(report_to=[])
    trainer.model, trainer.tools = SimpleNamespace(training=True), None
    trainer.state = SimpleNamespace(global_step=2, num_input_tokens_seen=0)
    trainer.use_vllm, trainer._last_loaded_step = use_vllm, 1
    trainer.vllm_generation = MagicMock()
    trainer.processing_class = MagicMock(**{"batch_decode.return_value": ["decoded"]})
    trainer._tokenizer, trainer.eos_token_ids = SimpleNamespace(pad_token_id=0), [2]
    trainer._metrics = {"train": defaultdict(list)}
    rollout = {"prompt_ids": [[1]], "completion_ids": [[2]], "logprobs": [[-0.1]], "env_mask": [[1]]}
    trainer.rollout_func = MagicMock(return_value=rollout)
    prompt_ids, completion_ids, tool_mask, completions, logprobs, *_ = trainer._generate(["prompt"])
    assert (prompt_ids, completion_ids, tool_mask, logprobs) == ([[1]], [[2]], [[1]], [[-0.1]])
    assert completions == ["decoded"] and trainer.vllm_generation.sync_weights.called == use_vllm
    trainer.rollout_func.assert_called_once_with(["prompt"], trainer)
    trainer.rollout_func.return_value = {"prompt_ids": [[1]], "completion_ids": [[2]]}
    with pytest.raises(ValueError, match="rollout_func must return keys"):
        trainer._generate(["prompt"])


# --- Engines: up to the call ---


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_vllm_is_never_sent_the_critic(policy_path, prompts, tmp_path, num_iterations):
    # Two rollouts, of which the second, too, has the pass that corrects what the engine says of its sampling
    own = {"num_iterations": num_iterations, "max_steps": 2 * num_iterations, "scale_advantages": False}
    trainer = ppo(policy_path, tmp_path, prompts, **own)
    sent = []

    def generate(prompts, images, num_generations, profiler):
        completions = [[7, 8, trainer.processing_class.eos_token_id] for _ in prompts]
        return None, completions, [[[-1.0]] * 3 for _ in prompts], None

    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = MagicMock(generate=generate)
    trainer.vllm_generation.sync_weights = lambda: sent.extend(n for n, _ in trainer.model.named_parameters())
    trainer.train()
    assert "lm_head.weight" in sent and not any("critic" in name for name in sent)
    assert "critic.value_head.weight" in dict(trainer.model.named_parameters())
    for log in trainer.state.log_history[: own["max_steps"] : num_iterations]:
        assert log["sampling/importance_sampling_ratio/mean"] != 1


def test_continuous_batching_is_not_given_the_critic(policy_path, prompts, tmp_path):
    trainer = ppo(policy_path, tmp_path, prompts, max_steps=2)
    seen = []

    def generate_batch(prompt_ids, **kwargs):
        seen.extend(n for n, _ in trainer.model.named_parameters())
        return {
            i: MagicMock(generated_tokens=[7, 8, trainer.processing_class.eos_token_id])
            for i in range(len(prompt_ids))
        }

    trainer.use_transformers_continuous_batching = True
    trainer.continuous_batching_config = None
    trainer.model.generate_batch = generate_batch
    trainer.train()
    assert seen and not any("critic" in name for name in seen)
    assert {p.dtype for p in trainer.critic.parameters()} == {torch.float32}


# --- What the critic costs ---


@pytest.mark.parametrize("num_iterations, kl", [(1, {}), (2, {}), (2, {"beta": 0.1}), (2, {"kl_in_reward": 0.1})])
def test_a_shared_critic_adds_no_forward_and_no_logits(policy_path, prompts, tmp_path, num_iterations, kl):
    """Runs of the trunk as many as GRPO's, and none of the LM head's own forward, which builds logits."""
    counts = []
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (PPOTrainer, PPOConfig)):
        ours = settings(tmp_path, num_generations=2, num_iterations=num_iterations, max_steps=2 * num_iterations)
        if config_class is GRPOConfig:
            del ours["critic_learning_rate"]
        in_loss = {"beta": sum(kl.values())} if config_class is GRPOConfig else kl | {"shared_prefix": "never"}
        args = config_class(**ours, **in_loss)
        trainer = trainer_class(policy_path, variety, args, prompts, rollout_func=scripted_rollout)
        calls = {"trunk": 0, "logits": 0}
        for model in filter(None, (trainer.model, trainer.ref_model)):
            model.model.register_forward_hook(lambda *_, calls=calls: calls.update(trunk=calls["trunk"] + 1))
            model.lm_head.register_forward_hook(lambda *_, calls=calls: calls.update(logits=calls["logits"] + 1))
        trainer.train()
        counts.append(calls)
    # Of several epochs the first one also gives the old log-probabilities, for which GRPO makes a pass of its own; but
    # for the first rollout, whose pass shows whether anything differs between the two
    counts[1]["trunk"] += num_iterations > 1
    assert counts[0] == counts[1] and counts[1]["logits"] == 0 and counts[1]["trunk"] > 0


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_averaged_weights_are_those_of_the_plain_policy(policy_path, prompts, tmp_path, critic):
    """By TRL's callback, whose average of the newest weights alone is the model itself."""
    newest = BEMACallback(update_freq=1, min_ema_multiplier=1.0, bias_power=1000.0)
    trainer = ppo(policy_path, tmp_path, prompts, critic=critic, trainer_kwargs={"callbacks": [newest]})
    trainer.train()
    averaged = type(trainer.model).from_pretrained(tmp_path / "bema").state_dict()
    trained = {name: weight for name, weight in trainer.model.state_dict().items() if not name.startswith("critic.")}
    assert averaged.keys() == trained.keys()
    assert all(torch.equal(averaged[name], weight) for name, weight in trained.items())


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_the_loss_of_a_batch_made_by_hand_is_the_parents(policy_path, prompts, tmp_path, loss_type):
    """One advantage per completion, and nothing of a rollout."""
    batch = {
        "prompt_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]),
        "completion_ids": torch.tensor([[11, 12, 13, 1], [14, 1, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(6),
    }
    batch["prompt_mask"] = torch.ones_like(batch["prompt_ids"])
    own = settings(tmp_path, loss_type=loss_type, importance_sampling_level="sequence")
    ours = PPOTrainer(policy_path, variety, PPOConfig(**own), prompts)
    del own["critic_learning_rate"]
    theirs = GRPOTrainer(policy_path, variety, GRPOConfig(**own | {"num_generations": 2}), prompts)
    losses = []
    for trainer in (ours, theirs):
        trainer.model.eval()
        with torch.no_grad():
            start, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                4,
            )
        losses.append(trainer._compute_loss(trainer.model, batch | {"old_per_token_logps": start + 0.05}))
    torch.testing.assert_close(*losses)
    assert losses[0].abs() > 1e-3
