"""Model cards: true at every moment, valid for the Hub, with snippets that run and curves that show what was logged."""

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import torch
from datasets import Dataset
from helpers import build_reward_model, count_good, make_rankings, ranking_settings, run_snippets, settings
from hub_server import HubServer, connect
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from matplotlib.image import imread
from peft import LoraConfig, PromptTuningConfig
from transformers import TrainerCallback
from trl import DPOTrainer, GRPOTrainer, RewardTrainer

from trl_ext import (
    PPOTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    predict_pair,
    tie_parameters,
    token_action_values,
    token_values,
)
from trl_ext.actor_critic.card import fenced
from trl_ext.algorithms import ALGORITHMS
from trl_ext.hub import model_card
from trl_ext.hub import record as training_record
from trl_ext.hub.curves import Panel, draw_training_curves, lines_of, running_mean
from trl_ext.hub.record import duration, evaluations, hardware, training_entries
from trl_ext.preference.card import PANELS


LORA = LoraConfig(r=4, target_modules="all-linear")
PREFERENCES = {
    "prompt": ["the film was", "it was a", "the actor", "but"],
    "chosen": [" good", " great film", " good and warm", " good"],
    "rejected": [" bad", " sad", " slow", " dull"],
}


def policy_trainer(algorithm, path, data, folder, kwargs=None, **overrides):
    config_class, trainer_class = ALGORITHMS[algorithm]
    rewards = (kwargs or {}).pop("reward_funcs", count_good)
    return trainer_class(path, rewards, config_class(**settings(folder, **overrides)), data, **kwargs or {})


def reward_trainer(model, data, folder, kwargs=None, **overrides):
    args = RankingRewardConfig(**ranking_settings(folder, **overrides))
    return RankingRewardTrainer(model, args, train_dataset=data, **kwargs or {})


def dpo_trainer(model, data, folder, kwargs=None, **overrides):
    args = RankingDPOConfig(**ranking_settings(folder, **overrides))
    return RankingDPOTrainer(model, args=args, train_dataset=data, **kwargs or {})


def finished(trainer):
    """Trained and saved, with its card."""
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def card_of(folder):
    return ModelCard.load(Path(folder) / "README.md")


@torch.no_grad()
def scores_of(trainer, texts):
    """Scores texts by a reward model as it is in memory."""
    inputs = [trainer.processing_class(text, return_tensors="pt") for text in texts]
    return [trainer.model.eval()(**row).logits.item() for row in inputs]


@pytest.fixture
def chat_rankings():
    columns = make_rankings(4)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in columns["prompt"]],
            "completions": [
                [[{"role": "assistant", "content": t}] for t in texts] for texts in columns["completions"]
            ],
            "ranks": columns["ranks"],
        }
    )


# --- Snippets. Every kind of adapter and critic is in test_adapter_matrix.py ---


@pytest.mark.parametrize(
    "algorithm, kwargs, overrides",
    [
        ("q_actor_critic", {}, {"q_rank": 4}),
        ("q_actor_critic", {"peft_config": LORA}, {"q_rank": 4, "critic": "adapter"}),
        ("nlpo", {}, {"critic": "separate", "min_tokens_to_keep": 2}),
        ("reinforce", {}, {"baseline": "value"}),
    ],
)
def test_a_policys_snippets_run(policy_path, prompts, tmp_path, algorithm, kwargs, overrides):
    trainer = finished(policy_trainer(algorithm, policy_path, prompts, tmp_path, dict(kwargs), **overrides))
    scope = run_snippets(tmp_path)
    assert len(scope["printed"]) == 1 and isinstance(scope["printed"][0], str)
    inputs = trainer.processing_class("Some text", return_tensors="pt")
    arguments = trainer.model.eval(), trainer.critic.eval(), inputs["input_ids"], inputs["attention_mask"]
    torch.testing.assert_close(scope["values"], token_values(*arguments))
    if algorithm == "q_actor_critic":
        torch.testing.assert_close(scope["action_values"], token_action_values(*arguments), equal_nan=True)
    else:
        assert "token_action_values" not in card_of(tmp_path).text


