"""Bad input to the ranking trainers fails early, with an error that names the argument or the row, and the mend."""

import logging
import math
import re
from pathlib import Path

import deprecations
import pytest
import torch
from datasets import Dataset
from helpers import RANKINGS, build_encoder, build_policy, build_reward_model, ranking_settings, tiny_config
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, RewardConfig

from trl_ext import RankingDPOConfig, RankingDPOTrainer, RankingRewardConfig, RankingRewardTrainer, tie_parameters


CONFIGS = {"reward": RankingRewardConfig, "dpo": RankingDPOConfig}


def make(task, tokenizer, tmp_path, dataset, kwargs=None, **overrides):
    args = CONFIGS[task](**ranking_settings(tmp_path, **overrides))
    kwargs = {"train_dataset": dataset, "processing_class": tokenizer} | (kwargs or {})
    if task == "reward":
        return RankingRewardTrainer(build_reward_model(tokenizer), args, **kwargs)
    return RankingDPOTrainer(build_policy(tokenizer), build_policy(tokenizer, seed=7), args, **kwargs)


def rows(*rankings, completions=(" good", " bad", " slow"), **columns):
    """One row for each of `rankings`, which are lists of ranks."""
    kept = [list(completions[: len(ranks)]) for ranks in rankings]
    return Dataset.from_dict(
        {"prompt": ["the film"] * len(rankings), "completions": kept, "ranks": rankings} | columns
    )


def of_pairs(*pairs, completions=(" good", " bad", " slow")):
    columns = {"prompt": ["the film"] * len(pairs), "completions": [list(completions)] * len(pairs)}
    return Dataset.from_dict(columns | {"pairs": list(pairs)})


def warnings_of(caplog):
    return [r.getMessage().removeprefix("[RANK 0] ") for r in caplog.records if r.levelno >= logging.WARNING]


# --- Configuration ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"ranking_model": "elo"},
            r"`ranking_model` must be one of \['bradley_terry', .*'davidson_luce'\], got 'elo'",
        ),
        ({"on_error": "skip"}, r"`on_error` must be one of \['raise', 'drop'\], got 'skip'"),
        ({"overlong": "cut"}, r"`overlong` must be one of \[.*'prune'.*\], got 'cut'"),
        ({"shared_prefix": "yes"}, r"`shared_prefix` must be one of \['auto', 'always', 'never'\]"),
        ({"max_tie_order": 0}, "`max_tie_order` must be at least 1, got 0"),
        ({"ranking_model": "davidson", "log_tie": [0.1, 0.2]}, "`log_tie` must be a list of 1 .*'davidson'.*0.2"),
        (
            {"ranking_model": "davidson", "log_tie": 0.5},
            "`log_tie` must be a list of numbers between -80 and 80, got 0.5",
        ),
        ({"ranking_model": "davidson", "log_tie": [1e3]}, "`log_tie` must be a list of numbers between.*1000.0"),
        ({"ranking_model": "davidson", "log_tie": [math.nan]}, "`log_tie` must be a list of numbers between.*nan"),
        ({"ranking_model": "davidson", "log_tie": []}, "`log_tie` must be a list of 1"),
        ({"ranking_model": "bradley_terry", "log_tie": [0.1]}, "`log_tie` must be a list of 0"),
        ({"max_tie_order": 3, "log_tie": [0.1]}, "`log_tie` must be a list of 2 .*and `max_tie_order=3`"),
        ({"ranking_model": "rao_kupper", "log_tie": [-0.1]}, "log theta and must be above 0, got -0.1"),
        ({"ranking_model": "rao_kupper", "log_tie": [0.0]}, "log theta and must be above 0"),
    ],
)
def test_config_is_refused(tmp_path, task, overrides, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS[task](**ranking_settings(tmp_path, **overrides))


def test_reward_models_do_not_truncate(tmp_path):
    """A cut completion has another meaning, and its score none; TRL leaves such pairs out as well."""
    with pytest.raises(ValueError, match=r"`overlong` must be one of \['prune', 'drop'\], got 'truncate'"):
        RankingRewardConfig(**ranking_settings(tmp_path, overlong="truncate"))
    assert RankingDPOConfig(**ranking_settings(tmp_path)).overlong == "truncate"


@pytest.mark.parametrize("task, other", [("reward", RewardConfig), ("reward", RankingDPOConfig), ("dpo", DPOConfig)])
def test_other_configs_are_refused(tokenizer, rankings, tmp_path, task, other):
    trainer_class = RankingRewardTrainer if task == "reward" else RankingDPOTrainer
    own = CONFIGS[task].__name__
    with pytest.raises(TypeError, match=f"`args` must be a `{own}`, got `{other.__name__}`. It takes every argument"):
        trainer_class("anything", args=other(**ranking_settings(tmp_path)), train_dataset=rankings)


def test_what_trl_refuses_is_refused(tokenizer, rankings, tmp_path):
    args = RankingRewardConfig(**ranking_settings(tmp_path))
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        RankingRewardTrainer(build_reward_model(tokenizer), args, processing_class=tokenizer)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=2))
    with pytest.raises(ValueError, match="num_labels=1"):
        RankingRewardTrainer(model, args, train_dataset=rankings, processing_class=tokenizer)


