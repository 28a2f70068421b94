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
rows with "test" are held out. See `film_reviews/files.py`.
"""

import argparse
import sys
from functools import partial

from accelerate import PartialState
from transformers import set_seed

from film_reviews.measures import compare
from film_reviews.report import plot_curves, print_completions, print_last_words, print_ranking, print_table
from film_reviews.tasks import get_task
from film_reviews.training import NUM_RANKED, rank_samples, train_language_model, train_policy, train_reward_model
from shared.progress import quiet


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/quickstart", help="where models, cards and curves go")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus, of the models and of sampling")
    parser.add_argument("--reviews", metavar="FILE", help="your own reviews: .jsonl or .csv, may be gzipped")
    parser.add_argument("--corpus_size", type=int, metavar="N", help="how many reviews the models learn from")
    parser.add_argument("--rollouts", type=int, metavar="N", help="how many batches PPO samples and learns from")
    return parser.parse_args(args)


def main() -> None:
    args = parse(sys.argv[1:])
    quiet()
    set_seed(args.seed)
    is_main = PartialState().is_main_process
    say = partial(print, flush=True) if is_main else lambda *_: None
    paths = {name: f"{args.output_dir}/{name}" for name in ("sft", "reward_model", "policy")}

    task = get_task(args.reviews, args.corpus_size, args.rollouts, args.seed)
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
