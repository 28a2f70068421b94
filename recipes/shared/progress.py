"""Training with a progress bar of one line, for recipes that somebody watches."""

import warnings

from transformers import ProgressCallback


def quiet() -> None:
    """Silences what says nothing to somebody who runs a recipe; errors and other warnings still show."""
    import datasets
    import transformers

    datasets.disable_progress_bars()  # of the maps that tokenize, a blink each
    transformers.utils.logging.disable_progress_bar()  # of loading and writing weights, likewise
    # What TRL's own code and defaults set off in a newer transformers
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


class StageBar(ProgressCallback):
    """The Trainer's progress bar with a name and the last value of some metrics, in place of a line per log."""

    def __init__(self, name: str, **metrics: str):
        super().__init__()
        self.name = name
        self.metrics = metrics  # shown as -> logged as

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"      {self.name}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {name: f"{logs[key]:.2f}" for name, key in self.metrics.items() if key in logs}
            if shown:
                self.training_bar.set_postfix(shown)

    def on_prediction_step(self, args, state, control, **kwargs):
        pass


def finish(trainer, bar: StageBar, model_name: str) -> None:
    """Trains with our progress bar, then leaves the model with its card."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(bar)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name=model_name)
    trainer.accelerator.wait_for_everyone()
