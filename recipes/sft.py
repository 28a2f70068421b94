r"""
Supervised fine-tuning with TRL's trainer: the stage before reinforcement learning. Every option of `SFTConfig` and `ModelConfig`
is an argument here, and `--config FILE.yaml` sets many at once (the command line wins over the file).

From a file, on one GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/sft.py --config recipes/sft.yaml

A LoRA adapter on a 4-bit base model, on one GPU:

    accelerate launch --config_file recipes/accelerate_configs/single_gpu.yaml recipes/sft.py \
        --model_name_or_path Qwen/Qwen2.5-7B --dataset_name trl-lib/Capybara --output_dir qwen-7b-sft \
        --use_peft --load_in_4bit --learning_rate 2e-4 --eos_token '<|im_end|>'

Own data (columns as TRL's SFT takes them: `messages`, `text`, or `prompt` and `completion`), eight sharded GPUs:

    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/sft.py \
        --model_name_or_path Qwen/Qwen2.5-7B --dataset_name demonstrations.jsonl --output_dir qwen-7b-sft --push_to_hub
"""

import sys

from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from shared.arguments import RecipeArguments, parse_arguments, prepare_model_args
from shared.data import load_split
from shared.saving import save
from trl_ext import SFTTrainer


def parse(args: list[str]) -> tuple:
    """Returns the arguments of this script, of the training and of the model."""
    return parse_arguments(__doc__, (RecipeArguments, SFTConfig, ModelConfig), args)


def main() -> None:
    script_args, training_args, model_args = parse(sys.argv[1:])
    prepare_model_args(model_args, training_args)
    has_eval = training_args.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_split(script_args, script_args.dataset_train_split),
        eval_dataset=load_split(script_args, script_args.dataset_test_split) if has_eval else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    save(trainer, script_args)


if __name__ == "__main__":
    main()
