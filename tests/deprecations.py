"""
Finds what this project's own calls do that a library has deprecated. Libraries say so by warnings whose place is their own
code, and by log messages, so the stack is asked who called: whoever is first outside the library that speaks.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).parents[1]
OWN = tuple(str(ROOT / folder) for folder in ("trl_ext", "recipes", "tests"))
# Code that only hands on what it is given: the calls of modules and decorated functions, and PEFT's of its base
HANDS_ON = re.compile(
    r"site-packages/(torch|accelerate)/|lib/python[\d.]+/(contextlib|functools)\.py|site-packages/typing_extensions\.py"
)
HANDS_ON_IN_PEFT = {"__getattr__", "forward", "generate"}
SPEAKS_OF_IT = re.compile(r"deprecated|will be removed in", re.IGNORECASE)
WITHIN = "`use_return_dict`"  # transformers' own models ask for it

warn, handle = warnings.warn, logging.Logger.handle
found: list[str] = []


def own_caller(frame) -> str | None:
    """The place in this project that called the library in whose code `frame` is, or None if another library did."""
    speaker, called = package_of(frame), None
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        is_own = path.startswith(OWN) and path != __file__
        is_override = is_own and name == called  # it hands on to its parent what it was asked for
        if is_own and not is_override:
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        is_peft = package_of(frame) == "peft" and name in HANDS_ON_IN_PEFT
        if not (is_override or package_of(frame) == speaker or is_peft or HANDS_ON.search(path)):
            return None
        frame, called = frame.f_back, name
    return None


@contextmanager
def asked_for() -> Iterator[None]:
    """Lets a test ask for deprecated things within the context, as users still do."""
    before = list(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    found[:] = before


def package_of(frame) -> str:
    return frame.f_code.co_filename.rpartition("site-packages/")[2].split("/")[0]


def watched_warn(message, category=None, stacklevel=1, *args, **kwargs):
    kind = type(message) if isinstance(message, Warning) else category or UserWarning
    if issubclass(kind, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        keep(message, sys._getframe(1))
    return warn(message, category, stacklevel + 1, *args, **kwargs)


def watched_handle(self, record):
    if SPEAKS_OF_IT.search(record.getMessage()):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == logging.__file__:
            frame = frame.f_back
        keep(record.getMessage(), frame)
    return handle(self, record)


def keep(message, frame) -> None:
    caller = own_caller(frame)
    if caller is not None and WITHIN not in str(message):
        found.append(f"{caller}: {message}")


warnings.warn, logging.Logger.handle = watched_warn, watched_handle
