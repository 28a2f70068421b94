"""The trainers against independent computations of what they should do."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    PROMPTS,
    build_policy,
    by_length,
    count_good,
    first_gradients,
    recorded,
    rows_of,
    scripted_rollout,
    settings,
)
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    ActorCriticConfig,
    ActorCriticTrainer,
    PPOConfig,
    PPOTrainer,
    ReinforceConfig,
    ReinforceTrainer,
)
from trl_ext.algorithms import ALGORITHMS
from trl_ext.critic.heads import ActionValueHead
from trl_ext.critic.reading import token_action_values, token_values
from trl_ext.critic.start import critic_from_policy, shared_critic


def plain_logps(model, prompt_ids, completion_ids):
    """Log-probabilities of one completion by the model's ordinary logits."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    logps = model(ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(completion_ids)[:, None])[:, 0]


def units_of(returns):
    """The mean and deviation of the first rollout's returns, in which a critic's values are."""
    returns = torch.tensor(list(returns))
    return returns.mean().item(), returns.std().item()


# --- What the batch holds ---


@pytest.mark.parametrize(
    "algorithm, overrides",
    [
        ("ppo", {"lam": 1.0, "num_iterations": 1}),
        ("ppo", {"lam": 1.0, "num_iterations": 2}),
        ("reinforce", {"baseline": "none", "scale_advantages": False}),
    ],
)
def test_returns_are_the_discounted_score_of_the_completion(
    policy, tokenizer, prompts, tmp_path, algorithm, overrides
):
    config_class, trainer_class = ALGORITHMS[algorithm]
    args = config_class(**settings(tmp_path, gamma=0.9, learning_rate=0.0, max_steps=1, **overrides))
    trainer = recorded(trainer_class)(policy, by_length, args, prompts, processing_class=tokenizer)
    trainer.train()
    for i, (_, completion) in enumerate(rows_of(batch := trainer.updates[0])):
        n = len(completion)
        expected = [n * 0.9 ** (n - 1 - t) for t in range(n)] + [0.0] * (batch["returns"].size(1) - n)
        for name in ("returns", "advantages") if algorithm == "reinforce" else ("returns",):
            torch.testing.assert_close(batch[name][i], torch.tensor(expected))


def test_each_lambda_is_that_of_what_it_is_named_for(policy, tokenizer, prompts, tmp_path):
    """Advantages and targets are those of runs with that one lambda."""
    trainer = A2CTrainer(policy, by_length, A2CConfig(**settings(tmp_path)), prompts, processing_class=tokenizer)
    lengths = torch.tensor([2, 4, 6])
    rewards, values = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < lengths.unsqueeze(1)

    def estimate(lam, **others):
        for name in ("lam_policy", "lam_value", "length_adaptive_alpha"):
            setattr(trainer.args, name, others.get(name))
        trainer.args.lam = lam
        return trainer.compute_advantages(rewards, values, mask, None)

    advantages, returns = estimate(0.5, lam_policy=0.2, lam_value=0.9)
    assert torch.equal(advantages, estimate(0.2)[0]) and not torch.allclose(advantages, estimate(0.5)[0])
    assert torch.equal(returns, estimate(0.9)[1]) and not torch.allclose(returns, estimate(0.5)[1])
    advantages, returns = estimate(0.5, lam_policy=0.2, length_adaptive_alpha=0.5)
    assert torch.equal(returns, estimate(0.5)[1])
    for row, lam in enumerate([0.0, 0.5, 2 / 3]):  # 1 - 1 / (alpha length)
        torch.testing.assert_close(advantages[row], estimate(lam)[0][row])


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_values_are_those_of_the_unpadded_prefixes(policy, tokenizer, prompts, tmp_path, critic, num_iterations):
    args = PPOConfig(
        **settings(
            tmp_path,
            critic=critic,
            max_steps=1,
            num_iterations=num_iterations,
            learning_rate=0.0,
            critic_learning_rate=0.0,
        )
    )
    trainer = recorded(PPOTrainer)(policy, by_length, args, prompts, processing_class=tokenizer)
    torch.nn.init.normal_(trainer.critic.value_head.weight)
    trainer.train()
    assert trainer.updates[0]["values"].grad_fn is None and not trainer.updates[0]["values"].requires_grad
    mean, std = units_of(float(len(ids)) for _, ids in rows_of(trainer.updates[0]) for _ in ids)
    for i, (prompt, completion) in enumerate(rows_of(batch := trainer.updates[0])):
        hidden = policy.model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
        expected = mean + std * (hidden @ trainer.critic.value_head.weight[0])
        n = len(completion)
        torch.testing.assert_close(batch["values"][i, :n], expected[len(prompt) - 1 : -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "separate", "q"])
