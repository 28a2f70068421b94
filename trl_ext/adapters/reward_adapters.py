"""Reward models that are adapters: found among `reward_funcs`, and put on the policy's base if it was theirs."""

import copy
from collections.abc import Collection
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import patch_environment
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..compat import get_config_model_id
from ..models.quantization import copy_quantization_flags, is_quantized, quantization_of
from ..models.reward_inputs import REWARD_INPUT, write_reward_input
from ..models.tie_parameters import read_config
from .new_layers import new_layers, unquantized
from .precision import cast_input
from .shared_base import MAIN, base_of_adapter, frozen_base, is_adapter, is_same_model


logger = get_logger(__name__)


def split_reward_adapters(reward_funcs) -> tuple[list, dict[int, str]]:
    """
    Splits TRL's `reward_funcs` into a list with a stand-in for each adapter given by path or Hub id, and the adapters
    by their index: if they share the policy's base can be known only when that is loaded.
    """
    reward_funcs = [] if reward_funcs is None else reward_funcs
    reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
    adapters = {i: path for i, path in enumerate(reward_funcs) if isinstance(path, str) and is_adapter(path)}
    for index, path in adapters.items():

        def stand_in(completions, **kwargs):
            raise RuntimeError("A reward adapter was asked for rewards before it was loaded.")

        stand_in.__name__ = Path(path).name
        reward_funcs[index] = stand_in
    return reward_funcs, adapters


def load_reward_adapter(policy, path: str, tokenizer, args, accelerator: Accelerator, is_fsdp: bool) -> tuple:
    """
    Loads a reward model that is an adapter, on the policy's base where that is its own.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): The policy, perhaps in a distributed wrapper.
        path (`str`): Folder or Hub id of the adapter.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; by default that beside it.
        args ([`~trl.GRPOConfig`]): The configuration of the trainer.
        accelerator (`Accelerator`): Knows the processes.
        is_fsdp (`bool`): FSDP shards the policy.

    Returns:
        `tuple`: The model, prepared for evaluation, and its tokenizer.

    Raises:
        ValueError: under DeepSpeed ZeRO-3, and for an adapter without a head.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"The reward model {path} is an adapter, and DeepSpeed ZeRO-3 splits its base over the processes. Merge "
            "it into its base first (`merge_adapter`), or use ZeRO-2 or DDP."
        )
    has_base = isinstance(policy, PeftModel)
    reward_model = reward_model_on_base(policy, path) if has_base and not is_fsdp else None
    if reward_model is not None:
        logger.info(f"The reward adapter {path} shares the policy's base.")
        warn_of_other_quantization(policy, path)
    else:
        reason = ", as FSDP shards the policy's" if has_base and is_fsdp else ""
        name, _ = base_of_adapter(path)
        logger.info(f"The reward adapter {path} is loaded on a base of its own, {name}{reason}.")
        kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        # Not by the first process alone, which would send it to the others only if it trained
        with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
            reward_model = reward_model_of_its_own(path, **kwargs)
        if not is_quantized(reward_model):
            reward_model.to(accelerator.device)
    if tokenizer is None:
        tokenizer = tokenizer_of_adapter(path, args.trust_remote_code)
    return accelerator.prepare_model(reward_model, device_placement=False, evaluation_mode=True), tokenizer


UNKNOWN = object()
# Starts of LoRA that change the base, which no other model can then share
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def warn_of_other_quantization(policy: PeftModel, path: str) -> None:
    """Warns if the policy's base is in other bits than the reward adapter was trained on, as far as that was saved."""
    trained_on, here = read_config(path).get("base_quantization", UNKNOWN), quantization_of(policy)
    if trained_on is not UNKNOWN and trained_on != here:
        logger.warning(
            f"The reward adapter {path} was trained on its base in {trained_on or 'full precision'}, and scores with the "
            f"policy's, in {here or 'full precision'}: its rewards differ by the rounding of the weights. Quantize both "
            "in the same way, or give the reward model a base of its own by merging it (`merge_adapter`)."
        )


def head_names(path: str) -> list[str]:
    """Lists the heads of a classifier (`score`, `classifier`) that an adapter in a folder or on the Hub holds whole."""
    weights = load_peft_weights(path, device="cpu")
    return [
        head for head in SEQ_CLS_HEAD_NAMES if any(f".{head}." in name and "lora_" not in name for name in weights)
    ]


def check_reward_adapter(path: str, missing_weights: Collection[str]) -> None:
    """
    Refuses an adapter without the layers that its rewards come from.

    Args:
        path (`str`): Folder or Hub id of the adapter.
        missing_weights (`Collection[str]`): Names of the classifier's weights that its base does not hold: those of the
            head, and with some encoders of a layer before it. Each load draws them anew.
    """
    held = {name.removeprefix("base_model.model.") for name in load_peft_weights(path, device="cpu")}
    held |= {name.replace(".base_layer.", ".") for name in held}
    layers = sorted({name.rpartition(".")[0] for name in missing_weights if name not in held})
    if layers:
        is_head = any(name in SEQ_CLS_HEAD_NAMES for name in layers) or not head_names(path)
        without = "a score head" if is_head else f"the layers {layers} that come before its head"
        raise ValueError(
            f"The reward model {path} is an adapter without {without}, so its rewards would be those of a random "
            f"one. It was trained with the wrong `task_type`, or saved without `modules_to_save={layers}`: train it "
            "again with `RankingRewardTrainer`, or with `task_type='SEQ_CLS'` and these in the `LoraConfig`."
        )


