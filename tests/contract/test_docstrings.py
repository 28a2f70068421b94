"""Docstrings begin with a verb in the third person or a noun, an answer and no question; what they refer to is there."""

import ast
import importlib
import pkgutil
import re

import pytest
from helpers import ROOT

import trl_ext


FILES = sorted(path for folder in ("trl_ext", "recipes", "tests") for path in (ROOT / folder).rglob("*.py"))
QUESTION = re.compile(r"(What|Whatever|Whether|Where|Which|Who|Whom|Whose|How|When|Why|Of|Those)\b", re.IGNORECASE)


def questions(source):
    """Names and first lines of all docstrings that begin with a question word."""
    tree = ast.parse(source)
    for node in [tree, *ast.walk(tree)]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if QUESTION.match(docstring):
                yield getattr(node, "name", ""), docstring.splitlines()[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_docstring_begins_with_a_question_word(path):
    assert sorted(set(questions(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ('"""What this is for."""', ""),
        ('class A:\n    """\n    Which one.\n    """', "A"),
        ('class A:\n    def f(self):\n        r"""Whether it is."""', "f"),
        ('def f():\n    async def g():\n        """of the batch"""', "g"),
    ],
)
def test_a_question_is_seen(source, name):
    assert [found for found, _ in set(questions(source))] == [name]


def test_an_answer_passes():
    source = '"""Offsets of tokens."""\nclass Whose:\n    """Whereabouts."""\ndef what():\n    """Returns the token where it ends."""'
    assert list(questions(source)) == []


MODULES = {name: importlib.import_module(name) for _, name, _ in pkgutil.walk_packages(trl_ext.__path__, "trl_ext.")}
OBJECTS = {name: value for module in MODULES.values() for name, value in vars(module).items()}
MEMBERS = [(name, member) for name, value in OBJECTS.items() if isinstance(value, type) for member in dir(value)]
NAMES = {*OBJECTS, *(member for _, member in MEMBERS), *map(".".join, MEMBERS)}


def is_there(reference):
    """True for names of other libraries, those of modules and classes here, and paths from `trl_ext` on that exist."""
    if reference.split(".")[0] in ("datasets", "peft", "torch", "transformers", "trl"):
        return True
    if not reference.startswith("trl_ext."):
        return reference in NAMES
    try:
        return pkgutil.resolve_name(reference) is not None
    except (AttributeError, ImportError):
        return False


@pytest.mark.parametrize("path", [path for path in FILES if "trl_ext" in path.parts], ids=lambda path: path.stem)
def test_what_docstrings_refer_to_is_there(path):
    references = re.findall(r"\[`~?([\w.]+)`\]", path.read_text(encoding="utf-8"))
    assert [reference for reference in references if not is_there(reference)] == []


def test_a_reference_to_nothing_is_seen():
    there = ["ValueHead", "trl_ext.token_mdp", "trl_ext.critic.heads.Estimate", "trl_ext.Critic", "trl.GRPOTrainer"]
    assert all(map(is_there, there))
    assert not any(
        map(is_there, ["trl_ext.value_heads", "trl_ext.critic.heads.Estimates", "heads.Estimate", "NoTrainer"])
    )