def test_padding_on_the_left_changes_no_value(tokenizer, critic):
    """Though GPT-2 has learned what each position is."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1, **sizes)).eval()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    critic_model = critic_from_policy(policy) if critic == "separate" else shared_critic(policy)
    torch.nn.init.normal_(critic_model.value_head.weight)
    f = token_values
    if critic == "q":
        critic_model.value_head = ActionValueHead(critic_model.value_head, len(tokenizer), rank=4)
        f = token_action_values
    texts = [[5, 6, 7, 8, 9], [5, 6], [10, 11, 12]]
    width = 7
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    padded = f(policy, critic_model, ids, mask)
    assert padded.nan_to_num().std() > 0.2
    for row, text in zip(padded, texts, strict=True):
        (alone,) = f(policy, critic_model, torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long))
        first = 1 if critic == "q" else 0  # the first token has no state before it
        torch.testing.assert_close(row[width - len(text) + first :], alone[first:], atol=1e-5, rtol=1e-5)


def test_a_cut_completion_is_worth_the_value_of_its_last_state(policy, tokenizer, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, truncation="bootstrap", learning_rate=0.0, critic_learning_rate=0.0))
    trainer = recorded(A2CTrainer)(
        policy, by_length, args, prompts, processing_class=tokenizer, rollout_func=scripted_rollout
    )
    torch.nn.init.normal_(trainer.critic.value_head.weight)
    trainer.train()
    cut = []
    for batch in trainer.updates:
        for i, (prompt, completion) in enumerate(rows_of(batch)):
            ids = torch.tensor([[*prompt, *completion]])
            is_cut = completion[-1] != tokenizer.eos_token_id
            last = token_values(policy, trainer.critic, ids, torch.ones_like(ids))[0, -1].item()
            expected = last if is_cut else float(len(completion))
            torch.testing.assert_close(batch["returns"][i, 0].item(), expected, atol=1e-4, rtol=1e-4)
            cut.append(is_cut)
    assert any(cut) and not all(cut)


@pytest.mark.parametrize("one_step_mdp", [False, True])
def test_reinforce_is_paid_less_what_the_critic_expected(policy, tokenizer, prompts, tmp_path, one_step_mdp):
    """A bandit once for all its tokens, less the value of its prompt; a cut completion by the value of its last state."""
    own = {"one_step_mdp": one_step_mdp, "baseline": "value", "truncation": "bootstrap", "gamma": 0.5}
    own |= {"gate_critic": False, "scale_advantages": False}
    args = ReinforceConfig(**settings(tmp_path, learning_rate=0.0, critic_learning_rate=0.0, **own))
    trainer = recorded(ReinforceTrainer)(
        policy, by_length, args, prompts, processing_class=tokenizer, rollout_func=scripted_rollout
    )
    torch.nn.init.normal_(trainer.critic.value_head.weight)
    trainer.train()
    cut = []
    for batch in trainer.updates:
        for i, (prompt, completion) in enumerate(rows_of(batch)):
            n, ids = len(completion), torch.tensor([[*prompt, *completion]])
            values = token_values(policy, trainer.critic, ids, torch.ones_like(ids))[0, len(prompt) - 1 :].tolist()
            cut.append(completion[-1] != tokenizer.eos_token_id)
            if one_step_mdp:
                returns, baselines = [values[-1] if cut[-1] else float(n)] * n, [values[0]] * n
            else:
                end = 0.5 * values[-1] if cut[-1] else float(n)
                returns, baselines = [end * 0.5 ** (n - 1 - t) for t in range(n)], values[:-1]
            expected = {"returns": returns, "advantages": [g - v for g, v in zip(returns, baselines, strict=True)]}
            for name, row in expected.items():
                assert batch[name][i, :n].tolist() == pytest.approx(row, abs=1e-4), name
    assert any(cut) and not all(cut)


def test_a_cut_completion_pays_the_missing_eos_penalty(policy, tokenizer, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, missing_eos_penalty=10.0))
    trainer = recorded(A2CTrainer)(
        policy, by_length, args, prompts, processing_class=tokenizer, rollout_func=scripted_rollout
    )
    trainer.train()
    for i, (_, completion) in enumerate(rows_of(batch := trainer.updates[0])):
        penalty = 0.0 if completion[-1] == tokenizer.eos_token_id else 10.0
        assert batch["returns"][i, 0].item() == pytest.approx(len(completion) - penalty)


def test_masked_truncation_trains_on_finished_completions_only(policy, tokenizer, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, truncation="mask"))
    assert args.mask_truncated_completions
    trainer = recorded(A2CTrainer)(
        policy, by_length, args, prompts, processing_class=tokenizer, rollout_func=scripted_rollout
    )
    trainer.train()
    batch = trainer.updates[0]
    ends = torch.isin(batch["completion_ids"], torch.tensor(tokenizer.eos_token_id)).any(dim=1)
    assert ends.any() and not ends.all()
    assert (batch["advantages"][~ends] == 0).all() and (batch["returns"][ends, 0] > 0).all()


def test_kl_in_reward_is_the_log_ratio_to_the_reference(policy_path, tokenizer, prompts, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(policy_path)
    reference = AutoModelForCausalLM.from_pretrained(policy_path)
    args = A2CConfig(**settings(tmp_path, kl_in_reward=0.5, learning_rate=3e-2, max_steps=3))
    trainer = recorded(A2CTrainer)(policy, by_length, args, prompts, processing_class=tokenizer)
    before = []

    class KeepWeights(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.append({name: p.detach().clone() for name, p in policy.named_parameters()})

    trainer.add_callback(KeepWeights())
    trainer.train()
    policy.load_state_dict(before[2], strict=False)
    batch = trainer.updates[2]
    for i, (prompt, completion) in enumerate(rows_of(batch)):
        k1 = plain_logps(policy, prompt, completion) - plain_logps(reference, prompt, completion)
        assert k1.abs().max() > 1e-2  # the policy has moved
        expected = len(completion) - 0.5 * k1.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(batch["returns"][i, : len(completion)], expected, atol=1e-3, rtol=1e-4)
    logged = trainer.state.log_history[2]
    assert logged["kl/k3"] > 0 and logged["kl/coef"] == 0.5
    assert trainer.beta == 0.5 and trainer.args.beta == 0.0


def test_kl_in_reward_is_a_reward_and_nothing_else(policy_path, tokenizer, prompts, tmp_path):
    """An update with it is one in which a reward function pays the penalty, and no reference is known."""
    fixed = {"lam": 0.9, "scale_advantages": False, "loss_type": "dapo", "vf_coef": 0.1}

    def gradients_of(**overrides):
        policy, reference = (AutoModelForCausalLM.from_pretrained(policy_path) for _ in range(2))

        def penalized(prompts, completion_ids, **kwargs):
            rewards = []
            for prompt, ids in zip(prompts, completion_ids, strict=True):
                prompt_ids = tokenizer(prompt)["input_ids"]
                k1 = plain_logps(policy, prompt_ids, ids) - plain_logps(reference, prompt_ids, ids)
                rewards.append([*(-0.5 * k1[:-1]).tolist(), len(ids) - 0.5 * k1[-1].item()])
            return rewards

        args = A2CConfig(**settings(tmp_path, **fixed, **overrides))
        reward = by_length if args.kl_in_reward else penalized
        trainer = A2CTrainer(policy, reward, args, prompts, processing_class=tokenizer, rollout_func=scripted_rollout)
        trainer._take_units = lambda rollout, forward: forward  # which are those of the rewards before any KL
        torch.nn.init.normal_(trainer.critic.value_head.weight, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            policy.lm_head.weight.mul_(1.5)  # off the reference, which is the policy as it was given
        return first_gradients(trainer)

    expected = gradients_of()
    for name, gradient in gradients_of(kl_in_reward=0.5).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_adaptive_kl_coefficient_is_what_a_nat_costs(policy_path, tokenizer, prompts, tmp_path):
    """Steered by the mean of log pi/pi_ref, of all completions; the policy and its KL stay as they are."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(policy_path) for _ in range(2))
    scripted = scripted_rollout(PROMPTS, SimpleNamespace(processing_class=tokenizer))
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.5)
        pairs = list(zip(scripted["prompt_ids"], scripted["completion_ids"], strict=True))
        kl = {tuple(ids): plain_logps(policy, p, ids) - plain_logps(reference, p, ids) for p, ids in pairs}
        policy.lm_head.weight.mul_(2)
    assert len(kl) == len(pairs)
    mean = sum(k1.sum().item() for k1 in kl.values()) / len(pairs)
    assert mean > 0.5
    own = {"kl_in_reward": 0.4, "kl_target": mean / 1.1, "kl_horizon": 16, "lam": 1.0}
    still = {"learning_rate": 0.0, "critic_learning_rate": 0.0, "per_device_train_batch_size": 8, "max_steps": 3}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    trainer = recorded(A2CTrainer)(
        policy,
        by_length,
        A2CConfig(**settings(tmp_path, **own, **still) | evaluation),
        prompts,
        eval_dataset=prompts,
        processing_class=tokenizer,
        rollout_func=scripted_rollout,
    )
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.5)
    trainer.train()
    # Ten percent too much, over half a horizon; evaluations between the updates steer nothing
    logged = [logs["kl/coef"] for logs in trainer.state.log_history if "kl/coef" in logs]
    for step, coef in enumerate([0.4, 0.4 * 1.05, 0.4 * 1.05**2]):
        batch = trainer.updates[2 * step]
        assert logged[step] == pytest.approx(coef, rel=1e-4)
        for i, (_, completion) in enumerate(rows_of(batch)):
            expected = len(completion) - coef * kl[tuple(completion)].flip(0).cumsum(0).flip(0)
            torch.testing.assert_close(batch["returns"][i, : len(completion)], expected, atol=1e-4, rtol=1e-4)


