"""Model cards, rendered from the templates in `model_cards/`; here that of a policy."""

import os
from enum import Enum
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from trl import GRPOConfig
from trl.data_utils import is_conversational

from .compat import get_config_model_id
from .shared_base import quantization_of


# In a wheel the templates lie inside the package, in a source tree beside it
_PACKAGED = Path(__file__).parent / "model_cards"
TEMPLATES = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "model_cards"

TRAINING_ARGUMENTS = [
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "world_size",
    "max_completion_length",
    "temperature",
    "top_p",
    "loss_type",
    "epsilon",
    "epsilon_high",
    "beta",
    "max_grad_norm",
    "bf16",
    "seed",
]
FINAL_METRICS = [
    "reward",
    "returns/mean",
    "values/mean",
    "explained_variance",
    "value_loss",
    "kl/k1",
    "kl/k3",
    "kl",
    "ratio/mean",
    "clip_ratio/region_mean",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "num_tokens",
]


PACKAGES = ["trl_ext", "trl", "transformers", "torch", "datasets"]
ADAPTER_SETTINGS = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save"]


def number(value) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return str(value)


def write_card(trainer, model, template: str, card_data: dict, **content) -> None:
    """
    Render a template of `model_cards/` to the README.md of the trainer's output folder.

    Args:
        trainer (`transformers.Trainer`): Which trained `model`.
        model (`PreTrainedModel` or `PeftModel`): Without distributed wrappers.
        template (`str`): File name.
        card_data (`dict`): `model_name`, `dataset_name`, `tags`, `pipeline_tag` of the card's metadata.
        content: What this template has beside what all have.
    """
    # Local models have no page to link to
    base_model = get_config_model_id(model.config)
    base_model = None if not base_model or os.path.isdir(base_model) else base_model
    tags, dataset_name = card_data["tags"], card_data["dataset_name"]
    extra_tags = [tags] if isinstance(tags, str) else list(tags or [])
    is_adapter = isinstance(model, PeftModel)
    metadata = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="peft" if is_adapter else "transformers",
        model_name=card_data["model_name"],
        pipeline_tag=card_data["pipeline_tag"],
        tags=sorted({*trainer._tag_names, *extra_tags}),
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATES / template),
        title=card_data["model_name"],
        base_model=base_model,
        dataset_name=dataset_name,
        num_prompts=len(trainer.train_dataset) if isinstance(trainer.train_dataset, Dataset) else None,
        model_id=trainer.hub_model_id or trainer.args.output_dir,
        is_adapter=is_adapter,
        trainer_name=trainer._name,
        trainer_class=type(trainer).__name__,
        paper=trainer._paper,
        step=trainer.state.global_step,
        versions={name: version(name) for name in [*PACKAGES, *(["peft"] if is_adapter else [])]},
        **content | {"hyper_parameters": content["hyper_parameters"] | adapter_settings(model)},
    )
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    card.save(os.path.join(trainer.args.output_dir, "README.md"))


def adapter_settings(model) -> dict[str, str]:
    """Of the adapter, and how its base is quantized; nothing of other models."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.active_peft_config.to_dict()
    settings = {f"adapter: {name}": number(config[name]) for name in ADAPTER_SETTINGS if config.get(name) is not None}
    quantization = quantization_of(model)
    return settings | ({} if quantization is None else {"base model: quantization": quantization})


def shown(args, names: list[str]) -> dict[str, str]:
    """The arguments of these names that are set."""
    values = {name: getattr(args, name) for name in names}
    return {name: number(value) for name, value in values.items() if value is not None}


def final_metrics(log_history: list[dict], names: list[str]) -> dict[str, str]:
    """The last logged value of each metric that says how training ended; evaluation's beside training's."""
    last = {}
    for entry in log_history:
        last.update({name: value for name, value in entry.items() if value is not None})
    names = [*names, *(f"eval_{name}" for name in names)]
    return {name: number(last[name]) for name in names if name in last}


class CardMixin:
    """Replaces TRL's model card by one that says what was trained, how and on what, and how it ended."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        rewards = list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        write_card(
            self,
            self._policy,
            "policy.md",
            {"model_name": model_name, "dataset_name": dataset_name, "tags": tags, "pipeline_tag": "text-generation"},
            prompt=self._example_prompt(),
            rewards=[(name, f"{weight:g}") for name, weight in rewards if weight != 0],
            watched=[name for name, weight in rewards if weight == 0],
            critic=None if self.critic is None else self.args.critic,
            hyper_parameters=self._hyper_parameters(),
            metrics=final_metrics(self.state.log_history, FINAL_METRICS),
        )

    def _example_prompt(self):
        """A stand-in of the kind the policy was trained on: a conversation or a text."""
        example = self.train_dataset[0] if isinstance(self.train_dataset, Dataset) else {}
        if "prompt" in example and is_conversational({"prompt": example["prompt"]}):
            return [{"role": "user", "content": "..."}]
        return example.get("prompt", "...")

    def _hyper_parameters(self) -> dict[str, str]:
        """What this package's configuration adds to TRL's, and the training arguments people ask for first."""
        known = {*GRPOConfig.__dataclass_fields__, "save_rollouts"}
        added = ["num_generations", *(name for name in self.args.__dataclass_fields__ if name not in known)]
        if self.critic is None:
            added = [name for name in added if "critic" not in name and name not in ("vf_coef", "cliprange_value")]
        return shown(self.args, [*TRAINING_ARGUMENTS, *added])
