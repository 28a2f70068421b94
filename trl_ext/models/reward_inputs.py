r"""
The text that a reward model reads of a prompt and its completion, as token ids: the same in training, judging,
reinforcement learning and prefix rewards. A note in the model's config (`reward_input`), or in `tie_parameters.json` of
an adapter, says how it was trained:

    {"kind": "text", "ending": "<eos>", "special_tokens": ["<bos>"], "pad_token": "<pad>"}

| kind | what is read |
| --- | --- |
| `text` | prompt and completion, then `ending` unless they end so, with the tokenizer's `special_tokens` around |
| `chat` | the conversation, by the tokenizer's chat template |
| `tokens` | unknown: it was trained on token ids |

A model without a note, or trained on token ids, is asked as TRL's `GRPOTrainer` asks: texts bare, without special
tokens or an ending, and conversations by the chat template.

A completion that was cut at the length limit is read like one that ended: rankings hold such completions too, and
training ends them all alike. The trainer's `truncation` says what being cut costs.
"""

import json
from dataclasses import asdict, dataclass, field

from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..compat import tokenize


logger = get_logger(__name__)

REWARD_INPUT = "reward_input"  # entry of the config
KINDS = {"text": "plain texts", "chat": "conversations", "tokens": "token ids"}


@dataclass(frozen=True)
class RewardInput:
    """
    A note that says how a reward model was trained.

    Args:
        kind (`str`): `"text"`, `"chat"` or `"tokens"`.
        pad_token (`str`): The score is that of the last token which is not this one.
        ending (`str`, *optional*, defaults to `""`): Put after each text that does not end with it.
        special_tokens (`list[str]`, *optional*): The tokens of an empty text; none where texts are bare.
    """

    kind: str
    pad_token: str
    ending: str = ""
    special_tokens: list[str] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        return self.kind != "tokens"


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Returns the tokenizer itself, or that of the processor of a model which could see images."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the tokens that the tokenizer puts around a text."""
    ids, bare = (tokenizer("", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    return [] if ids == bare else tokenizer.convert_ids_to_tokens(ids)


def input_in_training(processing_class, kind: str, bare_texts: bool = False) -> RewardInput:
    """Returns the note of a training with this tokenizer: on texts as TRL's `RewardTrainer` reads them, or bare."""
    tokenizer = text_tokenizer(processing_class)
    if kind != "text" or bare_texts:
        return RewardInput(kind, tokenizer.pad_token)
    return RewardInput(kind, tokenizer.pad_token, tokenizer.eos_token or "", special_tokens_of(tokenizer))


def reward_input_ids(
    prompt: str | list, completion: str | list, processing_class, how: RewardInput | None, **template_kwargs
) -> list[int]:
    """
    Tokenizes prompt and completion as a reward model reads them.

    Args:
        prompt, completion (`str` or `list`): Texts, or lists of messages.
        processing_class: The reward model's tokenizer, or a processor that has it.
        how ([`RewardInput`], *optional*): The note of its training. By default it is asked as TRL's `GRPOTrainer` does.
        template_kwargs: Given to the chat template.
    """
    if not isinstance(prompt, str):
        return list(tokenize(processing_class, prompt + completion, **template_kwargs)["input_ids"])
    text, tokenizer = prompt + completion, text_tokenizer(processing_class)
    if how is None or not how.is_known:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = text if text.endswith(how.ending) else text + how.ending
    return tokenizer(text, add_special_tokens=bool(how.special_tokens))["input_ids"]


def template_kwargs_of(row: dict) -> dict:
    """Returns the arguments of the chat template in a row of a dataset."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


# --- The note ---


def write_reward_input(config, how: RewardInput | dict | None) -> None:
    """Writes into a model's config how it was trained."""
    setattr(config, REWARD_INPUT, asdict(how) if isinstance(how, RewardInput) else how)


def read_reward_input(config) -> RewardInput | None:
    """
    Reads the note in a model's config; None where there is none.

    Raises:
        ValueError: for a malformed note: people may write one, too.
    """
    note = getattr(config, REWARD_INPUT, None)  # absent from models trained elsewhere
    if note is None:
        return None
    try:
        how = RewardInput(**note)
        text = (how.kind, how.pad_token, how.ending, *how.special_tokens)
        is_valid = how.kind in KINDS and isinstance(how.special_tokens, list) and all(type(x) is str for x in text)
    except TypeError:  # another type or other entries
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"`{REWARD_INPUT}` in the reward model's config must have a `kind` ({', '.join(KINDS)}) and a `pad_token`, "
            f"and may have an `ending` and a list of `special_tokens`, got {note!r}. Mend or remove it."
        )
    return how


def check_reward_input(how: RewardInput | None, is_chat: bool, processing_class, name: str) -> None:
    """
    Refuses to ask a reward model about texts that it was not trained on, and warns where nobody knows.

    Args:
        how ([`RewardInput`], *optional*): The note of its training.
        is_chat (`bool`): True if it shall score conversations, not texts.
        processing_class: Its tokenizer.
        name (`str`): Its name in messages.

    Raises:
        ValueError: for conversations if it was trained on texts or the other way round, and for a tokenizer that puts
            other special tokens around a text.
    """
    asked = "chat" if is_chat else "text"
    tokenizer = text_tokenizer(processing_class)
    if how is None or not how.is_known:
        if not is_chat:
            warn_of_unknown_texts(how, tokenizer, name)
        return
    if how.kind != asked:
        raise ValueError(
            f"The reward model {name} was trained on {KINDS[how.kind]} (`{REWARD_INPUT}` in its config says so), and the "
            f"prompts are {KINDS[asked]}: its scores of them would mean nothing. Use a reward model that was trained on "
            f"{KINDS[asked]}, or prompts that are {KINDS[how.kind]}; if another program has trained it since, mend what "
            "the config says."
        )
    if how.special_tokens and special_tokens_of(tokenizer) != how.special_tokens:
        raise ValueError(
            f"The reward model {name} was trained on texts with the special tokens {how.special_tokens}, and its "
            f"tokenizer here adds {special_tokens_of(tokenizer)}. Pass the tokenizer that was saved with it."
        )


def warn_of_unknown_texts(how: RewardInput | None, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    note = RewardInput("text", tokenizer.pad_token, tokenizer.eos_token or "", special_tokens_of(tokenizer))
    if not note.ending and not note.special_tokens:
        return  # the text can be read in one way only
    reason = "does not say how it was trained" if how is None else "was trained on token ids"
    logger.warning_once(
        f"The reward model {name} {reason}, and is asked about texts as TRL's GRPOTrainer does: without an "
        "end-of-sequence token or other special tokens. If it was trained on texts that had them, as TRL's "
        f"RewardTrainer and this package train, its scores here are not what it learned. Then put "
        f'"{REWARD_INPUT}": {json.dumps(asdict(note), ensure_ascii=False)} into its config.json (of an adapter: '
        "tie_parameters.json)."
    )
