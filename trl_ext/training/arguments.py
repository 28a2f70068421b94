"""Arguments of all trainers here: their documentation, and checks."""

import inspect
import textwrap
from dataclasses import MISSING, Field

from ..compat import get_config_model_id


def document_fields(config_class: type) -> type:
    """Completes a configuration's docstring by this package's fields as `--help` explains them; a class decorator."""
    lines = []
    for name, field in _our_fields(config_class).items():
        kind = inspect.formatannotation(field.type).removesuffix(" | None")
        default = field.default if field.default is not MISSING else field.default_factory()
        shown = "" if default is None else f", defaults to `{default!r}`"
        lines += [f"    {name} (`{kind}`, *optional*{shown}):"]
        lines += textwrap.wrap(field.metadata["help"], 111, initial_indent=" " * 8, subsequent_indent=" " * 8)
    config_class.__doc__ = "\n".join([inspect.cleandoc(config_class.__doc__), "", "Parameters:", *lines])
    return config_class


def check_choices(config) -> None:
    """Refuses a configuration in which a field of this package has none of the `choices` of its metadata."""
    for name, field in _our_fields(type(config)).items():
        choices = field.metadata.get("choices")
        if choices is not None and getattr(config, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {getattr(config, name)!r}.")


def _our_fields(config_class: type) -> dict[str, Field]:
    """Returns the fields that classes of this package declare, those of parents first."""
    ours = [base for base in reversed(config_class.__mro__) if base.__module__.startswith("trl_ext.")]
    return {name: config_class.__dataclass_fields__[name] for base in ours for name in inspect.get_annotations(base)}


def checked_args(args, trainer_class, model):
    """Returns `args`, which must be of a trainer's `config_class`; by default with a folder named after `model`."""
    config_class = trainer_class.config_class
    if args is None:
        model_name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_name.split('/')[-1]}-{trainer_class._name.replace(' ', '-')}")
    if not isinstance(args, config_class):
        parent = next(base.__name__ for base in config_class.__mro__ if base.__module__.startswith("trl."))
        raise TypeError(
            f"`args` must be a `{config_class.__name__}`, got `{type(args).__name__}`. It takes every argument of "
            f"`{parent}`."
        )
    return args
