"""
The tie parameters of a ranking likelihood, learned with a model and kept in its config.

They are a child module of the model while it trains, and are part of its output there, so that distributed wrappers see
them used. On disk they are two entries, `ranking_model` and `log_tie`, of `config.json`; or of `tie_parameters.json`
beside an adapter, whose folder must not have a `config.json`: transformers would look for a whole model there. The
latter also says how the base was quantized that the adapter's scores are for, and what it reads ([`reward_inputs`]).
[`tie_parameters`] reads either.
"""

import json
from dataclasses import make_dataclass
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .companion import Companion
from .quantization import quantization_of
from .reward_inputs import REWARD_INPUT


TIE_PARAMETERS_NAME = "tie_parameters"  # attribute of the model, prefix of the parameters
TIE_PARAMETERS_FILE = "tie_parameters.json"
# Rao-Kupper's log theta stays above this: at 0 a tie is impossible, and its loss infinite
MIN_LOG_THETA = 1e-3


class TieParameters(Companion):
    """
    The `log_tie` of [`~trl_ext.ranking.ranking_nll`], as a module to learn.

    Args:
        ranking_model (`str`): The likelihood.
        log_tie (`list[float]`): The values that learning starts from.
    """

    child_name = TIE_PARAMETERS_NAME

    def __init__(self, ranking_model: str, log_tie: list[float]):
        super().__init__()
        self.ranking_model = ranking_model
        self.raw = nn.Parameter(torch.zeros(len(log_tie)))
        self.set(log_tie)

    def forward(self) -> torch.Tensor:
        """Returns `(D-1,)` for Davidson-Luce, `(1,)` for pairwise models with ties."""
        if self.ranking_model == "rao_kupper":
            return nn.functional.softplus(self.raw.float()) + MIN_LOG_THETA
        # DDP takes a parameter that is itself an output for unused
        return self.raw.float().clone()

    @torch.no_grad()
    def set(self, log_tie: list[float]) -> None:
        """Makes [`forward`] return these values."""
        values = torch.tensor(log_tie, dtype=torch.float64, device=self.raw.device)
        if len(log_tie) != self.raw.numel() or not values.isfinite().all():
            raise ValueError(
                f"`log_tie` of '{self.ranking_model}' must be {self.raw.numel()} finite numbers, got {log_tie}."
            )
        if self.ranking_model == "rao_kupper":
            excess = (values - MIN_LOG_THETA).clamp(min=1e-6)
            values = excess + torch.log(-torch.expm1(-excess))  # the inverse of softplus
        self.raw.copy_(values)

    def tolist(self) -> list[float]:
        """
        Returns the values in double precision, so that [`set`] finds the very same parameters again. Where FSDP shards
        them, every process has to call this.
        """
        raw = self.raw.detach()
        raw = (raw.full_tensor() if isinstance(raw, DTensor) else raw).double().cpu()
        return (nn.functional.softplus(raw) + MIN_LOG_THETA if self.ranking_model == "rao_kupper" else raw).tolist()

    def hooks_on(self, model: PreTrainedModel | PeftModel) -> list[RemovableHandle]:
        return [model.register_forward_hook(self.add_to_output)]

    def add_to_output(self, module, args, output):
        """Adds the values to the model's output as `log_tie`; a forward hook."""
        # No tuple has room for it, and a model from which this was put aside shall look as if it were not there
        if not isinstance(output, ModelOutput) or TIE_PARAMETERS_NAME not in module._modules:
            return None
        return with_log_tie(type(output))(**output, log_tie=self())

    def restore(self, folder: str | Path) -> None:
        """Takes the values that the saved config has, or `tie_parameters.json` beside an adapter."""
        self.set(read_config(str(folder))["log_tie"])


@cache
def with_log_tie(output_class: type[ModelOutput]) -> type[ModelOutput]:
    """Returns the class with one more field: DDP rebuilds a forward's output from its class's fields."""
    fields = [("log_tie", torch.Tensor | None, None)]
    return make_dataclass(f"{output_class.__name__}WithTies", fields, bases=(output_class,))


def write_to_config(model: PreTrainedModel | PeftModel, ranking_model: str, log_tie: list[float]) -> None:
    """Notes in the model's config what likelihood its scores are for."""
    model.config.ranking_model = ranking_model
    model.config.log_tie = log_tie


def save_beside_adapter(model: PeftModel, directory: str) -> None:
    """Writes what a config would say of the adapter's scores, if there is anything."""
    config = model.config.to_dict()
    entries = {name: config[name] for name in ("ranking_model", "log_tie", REWARD_INPUT) if name in config}
    if entries:
        entries["base_quantization"] = quantization_of(model)
        (Path(directory) / TIE_PARAMETERS_FILE).write_text(json.dumps(entries, indent=2), encoding="utf-8")


def read_config(path: str) -> dict:
    """Reads `tie_parameters.json`, or else `config.json`, of a folder or Hub repository."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=[TIE_PARAMETERS_FILE, "config.json"]))
    files = [folder / name for name in (TIE_PARAMETERS_FILE, "config.json") if (folder / name).is_file()]
    return json.loads(files[0].read_text(encoding="utf-8")) if files else {}


def tie_parameters(model_or_path: PreTrainedModel | PeftModel | str | Path) -> tuple[str, torch.Tensor | None]:
    """
    Returns the likelihood that a model was trained with, to follow the scores in [`predict_pair`]:

    ```python
    >>> win, tie, lose = predict_pair(score_i, score_j, *tie_parameters("my-reward-model"))
    ```

    Args:
        model_or_path (`PreTrainedModel`, `PeftModel`, `str` or `Path`): The model, or its folder or Hub id.

    Returns:
        `tuple[str, torch.Tensor | None]`: `model` and `log_tie` of [`ranking_nll`].

    Raises:
        ValueError: if the model was not trained with a ranking likelihood.
    """
    if isinstance(model_or_path, str | Path):
        name, config = model_or_path, read_config(str(model_or_path))
    else:
        name, config = type(model_or_path).__name__, model_or_path.config.to_dict()
    if "ranking_model" not in config:
        raise ValueError(
            f"{name} has no `ranking_model` in its config: it was not trained on rankings, or it was and is an adapter "
            "that a transformers class loaded onto its base. Pass the folder or Hub id of the adapter instead."
        )
    log_tie = torch.tensor(config["log_tie"])
    if config["ranking_model"] == "davidson_luce":
        return "davidson_luce", log_tie
    return config["ranking_model"], log_tie.squeeze() if log_tie.numel() else None
