"""Model cards: their metadata, and what the cards of all trainers say, rendered from the templates in `model_cards/`."""

import os
from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel, PeftType
from transformers import PreTrainedModel, is_wandb_available

from .compat import get_comet_experiment_url, get_config_model_id, get_trackio_space_url
from .hub_metadata import check_language, check_licence
from .shared_base import quantization_of
from .training_curves import CURVES_FILE, Panel, draw_training_curves
from .training_record import (
    TrainingClock,
    duration,
    evaluations,
    hardware,
    is_number,
    last_values,
    training_entries,
)


# In a wheel the templates lie inside the package, in a source tree beside it
_PACKAGED = Path(__file__).parent / "model_cards"
TEMPLATES = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "model_cards"

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
    What a kind of trainer has to say.

    Args:
        model (`PreTrainedModel` or `PeftModel`): What was trained, without distributed wrappers.
        rows (`str`): What a row of the dataset is called.
        metrics (`list[str]`): What the table of metrics shows, where it was logged.
        results (`dict[str, tuple[str, str]]`):
            The metrics of evaluations that go into the metadata, with their type and their name there.
        panels (`list[Panel]`): The training curves.
        hyper_parameters (`dict[str, str]`): Names and values.
        papers (`list[dict]`): To be cited, each as TRL's `_paper`.
        details (`dict`): What the template has beside what all have.
    """

    model: PreTrainedModel | PeftModel
    rows: str
    metrics: list[str]
    results: dict[str, tuple[str, str]]
    panels: list[Panel]
    hyper_parameters: dict[str, str]
    papers: list[dict]
    details: dict


class ModelCardMixin:
    """
    Replaces TRL's model card. TRL writes it before every checkpoint and every push, so what it says is true of that
    moment. A trainer names its template and gives its content.
    """

    _template_file: str  # of `model_cards/`
    _pipeline_tag: str  # of the Hub
    _evaluated_own_data = True  # the last time, not data given to `evaluate`

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(TrainingClock())

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        self._evaluated_own_data = eval_dataset is None or isinstance(eval_dataset, str)
        return super().evaluate(eval_dataset, *args, **kwargs)

    @abstractmethod
    def _card_content(self) -> CardContent:
        """What the card says of this training."""

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | list[str] | None = None,
        language: str | list[str] | None = None,
        license_name: str | None = None,
        license_link: str | None = None,
    ) -> None:
        """
        Write `README.md`, with `training_curves.png` beside it, to the output folder. `push_to_hub` takes the same
        arguments: TRL's, two that [`~transformers.Trainer`] has, and two more.

        Args:
            model_name (`str`, *optional*): By default that of the repository or the output folder.
            dataset_name (`str`, *optional*): Hub id of what it was trained on. Local files have no page to link to.
            tags (`str` or `list[str]`, *optional*): Beside those of the trainer.
            license (`str` or `list[str]`, *optional*): Of the model, by the Hub's identifier, such as `"apache-2.0"`.
                Yours to choose: there is no default.
            language (`str` or `list[str]`, *optional*): Of the data, as codes such as `"en"`.
            license_name, license_link (`str`, *optional*): Of a license that the Hub does not know, with
                `license="other"`.

        Raises:
            ValueError: for a license or language that the Hub does not take. `push_to_hub` has saved the model by then,
                and uploads nothing.
        """
        if not self.is_world_process_zero():
            return
        if license is not None:
            check_licence(license, license_name, "license", "license_name")
        if language is not None:
            check_language(language)
        self._complete_hub_model_id()  # of `PushMixin`
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        content = self._card_content()
        model, dataset_id = content.model, hub_id(dataset_name)
        measured = evaluations(self.state.log_history, self._eval_names, self._best_step)
        card_data = ModelCardData(
            **derivation_of(model),
            datasets=dataset_id,
            eval_results=self._eval_results(measured, content.results, dataset_id) or None,
            language=language,
            license=license,
            license_name=license_name,
            license_link=license_link,
            model_name=model_name or Path(self.hub_model_id or folder.absolute()).name,
            pipeline_tag=self._pipeline_tag,
            tags=tags_of(model, self._tag_names, tags),
        )
        parts = {part: jinja2.Template((TEMPLATES / f"{part}.md").read_text(encoding="utf-8")) for part in PARTS}
        card = ModelCard.from_template(
            card_data,
            template_path=str(TEMPLATES / self._template_file),
            **parts,
            title=card_data.model_name,
            links=tracker_links(),
            badges=BADGES,
            adapter=adapter_in_words(model),
            quantization=quantization_of(model),
            bnb_config=bitsandbytes_config(model),
            data=data_in_words(self.train_dataset, content.rows),
            dataset_id=dataset_id,
            model_id=self.hub_model_id or folder.as_posix(),
            trainer_name=self._name,
            trainer_class=type(self).__name__,
            step=self.state.global_step,
            planned_steps=self.state.max_steps,
            best_step=self._best_step,
            best_metric=self.args.metric_for_best_model,
            curves=CURVES_FILE if self._draw_curves(content.panels) else None,
            metrics=self._metrics_table(measured, content.metrics),
            hyper_parameters=content.hyper_parameters | adapter_settings(model),
            facts=self._facts(model),
            versions=versions_of(model),
            papers=content.papers,
            package_version=installed_version("trl_ext"),
            **content.details,
        )
        card.save(folder / "README.md")

    @property
    def _best_step(self) -> int | None:
        """Of the checkpoint whose weights the model has, if the best ones were loaded at the end of training."""
        is_loaded = self.args.load_best_model_at_end and self.state.best_model_checkpoint and not self.is_in_train
        return self.state.best_global_step if is_loaded else None

    @property
    def _eval_names(self) -> list[str]:
        return list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []

    def _draw_curves(self, panels: list[Panel]) -> bool:
        history = self.state.log_history
        measured = {_evaluation(name): entries for name, entries in evaluations(history, self._eval_names).items()}
        return draw_training_curves({"training": training_entries(history)} | measured, panels, self.args.output_dir)

    def _metrics_table(self, measured: dict[str, list[dict]], names: list[str]) -> dict | None:
        """Columns, and rows of cells: the last values of training beside those of the last evaluations."""
        trained = training_entries(self.state.log_history)
        columns = {f"training, step {trained[-1]['step']}": last_values(trained)} if trained else {}
        for dataset_name, entries in measured.items():
            step = self._best_step or entries[-1]["step"]
            columns[cell(f"{_evaluation(dataset_name)}, step {step}")] = last_values(entries[-1:])
        rows = [(cell(name), [cell(column.get(name, "")) for column in columns.values()]) for name in names]
        rows = [row for row in rows if any(row[1])]
        return {"columns": list(columns), "rows": rows} if rows else None

    def _eval_results(
        self, measured: dict[str, list[dict]], results: dict[str, tuple[str, str]], dataset_id: str | None
    ) -> list[EvalResult]:
        """For the metadata: what was measured of the very weights that this card is of, and nothing older."""
        found = []
        for name, entries in measured.items():
            last = entries[-1]
            if last["step"] not in (self.state.global_step, self._best_step):
                continue
            dataset = self.eval_dataset[name] if name else self.eval_dataset
            is_known = self._evaluated_own_data and are_of_one_source(self.train_dataset, dataset)
            repo_id = dataset_id if is_known else None
            found += [
                EvalResult(
                    task_type=self._pipeline_tag,
                    dataset_type=repo_id or name or "unknown",
                    dataset_name=repo_id or name or "evaluation data",
                    dataset_split=str(dataset.split) if repo_id else None,
                    metric_type=metric_type,
                    metric_name=f"{metric_name} ({name})" if name else metric_name,
                    metric_value=last[metric],
                )
                for metric, (metric_type, metric_name) in results.items()
                if is_number(last.get(metric))
            ]
        return found

    def _facts(self, model) -> dict[str, str]:
        """On what it was trained, and how long."""
        clock = next(c for c in self.callback_handler.callbacks if isinstance(c, TrainingClock))
        facts = hardware(model, self.accelerator.num_processes)
        if self.state.global_step > 0:
            since = f" since step {clock.since_step}" if clock.since_step else ""
            facts["time"] = duration(clock.seconds) + since
        tokens = last_values(training_entries(self.state.log_history)).get("num_tokens")
        if tokens is not None:
            facts["tokens seen"] = f"{tokens:,.0f}"
        return facts


def _evaluation(dataset_name: str) -> str:
    return f"evaluation on {dataset_name}" if dataset_name else "evaluation"


# --- Metadata ---


def hub_id(name: str | None) -> str | None:
    """`name` if it can be of a repository of the Hub; those of local files and folders have no page to link to."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:  # a path, which may be gone by now
        return None
    return name


