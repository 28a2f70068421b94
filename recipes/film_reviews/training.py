"""The trainings of the quickstart: language model, rankings by the judge, reward model and policy."""

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from shared.progress import StageBar, finish
from trl_ext import PPOConfig, PPOTrainer, RankingRewardConfig, RankingRewardTrainer

from .measures import load
from .models import small_llama, train_tokenizer
from .samples import sample
from .tasks import Task


NUM_RANKED = 4  # continuations per ranking
EPOCHS, MINIBATCHES, MINIBATCH_SIZE = 4, 2, 64  # of PPO, for each rollout


def common_settings(output_dir: str, seed: int) -> dict:
    """Returns the arguments of all three trainers."""
    return {
        "output_dir": output_dir,
        "seed": seed,
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "activation_checkpointing": False,  # the models are tiny: time is what is short
        "save_strategy": "no",
        "report_to": "none",
    }


def train_language_model(task: Task, path: str, seed: int) -> PreTrainedTokenizerBase:
    """Trains a tokenizer and a small Llama on the reviews, leaves both in `path`, and returns the tokenizer."""
    tokenizer = train_tokenizer(task.texts, task.vocab_size)
    # The default initializer_range, 0.02, is for wider models; this small one would start slowly
    config = small_llama(tokenizer, task.hidden_size, task.num_layers, initializer_range=0.06)
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": task.texts}),
        args=SFTConfig(
            num_train_epochs=task.sft_epochs,
            per_device_train_batch_size=16,
            train_sampling_strategy="group_by_length",  # less padding
            learning_rate=4e-3,  # it starts from random weights
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_length=128,
            logging_steps=10,
            **common_settings(path, seed),
        ),
    )
    finish(trainer, StageBar("SFT", loss="loss"), "A language model of film reviews")
    return tokenizer


def rank_samples(task: Task, sft_path: str, tokenizer) -> list[dict]:
    """Samples four continuations of each opening from the language model, and has the judge rank the four."""
    model = load(AutoModelForCausalLM, sft_path)
    prompts = task.train_prompts[: task.ranked_prompts]
    rankings = []
    for start in tqdm(range(0, len(prompts), 64), desc="      Rankings", disable=not PartialState().is_main_process):
        batch = [prompt for prompt in prompts[start : start + 64] for _ in range(NUM_RANKED)]
        completions = sample(model, tokenizer, batch, task.max_completion_length, task.temperature).completions
        for i in range(0, len(batch), NUM_RANKED):
            four = completions[i : i + NUM_RANKED]
            rankings.append({"prompt": batch[i], "completions": four, "ranks": task.judge.rank(four)})
    # Each process draws its own samples; all go on with those of the first
    return broadcast_object_list([rankings])[0]


def train_reward_model(task: Task, rankings: list[dict], paths: dict[str, str], tokenizer, seed: int) -> float:
    """
    Trains the reward model, and returns the share of held-out pairs with a winner that it orders as the judge does.

    One usually starts from the language model's weights. Ours is so small that what it learned about the next word is
    in the way: a single layer from random weights, which can only weigh words, gets more of the held-out pairs right.
    """
    num_held_out = len(rankings) // 8
    set_seed(seed)
    trainer = RankingRewardTrainer(
        model=LlamaForSequenceClassification(small_llama(tokenizer, 64, 1, num_labels=1)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rankings[num_held_out:]),
        eval_dataset=Dataset.from_list(rankings[:num_held_out]),
        args=RankingRewardConfig(
            bare_texts=True,  # for `tests/benchmarks/compare.py`, where TRL's own trainers ask it, too
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            warmup_steps=20,
            center_rewards_coefficient=0.01,  # only differences are learned; this keeps the rewards around 0
            logging_steps=10,
            **common_settings(paths["reward_model"], seed),
        ),
    )
    finish(trainer, StageBar("Reward model", loss="loss", accuracy="accuracy"), "A reward model of film reviews")
    return trainer.evaluate()["eval_accuracy"]


def train_policy(task: Task, paths: dict[str, str], tokenizer, seed: int) -> PPOTrainer:
    """Trains the language model by PPO against the reward model; the critic is a head on its trunk."""

    def judge(completions, **kwargs):
        return task.judge.score(completions)

    trainer = PPOTrainer(
        model=paths["sft"],  # and the reference
        reward_funcs=[paths["reward_model"], judge],
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": task.train_prompts}),
        args=PPOConfig(
            reward_weights=[1.0, 0.0],  # the judge is only watched, for the curves
            max_steps=task.rollouts * EPOCHS * MINIBATCHES,
            num_iterations=EPOCHS,
            steps_per_generation=MINIBATCHES,
            per_device_train_batch_size=MINIBATCH_SIZE,
            max_completion_length=task.max_completion_length,
            temperature=task.temperature,
            missing_eos_penalty=1.0,  # a review should come to its end
            kl_in_reward=task.kl_in_reward,
            learning_rate=3e-4,  # large, for the model is tiny
            critic_detach=False,  # so small a trunk has to learn what the critic needs to know
            warmup_steps=10,
            logging_steps=EPOCHS * MINIBATCHES,  # one entry per rollout
            **common_settings(paths["policy"], seed),
        ),
    )
    bar = StageBar("PPO", reward="rewards/reward_model/mean", judge="rewards/judge/mean", kl="kl/k1")
    finish(trainer, bar, "A policy that writes positive film reviews")
    return trainer
