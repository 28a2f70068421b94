"""The end of the epochs on a rollout: how far the policy may go from the one that sampled."""

from types import SimpleNamespace

import pytest
import torch

from trl_ext.actor_critic.trust_region import TrustRegion


def processes(n):
    """An accelerator of `n` processes, all of which see the same."""
    return SimpleNamespace(reduce=lambda x, reduction: n * x)


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
