"""A critic that is fitted to stored rollouts, whose returns are known functions of their tokens."""

import random

import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from helpers import PROMPTS, build_policy, by_length, recorded, rows_of, settings
from peft import LoraConfig

from trl_ext import ReinforceConfig, ReinforceTrainer, load_rollouts, token_mdp, token_values
from trl_ext.actor_critic.episodes import divided, read_episodes
from trl_ext.algorithms import ALGORITHMS


def rollouts_of(tokenizer, num_rows, paid, bag="good good good bad bad bad", of_tools=""):
    """
    Completions that hold the same words in a random order, each of which earns what `paid` says of (last, word). The
    words `of_tools` are not the policy's.
    """
    rng, rows = random.Random(0), []
    for row in range(num_rows):
        words = bag.split()
        rng.shuffle(words)
        words.append("<eos>")
        rewards = [float(paid(pair)) for pair in zip([None, *words], words, strict=False)]
        rows.append({"prompt": PROMPTS[row % len(PROMPTS)], "tokens": words, "rewards": rewards})
        rows[-1] |= {
            "completion_ids": tokenizer.convert_tokens_to_ids(words),
            "own": [word != of_tools for word in words],
        }
    return Dataset.from_list(rows).add_column("terminated", [True] * num_rows)


def good(pair):
    return pair[1] == "good"


def make(algorithm, policy, tokenizer, prompts, tmp_path, peft_config=None, **overrides):
    config_class, trainer_class = ALGORITHMS[algorithm]
    args = config_class(**settings(tmp_path, per_device_train_batch_size=8, **overrides))
    return trainer_class(policy, by_length, args, prompts, processing_class=tokenizer, peft_config=peft_config)


def explained(trainer, rollouts, tokenizer, gamma=1.0):
    """Returns the explained variance of returns that are counted here, by values of unpadded texts."""
    values, returns = [], []
    for row in rollouts:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + row["completion_ids"]])
        of_row = token_values(trainer.model, trainer.critic, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        own = [t for t, is_own in enumerate(row["own"]) if is_own]
        values += of_row[own]
        returns += [sum(row["rewards"][k] * gamma**n for n, k in enumerate(own[i:])) for i in range(len(own))]
    values, returns = torch.tensor([values]), torch.tensor([returns])
    return token_mdp.explained_variance(values, returns, torch.ones_like(returns)).item()


# --- What it learns ---


def test_a_critic_learns_what_is_still_to_come(policy, tokenizer, prompts, tmp_path):
    """A bag of words has those left that were not drawn yet; half of them are not the policy's to draw."""
    rollouts = rollouts_of(tokenizer, 120, good, of_tools="bad")
    trainer = make("ppo", policy, tokenizer, prompts, tmp_path, critic="separate")
    seen = trainer.pretrain_critic(rollouts.select(range(100)))
    assert seen["explained_variance_before"] == 0 and seen["explained_variance"] > 0.9
    assert seen["rollouts"] == 100 and 1 <= seen["epochs"] <= 20
    assert explained(trainer, rollouts.select(range(100, 120)), tokenizer) > 0.9
    trainer.train()
    assert trainer.state.log_history[0]["pretraining/explained_variance"] == seen["explained_variance"]


def test_a_head_on_the_policys_states_learns_what_they_say(policy, tokenizer, prompts, tmp_path):
    """As much of it as least squares finds in them."""
    rollouts = rollouts_of(tokenizer, 120, lambda pair: pair[0] == "good")

    def states_and_returns(rows):
        ids = [tokenizer(row["prompt"])["input_ids"] + row["completion_ids"] for row in rows]
        with torch.no_grad():
            states = [policy.model(torch.tensor([x])).last_hidden_state[0, -8:-1] for x in ids]  # of seven tokens
        states = torch.nn.functional.pad(torch.cat(states), (0, 1), value=1.0)
        return states, torch.tensor([x for row in rows for x in row["rewards"]])[:, None]

    states, returns = states_and_returns(rollouts.select(range(100)))
    solution = torch.linalg.lstsq(states, returns).solution
    states, returns = states_and_returns(held_out := rollouts.select(range(100, 120)))
    best = 1 - ((states @ solution - returns).var() / returns.var()).item()
    trainer = make("ppo", policy, tokenizer, prompts, tmp_path, gamma=0.0)
    seen = trainer.pretrain_critic(rollouts.select(range(100)), learning_rate=0.03)
    assert seen["epochs"] < 20 and explained(trainer, held_out, tokenizer, gamma=0.0) > best - 0.05 > 0.6


def test_a_critic_of_actions_knows_the_token_itself(tokenizer, prompts, tmp_path):
    """No state says which word comes next, so V cannot know what it pays; Q can."""
    rollouts = rollouts_of(tokenizer, 100, good, bag="good bad " * 6)
    shares = {}
    for algorithm in ("q_actor_critic", "ppo"):
        trainer = make(algorithm, build_policy(tokenizer), tokenizer, prompts, tmp_path, gamma=0.0)
        shares[algorithm] = trainer.pretrain_critic(rollouts, learning_rate=0.03)["explained_variance"]
        if algorithm == "q_actor_critic":
            head = trainer.critic.value_head
            assert all(torch.equal(p, getattr(head, f"target_{n}")) for n, p in head.named_parameters())
    assert shares["q_actor_critic"] > 0.9 and shares["ppo"] < 0.5


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_the_policy_stays_as_it_is(policy_path, tokenizer, prompts, tmp_path, critic):
    lora = LoraConfig(target_modules="all-linear") if critic == "adapter" else None
    trainer = make("ppo", policy_path, tokenizer, prompts, tmp_path, peft_config=lora, critic=critic)
    trainer.model.train()
    own = {id(parameter) for parameter in trainer.critic.own_parameters()}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    random_state = torch.get_rng_state()
    trainer.pretrain_critic(rollouts_of(tokenizer, 20, good), num_epochs=2, learning_rate=0.01)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name]) == (id(parameter) not in own), name
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.optimizer is None and all(module.training for module in trainer.model.modules())


