"""Models that go on from prompts: loaded, and sampled from."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_tokenizer(name: str):
    """Returns a tokenizer that can pad. Raises a ValueError if it has no token for that."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {name} has neither a padding nor an end-of-sequence token, so prompts cannot be put "
                "into one batch. Give it one (`tokenizer.pad_token = ...`) and save it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: str):
    """Returns a causal language model, on the GPU if there is one, and its tokenizer."""
    tokenizer = load_tokenizer(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def context_of(config) -> int | None:
    """Returns the number of tokens that a model was made for; None where that has no bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)  # absent from others


def input_text(tokenizer, prompt: str | list) -> str:
    """Returns the text that a model goes on from: the prompt, or a conversation by the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def num_tokens(tokenizer, prompt: str | list) -> int:
    """Returns the length of the text that a model goes on from."""
    return len(tokenizer(input_text(tokenizer, prompt), add_special_tokens=isinstance(prompt, str))["input_ids"])


@torch.no_grad()
def sample(
    model, tokenizer, prompts: list, count: int, *, temperature: float, top_p: float, max_completion_length: int
) -> list[list]:
    """Returns `count` completions of each prompt, of its kind: texts, or replies as a list of one message."""
    is_chat = not isinstance(prompts[0], str)
    texts = [input_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not is_chat
    ).to(model.device)
    inputs.pop("token_type_ids", None)
    ids = model.generate(
        **inputs,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=max_completion_length,
        num_return_sequences=count,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoded = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    replies = [[{"role": "assistant", "content": text}] if is_chat else text for text in decoded]
    return [replies[i : i + count] for i in range(0, len(replies), count)]
