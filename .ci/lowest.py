"""Prints, as constraints for pip, the lowest version that `pyproject.toml` allows of each library the package is made of."""

import re
import tomllib
from pathlib import Path


project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
# Neither the tools that run the tests, nor torch, which `run` installs first
requirements = [*project["dependencies"], *extras["quantization"], *extras["recipes"], *extras["collect"]]
for requirement in requirements:
    name, lowest = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={lowest}")
