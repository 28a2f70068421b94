"""The KL that ends the epochs on a rollout: how it is estimated, and how far it may go."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_ext.actor_critic.reporting import update_metrics
from trl_ext.actor_critic.rollout import Rollout
from trl_ext.actor_critic.trust_region import TrustRegion


def processes(n):
    """An accelerator of `n` processes, all of which see the same."""
    return SimpleNamespace(reduce=lambda x, reduction: n * x, gather=lambda x: x)


def test_approx_kl_is_that_of_the_policy_that_sampled_to_the_new_one():
    """The batch holds each token as often as that policy samples it, and two tokens that nobody chose."""
    old, new = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    tokens = torch.tensor([[0, 0, 1], [2, 2, 1]])
    chosen = torch.tensor([[True, True, True], [True, False, False]])
    fields = dict.fromkeys(Rollout.__dataclass_fields__) | {"old_logps": old.log()[tokens], "chosen": chosen}
    args = SimpleNamespace(cliprange_value=None)
    sums, metrics = update_metrics(
        Rollout(**fields), new.log()[tokens], None, None, args, processes(1), is_first=False
    )
    exact = (old * (old / new).log()).sum().item()
    assert exact == pytest.approx(math.log(2) / 4)
    assert metrics["approx_kl"] == pytest.approx(exact) and metrics["ratio/max"] == 2
    assert metrics["ratio/mean"] == pytest.approx(1)  # in expectation under the policy that sampled
    assert sums["tokens"] == 4 and sums["approx_kl"].item() == pytest.approx(4 * exact)


@pytest.mark.parametrize("kl_per_token, ends", [(0.1, False), (0.149, False), (0.151, True)])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_epochs_end_at_one_and_a_half_times_the_target(kl_per_token, ends, num_processes):
    accelerator, region = processes(num_processes), TrustRegion(0.1, torch.device("cpu"))
    for num_tokens, share in ((10, 0.0), (30, 1.0), (0, 0.0)):  # micro-batches, of different KL and length
        region.observe(torch.tensor(40 * kl_per_token * share), torch.tensor(num_tokens))
    assert region.at_step(accelerator) == ends
    region.observe(torch.tensor(0.0), torch.tensor(40))  # of the step after it, which begins from 0
    assert region.at_step(accelerator) == ends
    region.begin_rollout()
    assert not region.has_ended and not region.at_step(accelerator)
