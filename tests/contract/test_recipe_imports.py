"""The direction of imports among the recipes: a program imports no program, and folders only what lies below them."""

import ast
from pathlib import Path

import pytest
from helpers import RECIPES


PROGRAMS = {path.stem for path in RECIPES.glob("*.py")}
# A folder may import from those of lower levels, and itself. Folders of one level do not know each other.
LEVEL_OF = {"shared": 0, "collecting": 1, "film_reviews": 1, "games": 1, "loop": 2}
FILES = sorted(path.relative_to(RECIPES) for path in RECIPES.rglob("*.py"))


def imported_roots(source):
    """The first part of each name that a source imports, wherever in it; what is relative is of its own folder."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def violations(file, source):
    level = LEVEL_OF.get(file.parts[0], max(LEVEL_OF.values()) + 1)
    for root in imported_roots(source):
        if root in PROGRAMS:
            yield f"{file} imports the program {root}"
        if root != file.parts[0] and LEVEL_OF.get(root, -1) >= level:
            yield f"{file} imports from {root}, which is on its own level or above"


def test_the_levels_are_those_of_the_folders_that_there_are():
    assert {path.parent.name for path in RECIPES.glob("*/__init__.py")} == set(LEVEL_OF)
    assert {"sft", "quickstart", "rlhf", "text_game"} <= PROGRAMS and PROGRAMS.isdisjoint(LEVEL_OF)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_recipe_keeps_the_rules(file):
    assert list(violations(file, (RECIPES / file).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ranking_dpo.py", "from ranking_reward import load_rankings"),
        ("rlhf.py", "def f():\n    import sft"),
        ("loop/plan.py", "import rlhf"),
        ("shared/data.py", "from collecting.text import as_text"),
        ("games/house.py", "import film_reviews.models"),
        ("collecting/text.py", "from loop.data import divide"),
    ],
)
def test_a_violation_is_seen(file, source):
    assert len(list(violations(Path(file), source))) == 1
    assert list(violations(Path(file), "from shared import arguments\nimport torch")) == []
