"""The ranking trainers against TRL's own, hand computation, identities and invariances."""

import copy
import itertools
import json
import math

import pytest
import torch
from datasets import Dataset
from helpers import (
    PROMPTS,
    RANKINGS,
    build_policy,
    build_reward_model,
    make_rankings,
    ranking_settings,
    settings,
)
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    pipeline,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from trl_ext import (
    PPOConfig,
    PPOTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    predict_pair,
    ranking_nll,
    tie_parameters,
)
from trl_ext.preference.preparation import tokenize_for_dpo
from trl_ext.ranking import LISTWISE_MODELS, RANKING_MODELS


WITHOUT_TIE_PARAMETERS = [m for m in RANKING_MODELS if m not in ("rao_kupper", "davidson", "davidson_luce")]


def reward_trainer(model, tokenizer, tmp_path, dataset, trainer_class=RankingRewardTrainer, kwargs=None, **overrides):
    config_class = RankingRewardConfig if trainer_class is RankingRewardTrainer else RewardConfig
    args = config_class(**ranking_settings(tmp_path, **overrides))
    return trainer_class(model, args, train_dataset=dataset, processing_class=tokenizer, **kwargs or {})


def dpo_trainer(model, tokenizer, tmp_path, dataset, trainer_class=RankingDPOTrainer, kwargs=None, **overrides):
    config_class = RankingDPOConfig if trainer_class is RankingDPOTrainer else DPOConfig
    args = config_class(**ranking_settings(tmp_path, **overrides))
    kwargs = {"ref_model": build_policy(tokenizer, seed=7)} | (kwargs or {})
    return trainer_class(model, args=args, train_dataset=dataset, processing_class=tokenizer, **kwargs)


def make(task, tokenizer, tmp_path, dataset, **kwargs):
    if task == "reward":
        return reward_trainer(build_reward_model(tokenizer), tokenizer, tmp_path, dataset, **kwargs)
    return dpo_trainer(build_policy(tokenizer), tokenizer, tmp_path, dataset, **kwargs)


def losses(trainer):
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_training(first, second, tolerance=1e-6):
    """The same losses step by step, and the same weights in the end."""
    assert losses(first) == pytest.approx(losses(second), rel=tolerance, abs=tolerance) and losses(first)
    assert_equal_weights(first, second, tolerance)


def assert_equal_weights(first, second, tolerance=1e-6):
    first, second = ({n: p for n, p in weights(t.model).items() if "tie_par" not in n} for t in (first, second))
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(
            weight, second[name], atol=tolerance, rtol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


class KeepGradients(TrainerCallback):
    """The first update's gradients."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# --- What plain transformers and loops say ---


def token_ids(tokenizer, prompt, completion):
    return tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]


def plain_score(model, tokenizer, prompt, completion):
    return model(torch.tensor([token_ids(tokenizer, prompt, completion)])).logits[0, 0]


def plain_logp(model, tokenizer, prompt, completion):
    ids, start = token_ids(tokenizer, prompt, completion), len(tokenizer(prompt)["input_ids"])
    logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :].sum()


def plain_scores(task, models, tokenizer, row, beta=0.1):
    """Scores the completions of one row, each run alone."""
    scores = []
    for completion in row["completions"]:
        if task == "reward":
            scores.append(plain_score(models[0], tokenizer, row["prompt"], completion))
        else:
            policy, reference = (plain_logp(model, tokenizer, row["prompt"], completion) for model in models)
            scores.append(beta * (policy - reference.detach()))
    return torch.stack(scores)


def ranks_tensor(row):
    return torch.tensor([-1 if rank is None else rank for rank in row["ranks"]])


# --- K = 2 ---


def pairs_and_rankings():
    """The same judgements as TRL's pairs and as rankings of two, the better one first or second."""
    rankings = make_rankings(10, num_completions=[2], num_ranks=2, seed=3)
    rankings["ranks"] = [[1, 2] if row % 3 else [2, 1] for row in range(10)]
    chosen, rejected = (
        [c[ranks.index(rank)] for c, ranks in zip(rankings["completions"], rankings["ranks"], strict=True)]
        for rank in (1, 2)
    )
    pairs = {"prompt": rankings["prompt"], "chosen": chosen, "rejected": rejected}
    return Dataset.from_dict(pairs), Dataset.from_dict(rankings)


@pytest.mark.parametrize(
    "ranking_model, overrides",
    [(model, {}) for model in (*WITHOUT_TIE_PARAMETERS, "davidson_luce")]
    + [
        ("davidson_luce", {"center_rewards_coefficient": 0.3}),
        ("bradley_terry", {"center_rewards_coefficient": 0.3, "shared_prefix": "never"}),
    ],
)
def test_two_completions_are_trls_reward_modeling(tokenizer, tmp_path, ranking_model, overrides):
    pairs, rankings = pairs_and_rankings()
    same = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 5}
    theirs = dict(overrides)
    theirs.pop("shared_prefix", None)
    trl = make("reward", tokenizer, tmp_path, pairs, trainer_class=RewardTrainer, **same, **theirs)
    ours = make("reward", tokenizer, tmp_path, rankings, ranking_model=ranking_model, **same, **overrides)
    trl.train()
    ours.train()
    assert ours.ties is None  # without ties in the data there is none to learn of
    assert_equal_training(ours, trl)
    # 'margin' is TRL's only where all are strict; each is a mean over the batch
    for first, second in zip(ours.state.log_history[:-1], trl.state.log_history[:-1], strict=True):
        for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm"):
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("ranking_model", [*WITHOUT_TIE_PARAMETERS, "davidson_luce"])
def test_two_completions_are_trls_dpo(tokenizer, tmp_path, ranking_model):
    pairs, rankings = pairs_and_rankings()
    same = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 5, "beta": 0.3}
    trl = make("dpo", tokenizer, tmp_path, pairs, trainer_class=DPOTrainer, **same)
    ours = make("dpo", tokenizer, tmp_path, rankings, ranking_model=ranking_model, **same)
    trl.train()
    ours.train()
    assert_equal_training(ours, trl)
    for first, second in zip(ours.state.log_history[:-1], trl.state.log_history[:-1], strict=True):
        for name in ("rewards/accuracies", "rewards/margins", "entropy", "grad_norm"):
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-5), name
        trl_mean = (second["logps/chosen"] + second["logps/rejected"]) / 2
        assert first["logps/mean"] == pytest.approx(trl_mean, rel=1e-5)
        assert first["rewards/mean"] == pytest.approx(
            (second["rewards/chosen"] + second["rewards/rejected"]) / 2, rel=1e-4, abs=1e-6
        )