def test_without_a_critic_the_card_has_none(policy_path, chats, tmp_path):
    finished(policy_trainer("reinforce", policy_path, chats, tmp_path))
    assert len(run_snippets(tmp_path)["printed"]) == 1  # of a chat
    text = card_of(tmp_path).text
    assert '"role": "user"' in text and "load_critic" not in text and "without a critic" in text
    assert not re.search(r"\| (vf_coef|critic\w*) \|", text)


def test_a_tuned_prompt_is_loaded_but_its_values_are_not_read(policy_path, prompts, tmp_path):
    """`token_values` would not see the virtual tokens."""
    peft_config = PromptTuningConfig(num_virtual_tokens=2)
    finished(policy_trainer("a2c", policy_path, prompts, tmp_path, {"peft_config": peft_config}))
    assert len(run_snippets(tmp_path)["printed"]) == 1
    card = card_of(tmp_path)
    assert "an adapter (PROMPT_TUNING) for" in card.text and "load_critic" not in card.text
    assert "with a critic" in card.text and "lora" not in card.data.tags


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_reward_models_snippets_score_as_in_training(
    policy_path, rankings, chat_rankings, tmp_path, is_chat, is_adapter
):
    kwargs = {"peft_config": LORA} if is_adapter else {}
    trainer = finished(reward_trainer(policy_path, chat_rankings if is_chat else rankings, tmp_path, kwargs))
    scope = run_snippets(tmp_path)
    if is_chat:
        question, *answers = "Which animals sleep standing up?", "Horses do.", "No animal does."
        texts = [f"<|user|> {question} <|assistant|> {answer} <eos>" for answer in answers]
    else:
        texts = ["A prompt and one answer <eos>", "A prompt and another answer <eos>"]
    printed = [score["score"] for score in scope["printed"][0]]
    assert printed == pytest.approx(scores_of(trainer, texts), rel=1e-4, abs=1e-6)
    expected = predict_pair(torch.tensor(1.2), torch.tensor(0.3), *tie_parameters(trainer.model))
    torch.testing.assert_close((scope["win"], scope["tie"], scope["lose"]), expected)


@pytest.mark.parametrize("kwargs", [{}, {"peft_config": LORA}])
@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_of_plain_pairs_the_card_says_that_it_is_trls_training(policy_path, tmp_path, task, kwargs):
    make = {"reward": reward_trainer, "dpo": dpo_trainer}[task]
    trainer = finished(make(policy_path, Dataset.from_dict(PREFERENCES), tmp_path, kwargs))
    (printed,) = run_snippets(tmp_path)["printed"]
    if task == "reward":
        texts = ["A prompt and one answer <eos>", "A prompt and another answer <eos>"]
        assert [score["score"] for score in printed] == pytest.approx(scores_of(trainer, texts), rel=1e-4, abs=1e-6)
    text = card_of(tmp_path).text
    assert "on 4 pairs" in text and "those who chose" in text and "predict_pair" not in text
    assert "ranking_model" not in text and "None" not in text
    assert ("Your Language Model is Secretly a Reward Model" in text) == (task == "dpo")


def test_a_dpo_card_cites_both_papers(policy_path, rankings, tmp_path):
    finished(dpo_trainer(policy_path, rankings, tmp_path, {"peft_config": LORA}))
    assert len(run_snippets(tmp_path)["printed"]) == 1
    text = card_of(tmp_path).text
    assert "2305.18290" in text and "2409.17431" in text and "a LoRA adapter for" in text


# --- Metadata ---


def test_metadata_of_a_finetuned_model(policy_path, prompts, tmp_path):
    trainer = policy_trainer("a2c", policy_path, prompts, tmp_path)
    trainer.model.config._name_or_path = "user/base"
    trainer.create_model_card("tiny", "user/films", ["films"], license="apache-2.0", language=["en", "de"])
    data = card_of(tmp_path).data.to_dict()
    assert data == {
        "base_model": "user/base",
        "base_model_relation": "finetune",
        "datasets": "user/films",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "model_name": "tiny",
        "pipeline_tag": "text-generation",
        "tags": ["a2c", "films", "generated_from_trainer", "trl", "trl_ext"],
    }
    text = card_of(tmp_path).text
    assert "[user/base](https://huggingface.co/user/base)" in text
    assert "[user/films](https://huggingface.co/datasets/user/films)" in text


