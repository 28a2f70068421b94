"""
Counts how often a reader of A2C has to change file, from the return of the rewards to the end of the first loss:

    python tests/benchmarks/file_changes.py

Python's profiler tells of every call and every return. Of these, the calls of a function of `trl_ext` count, and the
returns to one, as the reader goes back to the line of the call; each is in the file of that function. A change is one in
another file than the one before it: a detour through TRL or torch alone changes nothing. One process trains the tests'
tiny policy on one batch, with their settings, and once more with a KL penalty. Commit 8096140 has 101 and 117 changes.
"""

import itertools
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path


os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset
from helpers import PROMPTS, build_policy, build_tokenizer, count_good, settings
from transformers import PrinterCallback

import trl_ext
from trl_ext import A2CConfig, A2CTrainer


PACKAGE = Path(trl_ext.__file__).parent


class Reader:
    """Keeps the files of `trl_ext` in the order in which they are run."""

    def __init__(self):
        self.files = []

    def __call__(self, frame, event, arg):
        if event == "return":
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if event in ("call", "return") and path.is_relative_to(PACKAGE):
            self.files.append(str(path.relative_to(PACKAGE)))

    def changes(self) -> list[str]:
        """The files, without what stays in the file before."""
        return [file for file, _ in itertools.groupby(self.files)]


def read(**overrides) -> list[str]:
    """The file of the rewards, and each that is changed to, in the first step of A2C."""
    reader = Reader()

    class Watched(A2CTrainer):
        def _calculate_rewards(self, *args):
            rewards = super()._calculate_rewards(*args)
            sys.setprofile(reader)
            return rewards

        def _compute_loss(self, *args):
            loss = super()._compute_loss(*args)
            sys.setprofile(None)
            return loss

    tokenizer = build_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        build_policy(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        args = A2CConfig(**settings(folder, max_steps=1, **overrides))
        trainer = Watched(folder, count_good, args, Dataset.from_dict({"prompt": PROMPTS}))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rewards = Path(A2CTrainer._calculate_rewards.__code__.co_filename).relative_to(PACKAGE)
    return [file for file, _ in itertools.groupby([str(rewards), *reader.changes()])]


def main() -> None:
    for what, overrides in (("A2C", {}), ("A2C with a KL penalty", {"kl_in_reward": 0.1})):
        files = read(**overrides)
        print(f"\n{what}: {len(files) - 1} changes of file, over {len(set(files))} files")
        print(" > ".join(file.removesuffix(".py") for file in files))
        print(", ".join(f"{file} {count}" for file, count in Counter(files[1:]).most_common()))


if __name__ == "__main__":
    main()
