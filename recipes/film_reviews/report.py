"""The quickstart's report: a ranking, completions and a table of before and after, and curves."""

import re

from trl_ext import format_ranking

from .judges import Judge
from .samples import Samples


def print_ranking(judge: Judge, prompt: str, completions: list[str], ranks: list[int]) -> None:
    print(f"      For example: {prompt} ...")
    for letter, text, score in zip("ABCDEFGH", completions, judge.score(completions), strict=False):
        print(f"        {letter} ({score:+.2f}): {text}")
    print(f"        {format_ranking(ranks)}")


def print_table(before: dict[str, float], after: dict[str, float]) -> None:
    print(f"\n      {'':38}{'before':>10}{'after':>10}")
    for name, value in before.items():
        print(f"      {name:38}{value:10.3f}{after[name]:10.3f}")


def print_completions(judge: Judge, before: Samples, after: Samples, count: int) -> None:
    for row in range(count):
        print(f"\n      {before.prompts[row]} ...")
        for name, samples in (("before", before), ("after", after)):
            text = samples.completions[row]
            print(f"      {name:>6} ({judge.score([text])[0]:+.2f}): {text.strip()}")


CURVES = [  # title, axis, {label: logged name}
    ("Reward model's score", "reward", {"reward": "rewards/reward_model/mean"}),
    ("Judge's score (not trained on)", "score", {"judge": "rewards/judge/mean"}),
    ("KL to the reference", "nats per token", {"k1 (unbiased)": "kl/k1", "k3 (non-negative)": "kl/k3"}),
    ("Explained variance of the critic", "share of the returns' variance", {"": "explained_variance"}),
    ("Value loss", "half squared error per token", {"": "value_loss"}),
    ("Length of completions", "tokens", {"mean": "completions/mean_length"}),
]


def plot_curves(log_history: list[dict], title: str, output_dir: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    figure.suptitle(title)
    for axis, (name, unit, lines) in zip(axes.flat, CURVES, strict=True):
        for label, key in lines.items():
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    figure.savefig(f"{output_dir}/curves.png", dpi=120)
    plt.close(figure)


LAST_WORDS = """
      In {output_dir}:
        curves.png     how PPO went
        sft            the language model before PPO, which was also the reference
        policy         the language model after PPO, with its critic and its card, README.md
        reward_model   what the policy was trained on

      The three models load with plain transformers. Try one:

python -c "from transformers import pipeline
print(pipeline('text-generation', '{output_dir}/policy', do_sample=True)('{prompt}')[0]['generated_text'])"
"""


def print_last_words(output_dir: str, prompts: list[str]) -> None:
    prompt = next((text for text in prompts if re.fullmatch(r"[\w ,.-]+", text)), "The film")  # safe in a shell
    print(LAST_WORDS.format(output_dir=output_dir, prompt=prompt))