def test_rows_without_a_score_teach_nothing(policy, tokenizer, prompts, tmp_path):
    def half(prompts, completion_ids, **kwargs):
        return [float(i) if i % 2 else None for i in range(len(completion_ids))]

    args = PPOConfig(**settings(tmp_path, num_iterations=2, max_steps=1))
    trainer = recorded(PPOTrainer)(policy, half, args, prompts, processing_class=tokenizer)
    trainer.train()
    batch = trainer.updates[0]
    unscored = batch["scores"].isnan()
    assert unscored.sum() == 2
    assert (batch["advantages"][unscored] == 0).all() and (batch["returns"][unscored] == 0).all()
    # Of two scored completions each is compared with the other, and the scale is that of their tokens alone
    better = batch["scores"][~unscored] > batch["scores"][~unscored].mean()
    mask = batch["completion_mask"][~unscored]
    expected = torch.where(better.unsqueeze(1), 1.0, -1.0) * mask
    torch.testing.assert_close(batch["advantages"][~unscored], expected, atol=1e-4, rtol=0)


# --- The gradient ---


def with_tool_text(prompts, trainer):
    """Scripted completions whose second token is a tool's."""
    output = scripted_rollout(prompts, trainer)
    return output | {"env_mask": [[int(t != 1) for t in range(len(ids))] for ids in output["completion_ids"]]}


