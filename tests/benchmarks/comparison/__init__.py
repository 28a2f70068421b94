"""The parts of `compare.py`: methods with their settings, tasks, runs and results. Its world is the quickstart's."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[3] / "recipes"))
