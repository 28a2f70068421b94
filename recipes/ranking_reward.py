r"""
A reward model from rankings with ties. Every option of `RankingRewardConfig` and `ModelConfig` is an argument here, and
`--config FILE.yaml` sets many at once (the command line wins over the file).

Your own rankings, a line for each prompt, such as

    {"prompt": "2 + 2 =", "completions": [" 5", " 4", " four", " 22"], "ranking": "B > C > A = D"}

on one GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/ranking_reward.py \
        --dataset_name rankings.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir my-reward-model

In place of `ranking`, rows may have `ranks` ([4, 1, 2, 4]: lower is better, equal is tied, null is unranked), or `pairs`
of judgements ([[0, 1, 2], ...]: of completions 0 and 1 the second was better; 0 for neither), or TRL's `chosen`,
`rejected` and `tie`. Prompts and completions are texts or lists of messages. A tenth of the prompts is held out and
evaluated at the end.

A LoRA adapter on a 4-bit base model, with another likelihood:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/ranking_reward.py \
        --dataset_name rankings.jsonl --model_name_or_path Qwen/Qwen2.5-7B-Instruct --output_dir my-reward-model \
        --use_peft --load_in_4bit --ranking_model rao_kupper --push_to_hub

The result is a plain sequence classifier, which TRL's GRPO and `actor_critic.py --reward_model my-reward-model` take.
"""

import random
import sys
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from sft import (
    RecipeArguments,
    load_split,
    parse_arguments,
    prepare_model_args,
    save,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_ext import RankingRewardConfig, RankingRewardTrainer


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
    """Rankings to train on, and to evaluate: the test split if evaluation was asked for, else some of the prompts."""
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
    """Evaluate what was held out, so that the card has it, then write the model and push it if asked to."""
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    save(trainer, script_args)


def parse(args: list[str]) -> tuple:
    """The arguments of this script, of the training and of the model."""
    return parse_arguments(__doc__, (RankingRecipeArguments, RankingRewardConfig, ModelConfig), args)


def main() -> None:
    script_args, training_args, model_args = parse(sys.argv[1:])
    prepare_model_args(model_args, training_args)
    train_dataset, eval_dataset = load_rankings(script_args, training_args)
    trainer = RankingRewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    evaluate_and_save(trainer, script_args)


if __name__ == "__main__":
    main()