def test_metadata_of_an_adapter(policy_path, rankings, tmp_path):
    trainer = reward_trainer(policy_path, rankings, tmp_path / "named-so", {"peft_config": LORA})
    trainer.model.config._name_or_path = "user/base"
    trainer.create_model_card(tags="films")
    data = card_of(tmp_path / "named-so").data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("user/base", "adapter", "peft")
    assert {"lora", "transformers", "films", "ranking"} <= set(data.tags)
    assert data.model_name == "named-so" and data.pipeline_tag == "text-classification"
    assert data.license is None and data.eval_results is None


@pytest.mark.parametrize("name", ["/gone/by/now", "a/b/c", ".", "", "models--x"])
def test_what_is_no_repository_is_not_linked_to(policy_path, prompts, tmp_path, name):
    trainer = policy_trainer("a2c", policy_path, prompts, tmp_path)
    trainer.model.config._name_or_path = name
    trainer.create_model_card(dataset_name=str(tmp_path))
    card = card_of(tmp_path)
    assert "base_model" not in card.data.to_dict() and "base_model_relation" not in card.data.to_dict()
    assert card.data.datasets is None and "a model that was not loaded from the Hub" in card.text


def test_the_evaluation_is_in_the_model_index(policy_path, prompts, tmp_path):
    def short(completions, **kwargs):
        return [-len(text) / 100 for text in completions]

    held_out = {"easy": prompts, "hard": prompts.select(range(4))}
    kwargs = {"reward_funcs": [count_good, short], "eval_dataset": held_out}
    trainer = policy_trainer("ppo", policy_path, prompts, tmp_path, kwargs, eval_strategy="steps", eval_steps=2)
    finished(trainer)
    logged = {name: next(e for e in trainer.state.log_history if f"eval_{name}_runtime" in e) for name in held_out}
    data = card_of(tmp_path).data
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == tmp_path.name and results == data.eval_results and len(results) == 6
    for result in results:
        entry = logged[result.dataset_name]
        metrics = {
            f"mean reward ({result.dataset_name})": "eval_reward",
            f"mean reward of count_good alone ({result.dataset_name})": "eval_rewards/count_good/mean",
            f"mean reward of short alone ({result.dataset_name})": "eval_rewards/short/mean",
        }
        assert result.metric_value == entry[metrics[result.metric_name]]
        assert result.task_type == "text-generation" and result.metric_type == "mean_reward"
    assert {result.dataset_type for result in results} == {"easy", "hard"}
    values = [logged[name]["eval_reward"] for name in held_out]
    assert re.search(rf"\| reward \| \S+ \| {values[0]:.4g} \| {values[1]:.4g} \|", card_of(tmp_path).text)


def named(dataset, name):
    """As if it was loaded from the Hub's dataset of that name."""
    dataset = Dataset(dataset.data, split="test")
    dataset.info.dataset_name = name
    return dataset


@pytest.mark.parametrize("name, dataset_type, split", [("films", "user/films", "test"), ("other", "unknown", None)])
def test_an_evaluation_names_its_dataset_if_that_is_known(rankings, policy_path, tmp_path, name, dataset_type, split):
    kwargs = {"eval_dataset": named(rankings, name)}
    trainer = reward_trainer(policy_path, named(rankings, "films"), tmp_path, kwargs)
    trainer.train()
    measured = trainer.evaluate()
    trainer.create_model_card(dataset_name="user/films")
    results = {result.metric_name: result for result in card_of(tmp_path).data.eval_results}
    assert results["accuracy on pairs with a winner"] == EvalResult(
        task_type="text-classification",
        dataset_type=dataset_type,
        dataset_name="user/films" if name == "films" else "evaluation data",
        dataset_split=split,
        metric_type="accuracy",
        metric_name="accuracy on pairs with a winner",
        metric_value=measured["eval_accuracy"],
    )
    assert results["log-likelihood per ranking, nats"].metric_value == measured["eval_log_likelihood"]
    # Of what was only given to `evaluate`, nothing is known
    trainer.evaluate(named(rankings, "films"))
    trainer.create_model_card(dataset_name="user/films")
    assert {result.dataset_type for result in card_of(tmp_path).data.eval_results} == {"unknown"}


