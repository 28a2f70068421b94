"""Reward models by path or as objects: loaded, checked, and asked for scores in one way by trainers and recipes."""

import inspect
import sys
from collections.abc import Callable

import torch
from accelerate import DistributedType, PartialState
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import GRPOTrainer

from ..models.reward_inputs import (
    RewardInput,
    check_reward_input,
    read_reward_input,
    reward_input_ids,
    template_kwargs_of,
    text_tokenizer,
)
from ..models.score_head import padded
from .reward_adapters import reward_model_of_its_own, tokenizer_of_adapter
from .shared_base import is_adapter


logger = get_logger(__name__)

# Transformers' names for the table of a model that has learned its positions
POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions", "positions_embed")


def load_reward_model(
    path: str, processing_class=None, trust_remote_code: bool = False, **model_init_kwargs
) -> tuple[PreTrainedModel, object]:
    """
    Loads a reward model, whole or an adapter on a base of its own, with its tokenizer.

    Args:
        path (`str`): Folder or Hub id.
        processing_class (*optional*): Its tokenizer; by default the one that was saved with it.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Allow code of its repository to run.
        model_init_kwargs: Passed to `from_pretrained`.

    Returns:
        `tuple`: The model, in eval mode, and its tokenizer.

    Raises:
        ValueError: for a model without a trained head of one label, or without a token to pad with.
    """
    kwargs = {"trust_remote_code": trust_remote_code} | model_init_kwargs
    if is_adapter(path):
        model = reward_model_of_its_own(path, **kwargs)
        processing_class = processing_class or tokenizer_of_adapter(path, kwargs["trust_remote_code"])
    else:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        check_loaded(model, report, path)
        processing_class = processing_class or AutoTokenizer.from_pretrained(
            path, revision=kwargs.get("revision"), trust_remote_code=kwargs["trust_remote_code"]
        )
    make_ready(model, processing_class, path)
    return model, processing_class


def with_loaded_reward_models(reward_funcs: list, args, other_args: tuple, kwargs: dict) -> tuple[list, tuple, dict]:
    """
    Replaces paths in `reward_funcs`, among the arguments of a `GRPOTrainer`, by models with their tokenizers, loaded by
    the arguments that TRL loads them by.

    Args:
        reward_funcs (`list`): The rewards that the trainer was given.
        args (`GRPOConfig`): The arguments of the trainer.
        other_args (`tuple`), kwargs (`dict`): The arguments after `args`, by position and by name.

    Returns:
        `tuple[list, tuple, dict]`: `reward_funcs`, `other_args` and `kwargs`.
    """
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)[4:]  # after self, model, reward_funcs and args
    given = dict(zip(names, other_args, strict=False)) | kwargs
    classes = given.get("reward_processing_classes")
    if not isinstance(classes, list):
        classes = [None] * len(reward_funcs) if classes is None else [classes]
    if len(classes) != len(reward_funcs) or not any(isinstance(func, str) for func in reward_funcs):
        return reward_funcs, other_args, kwargs  # for the parent to take, or to refuse
    reward_funcs, classes = list(reward_funcs), list(classes)
    loading = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    if args.distributed_state.distributed_type in (DistributedType.MULTI_GPU, DistributedType.DEEPSPEED):
        loading["device_map"] = None
    for index, func in enumerate(reward_funcs):
        if isinstance(func, str):
            reward_funcs[index], classes[index] = load_reward_model(func, classes[index], **loading)
    position = names.index("reward_processing_classes")
    if len(other_args) > position:
        return reward_funcs, (*other_args[:position], classes, *other_args[position + 1 :]), kwargs
    return reward_funcs, other_args, kwargs | {"reward_processing_classes": classes}


def check_loaded(model: PreTrainedModel, report: dict, path: str) -> None:
    """Refuses weights that `from_pretrained` has drawn at random."""
    mismatched = {name: (tuple(saved), tuple(needed)) for name, saved, needed in report["mismatched_keys"]}
    for name, (saved, needed) in mismatched.items():
        if saved[1:] == needed[1:]:
            raise ValueError(
                f"The reward model {path} has {saved[0]} labels (`{name}`), and a reward is one number. Use a model with "
                "one label, e.g. one that `RankingRewardTrainer` or TRL's `RewardTrainer` has trained."
            )
        raise ValueError(f"The reward model {path} does not fit its config: `{name}` is {saved}, not {needed}.")
    missing = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
    if missing:
        raise ValueError(
            f"{path} has no weights for `{missing[0]}`, which would be drawn at random, and the rewards with it. It is "
            "no reward model: train one on it first, e.g. with `RankingRewardTrainer`."
        )


def make_ready(model: nn.Module, processing_class, name: str) -> RewardInput | None:
    """
    Makes a model score the last token that is no padding, without dropout.

    Args:
        model (`nn.Module`): A sequence classification model.
        processing_class: Its tokenizer, which is given a padding token if it has none: the end-of-sequence token, as
            TRL does, or that of the model's config.
        name (`str`): The name of the model in messages.

    Returns:
        [`RewardInput`], *optional*: The note of its training.

    Raises:
        ValueError: for a model with several labels, or if there is no token to pad with.
    """
    if model.config.num_labels != 1:
        raise ValueError(
            f"The reward model {name} has {model.config.num_labels} labels, and a reward is one number. Load it with "
            "`num_labels=1` if it was trained so, or use another."
        )
    how, tokenizer = read_reward_input(model.config), text_tokenizer(processing_class)
    config = model.config.get_text_config()
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        elif config.pad_token_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        else:
            raise ValueError(
                f"The reward model {name} has no padding token, nor its tokenizer, nor an end-of-sequence token to take "
                "in its place, so texts of different lengths cannot be scored together. Set `tokenizer.pad_token` to a "
                "token that no text holds, save the tokenizer with the model, or pass it."
            )
    # The score is that of the last token which is no padding, by what was padding in training
    pad_token = tokenizer.pad_token if how is None else how.pad_token
    if how is not None and pad_token not in tokenizer.get_vocab():
        raise ValueError(
            f"The reward model {name} was trained with the padding token {pad_token!r}, which its tokenizer here does "
            "not know. Pass the tokenizer that was saved with it."
        )
    config.pad_token_id = tokenizer.convert_tokens_to_ids(pad_token)
    model.eval()
    return how


