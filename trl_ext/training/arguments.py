"""The arguments that trainers here are given."""

from ..compat import get_config_model_id


def checked_args(args, trainer_class, model):
    """`args`, which must be of the `config_class` of `trainer_class`; by default with a folder named after `model`."""
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
