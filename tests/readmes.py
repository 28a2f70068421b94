"""The READMEs of this repository, each of which has its tests."""

from helpers import ROOT


# What the programs write is in folders of other names
ROOMS = sorted(path.parent for path in (ROOT / "trl_ext").glob("*/__init__.py"))
FOLDERS = [*ROOMS, *(ROOT / name for name in ("trl_ext", "recipes", "model_cards", "tests", "tests/benchmarks"))]
READMES = [ROOT / "README.md", *(folder / "README.md" for folder in FOLDERS)]


def name(readme):
    return str(readme.relative_to(ROOT))
