"""Each of TRL's policy losses with an advantage per token, against TRL's own with one per completion."""

import re

import pytest
import torch
from helpers import count_good, settings
from trl import GRPOConfig, GRPOTrainer

from trl_ext import PPOConfig, PPOTrainer
from trl_ext.actor_critic.config import TOKEN_LOSS_TYPES


BATCH = {
    "prompt_ids": torch.tensor([[5, 6, 7], [8, 9, 10], [5, 11, 12]]),
    "prompt_mask": torch.ones(3, 3, dtype=torch.long),
    "completion_ids": torch.tensor([[11, 12, 13, 1], [14, 1, 0, 0], [6, 7, 1, 0]]),
    "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
    "num_items_in_batch": torch.tensor(9),
}
OF_COMPLETIONS = torch.tensor([1.0, -0.7, 0.4])
# Logs of ratios, on both sides of every clip range
MOVED = torch.tensor([[0.3, -0.4, 0.1, 0.02], [-0.3, 0.25, 0, 0], [0.05, 0.5, -0.5, 0]])


@pytest.fixture(scope="module")
def trainers(policy_path, prompts, tmp_path_factory):
    own = settings(tmp_path_factory.mktemp("losses"))
    ours = PPOTrainer(policy_path, count_good, PPOConfig(**own), prompts)
    del own["critic_learning_rate"]
    theirs = GRPOTrainer(policy_path, count_good, GRPOConfig(**own | {"num_generations": 2}), prompts)
    return ours, theirs


def log_probs(trainer):
    ids, mask = (torch.cat([BATCH[f"prompt_{x}"], BATCH[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 4)[0]


def loss_and_gradients(trainer, loss_type, level, advantages, **batch):
    """The loss, and its gradients in the policy's parameters."""
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.current_gradient_accumulation_steps = 1
    parameters = [p for name, p in trainer.model.named_parameters() if not name.startswith("critic.")]
    old = log_probs(trainer).detach() - MOVED
    loss = trainer._compute_loss(
        trainer.model, {**BATCH, "advantages": advantages, "old_per_token_logps": old, **batch}
    )
    return loss, torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", TOKEN_LOSS_TYPES)
def test_a_completion_whose_tokens_are_worth_the_same(trainers, loss_type, level):
    ours, theirs = trainers
    expected = loss_and_gradients(theirs, loss_type, level, OF_COMPLETIONS)
    of_tokens = OF_COMPLETIONS.unsqueeze(1).expand(3, 4)
    torch.testing.assert_close(loss_and_gradients(ours, loss_type, level, of_tokens), expected, atol=1e-6, rtol=1e-5)
    assert expected[0].abs() > 1e-3 and max(gradient.abs().max() for gradient in expected[1]) > 1e-3


@pytest.mark.parametrize("loss_type", TOKEN_LOSS_TYPES)
def test_each_token_is_credited_for_itself(trainers, loss_type):
    """The gradient of all advantages is the sum of those of each alone, whatever the sign of the others is."""
    ours, _ = trainers
    advantages = torch.tensor([[1.0, -2.0, 0.5, -0.1], [-0.4, 0.8, 0, 0], [0.3, -0.6, 0.9, 0]])
    loss, gradients = loss_and_gradients(ours, loss_type, "token", advantages)
    sums = [torch.zeros_like(loss), *map(torch.zeros_like, gradients)]
    for row, token in BATCH["completion_mask"].nonzero().tolist():
        alone = torch.zeros_like(advantages)
        alone[row, token] = advantages[row, token]
        part, part_gradients = loss_and_gradients(ours, loss_type, "token", alone)
        sums = [total + x for total, x in zip(sums, [part, *part_gradients], strict=True)]
    torch.testing.assert_close(sums, [loss, *gradients], atol=1e-5, rtol=1e-4)


def test_vespo_weighs_by_the_whole_completion_and_the_tokens_own_sign(trainers):
    """phi = exp(lambda + k log W - lambda W), with W the ratio of the completion, the engine's correction in it."""
    ours, _ = trainers
    advantages = torch.tensor([[1.0, -2.0, 0.5, -0.1], [-0.4, 0.8, 0, 0], [0.3, -0.6, 0.9, 0]])
    correction = torch.tensor([[1.1, 1, 1, 1], [0.9, 1, 1, 1], [1, 1.2, 1, 1]])
    loss, _ = loss_and_gradients(ours, "vespo", "token", advantages, importance_sampling_ratio=correction)
    expected, logps, args = 0.0, log_probs(ours).tolist(), ours.args
    for row, token in BATCH["completion_mask"].nonzero().tolist():
        ratio = (MOVED[row].sum().exp() * correction[row].prod()).item()
        up = advantages[row, token] >= 0
        k, lam = (args.vespo_k_pos, args.vespo_lambda_pos) if up else (args.vespo_k_neg, args.vespo_lambda_neg)
        phi = ratio**k * torch.tensor(lam * (1 - ratio)).exp().item()
        expected -= phi * advantages[row, token].item() * logps[row][token] / 9
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (args.vespo_k_pos, args.vespo_lambda_pos) != (args.vespo_k_neg, args.vespo_lambda_neg)


def test_all_losses_of_trl_are_known():
    said = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    supported = said.partition("Supported values are")[2].partition(".")[0]
    assert sorted(re.findall(r"'(\w+)'", supported)) == sorted(TOKEN_LOSS_TYPES)