@pytest.mark.parametrize("log_tie", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, 0.0]])
def test_tie_parameters_must_be_finite(tokenizer, rankings, tmp_path, log_tie):
    with pytest.raises(ValueError, match="`log_tie` must be a list of numbers between"):
        make("reward", tokenizer, tmp_path, rankings, log_tie=log_tie)


def test_fewer_tie_parameters_than_the_data_has_ties_of(tokenizer, rankings, tmp_path):
    with pytest.raises(ValueError, match="`log_tie` is a list of 1.*ties of 3. Give 2"):
        make("reward", tokenizer, tmp_path, rankings, log_tie=[0.1])


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss_type": ["ipo"]},
        {"loss_type": ["sigmoid", "sft"]},
        {"label_smoothing": 0.1},
        {"f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"precompute_ref_log_probs": True},
        {"padding_free": True},
        {"truncation_mode": "keep_end"},
        {"loss_weights": [2.0]},
    ],
    ids=str,
)
def test_what_speaks_of_chosen_and_rejected_is_refused_with_rankings(tokenizer, rankings, tmp_path, overrides):
    (name,) = overrides
    error = f"`{name}=.*the dataset holds rankings. Leave it at .*, or convert"
    with deprecations.asked_for(), pytest.raises(ValueError, match=error):  # `keep_end` is
        make("dpo", tokenizer, tmp_path, rankings, **overrides)


def test_a_scheduler_that_knows_no_tie_parameters_is_refused(tokenizer, rankings, tmp_path):
    model = build_reward_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def trainer(**overrides):
        args = RankingRewardConfig(**ranking_settings(tmp_path, **overrides))
        kwargs = {"train_dataset": rankings, "processing_class": tokenizer, "optimizers": (optimizer, scheduler)}
        return RankingRewardTrainer(model, args, **kwargs)

    with pytest.raises(ValueError, match=r"`optimizers=\(optimizer, None\)`.*or set `learn_ties=False`"):
        trainer().train()
    trainer(learn_ties=False).train()


def test_an_optimizer_of_ones_own_gets_the_tie_parameters(tokenizer, rankings, tmp_path):
    """With their own learning rate and without the optimizer's weight decay; not at all where they are not learned."""
    for learn_ties in (True, False):
        model = build_reward_model(tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.3)
        args = RankingRewardConfig(**ranking_settings(tmp_path, tie_learning_rate=0.05, learn_ties=learn_ties))
        kwargs = {"train_dataset": rankings, "processing_class": tokenizer, "optimizers": (optimizer, None)}
        trainer = RankingRewardTrainer(model, args, **kwargs)
        trainer.train()
        groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        own = len(list(model.parameters())) - 1
        assert groups == [(own, 1e-3, 0.3), (1, 0.05, 0.0)][: 1 + learn_ties]


# --- Rows ---


