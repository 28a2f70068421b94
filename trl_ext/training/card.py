"""The model card that a trainer writes."""

from abc import abstractmethod
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..hub.curves import CURVES_FILE, Panel, draw_training_curves
from ..hub.metadata import check_language, check_licence
from ..hub.model_card import (
    BADGES,
    PARTS,
    TEMPLATES,
    CardContent,
    adapter_in_words,
    adapter_settings,
    are_of_one_source,
    bitsandbytes_config,
    cell,
    data_in_words,
    derivation_of,
    hub_id,
    installed_version,
    tags_of,
    tracker_links,
    versions_of,
)
from ..hub.record import TrainingClock, duration, evaluations, hardware, is_number, last_values, training_entries
from ..models.quantization import quantization_of


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
