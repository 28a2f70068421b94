"""Merging a trained adapter into its base, with everything that goes with it, and measuring what that loses."""

import copy
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .adapters import shared_adapted_weights
from .critic import CRITIC_NAME, Critic
from .critic_files import ADAPTER_CONFIG, ADAPTER_NAME, VALUE_HEAD_FILE, read_value_head, save_critic
from .reward_adapters import check_reward_adapter, fit_embeddings, head_names, tokenizer_of_adapter
from .reward_inputs import REWARD_INPUT, write_reward_input
from .shared_base import base_of_adapter, frozen_base
from .tie_parameters import TIE_PARAMETERS_FILE, read_config, write_to_config


# How far two merged weights may differ, over the largest of their elements, for sums that were formed in other orders
ROUNDING = 1e-6


def merge_adapter(
    adapter: str, output_dir: str, dtype: str | torch.dtype = "bfloat16", trust_remote_code: bool = False
) -> dict[str, float]:
    r"""
    Write an adapter and its base as one plain model: a policy with its critic and tokenizer, or a reward model with its
    score head and tie parameters.

    The base is loaded in float32, never quantized: merging into 4 bits would round away most of a small adapter. Sums
    are rounded once, to `dtype`. If the adapter was trained on a quantized base, that base's own rounding error (of
    some 9% of the weights' size in nf4) is not in the merged model, which thus differs from what was trained; compare
    them on your data.

    Args:
        adapter (`str`): Folder or Hub id.
        output_dir (`str`): A new or empty folder.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bfloat16"`): Of the model that is written.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether code in the base's repository may be run.

    Returns:
        `dict[str, float]`: `precision_loss`, |round(W') - W'| / |W' - W| in Frobenius norms over all weights W that the
        adapter changes to W', and the same for `critic_precision_loss` if the critic is an adapter.

    Raises:
        ValueError: for what is no adapter, a base that is stored quantized, a reward adapter without its head, or a
            folder that holds something.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    output = Path(output_dir)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"`output_dir` {output} is not empty. Name a new folder.")
    folder = Path(adapter) if Path(adapter).is_dir() else Path(snapshot_download(adapter))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} holds no {ADAPTER_CONFIG}: it is no adapter, and there is nothing to merge.")
    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(f"{adapter} is a learned prompt ({config.peft_type.value}), which no weight can take up.")
    base_name, revision = base_of_adapter(str(folder))
    of_base = {"revision": revision, "trust_remote_code": trust_remote_code}
    if getattr(AutoConfig.from_pretrained(base_name, **of_base), "quantization_config", None) is not None:
        raise ValueError(
            f"The base {base_name} is stored quantized, and merging into it would lose most of what the adapter "
            "learned. Set `base_model_name_or_path` in the adapter's config to the original it was quantized from."
        )
    # Without a task type it may be either; its own head tells
    is_reward_model = config.task_type == "SEQ_CLS" or (config.task_type is None and bool(head_names(str(folder))))
    if is_reward_model:
        base, info = AutoModelForSequenceClassification.from_pretrained(
            base_name, num_labels=1, dtype=torch.float32, output_loading_info=True, **of_base
        )
        check_reward_adapter(str(folder), info["missing_keys"])
    else:
        base = AutoModelForCausalLM.from_pretrained(base_name, dtype=torch.float32, **of_base)
    fit_embeddings(base, str(folder), trust_remote_code)
    peft_model = PeftModel.from_pretrained(base, folder)
    has_critic_adapter = (folder / CRITIC_NAME / ADAPTER_NAME).is_dir()
    critic_base = copy.deepcopy(frozen_base(peft_model)) if has_critic_adapter else None
    model, loss = merge(peft_model, dtype)
    losses = {"precision_loss": loss}
    tokenizer = tokenizer_of_adapter(str(folder), trust_remote_code)
    if is_reward_model:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    elif (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if (folder / TIE_PARAMETERS_FILE).is_file():
        saved = read_config(str(folder))
        if "ranking_model" in saved:
            write_to_config(model, saved["ranking_model"], saved["log_tie"])
        if REWARD_INPUT in saved:
            write_reward_input(model.config, saved[REWARD_INPUT])
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    losses.update(merge_critic(folder, critic_base, output, dtype))
    return losses


def merge_critic(folder: Path, base: PreTrainedModel | None, output: Path, dtype: torch.dtype) -> dict[str, float]:
    """
    Take over a critic: a head as it is, a model of its own as it is, an adapter merged into a model of its own, `base`,
    which is the trunk of the policy before its adapter.
    """
    if (folder / VALUE_HEAD_FILE).is_file():
        shutil.copy(folder / VALUE_HEAD_FILE, output)
    source = folder / CRITIC_NAME
    if not (source / ADAPTER_NAME).is_dir():
        if source.is_dir():
            shutil.copytree(source, output / CRITIC_NAME)
        return {}
    trunk, loss = merge(PeftModel.from_pretrained(base, source / ADAPTER_NAME), dtype)
    critic = Critic(trunk.config.get_text_config().hidden_size, trunk=trunk)
    read_value_head(critic, source)
    save_critic(critic, output)
    return {"critic_precision_loss": loss}


@torch.no_grad()
def merge(model: PeftModel, dtype: torch.dtype) -> tuple[torch.nn.Module, float]:
    """The base of `model`, in float32, with the adapter in its weights, of `dtype`; and the `precision_loss`."""
    tied_configs = part_shared_weights(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    lost = changed = 0.0
    for layer in tqdm(layers, desc="Merging"):
        before = {name: weight.clone() for name, weight in layer.get_base_layer().named_parameters()}
        layer.merge()
        for name, weight in layer.get_base_layer().named_parameters():
            lost += (weight.to(dtype).float() - weight).double().square().sum().item()
            changed += (weight - before[name]).double().square().sum().item()
    loss = (lost / changed) ** 0.5 if changed else 0.0
    merged = model.merge_and_unload()
    is_tied = tie_equal_weights(merged)
    for config in tied_configs:
        config.tie_word_embeddings = is_tied
    return merged.to(dtype), loss


def part_shared_weights(model: PeftModel) -> list[PreTrainedConfig]:
    """
    Give modules that share a weight which an adapter is on (embeddings tied to the head) a copy each: what one layer's
    adapter adds is not for the others, and each of several adapters would add to the same weight.

    Returns:
        `list[PreTrainedConfig]`: The configs that call weights tied.
    """
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    shared = shared_adapted_weights(model)
    seen = set()
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) in seen:
                module._parameters[name] = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            elif id(weight) in shared:
                seen.add(id(weight))
    configs += [config.get_text_config() for config in configs]
    return [config for config in configs if getattr(config, "tie_word_embeddings", False)]  # others have no embeddings


def tie_equal_weights(model: PreTrainedModel) -> bool:
    """
    Tie again what the merge left equal, but for rounding, among the weights that `model` tied. If some differ, each gets
    a weight of its own: its config can call all of them tied or none, and one that the config calls untied and another
    module holds too would be left out of what is saved, and drawn at random when that is loaded.

    Returns:
        `bool`: True if all are tied.
    """
    ties = model.all_tied_weights_keys.items()
    pairs = [(model.get_parameter(target), model.get_parameter(source)) for target, source in ties]
    is_tied = all((target - source).abs().max() <= ROUNDING * source.abs().max() for target, source in pairs)
    for (path, _), (target, source) in zip(ties, pairs, strict=True):
        module_path, _, name = path.rpartition(".")
        weight = source if is_tied else torch.nn.Parameter(target.detach().clone(), requires_grad=False)
        model.get_submodule(module_path)._parameters[name] = weight
    return is_tied
