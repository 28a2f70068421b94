"""Runs a program once for each list of arguments: `repeating.py PROGRAM RUNS.json`. Starting two takes longer."""

import json
import os
import runpy
import sys
from pathlib import Path


if __name__ == "__main__":
    program, runs = sys.argv[1:]
    sys.path.insert(0, str(Path(program).parent))
    leave, os._exit = os._exit, sys.exit  # several processes on the CPU leave without teardown when training is over
    for arguments in json.loads(Path(runs).read_text()):
        sys.argv = [program, *arguments]
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, ended
    leave(0)
