"""Adapters that a trainer starts from: loaded from a folder to be trained on, with a copy of them as the reference."""

from pathlib import Path

import torch
from accelerate.utils import set_seed
from huggingface_hub import snapshot_download
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.utils import TrainableTokensWrapper
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoProcessor, PreTrainedModel

from ..compat import REFERENCE, create_model_from_path
from .reward_adapters import fit_embeddings, head_names, tokenizer_of_adapter
from .shared_base import base_of_adapter


PROCESSOR_FILE = "processor_config.json"


# --- From a folder ---


def take_up_adapter(path: str, args, task_type: str, quantization_config=None) -> tuple[PeftModel, object | None]:
    """
    Loads an adapter on its base, to be trained further, as TRL loads a model.

    Args:
        path (`str`): Folder or Hub id of the adapter.
        args: The arguments of the trainer; `model_init_kwargs` are of the base, but for a `revision`, which is the adapter's.
        task_type (`str`): The kind of model that is trained. A reward model takes up a language model's adapter, and has a new head.
        quantization_config (`BitsAndBytesConfig`, *optional*): The base is quantized so.

    Returns:
        `tuple[PeftModel, object | None]`: The model, and the tokenizer or processor beside the adapter, if there is one.

    Raises:
        ValueError: for a learned prompt, which PEFT does not train further, and for a reward model's adapter where a
            language model is trained.
    """
    revision = (args.model_init_kwargs or {}).get("revision")
    folder = path if Path(path).is_dir() else snapshot_download(path, revision=revision)
    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(
            f"`model` {path} is a learned prompt ({config.peft_type.value}), which PEFT does not train further. Pass its "
            "base as `model`, with a `peft_config`."
        )
    is_of_rewards = bool(head_names(folder)) or config.task_type == "SEQ_CLS"
    if is_of_rewards and task_type != "SEQ_CLS":
        raise ValueError(
            f"`model` {path} is the adapter of a reward model, and a language model is to be trained. Pass one of a "
            "language model, or the base with a `peft_config`."
        )
    base = load_base(folder, args, task_type, quantization_config)
    if task_type == "SEQ_CLS" and not is_of_rewards:
        config.task_type, config.inference_mode = task_type, False
        model = get_peft_model(base, config)
        # PEFT wants the weights of everything that trains, and the head is new
        set_peft_model_state_dict(model, get_peft_model_state_dict(model) | load_peft_weights(folder, device="cpu"))
    else:
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    if (Path(folder) / PROCESSOR_FILE).is_file() and task_type != "SEQ_CLS":
        return model, AutoProcessor.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    has_tokenizer = (Path(folder) / "tokenizer_config.json").is_file()
    return model, tokenizer_of_adapter(folder, args.trust_remote_code) if has_tokenizer else None


def load_base(folder: str, args, task_type: str, quantization_config) -> PreTrainedModel:
    """Loads the base of the adapter in a folder, with the arguments of [`take_up_adapter`]."""
    name, revision = base_of_adapter(folder)
    kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {}) | {"revision": revision}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        kwargs["device_map"] = None
    architecture = None
    if task_type == "SEQ_CLS":
        architecture, kwargs["num_labels"] = AutoModelForSequenceClassification, 1
    set_seed(args.seed)  # of a new head
    base = create_model_from_path(name, architecture, **kwargs)
    fit_embeddings(base, folder, args.trust_remote_code)
    return base


# --- What trains ---


def say_that_head_has_no_bias(model: nn.Module) -> None:
    """
    Gives a head of which single tokens are trained (`trainable_token_indices`, with tied embeddings) an empty bias: TRL
    asks PEFT's wrapper around the head for one, and the wrapper, which knows of weights alone, has no answer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return
    if getattr(head.original_module, "bias", None) is not None:  # embeddings have none
        raise ValueError(
            "`trainable_token_indices` trains tokens of an LM head with a bias, which PEFT leaves out. Set "
            "`modules_to_save` to the embeddings and the head in its place."
        )
    head.register_parameter("bias", None)


# --- The reference ---


@torch.no_grad()
def copy_to_reference(model: PeftModel) -> None:
    """
    Makes the adapter [`REFERENCE`] a frozen copy of the active one. TRL copies the one called `default`, and of it only
    modules: the tokens of `trainable_token_indices`, LoRA on embeddings and IA3 are parameters without one.
    """
    name = model.active_adapter
    weights = dict(model.named_parameters(remove_duplicate=False))
    for path, weight in weights.items():
        before, _, after = f"{path}.".rpartition(f".{name}.")
        copied = weights.get(f"{before}.{REFERENCE}.{after}"[:-1]) if before else None
        if copied is not None:
            copied.copy_(weight)
    for path, weight in weights.items():
        if f".{REFERENCE}." in f"{path}.":
            weight.requires_grad_(False)