@pytest.mark.parametrize(
    "dataset, message",
    [
        (
            rows([1, 2], [1, -5]),
            r"train row 1, column `ranks`: must be whole numbers from 0.*got \[1, -5\].*from_scores",
        ),
        (rows([1, 2], [1, None]), "train row 1, column `ranks`: must rank two or more, got 1. Remove the row"),
        (
            Dataset.from_dict({"prompt": ["a"], "completions": [[" good", " bad"]], "ranks": [[1]]}),
            r"train row 0, column `ranks`: .*got \[1\] for 2 completions. Give null",
        ),
        (
            Dataset.from_dict({"prompt": ["a"], "completions": [[" good"]], "ranks": [[1]]}),
            "train row 0, column `completions`: must be a list of two or more.*Complete or remove the row",
        ),
        (
            Dataset.from_dict({"prompt": ["a"], "completions": [[" good", " bad"]], "ranking": ["A > C"]}),
            "train row 0, column `ranking`: must have labels from A to B or 1 to 2",
        ),
        (of_pairs([[0, 1, 1]], [[0, 3, 1]]), r"train row 1, column `pairs`: .*got \[0, 3, 1\] for 3 completions"),
    ],
)
def test_malformed_rows_are_named(tokenizer, tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        make("reward", tokenizer, tmp_path, dataset)


def test_malformed_rows_of_an_evaluation_are_named(tokenizer, rankings, tmp_path):
    bad = rows([1, 2], [1, None])
    with pytest.raises(ValueError, match="held_out row 1, column `ranks`"):
        make("reward", tokenizer, tmp_path, rankings, {"eval_dataset": {"held_out": bad}})
    with pytest.raises(ValueError, match="eval row 1, column `ranks`"):
        make("reward", tokenizer, tmp_path, rankings).evaluate(bad)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_malformed_rows_can_be_left_out(tokenizer, tmp_path, caplog, task):
    dataset = rows([1, 2], [1, None], [2, 1, 1], [None, 3], [1, -7])
    trainer = make(task, tokenizer, tmp_path, dataset, on_error="drop")
    assert trainer.train_dataset["ranks"] == [[1, 2], [2, 1, 1]]
    (message,) = warnings_of(caplog)
    assert "Dropped 3 of the 5 rows of the train dataset" in message
    assert "2, the first of them row 1: column `ranks`: must rank two or more" in message
    assert "1, the first of them row 4: column `ranks`: must be whole numbers" in message


@pytest.mark.parametrize(
    "columns", [["prompt", "completions"], ["completions", "ranks"], ["prompt", "completions", "order"]]
)
def test_missing_columns_are_named(tokenizer, tmp_path, columns):
    data = RANKINGS | {"order": RANKINGS["ranks"]}
    dataset = Dataset.from_dict({name: data[name] for name in columns})
    with pytest.raises(ValueError, match="train dataset must have columns `prompt`, `completions` and one of `ranks`"):
        make("reward", tokenizer, tmp_path, dataset)


@pytest.mark.parametrize(
    "dataset, overrides, message",
    [
        (rows([1, 2]).select([]), {}, "train dataset has no rankings.*no row is a ranking"),
        (rows([1, None]), {"on_error": "drop"}, "train dataset has no rankings.*no row is a ranking"),
        (rows([1, 2], [2, 1]), {"max_length": 3}, r"train dataset has no rankings.*`max_length` \(3\).*Raise it"),
    ],
)
def test_nothing_to_learn_from_is_an_error(tokenizer, tmp_path, dataset, overrides, message):
    with pytest.raises(ValueError, match=message):
        make("reward", tokenizer, tmp_path, dataset, **overrides)


@pytest.mark.parametrize(
    "ranks, overrides, message",
    [
        ([[1, 1], [2, 2]], {"ranking_model": "bradley_terry"}, "'bradley_terry' can learn nothing"),
        ([[1, None]], {"on_error": "drop"}, "no row is a ranking"),
        (
            [[1, 1]],
            {"on_error": "drop", "ranking_model": "plackett_luce"},
            "none has a probability under 'plackett_luce'",
        ),
        ([[1, 2]], {"max_length": 3}, r"`max_length` \(3\).*Raise it"),
    ],
)
def test_a_stream_with_nothing_to_learn_from_is_an_error(tokenizer, tmp_path, ranks, overrides, message):
    stream = rows(*ranks).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"train dataset has no rankings to learn from: .*{message}"):
        make("reward", tokenizer, tmp_path, stream, max_steps=1, **overrides)


