"""The configurations that trainers here are given, and what they say of themselves."""

import inspect
import textwrap
from dataclasses import MISSING

from ..compat import get_config_model_id


def document_fields(config_class: type) -> type:
    """Completes a configuration's docstring by this package's fields as `--help` explains them; a class decorator."""
    ours = [base for base in reversed(config_class.__mro__) if base.__module__.startswith("trl_ext.")]
    fields = {name: config_class.__dataclass_fields__[name] for base in ours for name in inspect.get_annotations(base)}
    lines = []
    for name, field in fields.items():
        kind = inspect.formatannotation(field.type).removesuffix(" | None")
        default = field.default if field.default is not MISSING else field.default_factory()
        shown = "" if default is None else f", defaults to `{default!r}`"
        lines += [f"    {name} (`{kind}`, *optional*{shown}):"]
        lines += textwrap.wrap(field.metadata["help"], 111, initial_indent=" " * 8, subsequent_indent=" " * 8)
    config_class.__doc__ = "\n".join([inspect.cleandoc(config_class.__doc__), "", "Parameters:", *lines])
    return config_class


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