def test_only_what_was_measured_of_these_weights_is_claimed(policy_path, rankings, tmp_path):
    cards = Cards()
    overrides = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1}
    kwargs = {"eval_dataset": rankings, "callbacks": [cards]}
    reward_trainer(policy_path, rankings, tmp_path, kwargs, **overrides).train()
    _, second, third, _ = map(ModelCard, cards.texts)
    assert "| training, step 2 | evaluation, step 2 |" in second.text and len(second.data.eval_results) == 4
    assert "| training, step 3 | evaluation, step 2 |" in third.text and third.data.eval_results is None


class WorstLast(TrainerCallback):
    """Makes the evaluations of a training look as listed."""

    def __init__(self, *values):
        self.values = list(values)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = self.values.pop(0)


def test_of_the_best_weights_the_card_has_their_evaluation(policy_path, rankings, tmp_path):
    overrides = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    overrides |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    kwargs = {"eval_dataset": rankings, "callbacks": [WorstLast(3.0, 1.0, 2.0)]}
    trainer = finished(reward_trainer(policy_path, rankings, tmp_path, kwargs, **overrides))
    best = next(e for e in trainer.state.log_history if e["step"] == 2 and "eval_accuracy" in e)
    card = card_of(tmp_path)
    assert "The weights are those of step 2, the best by `loss`" in card.text and "evaluation, step 2 |" in card.text
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["log-likelihood per ranking, nats"] == best["eval_log_likelihood"]


# --- Before the end, and over resumes ---


class Cards(TrainerCallback):
    """Keeps each card that is there when a checkpoint has been saved."""

    def __init__(self):
        self.texts = []

    def on_save(self, args, state, control, **kwargs):
        self.texts.append((Path(args.output_dir) / "README.md").read_text())


@pytest.fixture
def ten_seconds_a_step(monkeypatch):
    ticks = iter(range(0, 10**6, 10))
    monkeypatch.setattr(training_record, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def test_the_card_of_a_checkpoint_is_true_of_it(policy_path, prompts, tmp_path, ten_seconds_a_step):
    cards = Cards()
    overrides = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = policy_trainer("a2c", policy_path, prompts, tmp_path, {"callbacks": [cards]}, **overrides)
    trainer.train()
    for step, text in enumerate(cards.texts, start=1):
        steps = "3 optimizer steps" if step == 3 else f"{step} of 3 planned optimizer steps"
        assert f"for {steps} on 8 prompts" in text and f"| time | {10 * step}.0 s |" in text
        tokens = next(entry["num_tokens"] for entry in trainer.state.log_history if entry["step"] == step)
        assert f"| tokens seen | {tokens:,.0f} |" in text
    assert len(cards.texts) == 3
    assert "training_curves.png" not in cards.texts[0] and "training_curves.png" in cards.texts[1]  # a point, two


@pytest.mark.parametrize("restores_callbacks", [False, True])
def test_time_goes_on_where_training_is_resumed(
    policy_path, rankings, tmp_path, ten_seconds_a_step, restores_callbacks
):
    overrides = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    overrides["restore_callback_states_from_checkpoint"] = restores_callbacks

    def resumed():
        trainer = reward_trainer(policy_path, rankings, tmp_path, **overrides)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        trainer.create_model_card()
        return card_of(tmp_path).text

    reward_trainer(policy_path, rankings, tmp_path, **overrides).train()
    assert "| time | 50.0 s |" in resumed()  # 20 at the checkpoint, 20 of two steps, 10 until training had ended
    # A checkpoint that does not know: TRL's, or an older one
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["TrainingClock"]
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    assert "| time | 30.0 s since step 2 |" in resumed()


def test_training_anew_starts_the_clock_anew(policy_path, rankings, tmp_path, ten_seconds_a_step):
    trainer = reward_trainer(policy_path, rankings, tmp_path)
    trainer.train()
    finished(trainer)
    assert "| time | 30.0 s |" in card_of(tmp_path).text


def test_before_training_there_is_nothing_to_report(policy_path, prompts, tmp_path):
    policy_trainer("ppo", policy_path, prompts, tmp_path).create_model_card()
    text = card_of(tmp_path).text
    assert "for 0 optimizer steps on 8 prompts" in text and "None were logged" in text
    assert "| time |" not in text and "tokens seen" not in text
    assert not (tmp_path / "training_curves.png").exists()
    assert "| device | CPU with " in text and "| processes | 1 |" in text


@pytest.mark.parametrize(
    "seconds, words",
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (119.6, "2 min 0 s"), (3599.7, "1 h 0 min"), (9000, "2 h 30 min")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_hardware_of_gpus(monkeypatch):
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=device) for device in [*gpus, *gpus]])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert hardware(model, num_processes=4) == {
        "processes": "4",
        "device of the main process": "2 x NVIDIA H200",
        "peak GPU memory of the main process": "6.0 GiB",
    }


