"""Recorded rollouts: every completion with its numbers token by token, as Parquet in `output_dir/rollouts`."""

from pathlib import Path

from datasets import Dataset, DatasetDict


FOLDER = "rollouts"
NUMBERS_OF_TOKENS = ["rewards", "advantages", "returns", "values", "kl", "logps"]


ROLLOUT_COLUMNS = {
    "step": "optimizer steps made before it was sampled",
    "prompt": "what was completed: a text, or a list of messages (without their images)",
    "completion": "of the same kind; with tools it holds their answers",
    "completion_ids": "its tokens",
    "tokens": "the same as the tokenizer's vocabulary writes them",
    "own": "whether the token is a time step: chosen by the policy, in a completion that is trained on. False for what "
    "a tool or an environment says, and in completions that have no score or were masked because they were cut",
    "score": "weighted sum of the rewards of the whole, as the reward functions gave them; null where none applies",
    "terminated": "whether it ended by itself; if not, it was cut",
    "rewards": "what the estimator saw: dense rewards, the KL penalty of `kl_in_reward`, and the rest of the score (as "
    "`scale_rewards` and `truncation` leave it) on the last own token",
    "advantages": "how much better than expected the token was, before they are scaled",
    "returns": "what the critic is fitted to",
    "values": "what the critic said before the update: V(s_t), or Q(s_t, a_t) of Q actor-critic; null without a critic",
    "kl": "k1 to the reference, log pi - log pi_ref, in nats; null without a reference",
    "logps": "log-probability by the policy that sampled it, in nats",
}


def load_rollouts(output_dir: str | Path) -> DatasetDict:
    """
    Loads the rollouts that a training with `save_rollouts` recorded.

    Args:
        output_dir (`str` or `Path`): Folder of the training.

    Returns:
        [`~datasets.DatasetDict`]: `train`, and `eval` (or `eval_<name>` for each of several evaluation datasets), if
        there is any; a row per completion, in the order of steps, as [`ROLLOUT_COLUMNS`] says. Numbers of tokens are 0
        where `own` is false.

    Raises:
        ValueError: if nothing was recorded there.
    """
    files = {}
    for file in files_of(Path(output_dir) / FOLDER):
        files.setdefault(file.parent.name, []).append(str(file))
    if not files:
        raise ValueError(
            f"No rollouts in {Path(output_dir) / FOLDER}. Pass the `output_dir` of a training with `save_rollouts=True`."
        )
    splits = sorted(files, key=lambda split: (split != "train", split))
    return DatasetDict({split: Dataset.from_parquet(files[split], split=split) for split in splits})


def files_of(folder: Path) -> list[Path]:
    """Lists the files of recorded rollouts, in order of steps."""
    return sorted(folder.glob("*/step-*.parquet"))