def test_tokenized_rows_are_fit_to_the_length(tokenizer, tmp_path, caplog):
    data = {"group_ids": [[[5, 6, 7], [7], [8]], [[5, 6, 7], [8], [9, 9, 9]]], "ranks": [[1, 2, 3], [1, 2, 3]]}
    trainer = make("reward", tokenizer, tmp_path, Dataset.from_dict(data), max_length=2)
    assert trainer.train_dataset["ranks"] == [[-1, 2, 3]]
    assert "3 completions exceed `max_length` (2)" in warnings_of(caplog)[0]


@pytest.mark.parametrize("task, column", [("reward", "group_ids"), ("dpo", "completion_ids")])
def test_tokenized_rows_need_ranks(tokenizer, tmp_path, task, column):
    data = {column: [[[5, 6], [7]]], "prompt_ids": [[5]], "ranking": ["A > B"]}
    with pytest.raises(ValueError, match="train dataset is tokenized.*has no column `ranks`"):
        make(task, tokenizer, tmp_path, Dataset.from_dict(data))


def test_tokenized_rows_may_leave_completions_unranked(tokenizer, tmp_path):
    results = []
    for nothing in (None, -1):
        data = {"group_ids": [[[5, 6], [7], [8, 9]]] * 4, "ranks": [[1, 2, nothing]] * 4}
        trainer = make("reward", tokenizer, tmp_path, Dataset.from_dict(data))
        trainer.train()
        results.append([logs.get("loss") for logs in trainer.state.log_history])
    assert results[0] == results[1]


# --- Pairs with ties ---


def tied_pairs(tie, **columns):
    return Dataset.from_dict(
        {"prompt": ["a"] * 2, "chosen": [" good"] * 2, "rejected": [" bad"] * 2, "tie": tie} | columns
    )


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize(
    "dataset, message",
    [
        (tied_pairs([True, None]), "train row 1, column `tie`: must say true or false for every pair, got None"),
        (tied_pairs([0, 1]), "train row 0, column `tie`: must say true or false for every pair, got 0"),
        (
            tied_pairs([True, False], margin=[None, 0.5]),
            "train row 1, column `margin`: does not go with `tie`.*Remove one",
        ),
    ],
)
def test_pairs_with_ties_are_checked(tokenizer, tmp_path, task, dataset, message):
    with pytest.raises(ValueError, match=message):
        make(task, tokenizer, tmp_path, dataset)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_pairs_without_a_valid_tie_can_be_left_out(tokenizer, tmp_path, caplog, task):
    trainer = make(task, tokenizer, tmp_path, tied_pairs([None, True]), on_error="drop")
    assert trainer.train_dataset["ranks"] == [[1, 1]]
    (warning,) = warnings_of(caplog)
    assert "Dropped 1 of the 2 rows" in warning and "row 0: column `tie`: must say true or false" in warning


# --- What a likelihood can learn from ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize(
    "dataset, overrides, message",
    [
        (
            rows([1, 2], [1, 1]),
            {"ranking_model": "plackett_luce"},
            "train row 1, column `ranks`: 'plackett_luce' has no ties. Use a .*'davidson_luce'.*or.*`on_error='drop'`",
        ),
        (
            rows([1, 1, 2], [1, 1, 1]),
            {"max_tie_order": 2},
            r"train row 1, column `ranks`: must have no more completions tied than `max_tie_order` \(2\), got 3. Raise",
        ),
        (
            of_pairs([[0, 1, 1]], [[0, 1, 0], [1, 2, 0], [0, 2, 1]]),
            {},
            "train row 1, column `pairs`: must amount to a ranking for 'davidson_luce', which is listwise. Use",
        ),
        (
            of_pairs([[0, 1, 1], [0, 1, 2]], [[0, 1, 1]]),
            {"ranking_model": "plackett_luce_efron"},
            "train row 0, column `pairs`: must amount to a ranking for 'plackett_luce_efron', which is listwise",
        ),
    ],
)
def test_rankings_of_no_probability_are_refused(tokenizer, tmp_path, caplog, task, dataset, overrides, message):
    with pytest.raises(ValueError, match=message):
        make(task, tokenizer, tmp_path, dataset, **overrides)
    trainer = make(task, tokenizer, tmp_path, dataset, on_error="drop", **overrides)
    assert len(trainer.train_dataset) == 1
    (warning,) = warnings_of(caplog)
    reason = re.sub(r".*(column `\w+`).*", r"\1", message)
    assert "Dropped 1 of the 2 rows of the train dataset:\n- 1, the first of them row" in warning and reason in warning


