r"""
A comparison of two models by the judgements of their answers to the same prompts, with which `rlhf.py` ends. After

    python recipes/sample_completions.py --dataset_name test_prompts.jsonl --output_dir outputs/evaluation \
        --model_name_or_path my-sft-model my-policy --num_completions 2
    python recipes/judge_completions.py --folder outputs/evaluation ...    # or people: rank_completions.py

this prints how often the second wins, ties and loses, and what a reward model says of both:

    python recipes/rlhf_evaluate.py --folder outputs/evaluation --reward_model my-reward-model --output_dir outputs

and writes `evaluation.json`, `evaluation.md` and `evaluation.png`. Intervals are of 95%, from resampling the prompts.
"""

import argparse
import json
import sys
from pathlib import Path

from loop.answers import add_rewards_and_lengths, read_answers
from loop.evaluation import as_markdown, draw, examples, measure, rows_of, summary


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where sample_completions.py sampled from two models")
    parser.add_argument("--reward_model", required=True, help="a folder or Hub id")
    parser.add_argument("--output_dir", required=True, help="where the results go")
    parser.add_argument("--num_examples", type=int, default=4, help="prompts to show with both answers")
    return parser.parse_args(args)


def main() -> None:
    args = parse(sys.argv[1:])
    output = Path(args.output_dir)
    try:
        names, judges, answers = read_answers(Path(args.folder))
        add_rewards_and_lengths(answers, args.reward_model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = measure(names, judges, answers)
    shown = examples(names, answers, args.num_examples)
    output.mkdir(parents=True, exist_ok=True)
    draw(results, answers, output / "evaluation.png")
    (output / "evaluation.md").write_text(as_markdown(results, shown), encoding="utf-8")
    (output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{shown}\n\n{summary(results)}\n")
    for name, value in rows_of(results):
        print(f"{name:38}{value}")


if __name__ == "__main__":
    main()
