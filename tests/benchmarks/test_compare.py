"""The study: its statistics by closed forms, its rewards by hand, and a whole small one, which goes on where it was stopped."""

import math
import statistics
import sys
from pathlib import Path

import pytest
from helpers import run_program


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from comparison import tuning  # noqa: E402
from comparison.methods import METHODS  # noqa: E402
from comparison.results import Run, area, compare, final, half_width, holm, p_value, worst  # noqa: E402
from comparison.runs import Job, arguments  # noqa: E402
from comparison.tables import overview, sweep_table, task_table  # noqa: E402
from comparison.tasks import TASKS  # noqa: E402
from comparison.tasks.base import Places  # noqa: E402
from comparison.tasks.film_reviews import dense_praise, praise  # noqa: E402
from comparison.tasks.smollm2 import is_right, openings  # noqa: E402
from comparison.tasks.toys import chosen, counted, decided, four_symbols, level, symbol_tokenizer  # noqa: E402


# --- Statistics ---


def points(*objectives):
    return [{"tokens": 10 * i, "objective": value} for i, value in enumerate(objectives)]


def test_measures_of_a_curve():
    assert final(points(0, 0, 0, 0, 0, 0, 0, 1, 3)) == 2  # of 80 tokens, those after the 60th
    assert final([{"tokens": 5, "objective": 7.0}]) == area([{"tokens": 5, "objective": 7.0}]) == 7
    assert area(points(0, 2, 2)) == 1.5
    unequal = [{"tokens": 0, "objective": 0}, {"tokens": 10, "objective": 4}, {"tokens": 40, "objective": 4}]
    assert area(unequal) == pytest.approx((20 + 120) / 40)


def test_intervals_and_p_values_are_students():
    # With 1 degree of freedom Student's t is Cauchy's, with 2 its distribution is 1/2 + t / (2 sqrt(2 + t^2))
    two = [1.0, 4.0]
    error = statistics.stdev(two) / math.sqrt(2)
    assert half_width(two) == pytest.approx(math.tan(math.pi * 0.475) * error)
    assert half_width(two, 10) == pytest.approx(math.tan(math.pi * 0.4975) * error)
    assert p_value(two) == pytest.approx(1 - 2 / math.pi * math.atan(2.5 / error))
    three = [-1.0, -2.0, -4.0]
    t = statistics.mean(three) / (statistics.stdev(three) / math.sqrt(3))
    assert p_value(three) == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))
    assert half_width([2.0]) == math.inf and p_value([2.0]) == 1
    assert p_value([0.0, 0.0]) == 1 and p_value([3.0, 3.0]) == 0


def test_p_values_are_adjusted_for_their_number():
    # Holm 1979: the smallest times 4, the next times 3, and so on, and none below one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def runs(method, setting, finals):
    return [Run(method, setting, seed, points(0.0, *[value] * 8)) for seed, value in enumerate(finals)]


def test_methods_are_compared_seed_by_seed_at_the_same_rate():
    base = runs("grpo", 1.0, [1.0, 2.0, 3.0]) + runs("grpo", 3.0, [5.0, 5.0, 5.0])
    better = runs("reinforce", 1.0, [2.0, 3.001, 4.0]) + runs("reinforce", 3.0, [4.0, 5.2, 5.1])
    comparisons = {c.setting: c for c in compare(base + better)}
    assert comparisons[1.0].differences == pytest.approx([1, 1.001, 1])
    assert comparisons[1.0].num_comparisons == 2 and comparisons[1.0].verdict == "above"
    assert comparisons[1.0].p_adjusted == pytest.approx(2 * p_value([1, 1.001, 1]))
    assert comparisons[1.0].half_of_all == pytest.approx(half_width([1, 1.001, 1], 2))
    assert comparisons[3.0].verdict == "at"
    assert worst(list(comparisons.values())) == {("reinforce", "grpo"): comparisons[3.0]}
    assert [c.verdict for c in compare(base + runs("a2c", 1.0, [0.0, 1.001, 2.0]))] == ["below"]
    # A seed that one of them lacks is left out, and a baseline that was not run
    assert compare(base + runs("reinforce", 1.0, [2.0]))[0].differences == [1.0]
    assert compare(better) == []


