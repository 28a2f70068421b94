"""
Teach a tiny language model to write positive film reviews, no matter how badly they begin.

    accelerate launch recipes/quickstart.py

runs offline on two CPU cores in under five minutes and does the whole of RLHF, from nothing:

1. writes a small corpus of film reviews (a grammar of its own; no download),
2. trains a tokenizer and a language model on it, with `trl.SFTTrainer`,
3. samples four continuations for each of many openings and has a judge rank them, with ties,
4. trains a reward model on those rankings, with `trl_ext.RankingRewardTrainer`,
5. improves the language model against that reward model, with `trl_ext.PPOTrainer`,
6. shows completions of held-out negative openings before and after, and how good they are.

The judge stands for the human: it ranks the samples of step 3 and says in step 6 whether the policy got better; what
the policy is trained on is only the reward model. With your own reviews the judge is learned as well:

    accelerate launch recipes/quickstart.py --reviews reviews.jsonl.gz

The file holds JSON lines or CSV with columns `text` and `label` (1 positive, 0 negative), and `split` if you like:
rows with "test" are held out. See `quickstart_data.py`.
"""

import argparse
import sys
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from quickstart_data import Task, grammar_task, reviews_task, small_llama, train_tokenizer
from quickstart_report import (
    StageBar,
    plot_curves,
    print_completions,
    print_last_words,
    print_ranking,
    print_table,
    quiet,
)
from quickstart_sampling import compare, load, sample
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from trl_ext import PPOConfig, PPOTrainer, RankingRewardConfig, RankingRewardTrainer


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
        "dataloader_pin_memory": torch.cuda.is_available(),
        "activation_checkpointing": False,  # the models are tiny: time is what is short
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


def train_language_model(task: Task, path: str, seed: int) -> PreTrainedTokenizerBase:
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
    """Four continuations of each opening, as the language model writes them, and the judge's ranking of the four."""
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
    Return the share of held-out pairs with a winner that the reward model orders as the judge does.

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
            bare_texts=True,  # for `compare.py`, where TRL's own trainers ask it, too
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
            critic_learning_rate=1e-2,  # this and the next: the critic has only some dozen rollouts to learn from
            vf_coef=0.5,
            warmup_steps=10,
            logging_steps=EPOCHS * MINIBATCHES,  # one entry per rollout
            **common_settings(paths["policy"], seed),
        ),
    )
    bar = StageBar("PPO", reward="rewards/reward_model/mean", judge="rewards/judge/mean", kl="kl/k1")
    finish(trainer, bar, "A policy that writes positive film reviews")
    return trainer


def get_task(args: argparse.Namespace) -> Task:
    try:
        if args.reviews is None:
            return grammar_task(args.corpus_size, args.rollouts, args.seed)
        return reviews_task(args.reviews, args.corpus_size, args.rollouts, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    args = parse_args()
    quiet()
    set_seed(args.seed)
    is_main = PartialState().is_main_process
    say = partial(print, flush=True) if is_main else lambda *_: None
    paths = {name: f"{args.output_dir}/{name}" for name in ("sft", "reward_model", "policy")}

    task = get_task(args)
    say(f"[1/6] Reviews: {task.source}")
    say(f"      Judge: {task.judge.description}")
    say(f"      Seed: {args.seed}")

    say("[2/6] Language model: a tokenizer and a small Llama learn to write such reviews")
    tokenizer = train_language_model(task, paths["sft"], args.seed)

    say(f"[3/6] Rankings: the judge ranks {NUM_RANKED} continuations of each of {task.ranked_prompts} openings")
    rankings = rank_samples(task, paths["sft"], tokenizer)
    if is_main:
        print_ranking(task.judge, **next((r for r in rankings if len(set(r["ranks"])) == 3), rankings[0]))

    say("[4/6] Reward model: learns what makes a ranking likely, ties and all")
    accuracy = train_reward_model(task, rankings, paths, tokenizer, args.seed)
    say(f"      It orders {accuracy:.1%} of held-out pairs with a winner as the judge does")

    say("[5/6] PPO: the language model learns to please the reward model")
    history = train_policy(task, paths, tokenizer, args.seed).state.log_history

    say(f"[6/6] Before and after, on {len(task.test_prompts)} negative openings that were held out")
    (samples_before, before), (samples_after, after) = compare(task, paths, tokenizer, args.seed)
    if is_main:
        print_completions(task.judge, samples_before, samples_after, count=6)
        print_table(before, after)
        plot_curves(history, f"PPO: positive reviews, whatever their opening ({task.source})", args.output_dir)
        print_last_words(args.output_dir, task.test_prompts)


if __name__ == "__main__":
    main()