# --- Nothing in it stops a training ---


def test_streams(policy_path, rankings, prompts, tmp_path):
    stream = prompts.to_iterable_dataset()
    finished(policy_trainer("a2c", policy_path, stream, tmp_path / "policy"))
    assert "on a stream of prompts" in card_of(tmp_path / "policy").text
    stream = rankings.to_iterable_dataset()
    trainer = reward_trainer(policy_path, stream, tmp_path / "reward", {"eval_dataset": stream})
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(dataset_name="user/films")
    card = card_of(tmp_path / "reward")
    assert "on a stream of rankings" in card.text and card.data.eval_results[0].dataset_type == "unknown"


def test_a_model_in_memory_without_a_training_set(tokenizer, rankings, tmp_path):
    trainer = reward_trainer(build_reward_model(tokenizer), rankings, tmp_path, {"processing_class": tokenizer})
    trainer.train_dataset = None
    trainer.create_model_card()
    text = card_of(tmp_path).text
    assert "for 0 optimizer steps." in text and "stream" not in text and "None" not in text.split("## Use")[0]


def test_names_that_mean_something_in_markdown(policy_path, prompts, tmp_path):
    reward = lambda completions, **kwargs: [0.5] * len(completions)  # noqa: E731
    other = lambda completions, **kwargs: [None] * len(completions)  # noqa: E731
    other.__name__ = "a|b"
    kwargs = {"reward_funcs": [reward, other]}
    finished(policy_trainer("a2c", policy_path, prompts, tmp_path, kwargs, critic_model_name_or_path=None))
    text = card_of(tmp_path).text
    assert "| rewards/&lt;lambda>/mean | 0.5 |" in text and "`<lambda>` + `a|b`" in text


def test_values_that_are_no_numbers(policy_path, rankings, tmp_path):
    trainer = reward_trainer(policy_path, rankings, tmp_path, {"eval_dataset": rankings})
    trainer.train()
    trainer.evaluate()
    for entry in trainer.state.log_history:
        entry |= {"margin": math.inf, "loss": math.nan, "eval_accuracy": None, "eval_log_likelihood": math.nan}
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert "| margin | inf |" in card.text and "nan" not in str(card.data.to_dict()["model-index"])
    assert "log-likelihood per ranking, nats" not in {result.metric_name for result in card.data.eval_results}


def test_without_matplotlib_there_is_no_picture_but_a_hint(policy_path, rankings, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    finished(reward_trainer(policy_path, rankings, tmp_path))
    assert "training_curves.png" not in card_of(tmp_path).text and not (tmp_path / "training_curves.png").exists()
    assert "pip install matplotlib" in caplog.text


def test_not_installed_as_a_package(policy_path, prompts, tmp_path, monkeypatch):
    def version(package):
        raise model_card.PackageNotFoundError(package)

    monkeypatch.setattr(model_card, "version", version)
    policy_trainer("a2c", policy_path, prompts, tmp_path).create_model_card()
    assert "- trl_ext (not installed as a package)" in card_of(tmp_path).text


def test_peft_may_write_over_it(policy_path, prompts, tmp_path):
    """`save_pretrained` of an adapter edits the card that is there."""
    trainer = finished(policy_trainer("a2c", policy_path, prompts, tmp_path, {"peft_config": LORA}))
    before = card_of(tmp_path).text
    trainer.save_model()
    assert card_of(tmp_path).text.strip() == before.strip()


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RewardTrainer, DPOTrainer])
def test_trls_arguments_come_first(trainer_class, policy_path, prompts, rankings, tmp_path):
    make = {GRPOTrainer: PPOTrainer, RewardTrainer: RankingRewardTrainer, DPOTrainer: RankingDPOTrainer}
    names = trainer_class.create_model_card.__code__.co_varnames[:4]
    assert make[trainer_class].create_model_card.__code__.co_varnames[:4] == names


