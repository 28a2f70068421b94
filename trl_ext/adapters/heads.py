"""The head of a classifier, saved with its adapter even where PEFT would leave it out."""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from safetensors.torch import load_file, save_file
from torch import nn


ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_heads(model: PeftModel, directory: str, names: Iterable[str] = SEQ_CLS_HEAD_NAMES) -> None:
    """
    Adds the head of a classifier, and other layers of these `names`, to saved adapters that do not hold them, under the
    names that PEFT reads them back by.

    A reward adapter without its head has random rewards: transformers draws a new head whenever the base is loaded.
    """
    modules = dict(model.get_base_model().named_modules())
    heads = {name: modules[name] for name in names if name in modules}
    heads = {name: head for name, head in heads.items() if not isinstance(head, ModulesToSaveWrapper)}
    for adapter in model.peft_config if heads else ():
        file = Path(directory) / ("" if adapter == "default" else adapter) / ADAPTER_WEIGHTS
        if file.is_file():
            weights = load_file(file)
            for name, head in heads.items():
                weights |= {f"base_model.model.{name}.{key}": weight for key, weight in weights_of_head(head).items()}
            weights = {key: weight.detach().cpu().contiguous() for key, weight in weights.items()}
            save_file(weights, file, metadata={"format": "pt"})


@torch.no_grad()
def weights_of_head(head: nn.Module) -> dict[str, torch.Tensor]:
    """
    Returns the weights of a head; where an adapter is on it, those of the head alone, which `PeftModel` reads, and with
    the adapter merged, which PEFT's classes of classifiers read.
    """
    if not isinstance(head, BaseTunerLayer):
        weights = {key: weight for key, weight in head.state_dict().items() if "." not in key}
        for name, child in head.named_children():
            weights |= {f"{name}.{key}": weight for key, weight in weights_of_head(child).items()}
        return weights
    weights = {key: weight.clone() for key, weight in head.get_base_layer().state_dict().items()}
    apart = {f"base_layer.{key}": weight for key, weight in weights.items()}
    head.merge()
    together = {key: weight.clone() for key, weight in head.get_base_layer().state_dict().items()}
    head.merged_adapters.clear()
    head.get_base_layer().load_state_dict(weights)
    return apart | together
