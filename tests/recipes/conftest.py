"""Fixtures of the recipes: each by name, or run as a program, in a process that has imported what takes time."""

import importlib
import runpy
import sys

import datasets.config
import pytest
from helpers import RECIPES


@pytest.fixture(autouse=True)
def forgotten_rewards(tmp_path_factory):
    """Forgets modules that a test has imported from its folder, as the next one may have another of that name."""
    yield
    folders = str(tmp_path_factory.getbasetemp())
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(folders):
            del sys.modules[name]


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by name."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


@pytest.fixture
def run_recipe(monkeypatch, capsys):
    """Runs a recipe in `cwd` and returns what it printed, as `run_program` does, but in this process."""

    def run(script, *arguments, cwd):
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "path", [str(RECIPES), *sys.path])
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cwd / "cache"))
            capsys.readouterr()
            runpy.run_path(str(RECIPES / script), run_name="__main__")
        return capsys.readouterr().out

    return run