# --- What it says ---


def test_completions_are_shown_only_where_they_are_logged(policy_path, prompts, tmp_path):
    trainer = finished(policy_trainer("a2c", policy_path, prompts, tmp_path))
    text = card_of(tmp_path).text
    assert "## Examples" not in text and not any(prompt in text for prompt in prompts["prompt"] if " " in prompt)
    trainer = finished(policy_trainer("a2c", policy_path, prompts, tmp_path, log_completions=True))
    blocks = card_of(tmp_path).text.split("```text\n")[1:]
    shown = [block.split("\n```")[0] for block in blocks]
    logged = list(zip(trainer._logs["prompt"], trainer._logs["completion"], strict=True))[-3:]
    assert shown == [text for pair in logged for text in pair]
    rewards = list(trainer._logs["rewards"]["count_good"])[-3:]
    assert [f"`count_good` {reward:.3g}:" in block for reward, block in zip(rewards, blocks[::2], strict=True)] == [
        True
    ] * 3


def test_chats_are_shown_line_by_line(policy_path, chats, tmp_path):
    finished(policy_trainer("a2c", policy_path, chats, tmp_path, log_completions=True, max_completion_length=40))
    blocks = card_of(tmp_path).text.split("```text\n")[1:]
    assert blocks[0].startswith("user: ") and blocks[1].startswith("assistant: ")


def test_fences_hold_what_is_in_them():
    assert fenced("a ```` b") == "`````text\na ```` b\n`````" and fenced("`x`").startswith("```text\n")


