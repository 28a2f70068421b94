"""
Toy tasks over ten symbols in a circle, `a` to `j`, each a word; the policy is a Llama of some 20,000 parameters that
begins with all of them equally likely.

- `count-end`, `count-dense`: each symbol is right that follows the one before it (`c` after `b`), the first one that
  follows the prompt's; a point is paid at the end for all, or at each.
- `delayed`: the first symbol alone is right or wrong, by the prompt; 32 that do not matter come after it, and then the
  reward.
- `single`: as `count-end`, but a prompt of four symbols, of which the last is counted from, and the first says how much
  the completion is paid whatever it is. Every prompt is another one.
- `long`: each symbol of 256 is right that is one of the first three, whatever the prompt; the share is paid at the end.

A completion that ends early has wrong symbols in place of those it leaves out.
"""

import random
from collections.abc import Callable
from functools import partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from .base import Places, Start, Task


SYMBOLS = "abcdefghij"
SPECIAL = ["<pad>", "<eos>", "<unk>"]
END_PROBABILITY = 1e-3  # of a completion at any token, at the start
COUNT_LENGTH, LONG_LENGTH, NOISE_LENGTH = 8, 256, 32
LEVEL = 2.0  # what the first symbol of a prompt of `single` pays at most


def symbol_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *SYMBOLS])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def symbols_of(ids: list[int]) -> list[int]:
    """Returns the place in the circle of each token; negative for the special ones."""
    return [index - len(SPECIAL) for index in ids]


# --- What is right, `(prompt, ids)` to a number for each token ---


def counted(prompt: str, ids: list[int]) -> list[float]:
    """Pays each symbol that follows the one before it; all of them sum to 1."""
    before = [SYMBOLS.index(prompt[-1]), *symbols_of(ids)]
    return [(a >= 0 and b == (a + 1) % 10) / COUNT_LENGTH for a, b in zip(before, before[1:], strict=False)]


def decided(prompt: str, ids: list[int]) -> list[float]:
    """Pays 1 at the end if the first symbol is the third after the prompt's, and nothing was left out."""
    is_right = symbols_of(ids)[0] == (SYMBOLS.index(prompt) + 3) % 10 and len(ids) == 1 + NOISE_LENGTH
    return [0.0] * (len(ids) - 1) + [float(is_right)]


def chosen(prompt: str, ids: list[int]) -> list[float]:
    """Pays each symbol that is one of the first three; all of them sum to 1."""
    return [float(s in (0, 1, 2)) / LONG_LENGTH for s in symbols_of(ids)]


def level(prompt: str) -> float:
    """Returns what a prompt of `single` pays whatever is written."""
    return LEVEL * SYMBOLS.index(prompt[0]) / (len(SYMBOLS) - 1)


# --- Starts ---


def begin(
    places: Places,
    seed: int,
    is_dense: bool,
    pays: Callable,
    prompts: Callable,
    length: int,
    offset: Callable,
    has_dense: bool,
) -> Start:
    """Returns the start of a run that is paid by `pays` and, for its prompt alone, by `offset`."""

    def objective(prompts, completions, completion_ids):
        return [sum(pays(prompt, ids)) for prompt, ids in zip(prompts, completion_ids, strict=True)]

    def reward(prompts, completions, completion_ids, **columns):
        if is_dense and has_dense:
            return [pays(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]
        totals = objective(prompts, completions, completion_ids)
        return [total + offset(prompt) for prompt, total in zip(prompts, totals, strict=True)]

    tokenizer = symbol_tokenizer()
    return Start(uniform_policy(tokenizer, seed, length), tokenizer, prompts(), [reward], objective)


def uniform_policy(tokenizer: PreTrainedTokenizerFast, seed: int, length: int) -> LlamaForCausalLM:
    """Returns a random model, trained until every symbol is about equally likely and the end is `END_PROBABILITY`."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    target = torch.full((len(tokenizer),), (1 - len(SPECIAL) * END_PROBABILITY) / len(SYMBOLS))
    target[: len(SPECIAL)] = END_PROBABILITY
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(100):
        ids = torch.randint(len(SPECIAL), len(tokenizer), (16, min(length, 64)))
        loss = -(target * model(ids).logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def single_symbols() -> list[str]:
    return list(SYMBOLS) * 64


def four_symbols() -> list[str]:
    """Returns 10,000 prompts, all different."""
    prompts = [f"{a} {b} {c} {d}" for a in SYMBOLS for b in SYMBOLS for c in SYMBOLS for d in SYMBOLS]
    random.Random(0).shuffle(prompts)
    return prompts


def toy(
    name: str,
    pays: Callable,
    length: int,
    rollouts: int,
    prompts: Callable = single_symbols,
    offset: Callable = lambda prompt: 0.0,
    has_dense: bool = False,
    rollout_size: int = 64,
    **sizes,
) -> Task:
    return Task(
        name,
        partial(begin, pays=pays, prompts=prompts, length=length, offset=offset, has_dense=has_dense),
        max_completion_length=length,
        budget=rollouts * rollout_size * length,
        max_rollouts=2 * rollouts,
        rollout_size=rollout_size,
        **sizes,
    )