def test_a_verdict_allows_for_all_comparisons():
    base, better = runs("grpo", 1.0, [0.0, 0.0, 0.0]), runs("reinforce", 1.0, [1.0, 1.5, 2.0])
    assert [c.verdict for c in compare(base + better)] == ["above"]
    assert [c.verdict for c in compare(base + better + runs("rloo", 1.0, [0.0, 0.1, 0.2]))] == ["at", "at"]


def test_tables_show_every_run():
    of_task = runs("grpo", 1.0, [1.0, 2.0]) + runs("a2c", 1.0, [2.0, 3.001]) + runs("reinforce", 1.0, [2.0, 3.0])
    text = task_table(of_task)
    assert (
        "| a2c | 1 | 2.500 ± 6.3" in text and "| grpo | 1.000 ± 0.006 |" in text and "| reinforce | 0.000 ± " in text
    )
    assert "above: 1.000 (" in overview({"task": of_task, "other": runs("grpo", 1.0, [1.0])})
    text = sweep_table(
        runs("grpo", 2, [1.0, 1.0]) + runs("reinforce", 1, [1.0, 3.0]) + runs("reinforce", 2, [2.0, 2.0]), "n"
    )
    assert "| n | 1 | 2 |" in text and "| grpo |  | 1.000 ± 0.000 |" in text
    assert "| reinforce - grpo |  | 1.000 ± 0.000 |" in text


# --- Methods and tuning ---


def test_methods_are_at_their_defaults():
    """The study sets the same for all, but for what makes a method this one."""
    common = [name for name in METHODS if name not in ("reinforce-none", "reinforce-value")]
    for name in common:
        job = Job("words", name, 1e-3, 0, 100)
        given = arguments(job, "out") | {METHODS[name].kl_option: None}
        assert given.pop("num_iterations", METHODS["grpo-epochs"].overrides["num_iterations"]) > 1
        shared = {k: v for k, v in given.items() if k not in ("beta", "kl_in_reward")}
        assert shared == {k: v for k, v in arguments(Job("words", "ppo", 1e-3, 0, 100), "out").items() if k in shared}
    assert arguments(Job("words", "grpo", 1e-3, 0, 100), "out")["beta"] == 0.2
    assert arguments(Job("words", "ppo", 1e-3, 3, 100), "out")["kl_in_reward"] == 0.2
    assert arguments(Job("words", "ppo", 1e-3, 3, 100), "out")["seed"] == 3
    assert arguments(Job("single", "ppo", 1e-3, 0, 100), "out")["num_generations"] == 1
    assert arguments(Job("single", "grpo", 1e-3, 0, 100), "out")["num_generations"] == 8
    updates = arguments(Job("words", "ppo", 1e-3, 0, 100, (("steps_per_generation", 4),)), "out")
    assert updates["per_device_train_batch_size"] * 4 == TASKS["words"].rollout_size


def test_what_is_tuned_is_tuned_for_all():
    tried = []

    def perform(jobs):
        tried.extend(jobs)
        good = {"scale_rewards": "none", "beta": 0.6}
        value = [
            sum(dict(job.options).get(k) == v for k, v in good.items()) - abs(job.learning_rate - 3e-3) for job in jobs
        ]
        return [points(0, *[v] * 4) for v in value]

    chosen_for = tuning.tune("words", ["grpo", "ppo"], 100, perform)
    assert chosen_for == {
        "learning_rate": 3e-3,
        "options": {"grpo": {"scale_rewards": "none", "beta": 0.6}, "ppo": {}},
    }
    assert {job.seed for job in tried} == set(tuning.SEEDS) and not set(tuning.SEEDS) & set(range(5))
    assert {dict(job.options).get("kl_in_reward") for job in tried if job.method == "ppo"} == {None, 0.0667, 0.6}
    assert set(tuning.read_tuned()) == set(TASKS)


# --- Rewards ---


def ids_of(text):
    return symbol_tokenizer()(text)["input_ids"]


