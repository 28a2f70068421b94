"""Every README: short at the top, linked from there and back, and without links or paths that lead nowhere."""

import re

import pytest
from helpers import ROOT
from readmes import READMES, ROOMS, name


TOP = ROOT / "README.md"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./-])(?:recipes|tests|trl_ext|model_cards)/[\w./-]*\w")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """Returns the anchors that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(readme):
    """Yields paths and anchors that a README links to, within the repository."""
    for target in LINK.findall(without_code(readme.read_text(encoding="utf-8"))):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield (readme.parent / path).resolve() if path else readme, anchor


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_links_lead_somewhere(readme):
    for path, anchor in links(readme):
        assert path.exists(), path
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), (path, anchor)


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_paths_that_are_named_are_there(readme):
    text = readme.read_text(encoding="utf-8")
    missing = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    assert missing <= {"trl_ext/model_cards"}  # which is there in a wheel


@pytest.mark.parametrize("readme", READMES[1:], ids=name)
def test_files_that_are_named_are_beside_it(readme):
    named = re.findall(r"`(\w+\.py)`", readme.read_text(encoding="utf-8"))
    assert {file for file in named if not (readme.parent / file).is_file()} == set()


@pytest.mark.parametrize("folder", ROOMS, ids=lambda folder: folder.name)
def test_every_file_of_a_room_is_named(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in folder.glob("*.py") if f"`{path.name}`" not in text} <= {"__init__.py"}


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_no_heading_stands_twice(readme):
    headings = re.findall(r"^#+ .*$", without_code(readme.read_text(encoding="utf-8")), re.MULTILINE)
    assert len(headings) == len({*headings})


@pytest.mark.parametrize("readme", READMES[1:], ids=name)
def test_each_links_to_the_top(readme):
    assert TOP in {path for path, _ in links(readme)}


def test_from_the_top_each_is_two_links_away():
    reached = {TOP}
    for _ in range(2):
        reached |= {path for readme in reached if readme.suffix == ".md" for path, _ in links(readme)}
    assert set(READMES) <= reached


def test_the_top_is_short_and_opens_with_a_sentence_a_picture_and_two_commands():
    lines = TOP.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    opening = "\n".join(lines[: lines.index("## Trainers")])
    assert len(re.findall(r"^!\[", opening, re.MULTILINE)) == 1 and opening.count("```bash") == 2


def test_the_tree_names_every_room():
    text = TOP.read_text(encoding="utf-8")
    tree = text[text.index("## What lives where") :]
    for folder in ROOMS:
        assert f"\n  {folder.name}/ " in tree


def test_every_picture_is_shown():
    pictures = {path for folder in ("recipes", "tests") for path in (ROOT / folder).rglob("*.png")}
    assert pictures and pictures <= {path for readme in READMES for path, _ in links(readme)}
