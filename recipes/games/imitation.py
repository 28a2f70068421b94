"""Imitation: demonstrations by a careless player, and a language model that learns from them."""

import json
import random
from collections.abc import Callable

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import get_json_schema
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config
from trl.chat_template_utils import qwen3_instruct_2507_chat_template

from shared.progress import StageBar, finish
from trl_ext import PPOConfig, SFTTrainer

from .episodes import prompt_of


FAREWELL = "I am done."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]


def demonstrate(game, row: dict, carelessness: float, max_commands: int, rng: random.Random) -> list[dict]:
    """Plays an episode, and returns it as messages."""
    messages = prompt_of(game.reset(**row))
    for _ in range(max_commands):
        is_careless = rng.random() < carelessness
        command = rng.choice(game.possible_commands) if is_careless else game.best_command
        call = {"type": "function", "function": {"name": "act", "arguments": {"command": command}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "act", "content": game.act(command)})
        if game.has_won:
            break
    return [*messages, {"role": "assistant", "content": FAREWELL}]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on demonstrations; the chat template is that of a Qwen3 that calls tools."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL[:3], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.add_tokens(SPECIAL[3:])  # which the parser of calls must see
    tokenizer.chat_template = qwen3_instruct_2507_chat_template
    return tokenizer


def tiny_model(tokenizer, max_length: int) -> LlamaForCausalLM:
    """Returns a small Llama of random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def tiny_player(episodes: list[list[dict]], tools: list[dict], max_length: int, seed: int):
    """Returns a small Llama of random weights, and a tokenizer of what the episodes say."""
    set_seed(seed)
    template = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=qwen3_instruct_2507_chat_template
    )
    texts = [template.apply_chat_template(episode, tools=tools, tokenize=False) for episode in episodes]
    tokenizer = train_tokenizer(texts)
    return tiny_model(tokenizer, max_length), tokenizer


def imitate(
    episodes: list[list[dict]],
    act: Callable,
    args: PPOConfig,
    model_args: ModelConfig,
    epochs: int,
    learning_rate: float,
) -> str:
    """
    Fine-tunes on demonstrations, and returns the folder of the result.

    Args:
        episodes (`list[list[dict]]`): The demonstrations.
        act (`Callable`): The tool that they call.
        args (`PPOConfig`): Arguments of the training that follows, some of which are this one's too.
        model_args (`ModelConfig`): Without a `model_name_or_path`, a tiny model of random weights learns.
        epochs (`int`): Number of epochs.
        learning_rate (`float`): Learning rate.
    """
    tools, path, name = [get_json_schema(act)], f"{args.output_dir}/imitation", model_args.model_name_or_path
    if name is None:
        model, tokenizer = tiny_player(episodes, tools, args.max_completion_length + 512, args.seed)
        kwargs = {}
    else:
        model, tokenizer = name, AutoTokenizer.from_pretrained(name)
        kwargs = {
            "quantization_config": get_quantization_config(model_args),
            "peft_config": get_peft_config(model_args),
        }
    shared = ["seed", "use_cpu", "bf16", "dataloader_pin_memory", "activation_checkpointing"]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            path,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            assistant_only_loss=True,
            max_length=None,
            model_init_kwargs=None if name is None else args.model_init_kwargs,
            save_strategy="no",
            report_to="none",
            logging_steps=5,
            **{option: getattr(args, option) for option in shared},
        ),
        train_dataset=Dataset.from_list([{"messages": episode, "tools": json.dumps(tools)} for episode in episodes]),
        processing_class=tokenizer,
        **kwargs,
    )
    finish(trainer, StageBar("Imitation", loss="loss"), "A player by imitation")
    return path
