"""The study: its statistics, and a whole small one, which goes on where it was stopped."""

import json
import statistics
import sys
from pathlib import Path

import pytest
from helpers import run_program
from scipy import stats


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from comparison.methods import METHODS, METHODS_OF_TASK  # noqa: E402
from comparison.results import interval  # noqa: E402
from comparison.tasks import dense_praise, praise  # noqa: E402


def test_intervals_are_students():
    values = [1.0, 1.4, 0.9, 1.2, 1.5]
    low, high = stats.t.interval(0.95, 4, statistics.mean(values), stats.sem(values))
    assert interval(values) == f"1.20 ± {(high - low) / 2:.2f}"
    assert interval([2.0]) == "2.00"


def test_every_method_of_a_task_has_settings_and_as_many():
    for names in METHODS_OF_TASK.values():
        assert {len(METHODS[name].settings) for name in names} == {3}
    assert {"ppo", "ppo-delayed", "grpo", "rloo", "q-actor-critic", "nlpo", "best-of-n"} <= set(METHODS)


def test_dense_and_delayed_praise_are_worth_the_same():
    texts = ["It is a good film, not a bad one.", "A dull, sad mess.", "It was.", "Truly great! But slow."]
    dense = [sum(value for *_, value in reward) if reward else 0.0 for reward in dense_praise(texts)]
    assert dense == praise(texts) and len(set(dense)) > 2
    assert [texts[0][start:end] for start, end, _ in dense_praise(texts)[0]] == ["good", "bad"]


@pytest.mark.slow
def test_a_small_study(tmp_path):
    command = [
        HERE / "compare.py",
        "--tasks",
        "words",
        "--methods",
        "reinforce-mean",
        "best-of-n",
        "--seeds",
        1,
    ]
    command += ["--budget", 1000, "--corpus_size", 300, "--output_dir", "out", "--jobs", 1]
    printed = run_program(*command, cwd=tmp_path)
    assert "| reinforce-mean | " in printed and (tmp_path / "out" / "words.png").is_file()
    files = sorted((tmp_path / "out" / "runs").glob("*.json"))
    assert len(files) == 4  # three settings, and the best of them again
    points = json.loads(files[0].read_text())["points"]
    assert points[0]["tokens"] == 0 and points[-1]["tokens"] >= 1000 and points[0]["kl"] == pytest.approx(0, abs=1e-4)
    times = [file.stat().st_mtime_ns for file in files]
    run_program(*command, cwd=tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == times
