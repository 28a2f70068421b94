"""Rankings to learn from, some of them held out, which `ranking_reward.py` and `ranking_dpo.py` take alike."""

import random
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset

from .arguments import RecipeArguments
from .data import load_split
from .saving import save


@dataclass
class RankingRecipeArguments(RecipeArguments):
    """Arguments common to the recipes that learn from rankings."""

    held_out: float = field(
        default=0.1,
        metadata={
            "help": "Share of the prompts to hold out and evaluate at the end. Not used where `--eval_strategy` has "
            "the dataset's own test split evaluated; 0 holds nothing out."
        },
    )

    def __post_init__(self):
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held_out must be at least 0 and below 1, got {self.held_out}.")


def load_rankings(
    script_args: RankingRecipeArguments, training_args
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """Returns rankings to train on, and to evaluate: the test split if evaluation was asked for, else some prompts."""
    rankings = load_split(script_args, script_args.dataset_train_split)
    if training_args.eval_strategy != "no":
        return rankings, load_split(script_args, script_args.dataset_test_split)
    if script_args.held_out == 0 or isinstance(rankings, IterableDataset):
        return rankings, None
    # By prompt: of one that was ranked twice, no half may be trained on
    prompts = [str(prompt) for prompt in rankings["prompt" if "prompt" in rankings.column_names else "chosen"]]
    distinct = sorted(set(prompts))
    held_out = set(random.Random(training_args.seed).sample(distinct, round(script_args.held_out * len(distinct))))
    parts = [[i for i, prompt in enumerate(prompts) if (prompt in held_out) is held] for held in (False, True)]
    train, test = (rankings.select(part) for part in parts)
    return train, test if len(test) else None


def evaluate_and_save(trainer, script_args: RankingRecipeArguments) -> None:
    """Evaluates what was held out, so that the card has it, then writes the model and pushes it if asked to."""
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    save(trainer, script_args)