def test_tracked_runs_are_linked_to(policy_path, prompts, tmp_path, monkeypatch):
    wandb = SimpleNamespace(run=SimpleNamespace(url="https://wandb.example/run"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(model_card, "is_wandb_available", lambda: True)
    monkeypatch.setattr(model_card, "get_trackio_space_url", lambda: "https://trackio.example?runs=a")
    monkeypatch.setattr(model_card, "get_comet_experiment_url", lambda: None)
    trainer = policy_trainer("a2c", policy_path, prompts, tmp_path)
    trainer.create_model_card(tags=["trackio:https://old.example"])
    card = card_of(tmp_path)
    assert re.search(r"\[!\[Visualize in Weights & Biases\]\(\S+\)\]\(https://wandb.example/run\)\n", card.text)
    assert "](https://trackio.example?runs=a)" in card.text and "Comet" not in card.text
    assert [tag for tag in card.data.tags if tag.startswith("trackio")] == ["trackio:https://trackio.example?runs=a"]
    wandb.run = None  # or offline, where a run has no address
    trainer.create_model_card()
    assert "Biases" not in card_of(tmp_path).text


@pytest.mark.parametrize("algorithm", ["a2c", "ppo", "nlpo", "q_actor_critic", "reinforce"])
def test_citations_are_bibtex(policy_path, prompts, tmp_path, algorithm):
    overrides = {"min_tokens_to_keep": 2} if algorithm == "nlpo" else {}
    policy_trainer(algorithm, policy_path, prompts, tmp_path, **overrides).create_model_card()
    entries = "".join(block.split("```")[0] for block in card_of(tmp_path).text.split("```bibtex\n")[1:])
    keys = []
    for entry in re.split(r"\n(?=@)", entries.strip()):
        kind, key, fields = re.fullmatch(r"@(\w+)\{(\w+),\n(.*)\n\}\s*", entry, re.DOTALL).groups()
        keys.append(key)
        for field in fields.split("\n"):
            assert re.fullmatch(r"\s+\w+\s*= (\d+|\{.*\}),", field), field
            assert field.count("{") == field.count("}")
        assert kind in ("article", "inproceedings", "software") and {"title", "author"} <= set(
            re.findall(r"(\w+) +=", fields)
        )
    assert len(keys) == len(set(keys)) == 3 and keys[1:] == ["vonwerra2020trl", "trl_ext"]


def test_a_pushed_card_names_its_repository_and_brings_its_picture(policy_path, rankings, tmp_path, monkeypatch):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path)
        folder = tmp_path / "out"
        overrides = {"push_to_hub": True, "hub_model_id": "my-reward", "max_steps": 2}
        trainer = reward_trainer(policy_path, rankings, folder, **overrides)
        trainer.train()
        trainer.push_to_hub(dataset_name="user/films", license="mit", language="en")
        files = server.repos["model", "user/my-reward"].at().files
        card = ModelCard(files["README.md"].content.decode())
        assert 'tie_parameters("user/my-reward")' in card.text and str(folder) not in card.text
        assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", "user/films")
        assert files["training_curves.png"].content.startswith(b"\x89PNG")


# --- Evaluations and curves, from what was logged ---


HISTORY = [
    {"loss": 1.0, "step": 1},
    {"eval_loss": 0.9, "eval_runtime": 1.0, "step": 1},
    {"loss": 0.8, "step": 2},
    {"eval_loss": 0.7, "eval_runtime": 1.0, "step": 2},
    {"train_runtime": 5.0, "train_loss": 0.9, "step": 2},
    {"eval_loss": 0.6, "eval_runtime": 1.0, "step": 2},
    {"test_loss": 0.5, "eval_accuracy": 0.1, "test_runtime": 1.0, "step": 2},
]


def test_evaluations_are_told_from_training():
    assert training_entries(HISTORY) == [HISTORY[0], HISTORY[2]]
    assert [entry["loss"] for entry in evaluations(HISTORY, [])[""]] == [0.9, 0.7, 0.6]
    assert [entry["loss"] for entry in evaluations(HISTORY, [], best_step=1)[""]] == [0.9, 0.6]
    assert evaluations([HISTORY[0]], []) == {}


def test_evaluations_of_several_datasets():
    history = [
        {"eval_a_loss": 1.0, "eval_a_runtime": 1.0, "eval_accuracy": 0.5, "step": 3},
        {"eval_a_b_loss": 2.0, "eval_a_b_runtime": 1.0, "eval_accuracy": 0.6, "step": 3},
    ]
    found = evaluations(history, ["a", "a_b"])
    assert {name: (e[0]["loss"], e[0]["accuracy"]) for name, e in found.items()} == {
        "a": (1.0, 0.5),
        "a_b": (2.0, 0.6),
    }


def test_lines_are_what_was_logged():
    runs = {
        "training": [{"step": 1, "x": 1.0}, {"step": 2, "x": math.nan}, {"step": 3, "x": 3, "y": 5.0}],
        "evaluation": [{"step": 2, "x": 2.0, "y": None}],
    }
    lines = lines_of(Panel("X", "", "x", "y"), runs)
    assert [(line.run, line.is_dotted, line.steps, line.values) for line in lines] == [
        (0, False, [1, 3], [1.0, 3]),
        (1, False, [2], [2.0]),
        (0, True, [3], [5.0]),
    ]
    assert lines_of(Panel("Y", "", "y"), runs) == []  # a point is no curve
    assert lines_of(Panel("Z", "", "z", "x"), runs) == []


def test_running_mean():
    assert running_mean([1, 2, 6, 7], window=3) == pytest.approx([1.5, 3, 5, 6.5])
    assert running_mean([1, 2], window=1) == pytest.approx([1, 2])


@pytest.mark.parametrize("num_points", [0, 1, 2, 500])
def test_curves_of_short_and_long_trainings(tmp_path, num_points, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # a setting that needs what is not there
    settings_before = dict(matplotlib.rcParams)
    entries = [{"step": i, "loss": math.sin(i), "accuracy": i / 500} for i in range(num_points)]
    is_drawn = draw_training_curves({"training": entries, "evaluation": entries[:1]}, PANELS, tmp_path)
    assert is_drawn == (tmp_path / "training_curves.png").exists() == (num_points > 1)
    assert dict(matplotlib.rcParams) == settings_before
    if is_drawn:
        picture = imread(tmp_path / "training_curves.png")
        assert picture.shape[1] == pytest.approx(2 * 3.3 * 150, abs=2)  # two panels beside each other
        blue = (abs(picture[..., :3] - [0x1F / 255, 0x6F / 255, 0xB4 / 255]).max(axis=-1) < 0.02).any(axis=0)
        middle = len(blue) // 2
        assert blue[:middle].any() and blue[middle:].any()
