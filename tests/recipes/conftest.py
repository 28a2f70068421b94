"""Fixtures of the recipes: each by name, or run as a program, in a process that has imported what takes time."""

import importlib
import runpy
import sys

import datasets.config
import pytest
from helpers import RECIPES


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by name."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


@pytest.fixture
def run_recipe(monkeypatch, capsys):
    """Runs a recipe in `cwd` and returns what it printed, as `run_program` does, but in this process."""

    def run(script, *arguments, cwd):
        known = set(sys.modules)
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "path", [str(RECIPES), *sys.path])
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cwd / "cache"))
            capsys.readouterr()
            try:
                runpy.run_path(str(RECIPES / script), run_name="__main__")
            finally:
                for name in set(sys.modules) - known:  # a reward of this test is not that of the next
                    if str(getattr(sys.modules[name], "__file__", None)).startswith(str(cwd)):
                        del sys.modules[name]
        return capsys.readouterr().out

    return run