def of_odd_lengths(completion_ids, **kwargs):
    return [float(len(ids)) if len(ids) % 2 else None for ids in completion_ids]


@pytest.mark.parametrize(
    "case",
    ["a2c", "defaults", "ppo", "reinforce", "bandit", "separate", "accumulated", "minibatches", "tools", "unscored"],
)
def test_gradient_equals_that_of_the_plain_objective(policy, tokenizer, prompts, tmp_path, case):
    """One update's gradient against autograd through ordinary logits and hidden states, row by row, unpadded."""
    trainer_class, overrides = {
        "a2c": (A2CTrainer, {"gamma": 0.9, "vf_coef": 0.5}),
        "defaults": (PPOTrainer, {"critic_detach": True}),
        "ppo": (PPOTrainer, {"vf_coef": 0.5}),
        "reinforce": (ReinforceTrainer, {"gamma": 0.9, "baseline": "none"}),
        "bandit": (ReinforceTrainer, {"one_step_mdp": True, "baseline": "value"}),
        "separate": (A2CTrainer, {"critic": "separate"}),
        "accumulated": (A2CTrainer, {"vf_coef": 0.5, "gradient_accumulation_steps": 2}),
        "minibatches": (PPOTrainer, {"vf_coef": 0.5, "steps_per_generation": 2}),
        "tools": (A2CTrainer, {"vf_coef": 0.5}),
        "unscored": (A2CTrainer, {"vf_coef": 0.5, "per_device_train_batch_size": 8}),
    }[case]
    if case not in ("reinforce", "separate"):
        overrides = {"critic_detach": False} | overrides
    args = trainer_class.config_class(**settings(tmp_path, loss_type="dapo", **overrides))
    trainer = recorded(trainer_class)(
        policy,
        of_odd_lengths if case == "unscored" else by_length,
        args,
        prompts,
        processing_class=tokenizer,
        rollout_func={"tools": with_tool_text, "unscored": scripted_rollout}.get(case),
    )
    if trainer.critic is not None:
        torch.nn.init.normal_(trainer.critic.value_head.weight, std=0.3)
    gradients = first_gradients(trainer)

    loss, num_tokens, returns = 0, 0, []
    for _, completion in rows_of(trainer.rollouts[0]):
        n, gamma = len(completion), 1.0 if case == "bandit" else args.gamma
        num_tokens += n - (case == "tools" and n > 1)
        if case != "unscored" or n % 2 == 1:
            returns += [n * gamma ** (n - 1 - t) for t in range(n) if case != "tools" or t != 1]
    mean, std = units_of(returns)
    num_tokens /= 2 if case == "minibatches" else 1  # an update takes half of the rollout
    assert len(trainer.updates) == (2 if case == "accumulated" else 1)
    kinds = set()
    for batch in trainer.updates:
        for i, (prompt, completion) in enumerate(rows_of(batch)):
            n, ids = len(completion), torch.tensor([[*prompt, *completion]])
            chosen = torch.tensor([case != "tools" or t != 1 for t in range(n)])
            is_scored = case != "unscored" or n % 2 == 1
            kinds.add(is_scored)
            if not is_scored:
                continue
            loss = loss - (plain_logps(policy, prompt, completion) * batch["advantages"][i, :n])[chosen].sum()
            if trainer.critic is not None:
                trunk = trainer.critic.trunk or policy.model
                states = trunk(ids).last_hidden_state[0, len(prompt) - 1 : -1]
                states = states.detach() if args.critic_detach and trainer.critic.trunk is None else states
                head = trainer.critic.value_head
                values = states @ head.weight[0] + head.bias
                targets = (batch["returns"][i, :n] - mean) / std
                loss = loss + args.vf_coef * 0.5 * (values - targets)[chosen].square().sum()
    assert len(kinds) == (2 if case == "unscored" else 1)
    (loss / num_tokens).backward()
    assert gradients.keys() == {n for n, _ in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_detached_critic_leaves_the_trunk_to_the_policy(policy, tokenizer, prompts, tmp_path):
    """With zero advantages (lr 0 so far, reward = value = 0) only the value loss could move the trunk."""
    norms = {}
    for detach in (True, False):
        args = A2CConfig(**settings(tmp_path, critic_detach=detach, lam=0.0, max_steps=1, max_grad_norm=0.0))
        trainer = recorded(A2CTrainer)(build_policy(tokenizer), by_length, args, prompts, processing_class=tokenizer)
        torch.nn.init.normal_(trainer.critic.value_head.weight)
        trainer.compute_advantages = lambda rewards, values, mask, bootstrap: (torch.zeros_like(rewards), rewards + 1)

        class KeepNorm(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, detach=detach, trainer=trainer, **kwargs):
                norms[detach] = trainer.model.model.layers[0].mlp.up_proj.weight.grad.norm().item()

        trainer.add_callback(KeepNorm())
        trainer.train()
    assert norms[True] == 0 and norms[False] > 1e-4


# --- The updates ---


@pytest.mark.parametrize("num_iterations, steps_per_generation", [(3, 1), (1, 2), (2, 2)])
def test_the_first_update_on_a_rollout_has_ratio_one(
    policy, tokenizer, prompts, tmp_path, num_iterations, steps_per_generation
):
    args = PPOConfig(
        **settings(
            tmp_path,
            max_steps=2 * num_iterations * steps_per_generation,
            num_iterations=num_iterations,
            steps_per_generation=steps_per_generation,
        )
    )
    trainer = PPOTrainer(policy, by_length, args, prompts, processing_class=tokenizer)
    trainer.train()
    history = trainer.state.log_history[:-1]
    for step, logs in enumerate(history):
        first = step % (num_iterations * steps_per_generation) == 0
        assert (abs(logs["ratio/max"] - 1) < 1e-5) == first, (step, logs["ratio/max"])


def test_warmup_trains_the_critic_alone(policy, tokenizer, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, critic_warmup_steps=3, max_steps=4, num_iterations=1, weight_decay=0.1))
    trainer = PPOTrainer(policy, by_length, args, prompts, processing_class=tokenizer)
    weights = []

    class KeepWeights(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})

    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.add_callback(KeepWeights())
    trainer.train()
    for name, weight in start.items():
        frozen = [torch.equal(weight, after[name]) for after in weights]
        assert frozen == ([False] * 4 if name.startswith("critic.") else [True, True, True, False]), (name, frozen)