def test_rows_keep_their_numbers(tokenizer, tmp_path):
    """Though rows before the bad one were left out for their length."""
    dataset = rows([1, 2], [1, 2], [1, 1]).map(lambda row, i: {"prompt": "the film " * (5 - 2 * i)}, with_indices=True)
    with pytest.raises(ValueError, match="train row 2, column `ranks`: 'plackett_luce' has no ties"):
        make("reward", tokenizer, tmp_path, dataset, ranking_model="plackett_luce", max_length=5)


def test_texts_beyond_the_models_positions_are_counted(tokenizer, tmp_path, caplog):
    """As BERT's 512, where `max_length` is 1024 by default: the table of positions would end the training."""
    data = rows([1, 2], [2, 1]).map(lambda row, i: {"prompt": "the film " * (40 * i + 1)}, with_indices=True)

    def trained(dataset, **overrides):
        args = RankingRewardConfig(**ranking_settings(tmp_path, **overrides))
        return RankingRewardTrainer(build_encoder(tokenizer), args, train_dataset=dataset, processing_class=tokenizer)

    with pytest.raises(
        ValueError, match="1 of 2 rankings have texts beyond the 64 .*to 84 tokens. Set `max_length=64`"
    ):
        trained(data)
    trainer = trained(data, max_length=64)
    trainer.train()
    with pytest.raises(ValueError, match="1 of 1 rankings have texts beyond the 64 positions"):
        trainer.args.max_length = None
        trainer.evaluate(data.select([1]))
    # Those of a stream cannot be, so the argument is looked at
    trained(data.to_iterable_dataset(), max_length=64)
    assert "of this stream" not in caplog.text
    trained(data.to_iterable_dataset())
    assert "The model has learned 64 positions, and `max_length` is 1024" in caplog.text


@pytest.mark.parametrize("ranking_model", ["bradley_terry", "plackett_luce_marginal"])
def test_rankings_in_which_all_tie_teach_some_models_nothing(tokenizer, tmp_path, caplog, ranking_model):
    with pytest.raises(ValueError, match=f"no rankings.*all are tied, from which '{ranking_model}' can learn.*Use a"):
        make("reward", tokenizer, tmp_path, rows([1, 1], [2, 2, 2]), ranking_model=ranking_model)
    assert not warnings_of(caplog)
    trainer = make("reward", tokenizer, tmp_path, rows([1, 1], [1, 2], [2, 1, 1]), ranking_model=ranking_model)
    assert trainer.train_dataset["ranks"] == [[1, 2], [2, 1, 1]]
    assert [m for m in warnings_of(caplog) if f"left out 1 of 3 rankings, from which '{ranking_model}'" in m]
    trainer.train()
    assert all(math.isfinite(logs["loss"]) for logs in trainer.state.log_history[:-1])


@pytest.mark.parametrize(
    "ranking_model", ["davidson_luce", "davidson", "rao_kupper", "soft_bradley_terry", "plackett_luce_efron"]
)
def test_rankings_in_which_all_tie_teach_the_others(tokenizer, tmp_path, caplog, ranking_model):
    trainer = make("reward", tokenizer, tmp_path, rows([1, 1], [2, 2, 2]), ranking_model=ranking_model)
    trainer.train()
    assert len(trainer.train_dataset) == 2 and not warnings_of(caplog)
    assert all(math.isfinite(logs["loss"]) for logs in trainer.state.log_history[:-1])