def test_with_the_defaults_optimizer_too(tokenizer, tmp_path):
    """AdamW turns the last digit of a small gradient into a large one, so less closely."""
    pairs, rankings = pairs_and_rankings()
    same = {"learning_rate": 1e-3, "max_steps": 5, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    trl = make("reward", tokenizer, tmp_path, pairs, trainer_class=RewardTrainer, **same)
    ours = make("reward", tokenizer, tmp_path, rankings, **same)
    trl.train()
    ours.train()
    assert_equal_training(ours, trl, tolerance=3e-5)


@pytest.mark.parametrize("ranking_model", ["rao_kupper", "davidson"])
def test_dpo_with_ties_is_that_of_the_paper(tokenizer, tmp_path, ranking_model):
    """Chen et al. 2025: eq. 8 to 11 in d = beta log-ratio difference, nu = 3 for a tie and a win of the first."""
    nu, beta = 3.0, 0.5
    rows = {"prompt": ["the film was", "the actor"], "chosen": [" good", " warm but sad"], "rejected": [" bad"] * 2}
    dataset = Dataset.from_dict(rows | {"tie": [False, True]})
    # The paper's nu_D is half of nu = P(tie) / sqrt(P(win) P(lose)), which `log_tie` is the logarithm of
    log_tie = math.log(nu) if ranking_model == "rao_kupper" else math.log(2 * nu)
    trainer = make(
        "dpo",
        tokenizer,
        tmp_path,
        dataset,
        ranking_model=ranking_model,
        log_tie=[log_tie],
        beta=beta,
        per_device_train_batch_size=2,
        max_steps=1,
    )
    expected = []
    for prompt, chosen, rejected, is_tie in zip(*dataset.to_dict().values(), strict=True):
        models = (trainer.model, trainer.ref_model)
        d = plain_scores("dpo", models, tokenizer, {"prompt": prompt, "completions": [chosen, rejected]}, beta)
        d = (d[0] - d[1]).item()
        if ranking_model == "rao_kupper":
            alpha = math.log(nu)
            win, lose = 1 / (1 + math.exp(alpha - d)), 1 / (1 + math.exp(alpha + d))
            probability = (nu**2 - 1) * win * lose if is_tie else win
        else:
            win = 1 / (1 + math.exp(-d) + 2 * nu * math.exp(-d / 2))
            probability = 2 * nu * math.exp(-d / 2) * win if is_tie else win
        expected.append(-math.log(probability))
    trainer.train()
    assert losses(trainer) == pytest.approx([sum(expected) / 2], rel=1e-5)


# --- Any K ---


def parameters_of(ranking_model):
    return {"rao_kupper": [0.7], "davidson": [-0.4], "davidson_luce": [-0.2, -1.2]}.get(ranking_model)


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("ranking_model", RANKING_MODELS)
def test_loss_and_gradient_are_those_of_completions_run_one_by_one(tokenizer, tmp_path, ranking_model, task):
    """Over K - 1, or over the number of pairs; the tie parameters' gradient as well."""
    columns = dict(RANKINGS)
    if ranking_model == "plackett_luce":
        columns["ranks"] = [[2, 1, 3, None], [1, 2], [4, 1, 2, 3], [3, 1, 2, 4]]
    log_tie = parameters_of(ranking_model)
    trainer = make(
        task,
        tokenizer,
        tmp_path,
        Dataset.from_dict(columns),
        ranking_model=ranking_model,
        log_tie=log_tie,
        max_steps=1,
        max_grad_norm=0.0,
        kwargs={"callbacks": [keep := KeepGradients()]},
    )
    models = [build_reward_model(tokenizer)] if task == "reward" else [build_policy(tokenizer), trainer.ref_model]
    log_tie = None if log_tie is None else torch.tensor(log_tie, requires_grad=True)
    loss = 0
    for row in Dataset.from_dict(columns):
        ranks = ranks_tensor(row)
        num_ranked = int((ranks >= 0).sum())
        divisor = num_ranked - 1 if ranking_model in LISTWISE_MODELS else math.comb(num_ranked, 2)
        scores = plain_scores(task, models, tokenizer, row)
        loss = loss + ranking_nll(scores[None], ranks[None], ranking_model, log_tie)[0] / divisor / 4
    loss.backward()
    trainer.train()
    assert losses(trainer) == pytest.approx([loss.item()], rel=1e-5)
    for name, parameter in models[0].named_parameters():
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(
            keep.gradients.pop(name), parameter.grad, atol=2e-5 * size, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    if log_tie is None:
        assert not keep.gradients
    else:
        gradient = keep.gradients["tie_parameters.raw"]
        if ranking_model == "rao_kupper":  # through the softplus that keeps log theta above 0
            gradient = gradient / trainer_softplus_slope(0.7)
        torch.testing.assert_close(gradient, log_tie.grad, atol=1e-6, rtol=1e-4)


def trainer_softplus_slope(log_theta):
    """d log theta / d raw, where log theta = 0.001 + log(1 + e^raw)."""
    return 1 - math.exp(-(log_theta - 1e-3))


def test_centering_takes_the_mean_over_ranked_completions(tokenizer, rankings, tmp_path):
    results = []
    for coefficient in (None, 0.7):
        trainer = make(
            "reward", tokenizer, tmp_path, rankings, center_rewards_coefficient=coefficient, learning_rate=0.0
        )
        trainer.train()
        results.append(losses(trainer)[0])
    model, expected = build_reward_model(tokenizer), 0.0
    for row in rankings:
        scores = plain_scores("reward", [model], tokenizer, row)[ranks_tensor(row) >= 0]
        expected += (2 * scores.mean()).square().item() / 4
    assert results[1] - results[0] == pytest.approx(0.7 * expected, rel=1e-4)


# --- Invariances ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson"])
def test_accumulation_equals_batch_size(tokenizer, tmp_path, ranking_model, task):
    dataset = Dataset.from_dict(make_rankings(8))
    trainers = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make(
            task,
            tokenizer,
            tmp_path,
            dataset,
            ranking_model=ranking_model,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.3,
            max_steps=4,
        )
        trainer.train()
        trainers.append(trainer)
    for trainer in trainers[1:]:
        assert_equal_training(trainer, trainers[0], 2e-6)
        torch.testing.assert_close(trainer.ties(), trainers[0].ties(), atol=2e-6, rtol=0)
        for first, second in zip(trainer.state.log_history, trainers[0].state.log_history, strict=True):
            # `num_tokens` too: what the prompts' completions share does not depend on the batch
            names = {"three_way_accuracy", "tie_rate", "log_likelihood", "tie/delta_2", "tie/nu", "num_tokens"}
            for name in names & first.keys():
                assert first[name] == pytest.approx(second[name], rel=1e-5), name


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("ranking_model", ["davidson_luce", "plackett_luce_efron", "rao_kupper"])
def test_the_order_of_completions_does_not_matter(tokenizer, tmp_path, ranking_model, task):
    columns = make_rankings(8)
    reverse = {name: [v[::-1] for v in columns[name]] for name in ("completions", "ranks")}
    trainers = []
    for data in (columns, columns | reverse):
        settings = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 4, "ranking_model": ranking_model}
        trainers.append(make(task, tokenizer, tmp_path, Dataset.from_dict(data), **settings))
        trainers[-1].train()
    assert_equal_training(*trainers, tolerance=2e-6)


def test_judgements_of_the_same_order_train_the_same(tokenizer, tmp_path):
    """Ranks with gaps, text, and all pairs of each ranking are three ways to say one thing."""
    ranks = [[1, 2, 1], [3, 1, 2], [1, 1, 2], [2, 2, 1]]
    texts = ["A = C > B", "B > C > A", "A ~ B > C", "A = B < C"]
    pairs = [
        [[i, j, 0 if r[i] == r[j] else 1 if r[i] < r[j] else 2] for i, j in itertools.combinations(range(3), 2)]
        for r in ranks
    ]
    completions = [[" good", " bad and sad", " slow"]] * 4
    forms = {"ranks": [[10 * rank + 3 for rank in row] for row in ranks], "ranking": texts, "pairs": pairs}
    for ranking_model in ("davidson_luce", "davidson"):
        trainers = []
        for name, values in {"ranks ": ranks, **forms}.items():
            data = {"prompt": PROMPTS[:4], "completions": completions, name.strip(): values}
            trainers.append(
                make("reward", tokenizer, tmp_path, Dataset.from_dict(data), ranking_model=ranking_model, optim="sgd")
            )
            trainers[-1].train()
        for trainer in trainers[1:]:
            assert_equal_training(trainer, trainers[0], 1e-6)
            torch.testing.assert_close(trainer.ties(), trainers[0].ties(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_unranked_completions_change_nothing(tokenizer, tmp_path, task):
    columns = make_rankings(8, num_completions=[3])
    more = {
        "completions": [["", *c, " movie plot"] for c in columns["completions"]],
        "ranks": [[None, *r, None] for r in columns["ranks"]],
    }
    trainers = []
    for data in (columns, columns | more):
        trainers.append(make(task, tokenizer, tmp_path, Dataset.from_dict(data), optim="sgd", learning_rate=0.3))
        trainers[-1].train()
    assert_equal_training(*trainers)


def test_pairs_that_agree_with_no_order_train_pairwise_models(tokenizer, tmp_path):
    """A = B and B = C, but A > C: three judgements, and one of another pair made twice."""
    judgements = [[0, 1, 0], [1, 2, 0], [0, 2, 1], [0, 2, 1]]
    completions = [" good", " great", " bad"]
    dataset = Dataset.from_dict({"prompt": ["the film was"], "completions": [completions], "pairs": [judgements]})
    trainer = make(
        "reward", tokenizer, tmp_path, dataset, ranking_model="davidson", log_tie=[0.3], max_steps=1, optim="sgd"
    )
    s = [plain_score(build_reward_model(tokenizer), tokenizer, "the film was", c).item() for c in completions]

    def log_p(i, j, tie):
        total = math.exp((s[i] - s[j]) / 2) + math.exp((s[j] - s[i]) / 2) + math.exp(0.3)
        return (0.3 if tie else (s[i] - s[j]) / 2) - math.log(total)

    trainer.train()
    expected = -(log_p(0, 1, True) + log_p(1, 2, True) + 2 * log_p(0, 2, False)) / 4
    assert losses(trainer) == pytest.approx([expected], rel=1e-5)
    logs = trainer.state.log_history[0]
    assert logs["tie_rate"] == 0.5 and logs["accuracy"] == float(s[0] > s[2])


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_long_rankings_train(tokenizer, tmp_path, task):
    """Beside short ones. Their orders are too many to be listed, and metrics that need that are of the others."""
    columns = make_rankings(8, num_completions=[3, 9], num_ranks=4)
    trainer = make(task, tokenizer, tmp_path, Dataset.from_dict(columns), max_steps=3)
    trainer.train()
    assert {len(ranks) for ranks in columns["ranks"]} == {3, 9}
    for logs in trainer.state.log_history:
        assert all(math.isfinite(value) for value in logs.values())
        assert 0 <= logs.get("tie_rate", 0) <= 1
    assert losses(trainer)[-1] < losses(trainer)[0]


# --- It learns ---


def counted(wins, ties, defeats):
    return [[0, 1, 1]] * wins + [[0, 1, 0]] * ties + [[0, 1, 2]] * defeats


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("ranking_model", ["davidson", "rao_kupper"])
def test_two_parameters_fit_three_frequencies(tokenizer, tmp_path, ranking_model, task):
    """In 10 judgements 6 are wins and 3 ties: the likelihood is greatest where the model says 0.6, 0.3 and 0.1."""
    columns = {"prompt": ["the film was"] * 2, "completions": [[" good", " bad"], [" bad", " good"]]}
    dataset = Dataset.from_dict(columns | {"pairs": [counted(6, 3, 1), counted(1, 3, 6)]})
    trainer = make(
        task,
        tokenizer,
        tmp_path,
        dataset,
        ranking_model=ranking_model,
        log_tie=[0.1],
        tie_learning_rate=5e-2,
        learning_rate=3e-3,
        max_steps=120,
        logging_steps=40,
        per_device_train_batch_size=2,
    )
    trainer.train()
    # nu = 0.3 / sqrt(0.6 0.1); theta^2 = 6, from e^s / (e^s + theta) = 0.6 and 1 / (1 + theta e^s) = 0.1
    truth = 0.3 / math.sqrt(0.06) if ranking_model == "davidson" else math.sqrt(6)
    name = "tie/nu" if ranking_model == "davidson" else "tie/theta"
    logs = trainer.state.log_history[-2]
    assert logs[name] == pytest.approx(truth, rel=2e-2)
    models = [trainer.model.eval(), getattr(trainer, "ref_model", None)]
    good, bad = plain_scores(task, models, tokenizer, {"prompt": "the film was", "completions": [" good", " bad"]})
    gap = math.log(6) if ranking_model == "davidson" else math.log(1.5 * math.sqrt(6))
    assert (good - bad).item() == pytest.approx(gap, abs=3e-2)
    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1))
    assert logs["loss"] == pytest.approx(entropy, abs=1e-3)
    assert logs["pair_log_likelihood"] == pytest.approx(-entropy, abs=1e-3)
    assert logs["predicted_tie_rate"] == pytest.approx(0.3, abs=5e-3)


def enumerated_davidson_luce(scores, log_delta):
    """Probability of every weak order of the items, stage by stage, by listing the groups that could come next."""
    items = range(len(scores))
    delta = [1.0, *map(math.exp, log_delta)]

    def weight(group):
        return delta[len(group) - 1] * math.exp(sum(scores[i] for i in group) / len(group))

    def orders(left):
        if not left:
            return [((), 1.0)]
        groups = [g for n in range(1, len(delta) + 1) for g in itertools.combinations(left, n)]
        total = sum(map(weight, groups))
        return [
            ((group, *rest), weight(group) / total * p)
            for group in groups
            for rest, p in orders(tuple(i for i in left if i not in group))
        ]

    return {tuple(next(r for r, g in enumerate(o) if i in g) for i in items): p for o, p in orders(tuple(items))}


def test_davidson_luce_recovers_what_the_rankings_were_drawn_from(tokenizer, tmp_path):
    """As many of each of the 13 weak orders of three as are expected among 150."""
    truth = enumerated_davidson_luce([1.0, 0.0, -1.0], [-0.5, 0.4])
    assert len(truth) == 13 and sum(truth.values()) == pytest.approx(1)
    ranks = [list(order) for order, p in truth.items() for _ in range(round(150 * p))]
    columns = {"prompt": ["the film was"] * len(ranks), "completions": [[" good", " dull", " bad"]] * len(ranks)}
    trainer = make(
        "reward",
        tokenizer,
        tmp_path,
        Dataset.from_dict(columns | {"ranks": ranks}),
        log_tie=[0.0, 0.0],
        tie_learning_rate=5e-2,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        per_device_train_batch_size=len(ranks),
        max_steps=50,
        logging_steps=50,
    )
    trainer.train()
    torch.testing.assert_close(trainer.ties().detach(), torch.tensor([-0.5, 0.4]), atol=0.08, rtol=0)
    row = {"prompt": "the film was", "completions": [" good", " dull", " bad"]}
    scores = plain_scores("reward", [trainer.model.eval()], tokenizer, row)
    torch.testing.assert_close(scores - scores.mean(), torch.tensor([1.0, 0.0, -1.0]), atol=0.1, rtol=0)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_an_evident_preference_is_learned(tokenizer, tmp_path, task):
    """'good' beats 'bad', and two that both have it or both lack it tie; on prompts that training did not show."""

    def rows(prompts, fill):
        goods = [" good", f" {fill} good", f" good {fill} and {fill}"]
        bads = [" bad", f" {fill} bad", f" bad {fill} and {fill}"]
        completions = [[goods[i % 3], bads[(i + 1) % 3], goods[(i + 1) % 3], bads[i % 3]] for i in range(len(prompts))]
        return Dataset.from_dict(
            {"prompt": prompts, "completions": completions, "ranks": [[1, 2, 1, 2]] * len(prompts)}
        )

    trainer = make(
        task,
        tokenizer,
        tmp_path,
        rows(PROMPTS[:6] * 4, "plot"),
        kwargs={"eval_dataset": rows(PROMPTS[6:], "plot")},
        max_steps=40,
        logging_steps=40,
        learning_rate=5e-3,
        tie_learning_rate=5e-2,
    )
    before, _ = trainer.evaluate(), trainer.train()
    after = trainer.evaluate()
    accuracy = "eval_accuracy" if task == "reward" else "eval_rewards/accuracies"
    assert before[accuracy] < 0.8 and after[accuracy] == 1.0 and after["eval_three_way_accuracy"] == 1.0
    assert after["eval_log_likelihood"] > after["eval_baseline_log_likelihood"] + 0.5
    assert after["eval_kendall_tau_b"] > before["eval_kendall_tau_b"]


def test_tokenizers_without_an_end_of_sequence(tokenizer, tmp_path):
    """As BERT's: a reward model reads the text alone, and a policy could not learn to stop."""
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    data = Dataset.from_dict(FOUR_PAIRS).with_format("torch")
    trainer = make("reward", endless, tmp_path, data)
    expected = [[tokenizer(prompt + text)["input_ids"] for text in (" good", " bad")] for prompt in PROMPTS[:4]]
    assert trainer.train_dataset["group_ids"][:] == expected
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:4]]
    replies = [[[{"role": "assistant", "content": text}] for text in (" good", " bad")]] * 4
    data = Dataset.from_dict(FOUR_PAIRS | {"prompt": chats, "completions": replies})
    for form in ("arrow", "pandas"):
        assert make("reward", endless, tmp_path, data.with_format(form)).reward_input.kind == "chat"
    pairs = Dataset.from_dict({"prompt": ["the"], "chosen": [" good"], "rejected": [" bad"]})
    for task in ("reward", "dpo"):
        with pytest.raises(
            ValueError, match="the tokenizer has none. Set `tokenizer.eos_token`; or, for a reward model"
        ):
            make(task, endless, tmp_path, pairs)
    assert make("reward", endless, tmp_path, pairs.add_column("tie", [False])).reward_input.ending == ""
    with pytest.raises(ValueError, match="no end-of-sequence token.*Set `tokenizer.eos_token`"):
        tokenize_for_dpo({"prompt": "the", "completions": [" good", " bad"]}, endless)


