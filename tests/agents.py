"""Episodes with tools: a policy over bytes whose turns are scripted, and an environment that pays for them."""

import torch
from datasets import Dataset
from helpers import recorded, settings, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_chat_template

from trl_ext import A2CConfig, A2CTrainer


def build_tool_model():
    """A policy over bytes with Qwen3's chat template, which TRL can parse tool calls of."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=special[0], eos_token=special[2], padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:2]})
    tokenizer.add_tokens(special[3:])
    tokenizer.chat_template = qwen3_chat_template
    return LlamaForCausalLM(tiny_config(tokenizer, max_position_embeddings=4096)), tokenizer


def script_generation(model, tokenizer, turns):
    """Make `model.generate` answer each call with the next of `turns` (the last one again when they run out)."""
    calls = iter([*turns, *turns[-1:] * 100])

    def generate(input_ids, **kwargs):
        answer = torch.tensor(tokenizer(next(calls))["input_ids"]).expand(len(input_ids), -1)
        return torch.cat([input_ids, answer], dim=1)

    model.generate = generate


class Till:
    """Pays what it is given, minus one for the wrong thing."""

    def reset(self, **kwargs):
        self.total = 0.0

    def put(self, coin: int) -> str:
        """
        Puts in a coin.

        Args:
            coin: Its value.

        Returns:
            What the display says.
        """
        self.total += coin
        return f"You have {self.total}."

    def get_reward(self) -> float:
        return self.total


def put(coin):
    return f'<tool_call>\n{{"name": "put", "arguments": {{"coin": {coin}}}}}\n</tool_call><|im_end|>'


def episode(
    tool_model, tmp_path, turns, environment=Till, config_class=A2CConfig, trainer_class=A2CTrainer, **overrides
):
    model, tokenizer = tool_model
    script_generation(model, tokenizer, turns)
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Go."}]] * 4})
    overrides = {"max_completion_length": 600, "max_steps": 1, "turn_rewards": True, "lam": 1.0, **overrides}
    args = config_class(**settings(tmp_path, **overrides))
    trainer = recorded(trainer_class)(
        model, None, args, dataset, processing_class=tokenizer, environment_factory=environment
    )
    trainer.train()
    return trainer, trainer.updates[0]
