"""Training in two processes, sharded or not, is that in one, and so is what is recorded of it."""

import pytest
import torch
from helpers import FSDP2, launch
from processes.training import ACTOR_CRITICS, RANKERS, REFUSED_UNDER_FSDP, train

from trl_ext import load_rollouts


EXACT = {"returns/mean", "values/mean", "advantages/std", "explained_variance", "kl/k1", "approx_kl", "value_loss"}
EXACT_OF_RANKERS = {"loss", "three_way_accuracy", "tie_rate", "kendall_tau_b", "log_likelihood", "margin"}
EXACT_OF_RANKERS |= {"rewards/margins", "tie/delta_2", "tie/nu", "predicted_tie_rate", "num_tokens"}


@pytest.fixture(scope="module")
def one(policy_path, reward_model_path, tmp_path_factory):
    """The folder that this process leaves, with batch 4."""
    output = tmp_path_factory.mktemp("one")
    train(policy_path, reward_model_path, output, 4)
    return output


@pytest.fixture(scope="module")
def two(policy_path, reward_model_path, tmp_path_factory):
    """That of two processes with batch 2."""
    output = tmp_path_factory.mktemp("two")
    launch(2, "training.py", policy_path, reward_model_path, output, 2)
    return output


@pytest.fixture(scope="module")
def sharded(policy_path, reward_model_path, tmp_path_factory):
    """That of two processes with batch 2, between which FSDP2 shards."""
    output = tmp_path_factory.mktemp("sharded")
    launch(2, "training.py", policy_path, reward_model_path, output, 2, config_file=FSDP2)
    return output


def load(case, *folders):
    return (torch.load(folder / f"{case}.pt") for folder in folders)


def assert_weights_are_alike(first, second, atol):
    assert (first["num_processes"], second["num_processes"]) == (1, 2)
    assert first["weights"].keys() == second["weights"].keys()
    for name, weight in first["weights"].items():
        torch.testing.assert_close(
            weight, second["weights"][name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_every_weight_was_sharded(first, second):
    """Every one that trains."""
    assert first["num_sharded"] == 0 and second["num_sharded"] == len(second["weights"])


# --- Actor-critics ---


def assert_actor_critics_are_alike(first, second):
    assert_weights_are_alike(first, second, atol=2e-5)
    assert first["kl_coef"] == pytest.approx(second["kl_coef"], rel=1e-5)
    for ours, theirs in zip(first["log_history"][:-1], second["log_history"][:-1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in [name for name in EXACT if ours.get(name) is not None]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("case", ACTOR_CRITICS)
def test_two_processes_train_an_actor_critic_like_one(one, two, case):
    assert_actor_critics_are_alike(*load(case, one, two))


@pytest.mark.parametrize("case", [case for case in ACTOR_CRITICS if case not in REFUSED_UNDER_FSDP])
def test_fsdp_trains_an_actor_critic_like_one_process(one, sharded, case):
    first, second = load(case, one, sharded)
    assert_every_weight_was_sharded(first, second)
    assert_actor_critics_are_alike(first, second)


@pytest.mark.parametrize("case", ["ppo", "a2c-lora-checkpointing", "reinforce"])
def test_two_processes_record_what_one_does(one, two, case):
    first, second = (load_rollouts(folder / case)["train"].to_list() for folder in (one, two))
    assert len(first) == len(second) > 4
    for ours, theirs in zip(first, second, strict=True):
        for name, expected in ours.items():
            is_float = isinstance(expected, list) and isinstance(expected[0], float)
            assert theirs[name] == (pytest.approx(expected, abs=1e-4) if is_float else expected), name


# --- Rankings ---


def assert_rankers_are_alike(first, second):
    assert first["packs"] and second["packs"]
    assert_weights_are_alike(first, second, atol=2e-6)
    logs = first["log_history"], second["log_history"]
    for ours, theirs in zip(logs[0][:-1], logs[1][:-1], strict=True):
        assert {name for name in ours if "eval_" in name} == {name for name in theirs if "eval_" in name}
        # `eval_loss`, transformers' own, counts what fills the last batch up
        for name in [n for n in ours if n.removeprefix("eval_") in EXACT_OF_RANKERS and n != "eval_loss"]:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    assert len(logs[0]) == len(logs[1])
    # Of five rows, which two processes fill up to eight
    assert sum("eval_log_likelihood" in entry for entry in logs[0]) == 2


@pytest.mark.parametrize("case", RANKERS)
def test_two_processes_train_on_rankings_like_one(one, two, case):
    assert_rankers_are_alike(*load(case, one, two))


@pytest.mark.parametrize("case", RANKERS)
def test_fsdp_trains_on_rankings_like_one_process(one, sharded, case):
    first, second = load(case, one, sharded)
    assert_every_weight_was_sharded(first, second)
    assert_rankers_are_alike(first, second)
