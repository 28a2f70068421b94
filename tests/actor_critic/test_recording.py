"""Records of rollouts hold each completion once, and what independent computations say of it."""

import pytest
import torch
from agents import episode, put
from datasets import Dataset
from helpers import PROMPTS, by_length, count_good, recorded, scripted_rollout, settings, variety
from transformers import AutoModelForCausalLM

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    QActorCriticConfig,
    QActorCriticTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    load_rollouts,
)
from trl_ext.algorithms import ALGORITHMS
from trl_ext.data.rollouts import NUMBERS_OF_TOKENS, ROLLOUT_COLUMNS


def train(trainer_class, config_class, model, prompts, tmp_path, reward=by_length, **overrides):
    kwargs = {name: overrides.pop(name) for name in ("rollout_func", "eval_dataset") if name in overrides}
    args = config_class(**settings(tmp_path, save_rollouts=True, **overrides))
    trainer = recorded(trainer_class)(model, reward, args, prompts, **kwargs)
    trainer.train()
    return trainer


def rows_of(tmp_path, split="train"):
    return load_rollouts(tmp_path)[split].to_list()


CASES = {
    # Advantages come from TRL's scoring forward, in minibatches over several epochs
    "ppo": ("ppo", {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1}),
    # from a pass of our own
    "ppo-one-epoch": ("ppo", {"num_iterations": 1, "gradient_accumulation_steps": 2}),
    "nlpo": ("nlpo", {"num_iterations": 2, "min_tokens_to_keep": 8, "top_p_mask": 0.5}),
    # from the training forward, per micro-batch
    "a2c": ("a2c", {"gradient_accumulation_steps": 2}),
    # two rollouts within an optimizer step
    "a2c-twice": ("a2c", {"gradient_accumulation_steps": 2, "steps_per_generation": 1}),
    "q": ("q_actor_critic", {"q_rank": 4, "gradient_accumulation_steps": 2}),
    "all-actions": ("q_actor_critic", {"q_rank": 4, "policy_gradient": "all_actions"}),
    # and where the estimator needs no forward
    "reinforce": ("reinforce", {"gradient_accumulation_steps": 2}),
    "reinforce-kl": ("reinforce", {"gradient_accumulation_steps": 2, "beta": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_completion_is_recorded_once_with_what_it_was(case, policy_path, tokenizer, prompts, tmp_path):
    algorithm, overrides = CASES[case]
    config_class, trainer_class = ALGORITHMS[algorithm]
    trainer = train(trainer_class, config_class, policy_path, prompts, tmp_path, max_steps=4, **overrides)
    rows = rows_of(tmp_path)
    sampled = [
        (batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist(), batch["terminated"][i].item())
        for batch in trainer.rollouts
        for i in range(len(batch["completion_ids"]))
    ]
    assert [(row["completion_ids"], row["terminated"]) for row in rows] == sampled
    assert len(trainer.rollouts) >= (1 if trainer.num_iterations > 1 else 4)
    for row in rows:
        ids = row["completion_ids"]
        assert row["prompt"] in PROMPTS
        assert row["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.convert_tokens_to_ids(row["tokens"]) == ids
        assert row["score"] == row["reward/by_length"] == len(ids) and row["own"] == [True] * len(ids)
        # There is nothing else, so the last token earns it all (gamma is 1)
        assert row["rewards"] == [0.0] * (len(ids) - 1) + [len(ids)]
        assert (row["values"] is None) == case.startswith("reinforce")
        assert (row["kl"] is None) == (case != "reinforce-kl")
        assert all(len(row[name]) == len(ids) for name in NUMBERS_OF_TOKENS if row[name] is not None)
        if "q" not in case and "all" not in case:
            assert row["returns"][-1] == pytest.approx(len(ids), abs=1e-5)
    assert [name for name in rows[0] if name != "reward/by_length"] == list(ROLLOUT_COLUMNS)


@pytest.mark.parametrize("case", ["ppo", "a2c", "reinforce"])
def test_recording_changes_nothing_of_training(case, policy_path, prompts, tmp_path):
    algorithm, overrides = CASES[case]
    config_class, trainer_class = ALGORITHMS[algorithm]
    weights = []
    for save_rollouts in (False, True):
        args = config_class(**settings(tmp_path, max_steps=4, save_rollouts=save_rollouts, **overrides))
        trainer = trainer_class(policy_path, by_length, args, prompts)
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_log_probabilities_and_kl_are_those_of_plain_models(policy_path, tokenizer, prompts, tmp_path):
    """In the last of three rollouts, when the policy has moved off its reference."""
    for trainer_class, config_class, penalty in (
        (A2CTrainer, A2CConfig, {"kl_in_reward": 0.5}),
        (ReinforceTrainer, ReinforceConfig, {"beta": 0.5}),
    ):
        folder, policies = tmp_path / trainer_class.__name__, []

        class KeepPolicy(recorded(trainer_class)):
            def _generate_and_score_completions(self, inputs, policies=policies):
                self.save_model(str(tmp_path / "policy"))
                policies.append(AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32))
                return super()._generate_and_score_completions(inputs)

        args = config_class(**settings(folder, save_rollouts=True, max_steps=3, learning_rate=3e-2, **penalty))
        KeepPolicy(policy_path, by_length, args, prompts).train()
        reference = AutoModelForCausalLM.from_pretrained(policy_path)
        rows = [row for row in rows_of(folder) if row["step"] == 2]
        assert len(rows) == 4
        for row in rows:
            prompt, ids = tokenizer(row["prompt"])["input_ids"], row["completion_ids"]
            with torch.no_grad():
                logps, ref_logps = (
                    model(torch.tensor([[*prompt, *ids]]))
                    .logits[0, len(prompt) - 1 : -1]
                    .log_softmax(-1)[range(len(ids)), ids]
                    for model in (policies[2], reference)
                )
            assert (logps - ref_logps).abs().max() > 1e-2
            assert row["logps"] == pytest.approx(logps.tolist(), abs=1e-4)
            assert row["kl"] == pytest.approx((logps - ref_logps).tolist(), abs=1e-4)
            score = [0.0] * (len(ids) - 1) + [len(ids)]
            taken = 0.5 if "kl_in_reward" in penalty else 0.0
            assert row["rewards"] == pytest.approx(
                [s - taken * k for s, k in zip(score, row["kl"], strict=True)], abs=1e-5
            )


def dense(completion_ids, **kwargs):
    return [[0.25 * (t + 1) for t in range(len(ids))] for ids in completion_ids]


@pytest.mark.parametrize("case", ["ppo", "a2c"])
def test_advantages_and_returns_follow_from_rewards_and_values_by_hand(case, policy_path, prompts, tmp_path):
    """Delta by delta, from the last token back, of the critic alone; their scale is another matter."""
    algorithm, overrides = CASES[case]
    config_class, trainer_class = ALGORITHMS[algorithm]
    overrides = overrides | {"gamma": 0.9, "lam": 0.8, "max_steps": 8, "gate_critic": False, "scale_advantages": True}
    train(trainer_class, config_class, policy_path, prompts, tmp_path, reward=[by_length, dense], **overrides)
    rows = rows_of(tmp_path)
    assert any(abs(value) > 1e-3 for row in rows for value in row["values"])  # the critic has learned something
    for row in rows:
        n = len(row["completion_ids"])
        assert row["score"] == pytest.approx(n + 0.25 * n * (n + 1) / 2)
        assert row["reward/by_length"] == n and row["reward/dense"] == pytest.approx(0.25 * n * (n + 1) / 2)
        assert row["rewards"][:-1] == [0.25 * (t + 1) for t in range(n - 1)]
        assert sum(row["rewards"]) == pytest.approx(row["score"])
        advantage = 0.0
        for t in reversed(range(n)):
            following = row["values"][t + 1] if t + 1 < n else 0.0
            advantage = row["rewards"][t] + 0.9 * following - row["values"][t] + 0.9 * 0.8 * advantage
            assert row["advantages"][t] == pytest.approx(advantage, abs=1e-4)
            assert row["returns"][t] == pytest.approx(advantage + row["values"][t], abs=1e-4)


def test_the_critic_of_actions_says_q(policy_path, prompts, tmp_path):
    """With gamma = lambda = 1 the return is the rest of the reward, and advantages of 'q' are what the critic says."""
    for policy_gradient in ("q", "advantage", "all_actions"):
        folder = tmp_path / policy_gradient
        overrides = {"q_rank": 4, "lam": 1.0, "policy_gradient": policy_gradient, "max_steps": 4}
        train(QActorCriticTrainer, QActorCriticConfig, policy_path, prompts, folder, reward=variety, **overrides)
        rows = [row for row in rows_of(folder) if row["step"] > 1]
        for row in rows:
            score = sum(row["completion_ids"]) % 7 / 7
            assert row["returns"] == pytest.approx([score] * len(row["tokens"]), abs=1e-4)
        assert any(row["values"] != row["advantages"] for row in rows) == (policy_gradient != "q")
        assert any(abs(a) > 1e-5 for row in rows for a in row["advantages"])  # also where they are not followed


def test_no_score_and_no_end(policy_path, tokenizer, prompts, tmp_path):
    def some(completion_ids, prompts, **kwargs):
        return [
            None if prompt == PROMPTS[0] else float(len(ids))
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    overrides = {"rollout_func": scripted_rollout, "max_steps": 2, "reward": some}
    train(A2CTrainer, A2CConfig, policy_path, prompts, tmp_path / "a", missing_eos_penalty=10.0, **overrides)
    rows = rows_of(tmp_path / "a")
    cut = [row for row in rows if row["completion_ids"][-1] != tokenizer.eos_token_id]
    assert 0 < len(cut) < len(rows) == 8 and all(row["terminated"] != (row in cut) for row in rows)
    for row in rows:
        if row["prompt"] == PROMPTS[0]:
            assert row["score"] is row["reward/some"] is None and not any(row["own"])
            assert not any(row["advantages"]) and not any(row["logps"]) and not any(row["values"])
        else:
            assert sum(row["rewards"]) == row["score"] - (10.0 if row in cut else 0.0)
    train(A2CTrainer, A2CConfig, policy_path, prompts, tmp_path / "b", truncation="mask", **overrides)
    masked = rows_of(tmp_path / "b")
    assert [row["tokens"] for row in masked] == [row["tokens"] for row in rows]  # nothing of them is lost
    for row in masked:
        for name in ("own", "rewards", "advantages", "returns", "values", "logps"):
            assert len(row[name]) == len(row["completion_ids"]), name
        assert any(row["own"]) == (row["terminated"] and row["prompt"] != PROMPTS[0])


@pytest.mark.parametrize("algorithm", [(A2CTrainer, A2CConfig), (ReinforceTrainer, ReinforceConfig)])
def test_what_tools_say_is_not_the_policys(tool_model, tmp_path, algorithm):  # noqa: F811
    trainer_class, config_class = algorithm
    script = [put(3), put(-1), "Done.<|im_end|>"]
    episode(tool_model, tmp_path, script, trainer_class=trainer_class, config_class=config_class, save_rollouts=True)
    tokenizer = tool_model[1]
    rows = rows_of(tmp_path)
    assert len(rows) == 4
    for row in rows:
        assert row["prompt"] == [{"role": "user", "content": "Go."}]
        assert [message["role"] for message in row["completion"]] == ["assistant", "tool"] * 2 + ["assistant"]
        assert row["completion"][0]["tool_calls"][0]["function"] == {"name": "put", "arguments": {"coin": 3}}
        said = [id for id, own in zip(row["completion_ids"], row["own"], strict=True) if own]
        others = [id for id, own in zip(row["completion_ids"], row["own"], strict=True) if not own]
        assert tokenizer.decode(said) == "".join(script)
        assert "You have 3.0." in tokenizer.decode(others) and "You have 2.0." in tokenizer.decode(others)
        paid = [(t, reward) for t, reward in enumerate(row["rewards"]) if reward]
        assert [reward for _, reward in paid] == [3.0, -1.0] and row["score"] == row["reward/Till"] == 2.0
        ends = [row["completion_ids"][t] for t, _ in paid]
        assert ends == [tokenizer.eos_token_id] * 2 and all(row["own"][t] for t, _ in paid)
        for name in ("rewards", "advantages", "returns", "logps"):
            assert all(number == 0 for number, own in zip(row[name], row["own"], strict=True) if not own)


def test_conversations_come_back_as_messages(policy_path, chats, tokenizer, tmp_path):
    train(ReinforceTrainer, ReinforceConfig, policy_path, chats, tmp_path, max_steps=1)
    rows = rows_of(tmp_path)
    assert all(row["prompt"] in chats["prompt"] for row in rows) and len(rows) == 4
    for row in rows:
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["completion"] == [{"role": "assistant", "content": text}]


# --- Files ---


def test_evaluations_have_splits_of_their_own(policy_path, prompts, tmp_path):
    evaluated = {"math": prompts.select(range(6)), "a-b": prompts.select(range(4))}
    overrides = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": evaluated}
    trainer = train(A2CTrainer, A2CConfig, policy_path, prompts, tmp_path, max_steps=2, **overrides)
    for _ in range(2):  # the same step again is the same file again
        trainer.evaluate(prompts.select(range(2)), metric_key_prefix="train")
    rollouts = load_rollouts(tmp_path)
    assert list(rollouts) == ["train", "eval_a_b", "eval_math", "eval_train"]
    assert rollouts["eval_math"]["step"] == [1] * 6 + [2] * 6
    assert rollouts["eval_a_b"]["step"] == [1] * 4 + [2] * 4 and rollouts["train"]["step"] == [0] * 4 + [1] * 4
    assert sorted(rollouts["eval_math"]["prompt"]) == sorted(PROMPTS[:6] * 2)
    assert sorted(rollouts["eval_train"]["prompt"]) == sorted(PROMPTS[:2])
    assert len({str(split.features) for split in rollouts.values()}) == 1


def test_what_is_done_again_is_put_aside(policy_path, prompts, tmp_path):
    """From a checkpoint, what came after it; from the start, everything."""
    saved = {"save_strategy": "steps", "save_steps": 1}
    trainer = train(A2CTrainer, A2CConfig, policy_path, prompts, tmp_path, max_steps=3, **saved)
    first = rows_of(tmp_path)
    trainer.args.max_steps = 2
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    second = rows_of(tmp_path)
    assert second == first[:8] and aside(tmp_path, 1) == first[4:]
    trainer.args.max_steps = 1
    trainer.train()
    assert [row["step"] for row in rows_of(tmp_path)] == [0] * 4 and aside(tmp_path, 2) == second


def aside(tmp_path, number):
    folder = tmp_path / "rollouts" / f"superseded-{number}" / "train"
    return Dataset.from_parquet([str(file) for file in sorted(folder.iterdir())]).to_list()


def test_a_run_killed_while_it_writes_leaves_only_whole_files(policy_path, prompts, tmp_path, monkeypatch):
    from trl_ext.actor_critic import recording as rollouts

    def half(table, file):
        file.write_bytes(b"PAR1 and then")
        raise KeyboardInterrupt

    write, calls = rollouts.pq.write_table, []

    def write_two(table, file):
        calls.append(file)
        (write if len(calls) <= 2 else half)(table, file)

    monkeypatch.setattr(rollouts.pq, "write_table", write_two)
    with pytest.raises(KeyboardInterrupt):
        train(A2CTrainer, A2CConfig, policy_path, prompts, tmp_path, max_steps=4)
    assert load_rollouts(tmp_path)["train"]["step"] == [0] * 4 + [1] * 4


def test_nothing_is_written_unless_asked_for(policy_path, prompts, tmp_path):
    A2CTrainer(policy_path, count_good, A2CConfig(**settings(tmp_path)), prompts).train()
    assert not (tmp_path / "rollouts").exists()
    with pytest.raises(ValueError, match="No rollouts in .*`save_rollouts=True`"):
        load_rollouts(tmp_path)
