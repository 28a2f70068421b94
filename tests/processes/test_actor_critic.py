"""Actor-critic training in two processes, sharded or not, is that in one, and so is what is recorded."""

import pytest
import torch
from helpers import FSDP2, launch
from processes.actor_critic_script import CASES

from trl_ext import load_rollouts


@pytest.fixture(scope="module")
def by_processes(policy_path, tmp_path_factory):
    """
    (one process with batch 4, two processes with batch 2) for every case: weights, logs, KL coefficient, number of
    processes, number of sharded weights, rollouts.
    """
    results = []
    for num_processes, batch_size in ((1, 4), (2, 2)):
        output = tmp_path_factory.mktemp(f"processes{num_processes}")
        launch(num_processes, "actor_critic_script.py", policy_path, output, *CASES, batch_size)
        results.append({case: (*torch.load(output / f"{case}.pt"), load_rollouts(output / case)) for case in CASES})
    return results


FSDP_CASES = [case for case in CASES if case not in ("ppo-lora-adapter", "q-all-actions-lora")]  # which are refused


@pytest.fixture(scope="module")
def sharded(policy_path, tmp_path_factory):
    """Two processes with batch 2, between which FSDP2 shards."""
    output = tmp_path_factory.mktemp("sharded")
    launch(2, "actor_critic_script.py", policy_path, output, *FSDP_CASES, 2, config_file=FSDP2)
    return {case: torch.load(output / f"{case}.pt") for case in FSDP_CASES}


def assert_trained_alike(one, two):
    assert (one[3], two[3]) == (1, 2)
    assert one[0].keys() == two[0].keys()
    for name, weight in one[0].items():
        torch.testing.assert_close(weight, two[0][name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert one[2] == pytest.approx(two[2], rel=1e-5)
    exact = ["returns/mean", "values/mean", "advantages/std", "explained_variance", "kl/k1", "approx_kl", "value_loss"]
    for first, second in zip(one[1][:-1], two[1][:-1], strict=True):
        assert first.keys() == second.keys()
        for name in [name for name in exact if first.get(name) is not None]:
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(by_processes, case):
    assert_trained_alike(*(result[case] for result in by_processes))


@pytest.mark.parametrize("case", FSDP_CASES)
def test_two_processes_under_fsdp_train_like_one(by_processes, sharded, case):
    one, two = by_processes[0][case], sharded[case]
    assert one[4] == 0 and two[4] == len(two[0])  # every weight that trains was sharded
    assert_trained_alike(one, two)


@pytest.mark.parametrize("case", ["ppo", "a2c-lora-checkpointing", "reinforce"])
def test_two_processes_record_what_one_does(by_processes, case):
    one, two = (result[case][-1]["train"].to_list() for result in by_processes)
    assert len(one) == len(two) > 4
    for first, second in zip(one, two, strict=True):
        for name, expected in first.items():
            is_float = isinstance(expected, list) and isinstance(expected[0], float)
            assert second[name] == (pytest.approx(expected, abs=1e-4) if is_float else expected), name