# --- Tie parameters ---


FOUR_PAIRS = {"prompt": PROMPTS[:4], "completions": [[" good", " bad"]] * 4, "ranks": [[1, 1], [1, 2], [2, 1], [1, 2]]}


@pytest.mark.parametrize(
    "ranking_model, log_tie",
    # One of four pairs is tied: p = 1/4. nu and delta_2 solve nu / (2 + nu) = p, theta (theta - 1) / (theta + 1) = p
    [
        ("davidson", math.log(2 / 3)),
        ("davidson_luce", math.log(2 / 3)),
        ("rao_kupper", math.log(5 / 3)),
    ],
)
def test_tie_parameters_start_at_the_rate_of_ties(tokenizer, tmp_path, ranking_model, log_tie):
    model = build_reward_model(tokenizer)
    torch.nn.init.normal_(model.score.weight, std=1e-6)  # as good as equal scores
    trainer = reward_trainer(model, tokenizer, tmp_path, Dataset.from_dict(FOUR_PAIRS), ranking_model=ranking_model)
    torch.testing.assert_close(trainer.ties().detach(), torch.tensor([log_tie]), atol=1e-5, rtol=0)
    logs = trainer.evaluate(Dataset.from_dict(FOUR_PAIRS))
    assert logs["eval_predicted_tie_rate"] == pytest.approx(0.25, abs=1e-4) and logs["eval_tie_rate"] == 0.25
    assert logs["eval_tie_calibration_error"] == pytest.approx(0, abs=1e-4)
    assert logs["eval_log_likelihood"] == pytest.approx(logs["eval_baseline_log_likelihood"], abs=1e-4)


