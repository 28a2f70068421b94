r"""
The picture of the README: two reviews with the advantage that GRPO gives all of their tokens, and with those of a critic.

    accelerate launch recipes/quickstart.py
    python tests/benchmarks/credit.py --quickstart outputs/quickstart --output tests/benchmarks/credit.png

Policy, critic and reward model are the quickstart's, after training. The reviews go on from one opening, so GRPO's
advantage is, up to its scale, the reward less the mean of both; the others are generalized advantage estimates (gamma
1, lambda 0.95).
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import CenteredNorm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_ext import load_critic, token_mdp, token_values


OPENING = "The trailer was pretentious and the soundtrack is slow"
REVIEWS = [
    ", though the story works with real wit. It deserves every award.",
    ". It is told carelessly. It is a bore.",
]


@torch.no_grad()
def credit_of_tokens(folder: Path) -> list[tuple[list[str], float, torch.Tensor, torch.Tensor]]:
    """Returns tokens, reward, values before each token, and advantages, of each review."""
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    critic = load_critic(policy, str(folder / "policy"))
    reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    start = len(tokenizer(OPENING)["input_ids"])
    result = []
    for review in REVIEWS:
        text = tokenizer(OPENING + review, return_tensors="pt")  # the reward model read texts without an end token
        reward = reward_model(**text).logits.item()
        ids = torch.cat([text["input_ids"], torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        values = token_values(policy, critic, ids, torch.ones_like(ids))[:, start - 1 : -1]
        rewards = torch.zeros_like(values)
        rewards[:, -1] = reward
        mask = torch.ones_like(values, dtype=torch.bool)
        advantages, _ = token_mdp.generalized_advantage_estimate(rewards, values, mask, gamma=1.0, lam=0.95)
        tokens = [tokenizer.decode(token).strip() for token in ids[0, start:]]
        result.append((tokens, reward, values[0], advantages[0]))
    return result


def draw_line(axes, x: float, y: float, words: list[str], colours: list) -> None:
    """Writes words one after another, each on a ground of its own colour."""
    for word, colour in zip(words, colours, strict=True):
        box = {"boxstyle": "square,pad=0.25", "facecolor": colour, "edgecolor": "white", "linewidth": 0.8}
        text = axes.text(x, y, word, fontsize=9.5, family="DejaVu Sans", va="center", bbox=box)
        extent = text.get_window_extent(axes.figure.canvas.get_renderer())
        x = axes.transData.inverted().transform((extent.x1, 0))[0] + 0.012


def draw(rows, file: Path) -> None:
    """Draws both reviews twice."""
    mean_reward = sum(reward for _, reward, _, _ in rows) / len(rows)
    ways = {
        "GRPO: one advantage per completion": [torch.full_like(a, r - mean_reward) for _, r, _, a in rows],
        "trl_ext: one advantage per token": [a for _, _, _, a in rows],
    }
    figure, axes = plt.subplots(figsize=(8.2, 2.35), dpi=150)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.98)
    y = 0.95
    for title, advantages in ways.items():
        axes.text(0, y, title, fontsize=10, fontweight="bold", va="center")
        axes.text(0.47, y, f"{OPENING} ...", fontsize=9, color="0.45", va="center", style="italic")
        norm = CenteredNorm(0, max(a.abs().max().item() for a in advantages))
        for (tokens, reward, _, _), row in zip(rows, advantages, strict=True):
            y -= 0.15
            axes.text(0, y, f"reward {reward:+.2f}", fontsize=8.5, color="0.35", va="center")
            draw_line(axes, 0.125, y, tokens, plt.get_cmap("RdBu")(norm(row.numpy()) * 0.6 + 0.2))
        y -= 0.21
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("outputs/quickstart"), help="output of the quickstart")
    parser.add_argument("--output", type=Path, default=Path("credit.png"))
    args = parser.parse_args()
    rows = credit_of_tokens(args.quickstart)
    for tokens, reward, values, advantages in rows:
        print(f"reward {reward:+.2f}")
        for token, value, advantage in zip(tokens, values, advantages, strict=True):
            print(f"  V {value:+.2f}  A {advantage:+.2f}  {token}")
    draw(rows, args.output)


if __name__ == "__main__":
    main()