def derivation_of(model) -> dict[str, str | None]:
    """What it was made of, and what loads it. An adapter on a quantized base is still one on that base."""
    is_adapter, base_model = isinstance(model, PeftModel), hub_id(get_config_model_id(model.config))
    relation = "adapter" if is_adapter else "finetune"
    return {
        "base_model": base_model,
        "base_model_relation": relation if base_model is not None else None,
        "library_name": "peft" if is_adapter else "transformers",
    }


def are_of_one_source(train_dataset, eval_dataset) -> bool:
    """Whether two datasets were loaded from the same, as far as they know."""
    if train_dataset is None or eval_dataset is None:
        return False
    names = [dataset.info.dataset_name for dataset in (train_dataset, eval_dataset)]
    return names[0] is not None and names[0] == names[1]


def tags_of(model, own: list[str], given: str | list[str] | None) -> list[str]:
    tags = {"generated_from_trainer", *own, *([given] if isinstance(given, str) else given or [])}
    if isinstance(model, PeftModel):
        tags |= {"transformers", "lora"} if is_lora(model) else {"transformers"}
    trackio = get_trackio_space_url()
    if trackio is not None:
        tags = {tag for tag in tags if not tag.startswith("trackio:")} | {f"trackio:{trackio}"}
    return sorted(tags)


