"""Merging a trained adapter into its base, with everything that lies beside it, and measuring what rounding loses."""

import copy
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..adapters.merging import merge
from ..adapters.reward_adapters import check_reward_adapter, fit_embeddings, head_names, tokenizer_of_adapter
from ..adapters.shared_base import base_of_adapter, frozen_base
from ..critic.critic import Critic
from ..critic.files import ADAPTER_CONFIG, ADAPTER_NAME, CRITIC_NAME, VALUE_HEAD_FILE
from ..models.reward_inputs import REWARD_INPUT, write_reward_input
from ..models.tie_parameters import TIE_PARAMETERS_FILE, read_config, write_to_config


def merge_adapter(
    adapter: str, output_dir: str, dtype: str | torch.dtype = "bfloat16", trust_remote_code: bool = False
) -> dict[str, float]:
    r"""
    Writes an adapter and its base as one plain model: a policy with its critic and tokenizer, or a reward model with its
    score head and tie parameters.

    The base is loaded in float32, never quantized: merging into 4 bits would round away most of a small adapter. Sums
    are rounded once, to `dtype`. If the adapter was trained on a quantized base, that base's own rounding error (of
    some 9% of the weights' size in nf4) is not in the merged model, which thus differs from what was trained; compare
    them on your data.

    Args:
        adapter (`str`): Folder or Hub id.
        output_dir (`str`): A new or empty folder.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bfloat16"`): Type of the written weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`): True lets code in the base's repository run.

    Returns:
        `dict[str, float]`: `precision_loss`, |round(W') - W'| / |W' - W| in Frobenius norms over all weights W that the
        adapter changes to W', and the same for `critic_precision_loss` if the critic is an adapter.

    Raises:
        ValueError: for a folder without an adapter, a base that is stored quantized, a reward adapter without its
            head, or an `output_dir` that is not empty.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    output = Path(output_dir)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"`output_dir` {output} is not empty. Name a new folder.")
    folder, config = _adapter_folder(adapter)
    # Without a task type the adapter may be of either kind, and its head tells which
    is_reward_model = config.task_type == "SEQ_CLS" or (config.task_type is None and bool(head_names(str(folder))))
    base = _float32_base(folder, is_reward_model, trust_remote_code)
    peft_model = PeftModel.from_pretrained(base, folder)
    has_critic_adapter = (folder / CRITIC_NAME / ADAPTER_NAME).is_dir()
    critic_base = copy.deepcopy(frozen_base(peft_model)) if has_critic_adapter else None
    model, loss = merge(peft_model, dtype)
    tokenizer = tokenizer_of_adapter(str(folder), trust_remote_code)
    _take_over_settings(model, tokenizer, folder, is_reward_model)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {"precision_loss": loss} | merge_critic(folder, critic_base, output, dtype)


def _adapter_folder(adapter: str) -> tuple[Path, PeftConfig]:
    """Returns the local folder of an adapter that can be merged, and its configuration."""
    folder = Path(adapter) if Path(adapter).is_dir() else Path(snapshot_download(adapter))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} holds no {ADAPTER_CONFIG}: it is no adapter, and there is nothing to merge.")
    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(f"{adapter} is a learned prompt ({config.peft_type.value}), which no weight can take up.")
    return folder, config


def _float32_base(folder: Path, is_reward_model: bool, trust_remote_code: bool) -> PreTrainedModel:
    """Loads the base of the adapter in `folder`, with embeddings of the adapter's size."""
    base_name, revision = base_of_adapter(str(folder))
    of_base = {"revision": revision, "trust_remote_code": trust_remote_code}
    if getattr(AutoConfig.from_pretrained(base_name, **of_base), "quantization_config", None) is not None:
        raise ValueError(
            f"The base {base_name} is stored quantized, and merging into it would lose most of what the adapter "
            "learned. Set `base_model_name_or_path` in the adapter's config to the original it was quantized from."
        )
    if is_reward_model:
        base, info = AutoModelForSequenceClassification.from_pretrained(
            base_name, num_labels=1, dtype=torch.float32, output_loading_info=True, **of_base
        )
        check_reward_adapter(str(folder), info["missing_keys"])
    else:
        base = AutoModelForCausalLM.from_pretrained(base_name, dtype=torch.float32, **of_base)
    fit_embeddings(base, str(folder), trust_remote_code)
    return base


def _take_over_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, is_reward_model: bool
) -> None:
    """Gives the merged model the settings that lie beside the adapter: of padding, generation, ties and rewards."""
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


def merge_critic(folder: Path, base: PreTrainedModel | None, output: Path, dtype: torch.dtype) -> dict[str, float]:
    """
    Writes the critic beside an adapter: a head or a model of its own as it is, an adapter merged into a model of its
    own, `base`, the trunk of the policy before its adapter.
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
    critic.take_up_head(source)
    critic.save(output)
    return {"critic_precision_loss": loss}
