"""Model cards: the metadata and the contents that those of all trainers share. The templates are in `model_cards/`."""

import os
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from datasets import Dataset
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel, PeftType
from transformers import PreTrainedModel, is_wandb_available

from ..compat import get_comet_experiment_url, get_config_model_id, get_trackio_space_url
from ..models.quantization import quantization_of
from .curves import Panel


# In a wheel the templates lie inside the package, in a source tree beside it
_PACKAGE = Path(__file__).parents[1]
TEMPLATES = next(path for path in (_PACKAGE / "model_cards", _PACKAGE.parent / "model_cards") if path.is_dir())

PARTS = ["introduction", "generation", "training"]  # of several templates
PACKAGES = {
    "trl_ext": "trl_ext",
    "TRL": "trl",
    "Transformers": "transformers",
    "PyTorch": "torch",
    "Datasets": "datasets",
}
ADAPTER_SETTINGS = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save"]
BADGES = {
    "Weights & Biases": "https://raw.githubusercontent.com/wandb/assets/main/wandb-github-badge-28.svg",
    "Trackio": "https://raw.githubusercontent.com/gradio-app/trackio/refs/heads/main/trackio/assets/badge.png",
    "Comet": "https://raw.githubusercontent.com/comet-ml/comet-examples/master/logo/comet_badge.png",
}


@dataclass
class CardContent:
    """
    The contents of a card that differ from trainer to trainer.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The trained model, without distributed wrappers.
        rows (`str`): Name of the dataset's rows, e.g. `"prompts"`.
        metrics (`list[str]`): Metrics of the table, each shown if it was logged.
        results (`dict[str, tuple[str, str]]`):
            Metrics of evaluations that go into the metadata, with type and name there.
        panels (`list[Panel]`): The training curves.
        hyper_parameters (`dict[str, str]`): Names and values.
        papers (`list[dict]`): Papers to cite, each as TRL's `_paper`.
        details (`dict`): Variables of this template, beside those of all.
    """

    model: PreTrainedModel | PeftModel
    rows: str
    metrics: list[str]
    results: dict[str, tuple[str, str]]
    panels: list[Panel]
    hyper_parameters: dict[str, str]
    papers: list[dict]
    details: dict


# --- Metadata ---


def hub_id(name: str | None) -> str | None:
    """Returns `name` if a repository of the Hub can have it, else None: local files have no page to link to."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:  # a path, which may be gone by now
        return None
    return name


def derivation_of(model) -> dict[str, str | None]:
    """Returns the base of a model and the library that loads it. An adapter on a quantized base is one on that base."""
    is_adapter, base_model = isinstance(model, PeftModel), hub_id(get_config_model_id(model.config))
    relation = "adapter" if is_adapter else "finetune"
    return {
        "base_model": base_model,
        "base_model_relation": relation if base_model is not None else None,
        "library_name": "peft" if is_adapter else "transformers",
    }


def are_of_one_source(train_dataset, eval_dataset) -> bool:
    """Returns True if two datasets were loaded from the same source, as far as they know."""
    if train_dataset is None or eval_dataset is None:
        return False
    names = [dataset.info.dataset_name for dataset in (train_dataset, eval_dataset)]
    return names[0] is not None and names[0] == names[1]


def tags_of(model, of_trainer: list[str], given: str | list[str] | None) -> list[str]:
    """Returns the tags of a card: those of the trainer, of the model's kind, of the tracker, and those given."""
    tags = {"generated_from_trainer", *of_trainer, *([given] if isinstance(given, str) else given or [])}
    if isinstance(model, PeftModel):
        tags |= {"transformers", "lora"} if is_lora(model) else {"transformers"}
    trackio = get_trackio_space_url()
    if trackio is not None:
        tags = {tag for tag in tags if not tag.startswith("trackio:")} | {f"trackio:{trackio}"}
    return sorted(tags)


def tracker_links() -> dict[str, str]:
    """Returns the addresses of this run at the trackers that TRL's cards link to."""
    links = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        links["Weights & Biases"] = wandb.run.url if wandb.run is not None else None
    return {name: url for name, url in links.items() if url}


# --- Content ---


def cell(value) -> str:
    """Returns a value, or a name, as text for a table's cell."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    if isinstance(value, str) and os.path.isdir(value):  # a card is no place for paths of this machine
        value = Path(value).name
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def shown(args, names: list[str]) -> dict[str, str]:
    """Returns the arguments of these names that are set."""
    values = {name: getattr(args, name) for name in names}
    return {name: cell(value) for name, value in values.items() if value is not None}


def data_in_words(dataset, rows: str) -> str | None:
    """Returns `8 prompts` or `a stream of prompts`; None without a dataset."""
    if dataset is None:
        return None
    return f"{len(dataset)} {rows}" if isinstance(dataset, Dataset) else f"a stream of {rows}"


def is_lora(model) -> bool:
    """Returns True for a model with a LoRA adapter."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.LORA


def adapter_in_words(model) -> str | None:
    """Returns the kind of adapter, in words; None for a model without one."""
    if not isinstance(model, PeftModel):
        return None
    return "a LoRA adapter" if is_lora(model) else f"an adapter ({cell(model.active_peft_config.peft_type)})"


def adapter_settings(model) -> dict[str, str]:
    """Returns the settings of an adapter and of its base's quantization; none for a model without one."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.active_peft_config.to_dict()
    settings = {f"adapter: {name}": cell(config[name]) for name in ADAPTER_SETTINGS if config.get(name) is not None}
    quantization = quantization_of(model)
    return settings | ({} if quantization is None else {"base model: quantization": quantization})


def bitsandbytes_config(model) -> str | None:
    """Returns the code of a base's `BitsAndBytesConfig`, to load it the same way; None for a base without one."""
    if not (quantization_of(model) or "").startswith(("4bit", "8bit")):
        return None
    config = model.config.quantization_config
    settings = config if isinstance(config, dict) else config.to_diff_dict()
    settings = {name: settings[name] for name in sorted(settings, reverse=True)}  # `load_in` before what belongs to it
    shown = {name: f'"{value}"' if isinstance(value, str) else repr(value) for name, value in settings.items()}
    arguments = [f"{name}={value}" for name, value in shown.items() if name.startswith(("load_in", "bnb", "llm"))]
    return f"BitsAndBytesConfig({', '.join(arguments)})"


def versions_of(model) -> dict[str, str]:
    """Returns the versions of the packages that the model needs."""
    packages = dict(PACKAGES)
    if isinstance(model, PeftModel):
        packages["PEFT"] = "peft"
    if bitsandbytes_config(model) is not None:
        packages["bitsandbytes"] = "bitsandbytes"
    return {shown: installed_version(name) for shown, name in packages.items()}


def installed_version(package: str) -> str:
    """Returns the version of a package, or says that it has none."""
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, but not installed
        return "(not installed as a package)"
