"""
Teach a tiny language model to write positive film reviews, no matter how badly they begin.

    accelerate launch recipes/quickstart.py

runs offline on two CPU cores in under five minutes and does the whole of RLHF, from nothing:

1. writes a small corpus of film reviews (a grammar of its own; no download),
2. trains a tokenizer and a language model on it, with `trl.SFTTrainer`,
3. samples four continuations for each of many openings and has a judge rank them, with ties,
4. trains a reward model on the strict pairs of those rankings, with `trl.RewardTrainer`,
5. improves the language model against that reward model, with `trl_ext.PPOTrainer`,
6. shows completions of held-out negative openings before and after, and how good they are.

The judge stands for the human: it ranks the samples of step 3 and says in step 6 whether the policy got better; what
the policy is trained on is only the reward model. With your own reviews the judge is learned as well:

    accelerate launch recipes/quickstart.py --reviews reviews.jsonl.gz

The file holds JSON lines or CSV with columns `text` and `label` (1 positive, 0 negative), and `split` if you like:
rows with "test" are held out. See `quickstart_data.py`.
"""

import argparse
import os
import random
import sys

import torch
from accelerate import PartialState
from datasets import Dataset
from quickstart_data import Task, grammar_task, reviews_task
from quickstart_judges import ranking_string, strict_pairs
from quickstart_report import StageBar, measure, plot_curves, print_completions, print_table, quiet, sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ProgressCallback,
    set_seed,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from trl_ext import PPOConfig, PPOTrainer


NUM_RANKED = 4  # continuations per ranking
EPOCHS, MINIBATCHES, MINIBATCH_SIZE = 4, 2, 64  # of PPO, for each rollout


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/quickstart", help="where models, cards and curves go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus, of the models and of sampling")
    parser.add_argument("--reviews", metavar="FILE", help="your own reviews: .jsonl or .csv, may be gzipped")
    parser.add_argument("--corpus_size", type=int, metavar="N", help="how many reviews the models learn from")
    parser.add_argument("--rollouts", type=int, metavar="N", help="how many batches PPO samples and learns from")
    return parser.parse_args()


def common_settings(output_dir: str, seed: int) -> dict:
    """What all three trainers are told."""
    return {
        "output_dir": output_dir,
        "seed": seed,
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,  # the models are tiny: time is what is short
        "save_strategy": "no",
        "report_to": "none",
    }


def finish(trainer, bar: StageBar, model_name: str) -> None:
    """Train with our progress bar, then leave the model with its card."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(bar)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name=model_name)
    trainer.accelerator.wait_for_everyone()


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. A word and the space before it are one piece, so prompt + completion tokenizes as it was made."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def train_language_model(task: Task, path: str, seed: int) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(task.texts, task.vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=task.hidden_size,
        intermediate_size=2 * task.hidden_size,
        num_hidden_layers=task.num_layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": task.texts}),
        args=SFTConfig(
            num_train_epochs=task.sft_epochs,
            per_device_train_batch_size=32,
            learning_rate=3e-3,  # it starts from random weights
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
    """Four continuations of each opening, as the language model writes them, and the judge's ranking of the four."""
    model = AutoModelForCausalLM.from_pretrained(sft_path)
    prompts = task.train_prompts[: task.ranked_prompts]
    rankings = []
    for start in range(0, len(prompts), 64):
        batch = [prompt for prompt in prompts[start : start + 64] for _ in range(NUM_RANKED)]
        completions = sample(model, tokenizer, batch, task.max_completion_length).completions
        for i in range(0, len(batch), NUM_RANKED):
            four = completions[i : i + NUM_RANKED]
            rankings.append({"prompt": batch[i], "completions": four, "ranks": task.judge.rank(four)})
    return rankings


def preference_pairs(rankings: list[dict], tokenizer) -> Dataset:
    """
    The strict pairs of all rankings. They are tokenized here, without the end-of-sequence token that `RewardTrainer`
    would add: the PPO trainer shows prompt and completion to the reward model without it, too.
    """
    rows = []
    for ranking in rankings:
        texts = [ranking["prompt"] + completion for completion in ranking["completions"]]
        ids = tokenizer(texts)["input_ids"]
        rows += [{"chosen_ids": ids[i], "rejected_ids": ids[j]} for i, j in strict_pairs(ranking["ranks"])]
    return Dataset.from_list(rows)


