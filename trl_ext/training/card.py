"""The model card that a trainer writes in place of TRL's. TRL has it written before every checkpoint and every push."""

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


def write_card(
    trainer,
    content: CardContent,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    license: str | list[str] | None = None,
    language: str | list[str] | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
) -> None:
    """
    Writes a trainer's card and its training curves to the output folder.

    Args:
        trainer ([`TrainerBase`]): The trainer, as it is at the moment.
        content ([`CardContent`]): What trainers of its kind have to say.
        All others are those of [`TrainerBase.create_model_card`].
    """
    if license is not None:
        check_licence(license, license_name, "license", "license_name")
    if language is not None:
        check_language(language)
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    folder.mkdir(parents=True, exist_ok=True)
    model, dataset_id, best_step = content.model, hub_id(dataset_name), loaded_best_step(trainer)
    measured = evaluations(history, eval_names(trainer), best_step)
    card_data = ModelCardData(
        **derivation_of(model),
        datasets=dataset_id,
        eval_results=eval_results(trainer, measured, content.results, dataset_id) or None,
        language=language,
        license=license,
        license_name=license_name,
        license_link=license_link,
        model_name=model_name or Path(trainer.hub_model_id or folder.absolute()).name,
        pipeline_tag=trainer._pipeline_tag,
        tags=tags_of(model, trainer._tag_names, tags),
    )
    parts = {part: jinja2.Template((TEMPLATES / f"{part}.md").read_text(encoding="utf-8")) for part in PARTS}
    is_drawn = draw_curves(history, eval_names(trainer), content.panels, trainer.args.output_dir)
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / trainer._template_file),
        **parts,
        title=card_data.model_name,
        links=tracker_links(),
        badges=BADGES,
        adapter=adapter_in_words(model),
        quantization=quantization_of(model),
        bnb_config=bitsandbytes_config(model),
        data=data_in_words(trainer.train_dataset, content.rows),
        dataset_id=dataset_id,
        model_id=trainer.hub_model_id or folder.as_posix(),
        trainer_name=trainer._name,
        trainer_class=type(trainer).__name__,
        step=trainer.state.global_step,
        planned_steps=trainer.state.max_steps,
        best_step=best_step,
        best_metric=trainer.args.metric_for_best_model,
        curves=CURVES_FILE if is_drawn else None,
        metrics=metrics_table(history, measured, content.metrics, best_step),
        hyper_parameters=content.hyper_parameters | adapter_settings(model),
        facts=training_facts(trainer, model),
        versions=versions_of(model),
        papers=content.papers,
        package_version=installed_version("trl_ext"),
        **content.details,
    )
    card.save(folder / "README.md")


def loaded_best_step(trainer) -> int | None:
    """Returns the step of the checkpoint whose weights the model has, if the best ones were loaded after training."""
    state = trainer.state
    is_loaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint and not trainer.is_in_train
    return state.best_global_step if is_loaded else None


def eval_names(trainer) -> list[str]:
    """Returns the names of the datasets to evaluate on, if there are several."""
    return list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []


def draw_curves(history: list[dict], names: list[str], panels: list[Panel], folder: str) -> bool:
    """Draws the curves of training and of all evaluations; False if nothing was drawn."""
    measured = {title_of(name): entries for name, entries in evaluations(history, names).items()}
    return draw_training_curves({"training": training_entries(history)} | measured, panels, folder)


def title_of(dataset_name: str) -> str:
    """Names an evaluation."""
    return f"evaluation on {dataset_name}" if dataset_name else "evaluation"


def metrics_table(
    history: list[dict], measured: dict[str, list[dict]], names: list[str], best_step: int | None
) -> dict | None:
    """Returns columns, and rows of cells: the last values of training beside those of the last evaluations."""
    trained = training_entries(history)
    columns = {f"training, step {trained[-1]['step']}": last_values(trained)} if trained else {}
    for dataset_name, entries in measured.items():
        step = best_step or entries[-1]["step"]
        columns[cell(f"{title_of(dataset_name)}, step {step}")] = last_values(entries[-1:])
    rows = [(cell(name), [cell(column.get(name, "")) for column in columns.values()]) for name in names]
    rows = [row for row in rows if any(row[1])]
    return {"columns": list(columns), "rows": rows} if rows else None


def eval_results(
    trainer, measured: dict[str, list[dict]], results: dict[str, tuple[str, str]], dataset_id: str | None
) -> list[EvalResult]:
    """Returns the metadata of what was measured of the very weights that the card is of, and nothing older."""
    found = []
    for name, entries in measured.items():
        last = entries[-1]
        if last["step"] not in (trainer.state.global_step, loaded_best_step(trainer)):
            continue
        dataset = trainer.eval_dataset[name] if name else trainer.eval_dataset
        is_known = trainer.evaluated_own_data and are_of_one_source(trainer.train_dataset, dataset)
        repo_id = dataset_id if is_known else None
        found += [
            EvalResult(
                task_type=trainer._pipeline_tag,
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


def training_facts(trainer, model) -> dict[str, str]:
    """Returns the hardware, the time of training and the number of tokens, as far as they are known."""
    clock = next(c for c in trainer.callback_handler.callbacks if isinstance(c, TrainingClock))
    facts = hardware(model, trainer.accelerator.num_processes)
    if trainer.state.global_step > 0:
        since = f" since step {clock.since_step}" if clock.since_step else ""
        facts["time"] = duration(clock.seconds) + since
    tokens = last_values(training_entries(trainer.state.log_history)).get("num_tokens")
    if tokens is not None:
        facts["tokens seen"] = f"{tokens:,.0f}"
    return facts