@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson"])
def test_tie_parameters_have_their_own_learning_rate_and_no_weight_decay(tokenizer, tmp_path, ranking_model):
    """AdamW's first step is the learning rate, to the side the gradient says, and decay beside it."""
    trainer = make(
        "reward",
        tokenizer,
        tmp_path,
        Dataset.from_dict(FOUR_PAIRS),
        ranking_model=ranking_model,
        log_tie=[3.0],
        tie_learning_rate=0.02,
        learning_rate=1e-4,
        weight_decay=0.5,
        max_steps=1,
    )
    trainer.train()
    assert trainer.ties().item() == pytest.approx(3.0 - 0.02, abs=1e-5)  # there are far fewer ties than nu = e^3 says
    groups = {len(group["params"]): group for group in trainer.optimizer.param_groups if group["params"]}
    assert groups[1]["params"][0] is trainer.ties.raw
    assert all(p is not trainer.ties.raw for group in trainer.optimizer.param_groups[:-1] for p in group["params"])


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_tie_parameters_move_to_where_ties_are(tokenizer, tmp_path, task):
    for start, sign in ((3.0, -1), (-3.0, 1)):
        trainer = make(
            task, tokenizer, tmp_path, Dataset.from_dict(FOUR_PAIRS), log_tie=[start], tie_learning_rate=0.1
        )
        trainer.train()
        assert sign * (trainer.ties().item() - start) > 0.1
        logged = [logs["tie/delta_2"] for logs in trainer.state.log_history]
        assert logged[0] == pytest.approx(math.exp(start + sign * 0.1), rel=1e-3)  # as it is when it is logged
        assert logged[-1] == pytest.approx(trainer.ties().exp().item())


@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson", "rao_kupper"])
def test_tie_parameters_can_stay(tokenizer, tmp_path, ranking_model):
    trainer = make(
        "reward",
        tokenizer,
        tmp_path,
        Dataset.from_dict(FOUR_PAIRS),
        ranking_model=ranking_model,
        log_tie=[0.37],
        learn_ties=False,
        weight_decay=0.5,
        tie_learning_rate=1.0,
    )
    trainer.train()
    assert trainer.ties().item() == pytest.approx(0.37, abs=1e-7)
    assert all(p is not trainer.ties.raw for group in trainer.optimizer.param_groups for p in group["params"])


