"""Training on rankings in two processes, sharded or not, is that in one."""

import pytest
import torch
from helpers import FSDP2, launch
from processes.ranking_script import CASES


@pytest.fixture(scope="module")
def by_processes(policy_path, reward_model_path, tmp_path_factory):
    """(one process with batch 4, two processes with batch 2) for every case."""
    results = []
    for num_processes, batch_size in ((1, 4), (2, 2)):
        output = tmp_path_factory.mktemp(f"processes{num_processes}")
        launch(num_processes, "ranking_script.py", policy_path, reward_model_path, output, batch_size)
        results.append({case: torch.load(output / f"{case}.pt") for case in CASES})
    return results


@pytest.fixture(scope="module")
def sharded(policy_path, reward_model_path, tmp_path_factory):
    """Two processes with batch 2, between which FSDP2 shards."""
    output = tmp_path_factory.mktemp("sharded")
    launch(2, "ranking_script.py", policy_path, reward_model_path, output, 2, config_file=FSDP2)
    return {case: torch.load(output / f"{case}.pt") for case in CASES}


def assert_trained_alike(one, two):
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert one["packs"] and two["packs"]
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            weight, two["weights"][name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    names = {"loss", "three_way_accuracy", "tie_rate", "kendall_tau_b", "log_likelihood", "margin", "rewards/margins"}
    names |= {"tie/delta_2", "tie/nu", "predicted_tie_rate", "num_tokens"}
    first, second = one["log_history"], two["log_history"]
    assert len(first) == len(second)
    for ours, theirs in zip(first[:-1], second[:-1], strict=True):
        assert {name for name in ours if "eval_" in name} == {name for name in theirs if "eval_" in name}
        # `eval_loss`, transformers' own, counts what fills the last batch up
        for name in [n for n in ours if n.removeprefix("eval_") in names and n != "eval_loss"]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    # Of five rows, which two processes fill up to eight
    assert sum("eval_log_likelihood" in logs for logs in first) == 2


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(by_processes, case):
    assert_trained_alike(*(result[case] for result in by_processes))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_under_fsdp_train_like_one(by_processes, sharded, case):
    one, two = by_processes[0][case], sharded[case]
    assert one["num_sharded"] == 0 and two["num_sharded"] == len(two["weights"])  # every one that trains
    assert_trained_alike(one, two)