def test_judgements_that_all_tie_teach_bradley_terry_nothing(tokenizer, tmp_path, caplog):
    dataset = of_pairs([[0, 1, 0], [1, 2, 0]], [[0, 1, 0], [1, 2, 1]])
    trainer = make("reward", tokenizer, tmp_path, dataset, ranking_model="bradley_terry")
    assert trainer.train_dataset["pairs"] == [[[0, 1, 0], [1, 2, 1]]]
    assert "left out 1 of 2 rankings" in warnings_of(caplog)[0]


def test_larger_ties_than_those_trained_with_are_refused(tokenizer, tmp_path):
    trainer = make("reward", tokenizer, tmp_path, rows([1, 1, 2], [1, 2, 3]))
    with pytest.raises(
        ValueError, match=r"eval row 0, column `ranks`: must have no more completions tied.*\(2\), got 3"
    ):
        trainer.evaluate(rows([1, 1, 1]))


def test_arguments_serve_a_second_trainer(tokenizer, tmp_path):
    """One dataset's D is not said of the next."""
    args = RankingRewardConfig(**ranking_settings(tmp_path))
    for dataset, num_ties in ((rows([1, 2]), 0), (rows([1, 1], [1, 1, 1]), 2)):
        kwargs = {"train_dataset": dataset, "processing_class": tokenizer}
        trainer = RankingRewardTrainer(build_reward_model(tokenizer), args, **kwargs)
        assert (0 if trainer.ties is None else len(trainer.ties())) == num_ties


def test_rankings_for_a_trainer_of_pairs_are_refused(tokenizer, rankings, tmp_path):
    pairs = Dataset.from_dict({"prompt": ["a"] * 4, "chosen": [" good"] * 4, "rejected": [" bad"] * 4})
    trainer = make("reward", tokenizer, tmp_path, pairs)
    with pytest.raises(ValueError, match="no rankings at its start.*`train_dataset` or `eval_dataset`"):
        trainer.evaluate(rankings)


# --- Lengths ---


# With "the film" and the end of sequence: 4, 6 and 4 tokens
LONG = (" good", " bad and slow", " dull")