def test_theta_stays_above_one_where_nothing_ties(tokenizer, tmp_path):
    columns = FOUR_PAIRS | {"ranks": [[1, 2]] * 4}
    trainer = make(
        "reward",
        tokenizer,
        tmp_path,
        Dataset.from_dict(columns),
        kwargs={"eval_dataset": Dataset.from_dict(FOUR_PAIRS)},
        ranking_model="rao_kupper",
        tie_learning_rate=20.0,
        max_steps=4,
    )
    trainer.train()
    thetas = [logs["tie/theta"] for logs in trainer.state.log_history]
    assert thetas[-1] < 1.01 and all(theta > 1 for theta in thetas)
    assert all(map(math.isfinite, losses(trainer))) and losses(trainer)[-1] < losses(trainer)[0]
    assert math.isfinite(trainer.evaluate()["eval_loss"])  # there is a tie in it


@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson", "rao_kupper"])
def test_tie_parameters_survive_being_written(tokenizer, tmp_path, ranking_model):
    """To the last digit, which a run that is resumed from a checkpoint needs."""
    data = Dataset.from_dict(FOUR_PAIRS)
    trainers = [
        make("reward", tokenizer, tmp_path / name, data, ranking_model=ranking_model, log_tie=[0.3]) for name in "ab"
    ]
    for raw in torch.linspace(-6, 9, 60):
        trainers[0].ties.raw.data.fill_(raw)
        trainers[0].save_model()
        trainers[1]._load_from_checkpoint(str(tmp_path / "a"))
        assert torch.equal(trainers[0].ties.raw, trainers[1].ties.raw), raw


def test_the_largest_tie_of_an_evaluation_counts(tokenizer, tmp_path):
    train = {"prompt": ["the", "a"], "completions": [[" good", " bad", " sad"]] * 2, "ranks": [[1, 1, 2], [1, 2, 3]]}
    evaluation = {**train, "ranks": [[1, 1, 1], [1, 2, 3]]}
    trainer = make(
        "reward",
        tokenizer,
        tmp_path,
        Dataset.from_dict(train),
        kwargs={"eval_dataset": {"held_out": Dataset.from_dict(evaluation)}},
    )
    assert trainer.ties().shape == (2,) and trainer.ties().isfinite().all()
    assert math.isfinite(trainer.evaluate()["eval_held_out_loss"])


@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson", "rao_kupper"])
def test_rates_of_ties_are_those_of_the_training_data_alone(tokenizer, tmp_path, ranking_model):
    """However many ties there are to evaluate on."""
    tied = {"prompt": ["the"] * 8, "completions": [[" good", " bad"]] * 8, "ranks": [[1, 1]] * 8}
    kwargs = {"eval_dataset": {"tied": Dataset.from_dict(tied)}}
    trainer = make(
        "reward", tokenizer, tmp_path, Dataset.from_dict(FOUR_PAIRS), kwargs=kwargs, ranking_model=ranking_model
    )
    _, tie, _ = predict_pair(torch.zeros(1), torch.zeros(1), *tie_parameters(trainer.model))
    assert tie.item() == pytest.approx(1 / 4, abs=1e-5)


def test_one_large_tie_leaves_no_infinity_in_the_state(tokenizer, tmp_path, caplog):
    rows = [[" good", " bad"]] * 12 + [[" good"] * 11]
    columns = {"prompt": ["the"] * 13, "completions": rows, "ranks": [[1, 2]] * 9 + [[1, 1]] * 3 + [[1] * 11]}
    trainer = make("reward", tokenizer, tmp_path, Dataset.from_dict(columns), max_steps=4)
    assert max(map(abs, trainer.model.config.log_tie)) < 20
    trainer.ties.raw.data[-1] = 100.0  # beyond what training could come to
    trainer.train()
    trainer.save_state()
    state = json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=pytest.fail)
    assert state["log_history"][0]["tie/delta_11"] == pytest.approx(math.exp(100), rel=0.1)
    assert "rankings of up to 10 completions" in caplog.text


def test_the_next_trainer_of_a_model_starts_anew(tokenizer, rankings, tmp_path):
    model = build_reward_model(tokenizer)
    first = reward_trainer(model, tokenizer, tmp_path, rankings, log_tie=[2.0, 2.0])
    hooks = len(model._forward_hooks)
    second = reward_trainer(model, tokenizer, tmp_path, rankings, ranking_model="davidson", log_tie=[-1.0])
    assert len(model._forward_hooks) == hooks and first.ties is not second.ties
    assert [n for n, _ in model.named_parameters() if "tie" in n] == ["tie_parameters.raw"]
    second.train()
    assert tie_parameters(model)[0] == "davidson" and tie_parameters(model)[1].dim() == 0
    third = reward_trainer(model, tokenizer, tmp_path, rankings, ranking_model="plackett_luce_efron")
    third.train()
    assert not model._forward_hooks and tie_parameters(model) == ("plackett_luce_efron", None)


# --- What is on disk is the plain model ---


@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson", "rao_kupper", "bradley_terry"])
def test_a_saved_reward_model_is_plain_and_knows_its_likelihood(tokenizer, rankings, tmp_path, ranking_model):
    trainer = make(
        "reward", tokenizer, tmp_path, rankings, ranking_model=ranking_model, save_strategy="steps", save_steps=2
    )
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    row = RANKINGS["prompt"][0], RANKINGS["completions"][0][1]
    score = plain_score(trainer.model, tokenizer, *row)
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(plain_score(model, tokenizer, *row), score)
        name, log_tie = tie_parameters(str(folder))
        assert name == ranking_model
        if ranking_model == "bradley_terry":
            assert log_tie is None
        else:
            assert torch.equal(log_tie.reshape(-1), trainer.ties().detach())
        assert tie_parameters(model)[0] == ranking_model  # loading keeps what the config says
        win, tie, lose = predict_pair(torch.tensor(1.0), torch.tensor(0.0), name, log_tie)
        assert (win + tie + lose).item() == pytest.approx(1) and win > lose
        assert (tie > 0) == (ranking_model != "bradley_terry")
    # as from the trainer's model itself, by its own `save_pretrained`
    trainer.model.save_pretrained(tmp_path / "own")
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(info.values()) and tie_parameters(str(tmp_path / "own"))[0] == ranking_model
    classifier = pipeline("text-classification", model=str(tmp_path), function_to_apply="none")
    assert classifier("".join(row) + "<eos>")[0]["score"] == pytest.approx(score.item(), abs=1e-6)


def test_a_causal_model_becomes_a_reward_model(policy_path, rankings, tmp_path):
    args = RankingRewardConfig(**ranking_settings(tmp_path))
    trainer = RankingRewardTrainer(policy_path, args, train_dataset=rankings)
    trainer.train()
    trainer.save_model()
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("given", ["path", "model"])
def test_policies_train_on_the_reward_model(policy_path, reward_model_path, rankings, prompts, tmp_path, given):
    args = RankingRewardConfig(**ranking_settings(tmp_path / "reward"))
    trainer = RankingRewardTrainer(reward_model_path, args, train_dataset=rankings)
    trainer.train()
    trainer.save_model()
    reward = str(tmp_path / "reward")
    kwargs = {}
    if given == "model":  # as it comes out of training, tie parameters and all
        reward = trainer.model
        kwargs = {"reward_processing_classes": trainer.processing_class}
    theirs = settings(tmp_path, num_generations=2, max_steps=1)
    del theirs["critic_learning_rate"]
    policy_trainer = GRPOTrainer(policy_path, reward, GRPOConfig(**theirs), prompts, **kwargs)
    policy_trainer.train()
    assert math.isfinite(policy_trainer.state.log_history[0]["reward"])
    policy_trainer = PPOTrainer(policy_path, reward, PPOConfig(**settings(tmp_path, max_steps=1)), prompts, **kwargs)
    policy_trainer.train()
    assert math.isfinite(policy_trainer.state.log_history[0]["reward"])