def test_target_kl_ends_the_epochs_until_the_next_rollout(policy, tokenizer, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, learning_rate=5e-2, num_iterations=4, max_steps=8, target_kl=1e-3))
    trainer = PPOTrainer(policy, count_good, args, prompts, processing_class=tokenizer)
    moved, weights = [], [policy.lm_head.weight.detach().clone()]

    class KeepWeights(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(policy.lm_head.weight.detach().clone())
            moved.append(not torch.equal(weights[-2], weights[-1]))

    trainer.add_callback(KeepWeights())
    trainer.train()
    # the second epoch finds the policy too far off, and neither it nor a later one is made
    assert moved == [True, False, False, False] * 2


def test_evaluation_does_not_hide_the_kl_that_ends_the_epochs(tokenizer, prompts, tmp_path):
    """The KL of the second step is a little more than is allowed, and that of evaluations is 0."""

    def logged(name, **overrides):
        args = PPOConfig(**settings(tmp_path, learning_rate=5e-2, num_iterations=4, **overrides))
        trainer = PPOTrainer(
            build_policy(tokenizer),
            count_good,
            args,
            prompts,
            eval_dataset=prompts,
            processing_class=tokenizer,
            rollout_func=scripted_rollout,
        )
        trainer.train()
        return [logs[name] for logs in trainer.state.log_history if name in logs]

    target_kl = 0.8 * logged("approx_kl", max_steps=2)[1] / 1.5
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        assert logged("target_kl_exceeded", max_steps=4, target_kl=target_kl, **evaluation) == [0, 1]


def test_warmup_leaves_the_kl_coefficient_alone(policy_path, prompts, tmp_path):
    args = A2CConfig(
        **settings(tmp_path, kl_in_reward=0.1, kl_target=6.0, kl_horizon=10, critic_warmup_steps=3, max_steps=4)
    )
    trainer = A2CTrainer(policy_path, count_good, args, prompts)
    trainer.train()
    assert [logs["kl/coef"] for logs in trainer.state.log_history[:-1]] == [0.1] * 4


def test_a_separate_critic_is_not_run_for_the_reference(policy_path, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, critic="separate", kl_in_reward=0.1, num_iterations=2, max_steps=2))
    trainer = PPOTrainer(policy_path, count_good, args, prompts, peft_config=LoraConfig(target_modules="all-linear"))
    calls = []
    trainer.critic.trunk.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 3  # the rollout's values and two updates