def tracker_links() -> dict[str, str]:
    """The runs of the trackers that TRL's cards link to."""
    links = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        links["Weights & Biases"] = wandb.run.url if wandb.run is not None else None
    return {name: url for name, url in links.items() if url}


# --- Content ---


def cell(value) -> str:
    """A value, or a name, for a table's cell."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    if isinstance(value, str) and os.path.isdir(value):  # others need not know where
        value = Path(value).name
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def shown(args, names: list[str]) -> dict[str, str]:
    """The arguments of these names that are set."""
    values = {name: getattr(args, name) for name in names}
    return {name: cell(value) for name, value in values.items() if value is not None}


def data_in_words(dataset, rows: str) -> str | None:
    """`8 prompts` or `a stream of prompts`; None where there was no dataset."""
    if dataset is None:
        return None
    return f"{len(dataset)} {rows}" if isinstance(dataset, Dataset) else f"a stream of {rows}"


def is_lora(model) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.LORA


def adapter_in_words(model) -> str | None:
    """None of other models."""
    if not isinstance(model, PeftModel):
        return None
    return "a LoRA adapter" if is_lora(model) else f"an adapter ({cell(model.active_peft_config.peft_type)})"


def adapter_settings(model) -> dict[str, str]:
    """Of the adapter, and how its base is quantized; nothing of other models."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.active_peft_config.to_dict()
    settings = {f"adapter: {name}": cell(config[name]) for name in ADAPTER_SETTINGS if config.get(name) is not None}
    quantization = quantization_of(model)
    return settings | ({} if quantization is None else {"base model: quantization": quantization})


def bitsandbytes_config(model) -> str | None:
    """The code of a base's `BitsAndBytesConfig`, to load it the same way; None where there is none."""
    if not (quantization_of(model) or "").startswith(("4bit", "8bit")):
        return None
    config = model.config.quantization_config
    settings = config if isinstance(config, dict) else config.to_diff_dict()
    settings = {name: settings[name] for name in sorted(settings, reverse=True)}  # `load_in` before what belongs to it
    shown = {name: f'"{value}"' if isinstance(value, str) else repr(value) for name, value in settings.items()}
    arguments = [f"{name}={value}" for name, value in shown.items() if name.startswith(("load_in", "bnb", "llm"))]
    return f"BitsAndBytesConfig({', '.join(arguments)})"


def versions_of(model) -> dict[str, str]:
    packages = dict(PACKAGES)
    if isinstance(model, PeftModel):
        packages["PEFT"] = "peft"
    if bitsandbytes_config(model) is not None:
        packages["bitsandbytes"] = "bitsandbytes"
    return {shown: installed_version(name) for shown, name in packages.items()}


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # on the path, but not installed
        return "(not installed as a package)"
