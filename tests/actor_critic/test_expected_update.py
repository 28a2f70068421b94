"""
The update that is expected of a trainer, by a batch that holds everything in its due share: every token is as likely as
any other, and of all completions of two tokens those that end with the first are there as often as the others that begin
alike.
"""

import itertools

import pytest
import torch
from datasets import Dataset
from helpers import first_gradients, settings

from trl_ext.algorithms import ALGORITHMS


def all_completions(num_tokens, end):
    pairs = itertools.product(range(num_tokens), repeat=2)
    return [[first] if first == end else [first, second] for first, second in pairs]


@pytest.mark.parametrize(
    "algorithm, overrides",
    [
        ("reinforce", {"baseline": "none", "gamma": 0.5}),
        ("reinforce", {"baseline": "none", "one_step_mdp": True}),
        ("reinforce", {"baseline": "batch_mean", "gamma": 0.5}),
        ("a2c", {"lam": 1.0, "gamma": 0.5, "vf_coef": 0.0}),
        ("ppo", {"lam": 1.0, "gamma": 0.5, "vf_coef": 0.0, "whiten_advantages": False, "critic": "separate"}),
    ],
)
def test_the_expected_update_is_that_of_undiscounted_visits(policy, tokenizer, tmp_path, algorithm, overrides):
    """sum_s d(s) sum_a grad pi(a|s) Q(s, a): by a whole trainer, from rewards of tokens and whatever critic."""
    end, size = tokenizer.eos_token_id, len(tokenizer)
    completions = all_completions(size, end)
    rewards = 2 + torch.randn(1 + size, size, generator=torch.Generator().manual_seed(0))
    early, late = rewards[0], rewards[1:]  # of the first token, and of a second by the first

    def pay(completion_ids, **kwargs):
        return [[early[i].item(), *(late[i, j].item() for j in rest)] for i, *rest in completion_ids]

    def every_completion(prompts, trainer):
        ids = tokenizer("the film")["input_ids"]
        return {"prompt_ids": [ids] * len(prompts), "completion_ids": completions, "logprobs": None}

    config_class, trainer_class = ALGORITHMS[algorithm]
    sizes = {"per_device_train_batch_size": len(completions), "max_completion_length": 2, "loss_type": "dr_grpo"}
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
    (expected,) = torch.autograd.grad(-objective / 2, policy.lm_head.weight)  # per token that there may be
    assert expected.abs().max() > 0.05
    # A baseline of the batch holds, or leaves out, one completion in 729
    torch.testing.assert_close(actual, expected, atol=5e-3 * expected.abs().max().item(), rtol=0)