def test_value_gradients_are_zeroed_between_steps(policy, tokenizer, prompts, tmp_path):
    """A critic outside the model would accumulate gradients for the whole run."""
    args = A2CConfig(**settings(tmp_path, max_steps=3))
    trainer = A2CTrainer(policy, by_length, args, prompts, processing_class=tokenizer)
    trainer.train()
    assert all(p.grad is None for p in trainer.critic.parameters())
    in_optimizer = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert [sum(p is q for q in in_optimizer) for p in trainer.critic.parameters()] == [1, 1]


def test_critic_has_its_own_learning_rate(policy, tokenizer, prompts, tmp_path):
    args = A2CConfig(**settings(tmp_path, learning_rate=1e-3, critic_learning_rate=5e-2, weight_decay=0.1))
    trainer = A2CTrainer(policy, by_length, args, prompts, processing_class=tokenizer)
    trainer.create_optimizer()
    found = {id(p): (g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups for p in g["params"]}
    head = trainer.critic.value_head
    assert found[id(head.weight)] == (5e-2, 0.1) and found[id(head.bias)] == (5e-2, 0.0)
    assert found[id(policy.lm_head.weight)] == (1e-3, 0.1)


def test_given_optimizer_trains_the_critic(policy, tokenizer, prompts, tmp_path):
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    args = A2CConfig(**settings(tmp_path, max_steps=2))
    trainer = A2CTrainer(
        policy, by_length, args, prompts, processing_class=tokenizer, optimizers=(optimizer, scheduler)
    )
    trainer.train()
    assert trainer.critic.value_head.bias.abs().item() > 1e-3


def test_value_clipping_bounds_the_pull_on_the_critic(policy, tokenizer, prompts, tmp_path):
    """The first update takes every value further down than it may go, and none of the others moves the critic."""
    own = {"critic": "separate", "optim": "sgd", "weight_decay": 0.0, "num_iterations": 3, "max_steps": 3}
    own |= {"gate_critic": False, "cliprange_value": 1e-3, "critic_learning_rate": 0.1}
    args = PPOConfig(**settings(tmp_path, **own))
    trainer = PPOTrainer(policy, by_length, args, prompts, processing_class=tokenizer)
    trainer.compute_advantages = lambda rewards, values, mask, bootstrap: (rewards, values - torch.arange(10.0, 16.0))
    weights = [trainer.critic.value_head.bias.item()]

    class KeepWeights(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append(trainer.critic.value_head.bias.item())

    trainer.add_callback(KeepWeights())
    trainer.train()
    assert weights[0] > weights[1] == weights[2] == weights[3]
    assert [logs["value_clip_ratio"] for logs in trainer.state.log_history[:3]] == [0, 1, 1]


# --- Learning ---


def test_the_critic_begins_at_the_mean_and_learns_which_prompts_pay(policy, tokenizer, prompts, tmp_path):
    def of_prompt(prompts, **kwargs):
        return [100.0 + 10.0 * ("film" in prompt or "actor" in prompt) for prompt in prompts]

    own = {"critic": "separate", "per_device_train_batch_size": 8}
    args = A2CConfig(**settings(tmp_path, learning_rate=0.0, max_steps=40, **own))
    trainer = A2CTrainer(policy, of_prompt, args, prompts, processing_class=tokenizer)
    trainer.train()
    history = trainer.state.log_history[:-1]
    assert history[0]["values/mean"] == pytest.approx(history[0]["returns/mean"])
    losses = [logs["value_loss"] for logs in history]
    assert losses[0] == pytest.approx(0.5, abs=0.1)  # half of the variance, in its units
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


@pytest.mark.parametrize(
    "algorithm, overrides",
    [
        ("ppo", {"num_iterations": 2, "max_steps": 60}),
        ("a2c", {}),
        ("reinforce", {}),
        ("reinforce", {"one_step_mdp": True, "baseline": "value"}),
        ("ppo", {"critic": "separate", "num_iterations": 2, "max_steps": 60}),
    ],
)
def test_the_policy_learns(policy, tokenizer, prompts, tmp_path, algorithm, overrides):
    config_class, trainer_class = ALGORITHMS[algorithm]
    args = config_class(
        **settings(
            tmp_path,
            per_device_train_batch_size=16,
            num_generations=2,
            max_steps=40,
            logging_steps=10,
            learning_rate=1e-2,
        )
        | overrides
    )
    trainer = trainer_class(policy, count_good, args, prompts, processing_class=tokenizer)
    trainer.train()
    rewards = [logs["reward"] for logs in trainer.state.log_history[:-1]]
    assert rewards[0] < 0.45 and rewards[-1] > 0.8, rewards


def test_metrics_people_steer_by_are_logged(policy_path, prompts, tmp_path):
    args = PPOConfig(**settings(tmp_path, kl_in_reward=0.05, num_iterations=2, max_steps=4))
    trainer = PPOTrainer(policy_path, count_good, args, prompts)
    trainer.train()
    logs = trainer.state.log_history[2] | trainer.state.log_history[3]  # with the rollout, and the epoch after it
    for name in [
        "reward", "returns/mean", "values/mean", "value_loss", "explained_variance", "kl/k1", "kl/k3", "kl/coef",
        "ratio/mean", "ratio/max", "approx_kl", "clip_ratio/region_mean", "entropy", "completions/mean_length",
        "completions/clipped_ratio",
    ]:  # fmt: skip
        assert math.isfinite(logs[name]), name
    assert logs["tokens_per_second"] > 0
    assert "frac_reward_zero_std" not in logs


@pytest.mark.parametrize("num_iterations, accumulation", [(2, 1), (1, 2)])
def test_completions_table_shows_token_advantages(policy, tokenizer, prompts, tmp_path, num_iterations, accumulation):
    args = ActorCriticConfig(
        **settings(
            tmp_path,
            log_completions=True,
            scale_advantages=False,
            num_iterations=num_iterations,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
    )
    trainer = recorded(ActorCriticTrainer)(policy, by_length, args, prompts, processing_class=tokenizer)
    trainer.train()
    shown = dict(zip(trainer._logs["completion"], trainer._logs["advantages"], strict=True))
    rows = {}
    for batch in trainer.updates:
        for i, (_, completion) in enumerate(rows_of(batch)):
            text = tokenizer.decode(completion, skip_special_tokens=True)
            rows[text] = batch["advantages"][i, : len(completion)].mean().item()
    assert shown.keys() == rows.keys()
    for text, advantage in shown.items():
        assert advantage == pytest.approx(rows[text], abs=1e-5)
    assert all(value != "" for value in trainer._logs["extra"]["decisive_token"])


def test_lora_trains_adapters_and_head_only(policy_path, prompts, tmp_path):
    args = PPOConfig(
        **settings(tmp_path, kl_in_reward=0.05, num_iterations=2, max_steps=4, gradient_checkpointing=True)
    )
    trainer = PPOTrainer(
        policy_path, count_good, args, prompts, peft_config=LoraConfig(r=4, target_modules="all-linear")
    )
    start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        is_trained = "lora_" in name or name.startswith("critic.")
        assert torch.equal(start[name], parameter) != is_trained, name
