"""
The update that is expected of a trainer, mostly by a batch that holds everything in its due share: every token is as
likely as any other, and of all completions of two tokens those that end with the first are there as often as the others
that begin alike.
"""

import itertools

import pytest
import torch
from datasets import Dataset
from enumerable_mdp import TokenMDP
from helpers import build_policy, by_length, first_gradients, recorded, settings

from trl_ext import ReinforceConfig, ReinforceTrainer
from trl_ext.actor_critic.baseline import PastMean
from trl_ext.algorithms import ALGORITHMS


def all_completions(num_tokens, end):
    pairs = itertools.product(range(num_tokens), repeat=2)
    return [[first] if first == end else [first, second] for first, second in pairs]


def gradients(policy, tokenizer, tmp_path, algorithm, offset=0.0, **overrides):
    """The gradient of the LM head in one update, and in what trainers follow, by rewards of tokens and any critic."""
    end, size = tokenizer.eos_token_id, len(tokenizer)
    completions = all_completions(size, end)
    rewards = 2 + torch.randn(1 + size, size, generator=torch.Generator().manual_seed(0))
    early, late = rewards[0], rewards[1:]  # of the first token, and of a second by the first

    def pay(completion_ids, **kwargs):
        paid = [[early[i].item(), *(late[i, j].item() for j in rest)] for i, *rest in completion_ids]
        return [[*row[:-1], row[-1] + offset] for row in paid]

    def every_completion(prompts, trainer):
        ids = tokenizer("the film")["input_ids"]
        return {"prompt_ids": [ids] * len(prompts), "completion_ids": completions, "logprobs": None}

    config_class, trainer_class = ALGORITHMS[algorithm]
    sizes = {"per_device_train_batch_size": len(completions), "max_completion_length": 2}
    args = config_class(**settings(tmp_path, max_steps=1, **sizes, **overrides))
    data = Dataset.from_dict({"prompt": ["the film"] * len(completions)})
    trainer = trainer_class(policy, pay, args, data, processing_class=tokenizer, rollout_func=every_completion)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    if trainer.critic is not None:
        torch.nn.init.normal_(trainer.critic.value_head.weight, std=0.3)
    actual = first_gradients(trainer)["lm_head.weight"]

    # The states are the prompt, and the prompt with a token that does not end; their Q is a table
    goes_on = [i for i in range(size) if i != end]
    states = torch.tensor([[*tokenizer("the film")["input_ids"], i] for i in goes_on])
    logits = policy(input_ids=states).logits
    q_of_prompt = early.clone()
    q_of_prompt[goes_on] += args.gamma * late[goes_on].mean(dim=1)
    objective = (logits[0, -2].softmax(-1) * q_of_prompt).sum()
    objective = objective + (logits[:, -1].softmax(-1) * late[goes_on]).sum() / size
    return actual, torch.autograd.grad(-objective, policy.lm_head.weight)[0]


CRITIC_ALONE = {"lam": 1.0, "gamma": 0.5, "vf_coef": 0.0, "gate_critic": False}


@pytest.mark.parametrize(
    "algorithm, overrides",
    [
        ("reinforce", {"baseline": "none", "gamma": 0.5}),
        ("reinforce", {"baseline": "none", "one_step_mdp": True}),
        ("reinforce", {"baseline": "batch_mean", "gamma": 0.5}),
        ("a2c", CRITIC_ALONE),
        ("ppo", CRITIC_ALONE | {"critic": "separate"}),
    ],
)
def test_the_expected_update_is_that_of_undiscounted_visits(policy, tokenizer, tmp_path, algorithm, overrides):
    """sum_s d(s) sum_a grad pi(a|s) Q(s, a): by a whole trainer, in its size, too."""
    own = {"loss_type": "dr_grpo", "scale_advantages": False}
    actual, expected = gradients(policy, tokenizer, tmp_path, algorithm, **own, **overrides)
    expected /= 2  # per token that there may be
    assert expected.abs().max() > 0.05
    # A baseline of the batch leaves out one completion in 729
    torch.testing.assert_close(actual, expected, atol=5e-3 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("algorithm", ["reinforce", "a2c", "ppo"])
def test_at_the_defaults_it_has_that_direction_whatever_is_added_to_all_rewards(tokenizer, tmp_path, algorithm):
    updates = []
    for offset in (0.0, 5.0):
        actual, expected = gradients(build_policy(tokenizer), tokenizer, tmp_path, algorithm, offset)
        assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.99999
        updates.append(actual)
    # An offset takes digits from what it is added to
    torch.testing.assert_close(updates[1], updates[0], atol=1e-5 * updates[0].abs().max().item(), rtol=1e-4)


# --- The divisor of losses ---


def test_an_update_is_divided_by_the_tokens_of_rollouts_before_it(policy, tokenizer, prompts, tmp_path):
    args = ReinforceConfig(**settings(tmp_path, max_steps=4, gradient_accumulation_steps=2))
    trainer = recorded(ReinforceTrainer)(policy, by_length, args, prompts, processing_class=tokenizer)
    trainer.train()
    own = [batch["completion_mask"].sum().item() for batch in trainer.rollouts]
    assert len(set(own[:3])) == 3
    mean = own[0] + 0.1 * (own[1] - own[0])
    expected = [own[0], own[0], mean, mean + 0.1 * (own[2] - mean)]
    assert [batch["num_items_in_batch"].item() for batch in trainer.updates[::2]] == pytest.approx(expected)
    assert [batch["num_items_in_batch"].item() for batch in trainer.updates[1::2]] == pytest.approx(expected)


@pytest.mark.parametrize("num_completions", [1, 2])
def test_divided_by_past_tokens_it_follows_the_gradient_and_by_its_own_it_does_not(num_completions):
    """Over all rollouts of an MDP in which completions are of 1 to 3 tokens and earn 5 on average, without a baseline."""
    mdp = TokenMDP(early_end=True)
    objective = mdp.objective(1.0)
    rewards = torch.where(mdp.mask, mdp.rewards, 0).sum(dim=1) + 5 - objective.item()
    logps, probabilities, lengths = mdp.logps.sum(dim=1), mdp.probabilities.detach(), mdp.mask.sum(dim=1)
    past = PastMean()
    past.learn(torch.tensor(3.0 * num_completions))

    def cosine(divisor_of):
        surrogate = 0.0
        for rows in itertools.product(range(len(lengths)), repeat=num_completions):
            rows = list(rows)
            loss = (rewards[rows] * logps[rows]).sum() / divisor_of(lengths[rows].sum())
            surrogate = surrogate + probabilities[rows].prod() * loss
        (update,) = torch.autograd.grad(surrogate, mdp.logits, retain_graph=True)
        (gradient,) = torch.autograd.grad(objective, mdp.logits, retain_graph=True)
        return torch.cosine_similarity(update.flatten(), gradient.flatten(), dim=0).item()

    assert cosine(past.before) == pytest.approx(1.0, abs=1e-12)
    assert cosine(lambda num_tokens: num_tokens) < 0.9
