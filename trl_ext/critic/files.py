"""
A critic on disk, beside the policy, which stays loadable without this package:

    value_head.safetensors             the head of a shared critic
    critic/                            a separate critic: its trunk, as `save_pretrained` writes it, and
    critic/value_head.safetensors      its head
    critic/adapter/                    or the adapter of one on the policy's base, beside that head; not in `critic/`
                                       itself, where transformers would take it for one of the policy's
"""

import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from .critic import CRITIC_NAME, Critic
from .heads import ActionValueHead


VALUE_HEAD_FILE = "value_head.safetensors"
ADAPTER_NAME = "adapter"  # folder within the critic's
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = [f"{CRITIC_NAME}/*", VALUE_HEAD_FILE, ADAPTER_CONFIG, "adapter_model.safetensors"]


def save_critic(critic: Critic, directory: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Write the critic beside the policy, in the layout this module describes.

    Args:
        critic ([`Critic`]): What to write.
        directory (`str`): The policy's folder.
        state_dict (`dict[str, torch.Tensor]`, *optional*): The critic's gathered weights, where they are sharded.
    """
    state_dict = critic.state_dict() if state_dict is None else state_dict
    folder = Path(directory)
    # An earlier run's critic of the other kind must not be taken for this one's
    if critic.trunk is None:
        shutil.rmtree(folder / CRITIC_NAME, ignore_errors=True)
    else:
        (folder / VALUE_HEAD_FILE).unlink(missing_ok=True)
        folder = folder / CRITIC_NAME
        if folder.is_dir() and (folder / ADAPTER_NAME).is_dir() != critic.is_adapter:
            shutil.rmtree(folder)
        if critic.is_adapter:
            critic.trunk.save_pretrained(folder / ADAPTER_NAME, save_embedding_layers=False)
            (folder / ADAPTER_NAME / "README.md").unlink(missing_ok=True)  # PEFT's, which says nothing of a critic
        else:
            trunk = {name.removeprefix("trunk."): w for name, w in state_dict.items() if name.startswith("trunk.")}
            critic.trunk.save_pretrained(folder, state_dict=trunk)
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        name.removeprefix("value_head."): weight.float().contiguous()
        for name, weight in state_dict.items()
        if name.startswith("value_head.")
    }
    save_file(head, folder / VALUE_HEAD_FILE, metadata={"format": "pt"})


def restore_critic(critic: Critic, directory: str) -> None:
    """Fill an existing critic (of either kind) from what [`save_critic`] wrote to `directory`."""
    if critic.trunk is None:
        load_value_head(critic, directory)
        return
    folder = Path(directory) / CRITIC_NAME
    if not folder.is_dir() or (folder / ADAPTER_NAME).is_dir() != critic.is_adapter:
        kind = "adapter" if critic.is_adapter else "separate"
        raise FileNotFoundError(f"No {CRITIC_NAME}/ folder of a critic of kind {kind!r} in {directory}.")
    if critic.is_adapter:
        load_adapter_weights(critic.trunk, folder / ADAPTER_NAME)
        load_value_head(critic, folder)
        return
    trunk = AutoModel.from_pretrained(folder, dtype=critic.trunk.dtype)
    critic.trunk.load_state_dict(trunk.state_dict())
    load_value_head(critic, folder)


def read_value_head(critic: Critic, folder: str | Path) -> None:
    """Give the critic the head that is saved in `folder`, of either kind."""
    path = value_head_file(folder)
    with safe_open(path, framework="pt") as file:
        shape = file.get_slice("embedding").get_shape() if "embedding" in file.keys() else None
    if shape is not None:
        critic.value_head = ActionValueHead(critic.value_head, *shape)
    load_value_head(critic, folder)


def load_value_head(critic: Critic, folder: str | Path) -> None:
    """Fill the critic's head from the file in `folder`, or say why it does not fit."""
    path = value_head_file(folder)
    state = load_file(path)
    saved = {name: tuple(weight.shape) for name, weight in state.items()}
    expected = {name: tuple(weight.shape) for name, weight in critic.value_head.state_dict().items()}
    if saved != expected:
        raise ValueError(
            f"{path} does not fit this model: the file holds {saved}, its trunk needs {expected}. Load the model that "
            "the critic was saved with, or start a new critic by removing the file."
        )
    critic.value_head.load_state_dict(state)


def value_head_file(folder: str | Path) -> Path:
    path = Path(folder) / VALUE_HEAD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"No {VALUE_HEAD_FILE} in {folder}: no critic was saved there.")
    return path


def adapter_weights(trunk: PeftModel) -> dict[str, torch.Tensor]:
    """An adapter as PEFT saves it: without the embeddings under it, which are the base's."""
    return get_peft_model_state_dict(trunk, save_embedding_layers=False)


def load_adapter_weights(trunk: PeftModel, folder: str | Path) -> None:
    """Fill an adapter from where one like it was saved, with an error where names or shapes differ."""
    weights = load_peft_weights(str(folder), device="cpu")
    own, saved = ({name: tuple(w.shape) for name, w in state.items()} for state in (adapter_weights(trunk), weights))
    if own != saved:
        differing = sorted(set(own.items()) ^ set(saved.items()))[0]
        raise ValueError(
            f"The adapter in {folder} does not fit the critic's (first difference: {differing}). Use the same rank and "
            "`target_modules` for the policy's `peft_config` as it was trained with."
        )
    set_peft_model_state_dict(trunk, weights)


def local_folder(path: str) -> Path:
    """`path` itself if it is a folder, else the critic's files of the Hub repository of that name."""
    folder = Path(path)
    return (
        folder
        if folder.is_dir()
        else Path(snapshot_download(path, allow_patterns=[f"{CRITIC_NAME}/*", VALUE_HEAD_FILE]))
    )
