"""Games by name, prompts that begin them, and episodes to look at."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

from .house import HouseGame, rows


INSTRUCTION = "Find the gold. "


def choose_game(name: str, output_dir: str, seed: int) -> tuple[Callable, list[dict], list[dict]]:
    """Returns a maker of environments, and the rows of training and test."""
    if name == "house":
        return HouseGame, *rows(seed)
    if name != "textworld" and not Path(name).is_file():
        raise ValueError(
            f"--game {name}: expected 'house', 'textworld' or the file of a game, and there is no such file."
        )
    try:
        from .textworld_game import make_textworld_game, textworld_factory
    except ImportError:
        raise ImportError("--game textworld needs TextWorld: pip install -e '.[textworld]'.") from None
    file = make_textworld_game(output_dir, seed) if name == "textworld" else name
    return textworld_factory(file), [{}], [{}]


def prompt_of(observation: str = "") -> list[dict]:
    return [{"role": "user", "content": INSTRUCTION + observation}]


def prompts(game_rows: list[dict], count: int) -> Dataset:
    return Dataset.from_list([{"prompt": prompt_of(), **game_rows[i % len(game_rows)]} for i in range(count)])


class Winner:
    """Logs the games that were won, as a reward of weight 0, and keeps the last episodes to show them."""

    __name__ = "won"

    def __init__(self):
        self.episodes = []

    def __call__(self, prompts, completions, environments, **kwargs):
        self.episodes = [p + c for p, c in zip(prompts, completions, strict=True)]
        return [float(environment.has_won) for environment in environments]


def show(episodes: list[list[dict]]) -> None:
    for episode in episodes:
        print()
        for message in episode:
            for call in message.get("tool_calls") or []:
                print(f"      > {call['function']['arguments'].get('command')}")
            if message["role"] != "assistant":
                print(f"        {message['content'].removeprefix(INSTRUCTION)}")
            elif not message.get("tool_calls"):
                print(f"      {message['content']}")


def plot(log_history: list[dict], title: str, path: str) -> None:
    """Draws reward, share of games won, length and the critic over rollouts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [
        ("Reward of an episode", "reward"),
        ("Share of games won", "rewards/won/mean"),
        ("Tokens of an episode's commands", "completions/mean_length"),
        ("Explained variance of the critic", "explained_variance"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    figure.suptitle(title)
    for axis, (name, key) in zip(axes, curves, strict=True):
        points = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
        axis.plot(*zip(*points, strict=True), linewidth=1, alpha=0.4, color="tab:blue")
        width = max(1, len(points) // 10)
        means = [
            sum(y for _, y in points[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(points))
        ]
        axis.plot([x for x, _ in points], means, color="tab:blue")
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
