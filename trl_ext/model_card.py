"""The model card of a trained policy, rendered from `model_cards/policy.md`."""

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


def _number(value) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return str(value)


class CardMixin:
    """Replaces TRL's model card by one that says what was trained, how and on what, and how it ended."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        # Local models have no page to link to
        base_model = get_config_model_id(self._policy.config)
        base_model = None if not base_model or os.path.isdir(base_model) else base_model
        extra_tags = [tags] if isinstance(tags, str) else list(tags or [])
        rewards = list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        is_adapter = isinstance(self._policy, PeftModel)
        card_data = ModelCardData(
            base_model=base_model,
            datasets=dataset_name,
            library_name="peft" if is_adapter else "transformers",
            model_name=model_name,
            pipeline_tag="text-generation",
            tags=sorted({*self._tag_names, *extra_tags}),
        )
        card = ModelCard.from_template(
            card_data,
            template_path=str(TEMPLATES / "policy.md"),
            title=model_name,
            base_model=base_model,
            dataset_name=dataset_name,
            num_prompts=len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None,
            model_id=self.hub_model_id or self.args.output_dir,
            is_adapter=is_adapter,
            prompt=self._example_prompt(),
            trainer_name=self._name,
            trainer_class=type(self).__name__,
            paper=self._paper,
            rewards=[(name, f"{weight:g}") for name, weight in rewards if weight != 0],
            watched=[name for name, weight in rewards if weight == 0],
            critic=None if self.critic is None else self.args.critic,
            hyper_parameters=self._hyper_parameters(),
            metrics=self._final_metrics(),
            step=self.state.global_step,
            versions={name: version(name) for name in ("trl_ext", "trl", "transformers", "torch", "datasets")},
        )
        os.makedirs(self.args.output_dir, exist_ok=True)
        card.save(os.path.join(self.args.output_dir, "README.md"))

    def _example_prompt(self):
        """A stand-in of the kind the policy was trained on: a conversation or a text."""
        example = self.train_dataset[0] if isinstance(self.train_dataset, Dataset) else {}
        if "prompt" in example and is_conversational({"prompt": example["prompt"]}):
            return [{"role": "user", "content": "..."}]
        return example.get("prompt", "...")

    def _hyper_parameters(self) -> dict[str, str]:
        """What this package's configuration adds to TRL's, and the training arguments people ask for first."""
        added = [name for name in self.args.__dataclass_fields__ if name not in GRPOConfig.__dataclass_fields__]
        added = ["num_generations", *added]
        if self.critic is None:
            added = [name for name in added if "critic" not in name and name not in ("vf_coef", "cliprange_value")]
        values = {name: getattr(self.args, name) for name in [*TRAINING_ARGUMENTS, *added]}
        return {name: _number(value) for name, value in values.items() if value is not None}

    def _final_metrics(self) -> dict[str, str]:
        """The last logged value of each metric that says how training ended; evaluation's beside training's."""
        last = {}
        for entry in self.state.log_history:
            last.update({name: value for name, value in entry.items() if value is not None})
        names = [*FINAL_METRICS, *(f"eval_{name}" for name in FINAL_METRICS)]
        return {name: _number(last[name]) for name in names if name in last}
