"""Swaps: state of TRL's, transformers' or PEFT's that is another for a while, and then as before."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from logging import LogRecord, getLogger

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging
from trl import BEMACallback, SyncRefModelCallback


REFERENCE = "ref"  # TRL's name for the copy of an adapter that the KL is taken to
# TRL's callbacks that walk the model's parameters in parallel with those of another, plain model, and when they do
PARALLEL_WALKS = {BEMACallback: "on_train_begin", SyncRefModelCallback: "on_step_end"}


@contextmanager
def _swapped(owner, name: str, value) -> Iterator[None]:
    """Gives the object itself an attribute `name` of this value, within the context."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            vars(owner).pop(name, None)


def with_reference(args):
    """Makes TRL prepare a reference for a trainer that is made within the context, if the KL is used anywhere."""
    return _swapped(args, "beta", args.beta or args.kl_in_reward)


@contextmanager
def without_loading_warnings(trl_class: type) -> Iterator[None]:
    """Keeps TRL from saying that it ignores `model_init_kwargs`, which the model was loaded with."""

    def is_other(record: LogRecord) -> bool:
        return "your model is already instantiated" not in record.getMessage()

    logger = getLogger(trl_class.__module__)
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@contextmanager
def without_loading_report() -> Iterator[None]:
    """Keeps transformers from reporting, and showing the progress of, a load that is none."""
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


@contextmanager
def adapter_kept(model) -> Iterator[None]:
    """
    Keeps the adapters of a `PeftModel` as they were given while TRL makes a trainer of it: the same weights train, and
    the reference, if TRL adds one, is of the active adapter's kind, where TRL takes that of the one called `default`.
    Nothing happens to other models.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    configs, name = model.peft_config, model.active_adapter
    had_default, had_reference = "default" in configs, REFERENCE in configs
    with requires_grad_kept(model):
        try:
            configs.setdefault("default", configs[name])
            yield
        finally:
            if not had_default:
                del configs["default"]
        if name != "default" and had_default and REFERENCE in configs and not had_reference:
            model.delete_adapter(REFERENCE)
            model.add_adapter(REFERENCE, configs[name])


@contextmanager
def requires_grad_kept(model: nn.Module) -> Iterator[None]:
    """
    Keeps the choice of weights that train. PEFT's ways to add an adapter, and to switch to another and back,
    leave all of the active one's to train, those that were frozen with them, or none.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def trainables_kept(model: nn.Module) -> Iterator[None]:
    """Undoes what TRL's continuous batching leaves: the model cast to half precision, what trains included."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def parallel_walks_within(
    callbacks: list[TrainerCallback], context: Callable[[nn.Module], AbstractContextManager]
) -> Iterator[None]:
    """
    Makes the callbacks of `sync_ref_model` and of averaging, the trainer's own and a user's, walk the model's parameters
    within `context(model)`, which leaves those that the reference and the average have.
    """

    def within(event: Callable) -> Callable:
        def call(args, state, control, model=None, **kwargs):
            with context(model):
                return event(args, state, control, model=model, **kwargs)

        return call

    walking = [(c, event) for c in callbacks for kind, event in PARALLEL_WALKS.items() if isinstance(c, kind)]
    for callback, event in walking:
        setattr(callback, event, within(getattr(callback, event)))
    try:
        yield
    finally:
        for callback, event in walking:
            delattr(callback, event)


def generating_by(model, generate: Callable):
    """Replaces `model.generate`, within the context, by a function of the former one and the arguments."""
    former = model.generate
    return _swapped(model, "generate", functools.wraps(former)(functools.partial(generate, former)))


def rewarded_by(trainer, reward_funcs: list):
    """Makes TRL's trainer ask these functions in place of its own, one for each, within the context."""
    return _swapped(trainer, "reward_funcs", reward_funcs)


def without_masking_cut(trainer):
    """Keeps TRL from masking completions that were cut within the context."""
    return _swapped(trainer, "mask_truncated_completions", False)


@contextmanager
def first_scoring_by(trainer, answer: Callable) -> Iterator[None]:
    """
    Answers the first scoring pass that TRL's trainer makes within the context by `answer`, which is given the arguments
    of `_get_per_token_logps_and_entropies` and returns what that returns. Other passes are made.

    Raises:
        RuntimeError: if TRL made no pass.
    """
    former, is_asked = trainer._get_per_token_logps_and_entropies, False

    def score(*args, **kwargs):
        nonlocal is_asked
        if is_asked:
            return former(*args, **kwargs)
        is_asked = True
        return answer(*args, **kwargs)

    with _swapped(trainer, "_get_per_token_logps_and_entropies", score):
        yield
    if not is_asked:
        raise RuntimeError("TRL made no scoring pass where one was to be answered: its trainer has changed.")


@contextmanager
def scoring_answered(trainer, outputs: tuple) -> Iterator[None]:
    """Answers the scoring pass that TRL's loss makes within the context with `outputs`, see [`first_scoring_by`]."""
    with first_scoring_by(trainer, lambda *args, **kwargs: outputs):
        yield


def without_kl_in_loss(trainer):
    """Leaves the KL term out of TRL's loss within the context."""
    return _swapped(trainer, "beta", 0.0)