def max_text_length(model: nn.Module) -> int | None:
    """Returns the number of positions that a model has learned; None if it computes them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            # Some begin a few rows later: at `offset`, or after that of padding
            first = vars(module).get("offset", 0) if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return None


class RewardModel:
    """
    A reward model with its tokenizer, ready to score texts.

    Args:
        model (`nn.Module`): A sequence classification model with one label, without distributed wrappers.
        processing_class: Its tokenizer.
        name (`str`): Its name in messages.
    """

    def __init__(self, model: nn.Module, processing_class, name: str):
        PartialState()  # the logger asks it which process this is, and there may be no trainer
        self.how = make_ready(model, processing_class, name)
        self.model, self.processing_class, self.name = model, processing_class, name
        self.max_length = max_text_length(model)

    def check(self, is_chat: bool) -> None:
        """Refuses texts, or conversations, if the model was not trained on such; see [`check_reward_input`]."""
        check_reward_input(self.how, is_chat, self.processing_class, self.name)

    def check_lengths(self, prompts: list, max_completion_length: int) -> None:
        """
        Refuses prompts after which a completion may run beyond the positions that the model has learned.

        Every token holds at least one byte, so only prompts with more bytes than there are tokens left are tokenized.
        """
        if self.max_length is None:
            return
        empty = "" if isinstance(prompts[0], str) else [{"role": "assistant", "content": ""}]
        around = len(self.input_ids("" if isinstance(prompts[0], str) else empty, empty))
        room = self.max_length - max_completion_length
        for row, prompt in enumerate(prompts):
            if num_bytes(prompt) + around * (1 if isinstance(prompt, str) else len(prompt) + 1) <= room:
                continue
            num_tokens = len(self.input_ids(prompt, empty))
            if num_tokens > room:
                raise ValueError(
                    f"The prompt in row {row} of `train_dataset` has {num_tokens} tokens for the reward model "
                    f"{self.name}, with what goes around a text, and `max_completion_length` is "
                    f"{max_completion_length}; together that is more than the {self.max_length} positions that the "
                    "model has learned. Shorten or filter the prompts, lower `max_completion_length`, or use another "
                    "reward model."
                )

    def input_ids(self, prompt: str | list, completion: str | list, row: dict | None = None, **template_kwargs):
        """
        Returns [`reward_input_ids`] for this model. Arguments of the chat template in a dataset's `row` count if the
        model's note says that it was trained on conversations.
        """
        if row is not None and self.how is not None and self.how.kind == "chat":
            template_kwargs |= template_kwargs_of(row)
        return reward_input_ids(prompt, completion, self.processing_class, self.how, **template_kwargs)

    def fits(self, ids: list[int]) -> bool:
        """
        Returns True if the model has a position for each token. Warns if it has not, or was not made for so many.
        """
        made_for = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)  # absent from others
        if self.max_length is not None and len(ids) > self.max_length:
            logger.warning_once(
                f"The reward model {self.name} has learned {self.max_length} positions, and some texts are longer. They "
                "have no score. Shorten prompts or completions, or use another."
            )
            return False
        if self.max_length is None and made_for is not None and 0 < made_for < len(ids):
            logger.warning_once(
                f"The reward model {self.name} was made for {made_for} positions, and some texts are longer: their scores "
                "may mean nothing. Shorten prompts or completions, or use another."
            )
        return True

    @torch.inference_mode()
    def score(self, ids: list[list[int]], forward: Callable | None = None) -> list[float | None]:
        """
        Scores texts, and gives None for those that do not fit.

        Args:
            ids (`list[list[int]]`): Texts from `input_ids`.
            forward (`Callable`, *optional*): Run in place of the model itself.
        """
        fit = [self.fits(row) for row in ids]
        rows = [row[: self.max_length] for row in ids]  # all are run: sharded models need equally many in each process
        inputs = padded(rows, self.model.config.get_text_config().pad_token_id)
        if self.how is None and "token_type_ids" in text_tokenizer(self.processing_class).model_input_names:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])  # as TRL asks
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        logits = (forward or self.model)(**inputs).logits[:, 0]
        if not logits.isfinite().all():
            raise ValueError(f"The reward model {self.name} returned nan or an infinite score.")
        return [score if fits else None for score, fits in zip(logits.tolist(), fit, strict=True)]


def num_bytes(prompt: str | list) -> int:
    """
    Returns the largest number of tokens that a prompt can have; more than any model has positions if that is unknown.
    """
    if isinstance(prompt, str):
        return len(prompt.encode())
    contents = [message.get("content") for message in prompt]
    return sum(len(c.encode()) for c in contents) if all(isinstance(c, str) for c in contents) else sys.maxsize