def test_a_count_goes_round():
    assert counted("i", ids_of("j a b c")) == [1 / 8] * 4
    assert counted("a d i", ids_of("j j a <eos>")) == [1 / 8, 0, 1 / 8, 0]
    assert counted("a", ids_of("c d")) == [0, 1 / 8]  # what follows a wrong symbol may be right
    assert counted("j", ids_of("<unk> a")) == [0, 0]


def test_the_first_symbol_decides_if_all_are_there():
    noise = " b" * 32
    assert decided("i", ids_of("b" + noise)) == [0] * 32 + [1]
    assert sum(decided("i", ids_of("c" + noise))) == sum(decided("i", ids_of("b b <eos>"))) == 0


def test_symbols_of_a_kind_and_the_level_of_a_prompt():
    assert sum(chosen("a", ids_of("a c d <eos>"))) == pytest.approx(2 / 256)
    assert level("a j j j") == 0 and level("j a a a") == 2
    assert len(set(four_symbols())) == 10_000
    start = TASKS["single"].begin(None, 0, is_dense=True)
    assert start.rewards[0](["j a b c"], [""], [ids_of("d a <eos>")]) == [2 + 1 / 8]
    assert start.objective(["j a b c"], [""], [ids_of("d a <eos>")]) == [1 / 8]


def test_dense_rewards_are_worth_what_is_paid_at_the_end():
    prompts, ids = ["a", "i"], [ids_of("b c a b e f g h"), ids_of("b c <eos>")]
    starts = {dense: TASKS["count-dense"].begin(None, 0, is_dense=dense) for dense in (True, False)}
    dense, total = (starts[key].rewards[0](prompts, ["", ""], ids) for key in (True, False))
    assert [sum(row) for row in dense] == total == starts[True].objective(prompts, ["", ""], ids) == [6 / 8, 1 / 8]
    assert list(map(len, dense)) == [8, 3]


def test_dense_and_delayed_praise_are_worth_the_same():
    texts = ["It is a good film, not a bad one.", "A dull, sad mess.", "It was.", "Truly great! But slow."]
    dense = [sum(value for *_, value in reward) if reward else 0.0 for reward in dense_praise(texts)]
    assert dense == praise(texts) and len(set(dense)) > 2
    assert [texts[0][start:end] for start, end, _ in dense_praise(texts)[0]] == ["good", "bad"]


def test_sums_are_right_by_their_first_number():
    assert is_right(" 6\nState the final", "6") and is_right("-3", "-3") and is_right(" 06", "6")
    assert not any(is_right(text, "6") for text in (" 16", "The answer is 6", "", " -6", "- 6"))


def test_openings_are_the_first_words_of_negative_reviews():
    rows = [
        {"text": "a b c d e f g h", "label": 0},
        {"text": "a b c d e f x", "label": 0},
        {"text": "good", "label": 1},
    ]
    assert openings(rows) == ["a b c d e f"]


def test_tasks_that_need_files_say_so():
    assert TASKS["smollm2-reviews"].missing(Places("out")) == "--smollm2 and --data"
    assert TASKS["smollm2-reviews"].missing(Places("out", smollm2="model", data="reviews.jsonl")) == ""
    assert TASKS["words"].missing(Places("out")) == ""


# --- The whole ---


@pytest.mark.slow
def test_a_small_study(tmp_path):
    command = [HERE / "compare.py", "--tasks", "single", "words", "--methods", "a2c", "grpo", "--rates", 3]
    command += ["--seeds", 1, "--budget", 1000, "--corpus_size", 300, "--output_dir", "out", "--jobs", 1]
    printed = run_program(*command, "--set", "vf_coef=0.2", cwd=tmp_path)
    assert "| a2c | 3 | " in printed and "| a2c - grpo | at: " in printed
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {
        "compare_single.png",
        "compare_words.png",
        "compare_overview.png",
    }
    files = sorted((tmp_path / "out" / "runs").glob("*.json"))
    assert len(files) == 4 and sum("vf_coef=0.2" in file.name for file in files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    assert run_program(*command, "--set", "vf_coef=0.2", cwd=tmp_path) == printed
    assert [file.stat().st_mtime_ns for file in files] == times