def reward_model_on_base(policy: PeftModel, path: str) -> PeftModel | None:
    """
    Loads the reward adapter at `path`, with its score head, on the base that `policy` holds already.

    Bases are told apart by their names and revisions: of weights that were changed in memory, nothing is known.

    Args:
        policy (`PeftModel`): A language model with an adapter of its own.
        path (`str`): Folder or Hub id of an adapter of a sequence classification model with one label.

    Returns:
        `PeftModel` in eval mode, which shares the frozen weights of `policy`; or `None` where the adapter was trained
        on another base, or on a model without a `score` head on a causal trunk.

    Raises:
        ValueError: if it has no head, or does not fit the base although it names it.
    """
    base = policy.get_base_model()
    name, revision = base_of_adapter(path)
    if not is_same_model(name, get_config_model_id(base.config)):
        return None
    if revision != (policy.active_peft_config.revision or MAIN):
        return None
    starts = [str(getattr(config, "init_lora_weights", "")) for config in policy.peft_config.values()]
    if any(start.startswith(CHANGES_BASE) for start in starts):
        return None
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    if "score" not in model._modules:
        return None
    check_reward_adapter(path, [f"score.{name}" for name, _ in model.score.named_parameters()])
    setattr(model, model.base_model_prefix, frozen_base(policy))
    if saved_embeddings(model, path) is not None:  # which are not to be written over the policy's
        model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
        fit_embeddings(model, path)
    model.score.float().to_empty(device=policy.device)
    with torch.no_grad():
        for weight in model.score.parameters():
            weight.fill_(torch.nan)  # until the adapter's file fills it
    copy_quantization_flags(base, model)
    return load_adapter(model, path).eval()


def reward_model_of_its_own(path: str, **model_init_kwargs) -> PeftModel:
    """Loads the reward adapter at `path`, with its head, on a base of its own."""
    name, revision = base_of_adapter(path)
    model_init_kwargs |= {"num_labels": 1, "revision": revision}
    if model_init_kwargs.get("quantization_config") is not None:
        trained = list(getattr(PeftConfig.from_pretrained(path), "modules_to_save", None) or [])
        trained += new_layers(name, model_init_kwargs)
        model_init_kwargs["quantization_config"] = unquantized(model_init_kwargs["quantization_config"], trained)
    base, info = AutoModelForSequenceClassification.from_pretrained(
        name, output_loading_info=True, **model_init_kwargs
    )
    check_reward_adapter(path, info["missing_keys"])
    fit_embeddings(base, path, model_init_kwargs.get("trust_remote_code", False))
    return load_adapter(base, path).eval()


def load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """
    Puts an adapter on its base for inference, with the head in the precision that it was trained in, and the note of
    its training in the config. The error for an adapter that does not fit says what to do.
    """
    for name in SEQ_CLS_HEAD_NAMES:
        if name in model._modules:
            model._modules[name].float().register_forward_pre_hook(cast_input)
    note = read_config(path).get(REWARD_INPUT)
    if note is not None:
        write_reward_input(model.config, note)
    try:
        return PeftModel.from_pretrained(model, path)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"The adapter {path} does not fit {get_config_model_id(model.config)}, which it names as its base: it was "
            "trained on another model, or this one has changed since. Load the base it was trained on, or train the "
            f"adapter again. ({str(error).strip().splitlines()[0]})"
        ) from error


def saved_embeddings(model: PreTrainedModel, path: str) -> torch.Tensor | None:
    """
    Reads the input embeddings `(V, H)` that the adapter at `path` brings along for its base, as PEFT saves them if they
    were resized or an adapter is on them.
    """
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    weights = load_peft_weights(path, device="cpu")
    keys = [f"base_model.model.{name}.{kind}weight" for kind in ("", "base_layer.", "token_adapter.base_layer.")]
    return next((weights[key] for key in keys if key in weights), None)


def fit_embeddings(model: PreTrainedModel, path: str, trust_remote_code: bool = False) -> None:
    """
    Resizes a base's embeddings, in place, to those that the adapter at `path` was trained with: as many as it brings
    along, or else as its tokenizer needs, if that has more tokens than the base's own. (Some bases have tokens beyond
    their embeddings, such as Gemma 3 1B one for images; a row for it would be drawn at random, and sampled.)
    """
    saved, num_tokens = saved_embeddings(model, path), model.get_input_embeddings().weight.size(0)
    needed = num_tokens
    if saved is not None:
        needed = saved.size(0)
    elif (num_own := len(tokenizer_of_adapter(path, trust_remote_code))) > num_tokens:
        name, revision = base_of_adapter(path)
        try:
            num_of_base = len(
                AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
            )
        except (OSError, ValueError):  # the base has no tokenizer
            num_of_base = 0
        needed = num_own if num_own > num_of_base else num_tokens
    if needed != num_tokens:
        model.resize_token_embeddings(needed, mean_resizing=saved is None)


def tokenizer_of_adapter(path: str, trust_remote_code: bool = False):
    """Loads the tokenizer saved with an adapter, or else that of its base."""
    has_own = (Path(path) / "tokenizer_config.json").is_file() or not Path(path).is_dir()
    name, revision = (path, None) if has_own else base_of_adapter(path)
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