def test_a_saved_policy_is_plain_and_generates(tokenizer, rankings, tmp_path):
    trainer = make("dpo", tokenizer, tmp_path, rankings, ranking_model="rao_kupper")
    trainer.train()
    trainer.save_model()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor([tokenizer("the film was")["input_ids"]])
    generated = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (trainer.model.eval(), model)]
    assert torch.equal(*generated)
    torch.testing.assert_close(tie_parameters(str(tmp_path))[1], trainer.ties().detach()[0], atol=0, rtol=0)
    generator = pipeline("text-generation", model=str(tmp_path))
    assert generator("the film was", max_new_tokens=2, return_full_text=False)[0]["generated_text"]


def lora(task):
    if task == "reward":
        return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def lora_trainer(task, policy_path, reward_model_path, tmp_path, dataset, **overrides):
    settings = ranking_settings(tmp_path, **overrides)
    if task == "reward":
        args, trainer_class, path = RankingRewardConfig(**settings), RankingRewardTrainer, reward_model_path
    else:
        args, trainer_class, path = RankingDPOConfig(**settings), RankingDPOTrainer, policy_path
    return trainer_class(path, args=args, train_dataset=dataset, peft_config=lora(task))


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_lora_trains_saves_and_loads(policy_path, reward_model_path, rankings, tmp_path, task):
    trainer = lora_trainer(task, policy_path, reward_model_path, tmp_path, rankings, gradient_checkpointing=True)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer._packs
    for name, parameter in trainer.model.named_parameters():
        trained = "lora_" in name or "score.modules_to_save" in name or name == "tie_parameters.raw"
        assert torch.equal(start[name], parameter) != trained, name
    trainer.save_model()
    assert not any("tie" in name for name in torch_load_safetensors(tmp_path / "adapter_model.safetensors"))
    ranking_model, log_tie = tie_parameters(str(tmp_path))
    assert ranking_model == "davidson_luce" and torch.equal(log_tie, trainer.ties().detach())
    ids = torch.tensor([[9, 8, 7, 6, 5]])
    expected = trainer.model.eval()(ids).logits
    auto_class = AutoPeftModelForSequenceClassification if task == "reward" else AutoPeftModelForCausalLM
    model = auto_class.from_pretrained(str(tmp_path), **({"num_labels": 1} if task == "reward" else {}))
    torch.testing.assert_close(model.eval()(ids).logits, expected, atol=0, rtol=0)
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    auto_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    model, info = auto_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tie_parameters(str(tmp_path / "merged"))[1], log_tie)


def torch_load_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_a_folder_with_an_adapter_loads_as_trls_does(policy_path, reward_model_path, rankings, tmp_path, task):
    trainer = lora_trainer(task, policy_path, reward_model_path, tmp_path, rankings)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[9, 8, 7, 6, 5]])
    auto_class = AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM
    model = auto_class.from_pretrained(str(tmp_path))
    torch.testing.assert_close(model.eval()(ids).logits, trainer.model.eval()(ids).logits, atol=0, rtol=0)
    kind = {"reward": "text-classification", "dpo": "text-generation"}[task]
    assert pipeline(kind, model=str(tmp_path))("the film was")


# --- Resuming ---


def comparable(log_history):
    """Without what the clock says, and the count of tokens, which TRL starts anew as well."""
    left_out = ("num_tokens", "total_flos", "train_loss", "runtime", "per_second", "preparation_time")
    return [{k: v for k, v in logs.items() if not any(part in k for part in left_out)} for logs in log_history]


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("ranking_model", ["davidson_luce", "rao_kupper"])
def test_a_resumed_run_is_the_whole_run(
    policy_path, reward_model_path, tokenizer, tmp_path, task, use_peft, ranking_model
):
    def trainer(folder):
        overrides = {
            "ranking_model": ranking_model,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "per_device_train_batch_size": 2,
            "lr_scheduler_type": "linear",
        }
        dataset = Dataset.from_dict(make_rankings(6))
        if use_peft:
            return lora_trainer(task, policy_path, reward_model_path, tmp_path / folder, dataset, **overrides)
        return make(task, tokenizer, tmp_path / folder, dataset, **overrides)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert comparable(whole.state.log_history) == comparable(resumed.state.log_history)
    first, second = weights(whole.model), weights(resumed.model)
    assert first.keys() == second.keys() and "tie_parameters.raw" in first
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    states = [
        torch.load(tmp_path / folder / "checkpoint-4" / "optimizer.pt")["state"] for folder in ("whole", "resumed")
    ]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(first)
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items()), key


