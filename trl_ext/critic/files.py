"""
A critic on disk, beside the policy, which stays loadable without this package:

    value_head.safetensors             the head of a shared critic
    critic/                            a separate critic: its trunk, as `save_pretrained` writes it, and
    critic/value_head.safetensors      its head
    critic/adapter/                    or the adapter of one on the policy's base, beside that head; not in `critic/`
                                       itself, where transformers would take it for one of the policy's
"""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .heads import UNITS, Units


CRITIC_NAME = "critic"  # attribute of the policy, prefix of the critic's parameters, and folder of a separate critic
VALUE_HEAD_FILE = "value_head.safetensors"
ADAPTER_NAME = "adapter"  # folder within the critic's
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = [f"{CRITIC_NAME}/*", VALUE_HEAD_FILE, ADAPTER_CONFIG, "adapter_model.safetensors"]


def save_value_head(head: Units, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes a head's weights, which `state_dict` holds gathered, and its units in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.float().contiguous() for name, x in {**state_dict, **head.units}.items()}
    save_file(tensors, folder / VALUE_HEAD_FILE, metadata={"format": "pt"})


def embedding_shape(folder: str | Path) -> list[int] | None:
    """Returns the shape of the table of tokens of the action-value head in `folder`, None for a value head."""
    with safe_open(value_head_file(folder), framework="pt") as file:
        return file.get_slice("embedding").get_shape() if "embedding" in file.keys() else None


def load_value_head(head: Units, folder: str | Path) -> None:
    """Fills a head from the file in `folder`, or raises ValueError where shapes differ."""
    path = value_head_file(folder)
    state = load_file(path)
    # Files of older versions hold values in units of 1
    units = {name: state.pop(name, torch.tensor(float(name != "mean"))) for name in UNITS}
    saved = {name: tuple(weight.shape) for name, weight in state.items()}
    expected = {name: tuple(weight.shape) for name, weight in head.state_dict().items()}
    if saved != expected:
        raise ValueError(
            f"{path} does not fit this model: the file holds {saved}, its trunk needs {expected}. Load the model that "
            "the critic was saved with, or start a new critic by removing the file."
        )
    head.load_state_dict(state)
    head.units = units


def value_head_file(folder: str | Path) -> Path:
    """Returns the file of a head in `folder`, or raises FileNotFoundError."""
    path = Path(folder) / VALUE_HEAD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"No {VALUE_HEAD_FILE} in {folder}: no critic was saved there.")
    return path


def save_adapter(trunk: PeftModel, folder: Path) -> None:
    """Writes the adapter alone."""
    trunk.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, which says nothing of a critic


def adapter_weights(trunk: PeftModel) -> dict[str, torch.Tensor]:
    """Returns an adapter as PEFT saves it: without the embeddings under it, which are the base's."""
    return get_peft_model_state_dict(trunk, save_embedding_layers=False)


def load_adapter_weights(trunk: PeftModel, folder: str | Path) -> None:
    """Fills an adapter from where one like it was saved, or raises ValueError where names or shapes differ."""
    weights = load_peft_weights(str(folder), device="cpu")
    expected, saved = (
        {name: tuple(w.shape) for name, w in state.items()} for state in (adapter_weights(trunk), weights)
    )
    if expected != saved:
        differing = sorted(set(expected.items()) ^ set(saved.items()))[0]
        raise ValueError(
            f"The adapter in {folder} does not fit the critic's (first difference: {differing}). Use the same rank and "
            "`target_modules` for the policy's `peft_config` as it was trained with."
        )
    set_peft_model_state_dict(trunk, weights)


def local_folder(path: str) -> Path:
    """Returns `path` itself if it is a folder, else the critic's files of the Hub repository of that name."""
    folder = Path(path)
    return (
        folder
        if folder.is_dir()
        else Path(snapshot_download(path, allow_patterns=[f"{CRITIC_NAME}/*", VALUE_HEAD_FILE]))
    )
