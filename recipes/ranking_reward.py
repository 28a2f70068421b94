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

import sys

from trl import ModelConfig, get_peft_config, get_quantization_config

from shared.arguments import parse_arguments, prepare_model_args
from shared.rankings import RankingRecipeArguments, evaluate_and_save, load_rankings
from trl_ext import RankingRewardConfig, RankingRewardTrainer


def parse(args: list[str]) -> tuple:
    """Returns the arguments of this script, of the training and of the model."""
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