def train_reward_model(rankings: list[dict], sft_path: str, tokenizer, path: str, seed: int) -> float:
    """Start from the language model's trunk; return the share of held-out pairs that it orders as the judge does."""
    num_held_out = len(rankings) // 8
    trainer = RewardTrainer(
        model=sft_path,
        processing_class=tokenizer,
        train_dataset=preference_pairs(rankings[num_held_out:], tokenizer),
        eval_dataset=preference_pairs(rankings[:num_held_out], tokenizer),
        args=RewardConfig(
            num_train_epochs=2,
            per_device_train_batch_size=32,
            learning_rate=5e-4,
            center_rewards_coefficient=0.01,  # only differences are learned; this keeps the rewards around 0
            logging_steps=10,
            **common_settings(path, seed),
        ),
    )
    finish(trainer, StageBar("Reward model", loss="loss", accuracy="accuracy"), "A reward model of film reviews")
    return trainer.evaluate()["eval_accuracy"]


def train_policy(task: Task, sft_path: str, reward_path: str, tokenizer, path: str, seed: int) -> PPOTrainer:
    def judge(completions, **kwargs):
        return task.judge.score(completions)

    trainer = PPOTrainer(
        model=sft_path,  # and the reference
        reward_funcs=[reward_path, judge],
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": task.train_prompts}),
        args=PPOConfig(
            reward_weights=[1.0, 0.0],  # the judge is only watched, for the curves
            max_steps=task.rollouts * EPOCHS * MINIBATCHES,
            num_iterations=EPOCHS,
            steps_per_generation=MINIBATCHES,
            per_device_train_batch_size=MINIBATCH_SIZE,
            max_completion_length=task.max_completion_length,
            missing_eos_penalty=1.0,  # a review should come to its end
            kl_in_reward=0.1,
            learning_rate=3e-4,  # large, for the model is tiny
            critic_learning_rate=3e-3,
            warmup_steps=10,
            logging_steps=EPOCHS * MINIBATCHES,  # one entry per rollout
            **common_settings(path, seed),
        ),
    )
    bar = StageBar("PPO", reward="rewards/reward_model/mean", judge="rewards/judge/mean", kl="kl/k1")
    finish(trainer, bar, "A policy that writes positive film reviews")
    return trainer


def compare(task: Task, sft_path: str, reward_path: str, policy_path: str, tokenizer, seed: int):
    """Sample the same held-out openings from the language model before and after, and measure both."""
    sft = AutoModelForCausalLM.from_pretrained(sft_path).eval()
    policy = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward_path)
    columns = []
    for model in (sft, policy):
        set_seed(seed)
        samples = sample(model, tokenizer, task.test_prompts, task.max_completion_length)
        columns.append((samples, measure(model, sft, reward_model, tokenizer, task.judge, samples)))
    return columns


def main() -> None:
    args = parse_args()
    quiet()
    state = PartialState()
    if not torch.cuda.is_available():  # `accelerate launch` leaves each process one thread
        torch.set_num_threads(max(1, os.cpu_count() // state.num_processes))
    say = print if state.is_main_process else lambda *_: None
    sft_path, reward_path, policy_path = (
        os.path.join(args.output_dir, name) for name in ("sft", "reward_model", "policy")
    )

    set_seed(args.seed)
    try:
        if args.reviews is None:
            task = grammar_task(args.corpus_size, args.rollouts, args.seed)
        else:
            task = reviews_task(args.reviews, args.corpus_size, args.rollouts, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    say(f"[1/6] Reviews: {task.source}")
    say(f"      seed {args.seed}; e.g. {random.choice(task.texts)!r}")
    say(f"      judge: {task.judge.description}")

    say("[2/6] Language model: a tokenizer and a small Llama learn to write such reviews")
    tokenizer = train_language_model(task, sft_path, args.seed)

    say(f"[3/6] Rankings: {NUM_RANKED} continuations of each opening, ranked by the judge")
    rankings = rank_samples(task, sft_path, tokenizer)
    say(f"      e.g. {rankings[0]['prompt']} ...   {ranking_string(rankings[0]['ranks'])}")

    say("[4/6] Reward model: learns the strict pairs of these rankings")
    accuracy = train_reward_model(rankings, sft_path, tokenizer, reward_path, args.seed)
    say(f"      orders {accuracy:.1%} of held-out pairs as the judge does")

    say("[5/6] PPO: the language model learns to please the reward model")
    trainer = train_policy(task, sft_path, reward_path, tokenizer, policy_path, args.seed)

    say(f"[6/6] Before and after, on {len(task.test_prompts)} held-out negative openings")
    (samples_before, before), (samples_after, after) = compare(
        task, sft_path, reward_path, policy_path, tokenizer, args.seed
    )
    if state.is_main_process:
        print_completions(task.judge, samples_before, samples_after, count=5)
        print()
        print_table(before, after)
        curves = os.path.join(args.output_dir, "curves.png")
        plot_curves(trainer.state.log_history, "curves", curves)


if __name__ == "__main__":
    main()
