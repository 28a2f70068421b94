"""The built wheel holds what a run needs, the card template included, away from the source tree."""

import os
import subprocess
import sys
import zipfile

from helpers import ROOT


TRAIN_ONE_STEP = """
import sys
import trl_ext
from datasets import Dataset
from trl_ext import A2CConfig, A2CTrainer

assert trl_ext.__file__.startswith(sys.argv[1]), trl_ext.__file__
args = A2CConfig(
    "out", per_device_train_batch_size=2, max_completion_length=4, max_steps=1, report_to="none", use_cpu=True, bf16=False
)
dataset = Dataset.from_dict({"prompt": ["the film", "a dull plot"]})
A2CTrainer(sys.argv[2], lambda completions, **kwargs: [1.0] * len(completions), args, dataset).train()
"""


def test_a_wheel_trains_and_writes_its_card(policy_path, tmp_path):
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], **run)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "trl_ext/model_cards/policy.md" in names
    assert {name.split("/")[0] for name in names} == {"trl_ext", "trl_ext-0.1.0.dist-info"}
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)], **run)
    env = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-P", "-c", TRAIN_ONE_STEP, str(site), policy_path], env=env, **run)
    assert "trained with A2C" in (tmp_path / "out" / "README.md").read_text()