@pytest.mark.parametrize(
    "overlong, ranks, message",
    [
        ("prune", [[3, -1, 1], [1, -1, 1]], "3 completions.*pruned from their rankings; 1 of 4 rows"),
        ("drop", [[1, -1, 2]], "3 completions.*dropped with their rows; 3 of 4 rows"),
    ],
)
@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_overlong_completions(tokenizer, tmp_path, caplog, task, overlong, ranks, message):
    dataset = rows([3, 2, 1], [1, 1, 1], [1, 2, None], [1, None, 2], completions=LONG)
    trainer = make(task, tokenizer, tmp_path, dataset, overlong=overlong, max_length=5)
    kept = [[3, -1, 1], [1, -1, 1], [1, -1, 2]] if overlong == "prune" else ranks
    assert trainer.train_dataset["ranks"] == kept
    (warning,) = warnings_of(caplog)
    assert warning.startswith("train: ") and "`max_length` (5)" in warning
    first, second = message.split(".*")
    assert first in warning and second in warning
    # What is left of the ranking is what is learned of: as if the completion had never been ranked
    trainer.train()
    columns = {"completions": [[" good", " dull"]] * len(kept), "ranks": [[r for r in row if r > 0] for row in kept]}
    alone = make(task, tokenizer, tmp_path, Dataset.from_dict(columns | {"prompt": ["the film"] * len(kept)}))
    alone.train()
    losses = [[logs.get("loss") for logs in t.state.log_history[:-1]] for t in (trainer, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_overlong_completions_take_their_judgements_along(tokenizer, tmp_path, caplog):
    judgements = [[0, 1, 1], [1, 2, 0], [0, 2, 2], [0, 2, 0]], [[0, 1, 1], [0, 1, 2]]
    dataset = of_pairs(*judgements, completions=LONG)
    trainer = make("reward", tokenizer, tmp_path, dataset, max_length=5, ranking_model="davidson")
    assert trainer.train_dataset["pairs"] == [[[0, 2, 2], [0, 2, 0]]]
    assert "2 completions exceed" in warnings_of(caplog)[0] and "1 of 2 rows" in warnings_of(caplog)[0]
    trainer.train()
    assert trainer.state.log_history[0]["tie_rate"] == 0.5


def test_judgements_that_nobody_made_do_not_count(tokenizer, tmp_path):
    """A > B and B > C give the order A, B, C, but without B nobody compared A with C."""
    dataset = of_pairs([[0, 1, 1], [1, 2, 1]], [[0, 2, 0]], completions=LONG)
    trainer = make("reward", tokenizer, tmp_path, dataset, max_length=5, ranking_model="davidson")
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["wins"].sum() == 0 and batch["ties"].sum() == 2


def test_truncated_completions(tokenizer, tmp_path, caplog):
    """As TRL truncates: at `max_length` tokens; those of which nothing is left go, and their row."""
    texts = [[" good", " bad and slow", " bad and dull", " dull"]] * 2
    data = {"prompt": ["the film", "the film was a dull"], "completions": texts, "ranks": [[1, 2, 3, 3]] * 2}
    trainer = make("dpo", tokenizer, tmp_path, Dataset.from_dict(data), max_length=4)
    good, bad, dull, and_, eos = (tokenizer(word)["input_ids"][0] for word in "good bad dull and <eos>".split())
    assert trainer.train_dataset["completion_ids"] == [[[good, eos], [bad, and_], [bad, and_], [dull, eos]]]
    assert trainer.train_dataset["ranks"] == [[1, 2, 3, 3]]
    overlong, identical = warnings_of(caplog)
    assert "6 completions exceed `max_length` (4)" in overlong and "1 of 2 rows" in overlong
    assert "in 1 of 2 rankings (row 0 is the first)" in identical and "perhaps since they were truncated" in identical


def test_identical_completions_are_reported(tokenizer, tmp_path, caplog):
    dataset = rows([1, 2], [1, 2, 3], [1, 2, None], completions=(" good", " bad", " good"))
    trainer = make("reward", tokenizer, tmp_path, dataset)
    (message,) = warnings_of(caplog)
    assert "train: in 1 of 3 rankings (row 1 is the first), completions are the same" in message
    assert "truncated" not in message and len(trainer.train_dataset) == 3


def test_lengths_that_fit_are_not_spoken_of(tokenizer, rankings, tmp_path, caplog):
    make("reward", tokenizer, tmp_path, rankings, max_length=None)
    make("dpo", tokenizer, tmp_path, rankings, max_length=15)
    assert not warnings_of(caplog)


# --- Scores ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson"])
def test_scores_that_are_no_numbers_are_an_error(tokenizer, rankings, tmp_path, value, ranking_model):
    trainer = make("reward", tokenizer, tmp_path, rankings, ranking_model=ranking_model)
    trainer.model.score.weight.data.fill_(value)
    with pytest.raises(ValueError, match="`scores` holds NaN"):
        trainer.train()


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson", "rao_kupper"])
def test_gradients_that_are_no_numbers_are_an_error(tokenizer, rankings, tmp_path, task, ranking_model):
    trainer = make(task, tokenizer, tmp_path, rankings, ranking_model=ranking_model, max_steps=3)
    trainer.ties.raw.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(ValueError, match="gradient was not finite.*Lower `learning_rate`"):
        trainer.train()


# --- The likelihood on disk ---


def test_models_without_a_likelihood_say_so(policy_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="has no `ranking_model` in its config: it was not trained on rankings"):
        tie_parameters(policy_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no `ranking_model`"):
        tie_parameters(build_policy(tokenizer))


def test_a_path_is_as_good_as_its_text(tokenizer, rankings, tmp_path):
    trainer = make("reward", tokenizer, tmp_path, rankings)
    trainer.save_model()
    assert torch.equal(tie_parameters(Path(tmp_path))[1], tie_parameters(str(tmp_path))[1])
