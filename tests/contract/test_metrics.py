"""Every metric that is logged, and every option, has its row in a README, and every row is of one."""

import re

import pytest
from datasets import Dataset
from helpers import ROOT, count_good, ranking_settings, settings
from trl import DPOConfig, GRPOConfig, RewardConfig

from trl_ext import (
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    load_rollouts,
)
from trl_ext.algorithms import ALGORITHMS


# What transformers' Trainer logs of any training
OF_ANY_TRAINING = re.compile("epoch|step|total_flos|runtime|(samples|steps)_per_second|train_.*")
RUNS = {
    "ppo": {"kl_in_reward": 0.1, "target_kl": 1e-6, "cliprange_value": 0.2, "num_iterations": 2},
    "nlpo": {"min_tokens_to_keep": 2, "entropy_coef": 0.01, "num_iterations": 1},
    "q_actor_critic": {"q_rank": 2, "loss_type": "vespo"},
    "reinforce": {"num_generations": 2, "beta": 0.1, "loss_type": "cispo", "save_rollouts": True},
    "a2c": {},  # on a stream, of which a prompt is too long
}
RANKING_RUNS = {
    "davidson_luce": (RankingRewardTrainer, RankingRewardConfig),
    "rao_kupper": (RankingRewardTrainer, RankingRewardConfig),
    "davidson": (RankingDPOTrainer, RankingDPOConfig),
}


def section(folder, heading):
    text = (ROOT / "trl_ext" / folder / "README.md").read_text(encoding="utf-8")
    return re.split(r"^## ", text[text.index(f"## {heading}\n") + 3 :], flags=re.MULTILINE)[0]


def documented(folder):
    """Returns names in the first column of the tables of metrics, as patterns: `<name>` stands for any."""
    cells = re.findall(r"^\| (`.*?`) \|", section(folder, "Every metric"), re.MULTILINE)
    names = [name for cell in cells for name in cell.split(", ")]
    assert len(names) == len({*names}) > 10
    return {name: re.compile(re.sub("<[^>]+>", "[^/]+", name.strip("`"))) for name in names}


def logged(trainer):
    """Returns names of all that a training and an evaluation log, those of the latter without their `eval_`."""
    trainer.train()
    trainer.evaluate()
    names = {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    return {name for name in names if not OF_ANY_TRAINING.fullmatch(name)}


@pytest.fixture(scope="module")
def of_actor_critics(policy_path, prompts, tmp_path_factory):
    found = {}
    for name, (config_class, trainer_class) in ALGORITHMS.items():
        args = config_class(**settings(tmp_path_factory.mktemp(name), **RUNS[name]))
        dataset = prompts
        if name == "a2c":
            dataset = Dataset.from_dict({"prompt": ["the film was " * 30] * 8}).to_iterable_dataset()
        trainer = trainer_class(policy_path, count_good, args, dataset, eval_dataset=prompts.select(range(4)))
        if name == "reinforce":
            rollouts = args.output_dir
        if name == "ppo":
            trainer.pretrain_critic(load_rollouts(rollouts)["train"])
        found[name] = logged(trainer)
    return found


@pytest.fixture(scope="module")
def of_rankers(policy_path, rankings, tmp_path_factory):
    found = {}
    for model, (trainer_class, config_class) in RANKING_RUNS.items():
        args = config_class(**ranking_settings(tmp_path_factory.mktemp(model), ranking_model=model))
        trainer = trainer_class(policy_path, args=args, train_dataset=rankings, eval_dataset=rankings)
        found[model] = logged(trainer)
    return found


@pytest.mark.parametrize("folder, runs", [("actor_critic", "of_actor_critics"), ("preference", "of_rankers")])
def test_rows_and_metrics_are_the_same(request, folder, runs):
    rows, found = documented(folder), request.getfixturevalue(runs)
    names = set().union(*found.values())
    assert {name for name in names if not any(row.fullmatch(name) for row in rows.values())} == set()
    assert {row for row, pattern in rows.items() if not any(map(pattern.fullmatch, names))} == set()


def test_rows_say_of_which_trainer_they_are(of_actor_critics):
    """The claims about which run has a metric."""
    has = {name: {run for run, names in of_actor_critics.items() if name in names} for name in documented_names()}
    assert has["mask/forced"] == has["mask/inside"] == {"nlpo"}
    assert has["frac_reward_zero_std"] == {"reinforce"}  # several completions per prompt
    assert has["explained_variance"] == {*RUNS} - {"reinforce"}  # which has no critic
    assert has["target_kl_exceeded"] == has["value_clip_ratio"] == {"ppo"}
    assert has["prompts/clipped_ratio"] == {"a2c"}
    assert has["kl"] == {"reinforce"} and has["kl/coef"] == {"ppo"}


def documented_names():
    return [name.strip("`") for name in documented("actor_critic")]


@pytest.mark.parametrize(
    ("folder", "parents", "configs"),
    [
        ("actor_critic", {GRPOConfig}, [config_class for config_class, _ in ALGORITHMS.values()]),
        ("preference", {RewardConfig, DPOConfig}, [config_class for _, config_class in RANKING_RUNS.values()]),
    ],
)
def test_every_option_is_in_the_table_of_its_subject(folder, parents, configs):
    cells = re.findall(r"^\| [^|]+ \| (`.*) \|$", section(folder, "Options"), re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    added = {
        name for config in configs for name, field in config.__dataclass_fields__.items() if is_added(field, parents)
    }
    assert added <= named <= {name for config in configs for name in config.__dataclass_fields__}


def is_added(field, parents):
    return all(field.name not in parent.__dataclass_fields__ for parent in parents)
