"""Estimates of KL that are logged, by batches that hold each token as often as the policy that samples it."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_ext.actor_critic import reporting
from trl_ext.actor_critic.reporting import kl_metrics, kl_sums, update_metrics
from trl_ext.actor_critic.rollout import Rollout


ACCELERATOR = SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x)
SAMPLED, OTHER = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
# Two completions, and two tokens that nobody chose
TOKENS = torch.tensor([[0, 0, 1], [2, 2, 1]])
CHOSEN = torch.tensor([[True, True, True], [True, False, False]])
KL = math.log(2) / 4  # of SAMPLED to OTHER


def rollout(**fields):
    return Rollout(**dict.fromkeys(Rollout.__dataclass_fields__) | {"chosen": CHOSEN, **fields})


def metrics_of(logps, is_first, **fields):
    args = SimpleNamespace(cliprange_value=None, disable_dropout=True)
    return update_metrics(rollout(**fields), logps, None, None, args, ACCELERATOR, is_first)


def test_approx_kl_is_that_of_the_policy_that_sampled_to_the_new_one():
    sums, metrics = metrics_of(OTHER.log()[TOKENS], is_first=False, old_logps=SAMPLED.log()[TOKENS])
    assert metrics["approx_kl"] == pytest.approx(KL) and metrics["ratio/max"] == 2
    assert metrics["ratio/mean"] == pytest.approx(1)
    assert sums["tokens"] == 4 and sums["approx_kl"].item() == pytest.approx(4 * KL)


def test_the_kl_to_the_reference_is_that_of_the_policy_per_token(monkeypatch):
    monkeypatch.setattr(reporting, "MAX_FIRST_KL", 1.0)  # above which there is a warning
    logps, fields = SAMPLED.log()[TOKENS], {"ref_logps": OTHER.log()[TOKENS]}
    sums = kl_sums(rollout(**fields), logps, ACCELERATOR)
    assert sums["tokens"] == 4 and sums["completions"] == 2
    assert sums["k1"] == pytest.approx(4 * KL) and sums["k3"] == pytest.approx(4 * KL)
    assert sums["k2"] == pytest.approx(3 * math.log(2) ** 2 / 2)  # of the three tokens on which the two differ
    assert kl_metrics(sums) == {f"kl/{name}": sums[name] / 4 for name in ("k1", "k2", "k3")}
    _, metrics = metrics_of(logps, is_first=True, **fields)
    assert metrics["first_step/kl"] == pytest.approx(KL) and metrics["approx_kl"] == 0
