r"""
DPO from rankings with ties. Every option of `RankingDPOConfig` and `ModelConfig` is an argument here, and
`--config FILE.yaml` sets many at once (the command line wins over the file).

Your own rankings, in the format that `ranking_reward.py` describes, on one GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/ranking_dpo.py \
        --dataset_name rankings.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir my-model \
        --learning_rate 1e-6 --beta 0.1

A LoRA adapter on a 4-bit base model, whose reference is the base itself:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/ranking_dpo.py \
        --dataset_name rankings.jsonl --model_name_or_path Qwen/Qwen2.5-7B-Instruct --output_dir my-model \
        --use_peft --load_in_4bit --learning_rate 1e-5 --push_to_hub

Pairs with ties (`prompt`, `chosen`, `rejected`, `tie`) as DPO-D of Chen et al., https://huggingface.co/papers/2409.17431:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/ranking_dpo.py \
        --dataset_name pairs.jsonl --ranking_model davidson --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --output_dir my-model --learning_rate 1e-6
"""

import sys

from trl import ModelConfig, get_peft_config, get_quantization_config

from shared.arguments import parse_arguments, prepare_model_args
from shared.rankings import RankingRecipeArguments, evaluate_and_save, load_rankings
from trl_ext import RankingDPOConfig, RankingDPOTrainer


def parse(args: list[str]) -> tuple:
    """Returns the arguments of this script, of the training and of the model."""
    return parse_arguments(__doc__, (RankingRecipeArguments, RankingDPOConfig, ModelConfig), args)


def main() -> None:
    script_args, training_args, model_args = parse(sys.argv[1:])
    prepare_model_args(model_args, training_args)
    train_dataset, eval_dataset = load_rankings(script_args, training_args)
    trainer = RankingDPOTrainer(
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
