"""Docstrings begin with a verb in the third person or a noun: an answer, not a question."""

import ast
import re

import pytest
from helpers import ROOT


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