@pytest.mark.parametrize("use_peft", [False, True])
@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson"])
def test_the_best_model_comes_back_with_its_tie_parameters(
    reward_model_path, rankings, tmp_path, ranking_model, use_peft
):
    overrides = {
        "ranking_model": ranking_model,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_num_tokens",  # only rises, so the first checkpoint is the best
        "greater_is_better": False,
    }
    args = RankingRewardConfig(**ranking_settings(tmp_path, **overrides))
    trainer = RankingRewardTrainer(
        reward_model_path,
        args,
        train_dataset=rankings,
        eval_dataset=rankings,
        peft_config=lora("reward") if use_peft else None,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    _, best = tie_parameters(str(tmp_path / "checkpoint-1"))
    _, last = tie_parameters(str(tmp_path / "checkpoint-3"))
    assert torch.equal(trainer.ties().detach(), best.reshape(-1)) and not torch.equal(best, last)
    assert trainer.model.config.log_tie == best.reshape(-1).tolist()
    trainer.save_model(str(tmp_path / "final"))
    assert torch.equal(tie_parameters(str(tmp_path / "final"))[1], best)


# --- Metrics ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("ranking_model", ["davidson_luce", "davidson"])
def test_evaluation_is_over_all_rows(tokenizer, tmp_path, task, ranking_model):
    """Seven rows in batches of three: each metric by loops over all of them, no mean of means."""
    columns = make_rankings(7, seed=5)
    columns["ranks"][2] = [0] * len(columns["ranks"][2])  # a tau that is not defined
    log_tie = [-0.3, -0.9, -1.4] if ranking_model == "davidson_luce" else [-0.3]
    dataset = Dataset.from_dict(columns)
    overrides = {"ranking_model": ranking_model, "log_tie": log_tie, "per_device_eval_batch_size": 3}
    overrides |= {"beta": 2.0} if task == "dpo" else {}
    trainer = make(task, tokenizer, tmp_path, dataset, kwargs={"eval_dataset": dataset}, **overrides)
    metrics = trainer.evaluate()
    models = [trainer.model.eval(), getattr(trainer, "ref_model", None)]
    pairs, probabilities, taus, nlls, baselines, per_prompt = [], [], [], [], [], []
    for row in dataset:
        scores, ranks = plain_scores(task, models, tokenizer, row, beta=2.0).detach(), torch.tensor(row["ranks"])
        k = len(ranks)
        items = list(itertools.combinations(range(k), 2))
        own = [(scores[i] - scores[j], ranks[j] - ranks[i]) for i, j in items]
        pairs += own
        if ranking_model == "davidson":
            for gap, _ in own:
                parts = [math.exp(gap / 2), math.exp(-0.3), math.exp(-gap / 2)]
                probabilities.append([part / sum(parts) for part in parts])
        else:  # of two within the ranking, summed over the ranks of all
            orders = enumerated_davidson_luce(scores.tolist(), log_tie[: k - 1])
            for i, j in items:
                by_outcome = [
                    sum(p for order, p in orders.items() if (order[j] > order[i]) - (order[j] < order[i]) == sign)
                    for sign in (1, 0, -1)
                ]
                probabilities.append(by_outcome)
        strict = [(gap.sign() * order.sign()).item() for gap, order in own if order != 0]
        if strict:
            taus.append(sum(strict) / math.sqrt(len(strict) * len(own)))
        for values, where in ((scores, nlls), (torch.zeros(k), baselines)):
            where.append(ranking_nll(values[None], ranks[None], ranking_model, torch.tensor(log_tie)).item())
        per_prompt.append(nlls[-1] / (k - 1 if ranking_model == "davidson_luce" else len(own)))
    outcomes = [1 - int(order.sign()) for _, order in pairs]  # 0: the first is better, 1: a tie, 2: the second is
    hits = [
        (p.index(max(p)) == outcome, math.log(p[outcome])) for p, outcome in zip(probabilities, outcomes, strict=True)
    ]
    strict = [(gap * order.sign()).item() for gap, order in pairs if order != 0]
    expected = {
        "accuracy": sum(gap > 0 for gap in strict) / len(strict),
        "margin": sum(strict) / len(strict),
        "three_way_accuracy": sum(hit for hit, _ in hits) / len(hits),
        "pair_log_likelihood": sum(log_p for _, log_p in hits) / len(hits),
        "tie_rate": 1 - len(strict) / len(pairs),
        "predicted_tie_rate": sum(p[1] for p in probabilities) / len(pairs),
        "kendall_tau_b": sum(taus) / len(taus),
        "log_likelihood": -sum(nlls) / 7,
        "baseline_log_likelihood": -sum(baselines) / 7,
        "loss": sum(per_prompt) / 7,
    }
    assert len(taus) < 7 and 0.2 < expected["tie_rate"] < 0.8 and 0 < expected["accuracy"] < 1
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"} if task == "dpo" else {}
    for name, value in expected.items():
        assert metrics[f"eval_{names.get(name, name)}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_compute_metrics_gets_scores_and_ranks(tokenizer, rankings, tmp_path, task):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        scores, ranks = prediction.predictions
        return {"best_is_first": ((scores.argmax(axis=1) == 0) & (ranks[:, 0] == 1)).mean()}

    kwargs = {"compute_metrics": compute_metrics, "eval_dataset": rankings}
    trainer = make(task, tokenizer, tmp_path, rankings, kwargs=kwargs, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    scores, ranks = seen[0].predictions
    assert scores.shape == ranks.shape == (4, 4) and "eval_best_is_first" in metrics
    models = [trainer.model.eval(), getattr(trainer, "ref_model", None)]
    for b, row in enumerate(rankings):
        is_ranked = ranks_tensor(row) >= 0
        assert ranks[b][ranks[b] >= 0].tolist() == ranks_tensor(row)[is_ranked].tolist()
        expected = plain_scores(task, models, tokenizer, row)[is_ranked]
        torch.testing.assert_close(torch.tensor(scores[b][ranks[b] >= 0]), expected, atol=1e-5, rtol=1e-5)


# --- Data ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_a_stream_trains_like_the_dataset(tokenizer, rankings, tmp_path, task):
    trainers = []
    for dataset in (rankings, rankings.to_iterable_dataset()):
        trainer = make(task, tokenizer, tmp_path, dataset, optim="sgd", max_steps=3)  # batches of all four rows
        trainer.train()
        trainers.append(trainer)
    assert_equal_training(*trainers)
    torch.testing.assert_close(trainers[0].ties(), trainers[1].ties(), atol=1e-6, rtol=0)


def test_a_stream_evaluates_like_the_dataset(tokenizer, rankings, tmp_path):
    metrics = []
    for dataset in (rankings, rankings.to_iterable_dataset()):
        kwargs = {"eval_dataset": dataset}
        trainer = make("reward", tokenizer, tmp_path, rankings, kwargs=kwargs, per_device_eval_batch_size=3)
        metrics.append(trainer.evaluate())
    # `eval_loss` of a stream is a mean of batches' means, as everywhere in transformers
    for name in ("eval_log_likelihood", "eval_accuracy", "eval_tie_rate", "eval_kendall_tau_b"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5), name


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_evaluate_takes_datasets_as_they_are(tokenizer, rankings, tmp_path, task):
    parts = {"first": rankings.select(range(2)), "all": rankings}
    trainer = make(task, tokenizer, tmp_path, rankings, kwargs={"eval_dataset": parts})
    of_dict = trainer.evaluate()
    by_name = trainer.evaluate("first")
    new = trainer.evaluate(rankings.select(range(2)))
    assert of_dict["eval_first_loss"] == by_name["eval_loss"] == pytest.approx(new["eval_loss"], rel=1e-6)
    assert of_dict["eval_all_loss"] != pytest.approx(new["eval_loss"], rel=1e-3)
    new = trainer.evaluate({"held_out": rankings})
    assert new["eval_held_out_loss"] == pytest.approx(of_dict["eval_all_loss"], rel=1e-6)


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("prompt", ["explicit", "implicit"])
def test_a_tie_column_makes_rankings_of_pairs(tokenizer, tmp_path, task, prompt):
    pairs, _ = pairs_and_rankings()
    ties = [row % 4 == 0 for row in range(len(pairs))]
    rankings = {
        "prompt": pairs["prompt"],
        "completions": [[row["chosen"], row["rejected"]] for row in pairs],
        "ranks": [[1, 1] if tie else [1, 2] for tie in ties],
    }
    pairs = pairs.add_column("tie", ties)
    if prompt == "implicit":
        pairs = pairs.map(lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")})
        pairs = pairs.remove_columns("prompt")
    trainers = []
    for dataset in (pairs, Dataset.from_dict(rankings)):
        trainers.append(make(task, tokenizer, tmp_path, dataset, optim="sgd", learning_rate=0.3))
        trainers[-1].train()
    assert trainers[0].ties is not None
    assert_equal_training(*trainers)
    torch.testing.assert_close(trainers[0].ties(), trainers[1].ties(), atol=1e-6, rtol=0)


def test_unused_columns_may_stay(tokenizer, rankings, tmp_path):
    dataset = rankings.add_column("annotator", ["a", "b", "c", "d"])
    trainers = []
    for remove in (True, False):
        trainer = make("reward", tokenizer, tmp_path, dataset, remove_unused_columns=remove, optim="sgd")
        trainer.train()
        trainers.append(trainer)
    assert "annotator" in trainers[1].train_dataset.column_names
    assert_equal_training(*trainers)


def test_tokenized_rankings_are_taken_as_they_are(tokenizer, rankings, tmp_path):
    first = make("reward", tokenizer, tmp_path, rankings, optim="sgd")
    tokenized = first.train_dataset.select_columns(["group_ids", "ranks"])
    second = make("reward", tokenizer, tmp_path, tokenized, optim="sgd")
    first.train()
    second.train()
    assert_equal_training(first, second)
    assert second.train_dataset["group_ids"][0] == [
        token_ids(tokenizer, "the film was", c) for c in RANKINGS["completions"][0]
    ]


def chat_pairs():
    def turn(role, text):
        return [{"role": role, "content": text}]

    return Dataset.from_dict(
        {
            "prompt": [turn("user", prompt) for prompt in PROMPTS[:4]],
            "chosen": [turn("assistant", text) for text in ("good", "good great", "warm", "bright")],
            "rejected": [turn("assistant", text) for text in ("bad", "dull and slow", "sad", "good dull")],
        }
    )


def as_rankings(pairs):
    columns = [name for name in pairs.column_names if name not in ("chosen", "rejected")]
    rows = [{name: row[name] for name in columns} | {"completions": [row["chosen"], row["rejected"]]} for row in pairs]
    return Dataset.from_list([row | {"ranks": [1, 2]} for row in rows])


TOKENIZED = ["text", "chat", "chat_template_kwargs", "ends with eos", "prompt is no prefix"]


def tokenized_pairs(kind, tokenizer):
    if kind == "text":
        return tokenizer, pairs_and_rankings()[0]
    if kind == "ends with eos":
        pairs, _ = pairs_and_rankings()
        return tokenizer, pairs.map(lambda row: {"chosen": row["chosen"] + " <eos>"})
    if kind == "chat":
        return tokenizer, chat_pairs()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    if kind == "prompt is no prefix":  # as where a template opens a thought for the model alone
        tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'warm sad' }}{% endif %}"
        return tokenizer, chat_pairs()
    tokenizer.chat_template = "{{ mood }} " + tokenizer.chat_template
    return tokenizer, chat_pairs().add_column("chat_template_kwargs", [{"mood": m} for m in "sad warm a it".split()])


@pytest.mark.parametrize("kind", TOKENIZED)
def test_rankings_are_tokenized_as_trl_tokenizes_pairs(policy_path, tmp_path, kind):
    tokenizer, pairs = tokenized_pairs(kind, AutoTokenizer.from_pretrained(policy_path))
    rankings = as_rankings(pairs)
    theirs = make("reward", tokenizer, tmp_path, pairs, trainer_class=RewardTrainer).train_dataset
    ours = make("reward", tokenizer, tmp_path, rankings).train_dataset
    assert ours["group_ids"] == [[row["chosen_ids"], row["rejected_ids"]] for row in theirs]
    assert len(ours["group_ids"][0][0]) > 3
    theirs = make("dpo", tokenizer, tmp_path, pairs, trainer_class=DPOTrainer).train_dataset
    ours = make("dpo", tokenizer, tmp_path, rankings).train_dataset
    assert ours["prompt_ids"] == theirs["prompt_ids"] and len(ours["prompt_ids"][0]) > 1
    assert ours["completion_ids"] == [[row["chosen_ids"], row["rejected_ids"]] for row in theirs]


def test_dpo_truncates_as_trl_does(tokenizer, tmp_path):
    pairs, rankings = pairs_and_rankings()
    same = {"optim": "sgd", "learning_rate": 0.3, "max_length": 6, "max_steps": 3}
    trl = make("dpo", tokenizer, tmp_path, pairs, trainer_class=DPOTrainer, **same)
    ours = make("dpo", tokenizer, tmp_path, rankings, **same)
    assert 0 < len(ours.train_dataset) == len(trl.train_dataset) <= len(pairs)
    assert max(len(row["prompt_ids"]) + len(ids) for row in ours.train_dataset for ids in row["completion_ids"]) == 6
    trl.train()
    ours.train()
    assert_equal_training(ours, trl)


def test_reward_drops_what_trl_drops(tokenizer, tmp_path):
    pairs, rankings = pairs_and_rankings()
    trl = make("reward", tokenizer, tmp_path, pairs, trainer_class=RewardTrainer, max_length=6)
    ours = make("reward", tokenizer, tmp_path, rankings, max_length=6)
    assert 0 < len(ours.train_dataset) == len(trl.train_dataset) < len(pairs)
    for ids, row in zip(ours.train_dataset["group_ids"], trl.train_dataset, strict=True):
        assert sorted(ids) == sorted([row["chosen_ids"], row["rejected_ids"]])


# --- Model card ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize(
    "ranking_model, tie_name", [("davidson_luce", "delta_3"), ("rao_kupper", "theta"), ("plackett_luce_efron", None)]
)
def test_model_card(tokenizer, rankings, tmp_path, task, ranking_model, tie_name):
    overrides = {"ranking_model": ranking_model, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2}
    trainer = make(task, tokenizer, tmp_path, rankings, kwargs={"eval_dataset": rankings}, **overrides)
    trainer.train()
    card = ModelCard.load(tmp_path / "README.md")
    text = card.content
    likelihood = {"davidson_luce": "Davidson-Luce", "rao_kupper": "Rao-Kupper", "plackett_luce_efron": "Efron"}
    assert likelihood[ranking_model] in text and "2 optimizer steps on 4 rankings" in text
    assert (
        "None" not in text
        and "{{" not in text.split("```bibtex")[0]
        and str(tmp_path.parent.parent) + "/policy" not in text
    )
    assert f"| ranking_model | {ranking_model} |" in text
    assert card.data.library_name == "transformers" and "ranking" in card.data.tags
    assert card.data.pipeline_tag == {"reward": "text-classification", "dpo": "text-generation"}[task]
    last = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    if tie_name is None:
        assert "tie parameter" not in text
    else:
        value = last[f"tie/{tie_name}"]
        assert f"{tie_name} | {value:.4g} |" in text
    assert "| metric | training, step 2 | evaluation, step 2 |" in text
    for name in ("log_likelihood", "accuracy" if task == "reward" else "rewards/accuracies"):
        assert f"| {name} | {last[name]:.4g} | {last[f'eval_{name}']:.4g} |" in text


def test_the_cards_snippets_run(tokenizer, rankings, tmp_path):
    trainer = make("reward", tokenizer, tmp_path, rankings)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("tiny")
    snippets = ModelCard.load(tmp_path / "README.md").text.split("```python")[1:]
    assert len(snippets) == 2
    scope = {}
    for snippet in snippets:
        exec(snippet.split("```")[0].replace("print(", "shown = ("), scope)
    assert len(scope["shown"]) == 2 and all("score" in score for score in scope["shown"])
    # Davidson-Luce of two is Davidson: by hand
    weights = [math.exp((1.2 - 0.3) / 2), trainer.ties().exp()[0].item(), math.exp((0.3 - 1.2) / 2)]
    predicted = [scope[name].item() for name in ("win", "tie", "lose")]
    assert predicted == pytest.approx([w / sum(weights) for w in weights], rel=1e-5)


def test_the_card_of_a_checkpoint_has_its_tie_parameters(tokenizer, rankings, tmp_path):
    """They need not have been logged."""
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "no", "tie_learning_rate": 0.5}
    trainer = make("reward", tokenizer, tmp_path, rankings, ranking_model="davidson", **saving)
    start = trainer.ties().exp().item()
    trainer.train()
    nu = trainer.ties().exp().item()
    card = (tmp_path / "README.md").read_text()
    assert f"| tie/nu | {nu:.4g} |" in card and abs(nu - start) > 0.1