def test_the_units_are_those_of_the_returns(tokenizer, prompts, tmp_path):
    """A reward that is a thousand times as large, and moved, is learned as well, and at the same rate."""
    found = []
    for scale, shift in ((1.0, 0.0), (1000.0, -5000.0)):
        rollouts = rollouts_of(tokenizer, 40, lambda pair: scale * good(pair) + shift * (pair[1] == "<eos>"))  # noqa: B023
        trainer = make("ppo", build_policy(tokenizer), tokenizer, prompts, tmp_path, max_grad_norm=10.0)
        seen = trainer.pretrain_critic(rollouts, num_epochs=5, learning_rate=0.03)
        ids = torch.tensor([rollouts[0]["completion_ids"]])
        values = token_values(trainer.model, trainer.critic, ids, torch.ones_like(ids))
        found.append((seen["explained_variance"], (values - shift) / scale))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-2) and found[0][0] > 0.1
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-2, rtol=0)


def test_rows_may_come_in_any_order(tokenizer, prompts, tmp_path):
    rollouts = rollouts_of(tokenizer, 30, good)
    weights = []
    for rows, seed in ((rollouts, 1), (rollouts.shuffle(seed=5), 1), (rollouts, 2)):
        trainer = make("ppo", build_policy(tokenizer), tokenizer, prompts, tmp_path, seed=seed)
        trainer.pretrain_critic(rows, num_epochs=2, learning_rate=0.1)
        weights.append(trainer.critic.value_head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_best_weights_are_kept(policy, tokenizer, prompts, tmp_path):
    """At a rate at which nothing can be learned the critic stays as it was."""
    trainer = make("ppo", policy, tokenizer, prompts, tmp_path)
    seen = trainer.pretrain_critic(rollouts_of(tokenizer, 30, good), learning_rate=1e6)
    assert seen["epochs"] == 3 and seen["explained_variance"] == 0
    assert not any(parameter.any() for parameter in trainer.critic.parameters())


# --- What it reads ---


def discounted(gamma):
    return lambda rewards, mask, kl: token_mdp.discounted_returns(rewards, mask, gamma)


@pytest.mark.parametrize("data", ["prompts", "chats"])
def test_episodes_are_what_a_run_without_critic_has_sampled(request, policy, tokenizer, tmp_path, data):
    dataset = request.getfixturevalue(data)
    args = ReinforceConfig(**settings(tmp_path, save_rollouts=True, gamma=0.9))
    trainer = recorded(ReinforceTrainer)(policy, by_length, args, dataset, processing_class=tokenizer)
    trainer.train()
    rollouts = load_rollouts(tmp_path)["train"]
    tokenize = lambda texts: trainer._tokenize_prompts(texts)[0]  # noqa: E731
    episodes = read_episodes(rollouts, tokenizer, 27, tokenize, trainer._targets_of, "penalty")
    sampled = [row for batch in trainer.rollouts for row in rows_of(batch)]
    assert [(e.prompt_ids, e.completion_ids) for e in episodes] == sorted(sampled)
    returns = sorted((row["completion_ids"], row["returns"]) for row in rollouts)
    for (ids, expected), episode in zip(returns, sorted(episodes, key=lambda e: e.completion_ids), strict=True):
        assert episode.completion_ids == ids and episode.returns == pytest.approx(expected)
    critic = make("a2c", build_policy(tokenizer), tokenizer, dataset, tmp_path)
    assert critic.pretrain_critic(rollouts, num_epochs=1)["rollouts"] == len(rollouts)


def test_returns_are_those_of_the_policys_own_tokens(tokenizer):
    """A tool's answer is no time step, and a cut completion has a return only if the limit is the horizon."""
    common = {
        "tokens": ["good", "bad", "good"],
        "completion_ids": tokenizer.convert_tokens_to_ids(["good", "bad", "good"]),
    }
    rows = [
        {"prompt": "it", "own": [True, False, True], "rewards": [1.0, 0.0, 4.0], "terminated": True, **common},
        {"prompt": "it", "own": [True, True, True], "rewards": [0.0, 0.0, 8.0], "terminated": False, **common},
        {"prompt": "it", "own": [False, False, False], "rewards": [0.0, 0.0, 0.0], "terminated": True, **common},
    ]
    rollouts = concatenate_datasets([Dataset.from_list(rows)] * 2)

    def returns(truncation):
        tokenize = lambda prompts: [[5] for _ in prompts]  # noqa: E731
        episodes = read_episodes(rollouts, tokenizer, 27, tokenize, discounted(0.5), truncation)
        return [e.returns for e in episodes]

    whole, cut = [3.0, 0.0, 4.0], [2.0, 4.0, 8.0]
    assert returns("penalty") == [whole, whole, cut, cut]
    assert returns("bootstrap") == returns("mask") == [whole, whole]


def test_a_critic_of_actions_is_fitted_to_what_comes_after_the_tokens_own_kl(
    policy_path, tokenizer, prompts, tmp_path
):
    """It knows that one; where nothing else is paid, the last token is worth nothing."""
    rollouts = rollouts_of(tokenizer, 2, good)
    kl = [0.5, -1.0, 2.0, 0.0, 1.0, 3.0, 4.0]
    rows = (
        rollouts.remove_columns("rewards").add_column("kl", [kl] * 2).add_column("rewards", [[-x / 4 for x in kl]] * 2)
    )
    trainer = make("q_actor_critic", policy_path, tokenizer, prompts, tmp_path, kl_in_reward=0.25)
    tokenize = lambda prompts: [[5] for _ in prompts]  # noqa: E731
    for episode in read_episodes(rows, tokenizer, 27, tokenize, trainer._targets_of, "penalty"):
        assert episode.returns == pytest.approx([-sum(kl[t + 1 :]) / 4 for t in range(7)])


def test_prompts_are_held_out_whole_where_there_are_ten(tokenizer):
    rollouts = rollouts_of(tokenizer, 60, good)
    for num_prompts in (20, 4):
        rows = rollouts.remove_columns("prompt").add_column("prompt", [str(i % num_prompts) for i in range(60)])
        tokenize = lambda prompts: [[int(prompt)] for prompt in prompts]  # noqa: E731
        episodes = read_episodes(rows, tokenizer, 27, tokenize, discounted(1.0), "penalty")
        training, held_out = divided(episodes, seed=0)
        shared = {*(e.prompt_ids[0] for e in training)} & {*(e.prompt_ids[0] for e in held_out)}
        assert len(training) == 54 and len(held_out) == 6 and bool(shared) == (num_prompts == 4)


# --- What it refuses ---


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda rows: DatasetDict({"train": rows}), r"load_rollouts\(output_dir\)\['train'\]"),
        (lambda rows: rows.remove_columns("rewards"), r"lacks the columns \['rewards'\]"),
        (lambda rows: rows.map(lambda row: {"own": [False] * 7}), "0 of 4 rollouts have a return"),
        (lambda rows: rows.map(lambda row: {"completion_ids": [27] * 7}), "the token 27, and the policy knows 27"),
        (lambda rows: rows.map(lambda row: {"tokens": ["Ġgood"] * 7}), "as 'Ġgood', and the policy's tokenizer as"),
    ],
)
def test_rollouts_that_do_not_fit_are_refused(policy, tokenizer, prompts, tmp_path, change, message):
    trainer = make("ppo", policy, tokenizer, prompts, tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.pretrain_critic(change(rollouts_of(tokenizer, 4, good)))


def test_a_trainer_whose_critic_cannot_be_pretrained_says_so(policy, tokenizer, prompts, tmp_path, monkeypatch):
    rollouts = rollouts_of(tokenizer, 4, good)
    with pytest.raises(ValueError, match="ReinforceTrainer has no critic to pretrain .* `baseline='value'`"):
        make("reinforce", policy, tokenizer, prompts, tmp_path).pretrain_critic(rollouts)
    trainer = make("ppo", policy, tokenizer, prompts, tmp_path)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match="FSDP and DeepSpeed shard the critic.*`critic_model_name_or_path`"):
        trainer.pretrain_critic(rollouts)
