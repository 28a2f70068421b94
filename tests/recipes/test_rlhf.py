"""The whole loop as its user runs it, in small, against a Hub of our own; and what it refuses, keeps and goes on from."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from helpers import RECIPES
from hub_server import (
    OTHER_TOKEN,
    READ_TOKEN,
    UNKNOWN_TOKEN,
    WRITE_TOKEN,
    HubServer,
    connect,
    environment,
    run_against,
)
from huggingface_hub import DatasetCard, HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_ext.data.items import read_items
from trl_ext.data.judgements import Judgements


sys.path.insert(0, str(RECIPES))

import actor_critic  # noqa: E402
import rlhf  # noqa: E402
from film_reviews.judges import lexicon_judge, praise  # noqa: E402
from loop.answers import compare  # noqa: E402
from loop.arguments import check  # noqa: E402
from loop.data import divide  # noqa: E402
from loop.evaluation import interval  # noqa: E402
from loop.options import parse  # noqa: E402
from loop.plan import Plan  # noqa: E402
from loop.publishing import stage_model  # noqa: E402
from loop.records import check_unchanged, last_checkpoint, record_of, write_record  # noqa: E402
from loop.running import shortened  # noqa: E402
from loop.stages import flags  # noqa: E402
from loop.start import begin_again  # noqa: E402


pytestmark = pytest.mark.slow

TINY = {
    "training": {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "logging_steps": 1,
        "learning_rate": 0.01,
    },
    "prepare": {"corpus_size": 80, "num_test": 8, "vocab_size": 400, "hidden_size": 16, "num_layers": 1},
    "sft": {"max_steps": 6, "per_device_train_batch_size": 8, "save_strategy": "no"},
    "sample": {"max_prompts": 12, "max_completion_length": 12},
    "reward_model": {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"},
    "policy": {"max_steps": 12, "per_device_train_batch_size": 8, "max_completion_length": 12, "save_steps": 2},
    "answer": {"num_completions": 4, "max_completion_length": 12},
}
PUBLISH = shlex.split("--push_to_hub --namespace user --name films --licence cc-by-4.0")
MODELS, DATASETS = (
    ("user/films-sft", "user/films-reward-model", "user/films"),
    ("user/films-rankings", "user/films-rollouts"),
)
STAGES = ["prepare", "sft", "sample", "rank", "reward_model", "policy", "answer", "evaluate", "publish"]


class Loop:
    """A user's folder, in which the loop is started as a program."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.output = folder / "out"
        self.write_config(TINY)

    def write_config(self, config):
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(config))

    def start(self, *args, token=WRITE_TOKEN, lists_imports=False):
        command = [sys.executable, str(RECIPES / "rlhf.py"), "--config", "tiny.yaml", "--output_dir", "out", *args]
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        own |= {"PYTHONPROFILEIMPORTTIME": "1"} if lists_imports else {}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment(self.server, self.folder / "home", token) | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args, **kwargs):
        """`(exit status, output, errors)`"""
        process = self.start(*args, **kwargs)
        printed, errors = process.communicate(timeout=300)
        return process.returncode, printed, errors

    def kill_during_policy(self):
        """Ends the loop while the policy is trained, after its second checkpoint; returns what it said."""
        process = self.start(*PUBLISH)
        while (
            process.poll() is None and not (self.output / "policy" / "checkpoint-4" / "trainer_state.json").is_file()
        ):
            time.sleep(0.02)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=60)
        return process.returncode, printed, errors, psutil.wait_procs(started, timeout=10)[1]


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """The loop killed in the middle, gone on with while the Hub refuses one model, and finished; and what was said."""
    with HubServer() as server:
        loop = Loop(tmp_path_factory.mktemp("rlhf"), server)
        loop.killed = loop.kill_during_policy()
        server.fail("POST", "/api/models/user/films-reward-model/commit", 403)
        loop.refused = loop.run(*PUBLISH)
        loop.published_then = sorted(repo_id for _, repo_id in server.repos if len(commits(server, repo_id)) > 1)
        loop.finished = loop.run(*PUBLISH)
        yield loop


def commits(server, repo_id):
    (repo,) = [repo for (_, name), repo in server.repos.items() if name == repo_id]
    return [*repo.history()]


def files_of(server, repo_id):
    return commits(server, repo_id)[0].files


# --- The run ---


def test_what_is_killed_goes_on_from_its_last_checkpoint(loop):
    status, printed, errors, alive = loop.killed
    assert status == 143 and "[6/9] policy" in printed and "[7/9]" not in printed, errors
    assert alive == []  # nothing trains on unseen
    _, printed, _ = loop.refused
    assert [f"[{i}/9] {name}: done before, skipped" in printed for i, name in enumerate(STAGES, 1)] == [True] * 5 + [
        False
    ] * 4
    resumed = int(re.search(r"goes on from out/policy/checkpoint-(\d+)", printed)[1])
    assert 4 <= resumed < 12
    state = json.loads((loop.output / "policy" / "checkpoint-12" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == list(range(1, 13))


def test_a_repository_that_is_refused_stops_no_other_and_the_loop_says_how_to_go_on(loop):
    status, printed, errors = loop.refused
    assert status == 1
    assert loop.published_then == sorted({*MODELS, *DATASETS} - {"user/films-reward-model"})
    assert "The token may not write to user/films-reward-model" in printed and "hf upload" in printed
    assert "1 of 5 could not be published: user/films-reward-model" in printed
    command = shlex.split(errors.split("when that is mended: ")[1])
    assert command[:2] == ["python", str(RECIPES / "rlhf.py")] and command[-len(PUBLISH) :] == PUBLISH
    status, printed, errors = loop.finished
    assert status == 0, errors
    assert printed.count("done before, skipped") == 8 and "[9/9] publish: as user/films" in printed
    assert {repo_id for _, repo_id in loop.server.repos} == {*MODELS, *DATASETS}
    # What was there already was not committed again: the first commit is the Hub's own
    assert [len(commits(loop.server, repo_id)) for repo_id in (*MODELS, *DATASETS)] == [2] * 5


def test_started_again_it_skips_everything(loop):
    before = {file: file.stat().st_mtime for file in loop.output.rglob("*") if file.is_file()}
    calls = len(loop.server.calls)
    status, printed, imported = loop.run(*PUBLISH, lists_imports=True)
    assert "| argparse\n" in imported and "| torch\n" not in imported  # which takes longer than all the rest
    assert status == 0 and printed.count("done before, skipped") == 9
    assert before == {file: file.stat().st_mtime for file in loop.output.rglob("*") if file.is_file()}
    assert len(loop.server.calls) == calls


def test_changed_settings_are_refused_by_the_stages_name(loop):
    loop.write_config(TINY | {"policy": TINY["policy"] | {"kl_in_reward": 0.1}})
    try:
        status, printed, errors = loop.run(*PUBLISH)
    finally:
        loop.write_config(TINY)
    assert status == 1 and "skipped" not in printed
    assert "The stage policy was finished with other settings" in errors
    assert "actor_critic.py --kl_in_reward: was not given, now 0.1" in errors and "--redo policy" in errors


# --- What is published ---


def test_the_five_link_to_each_other(loop):
    known = {(kind, repo_id): repo for (kind, repo_id), repo in loop.server.repos.items()}
    for (kind, repo_id), repo in known.items():
        text = repo.at("main").files["README.md"].content.decode()
        linked = {
            ("dataset" if dataset else "model", name)
            for dataset, name in re.findall(r"https://huggingface\.co/(datasets/)?(user/[\w-]+)", text)
        }
        assert linked == set(known), repo_id
        assert text.count("Five things came out of one run of RLHF") == 1
        card = (ModelCard if kind == "model" else DatasetCard)(text)
        assert card.data.license == "cc-by-4.0"
    data = {
        repo_id: ModelCard(files_of(loop.server, repo_id)["README.md"].content.decode()).data for repo_id in MODELS
    }
    sft, reward_model, policy = data.values()
    assert (sft.base_model, reward_model.base_model, policy.base_model) == (None, "user/films-sft", "user/films-sft")
    assert reward_model.datasets == ["user/films-rankings"]
    assert [card.model_name for card in data.values()] == ["films-sft", "films-reward-model", "films"]


def test_the_policys_card_has_the_evaluation(loop):
    files = files_of(loop.server, "user/films")
    card = ModelCard(files["README.md"].content.decode())
    results = json.loads((loop.output / "evaluation.json").read_text())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {
        name: pytest.approx(results[name]["mean"], abs=1e-4) for name in ("win_rate", "tie_rate", "lose_rate")
    }
    assert {(r.dataset_type, r.dataset_split) for r in card.data.eval_results} == {("user/films-rankings", "test")}
    assert "## Evaluation" in card.text and "![Evaluation](evaluation.png)" in card.text
    assert files["evaluation.png"].content == (loop.output / "evaluation.png").read_bytes()


def test_nothing_of_this_machine_is_published(loop):
    for repo_id in (*MODELS, *DATASETS):
        files = files_of(loop.server, repo_id)
        for name, file in files.items():
            assert str(loop.folder).encode() not in file.content, (repo_id, name)
            assert re.search(rb"\bout/", file.content) is None, (repo_id, name)
            assert WRITE_TOKEN.encode() not in file.content, (repo_id, name)
        assert not [
            name for name in files if "checkpoint" in name or "rollouts" in name or name == "training_args.bin"
        ]
        text = files["README.md"].content.decode()
        snippets = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        assert f'"{repo_id}"' in snippets and '"None"' not in snippets and "[None]" not in text


LOAD = """
    import json
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    results = {}
    for name, cls in (
        ("films-sft", AutoModelForCausalLM), ("films", AutoModelForCausalLM),
        ("films-reward-model", AutoModelForSequenceClassification),
    ):
        ids = AutoTokenizer.from_pretrained(f"user/{name}")(["The film is bad"], return_tensors="pt")["input_ids"]
        results[name] = cls.from_pretrained(f"user/{name}").eval()(ids).logits.flatten().tolist()
    for name in ("films-rankings", "films-rollouts"):
        results[name] = {split: rows.to_list() for split, rows in load_dataset(f"user/{name}").items()}
    print(json.dumps(results))
"""


def test_what_was_published_loads_in_a_fresh_process(loop):
    run = run_against(loop.server, LOAD, loop.folder / "other-home", token=READ_TOKEN)
    assert run.returncode == 0, run.stderr[-2000:]
    loaded = json.loads(run.stdout.splitlines()[-1])
    ids = AutoTokenizer.from_pretrained(loop.output / "sft")(["The film is bad"], return_tensors="pt")["input_ids"]
    for name, folder in (("films-sft", "sft"), ("films", "policy"), ("films-reward-model", "reward_model")):
        cls = AutoModelForSequenceClassification if folder == "reward_model" else AutoModelForCausalLM
        logits = cls.from_pretrained(loop.output / folder).eval()(ids).logits.flatten().tolist()
        assert loaded[name] == pytest.approx(logits, abs=1e-5)
    assert loaded["films-sft"] != pytest.approx(loaded["films"], abs=1e-3)  # it did learn something
    rankings, rollouts = loaded["films-rankings"], loaded["films-rollouts"]
    judged = {split: Judgements(loop.output / folder, "judge-word-list") for split, folder in SPLITS.items()}
    assert {split: {row["id"]: row["ranks"] for row in rows} for split, rows in rankings.items()} == {
        split: {record["id"]: record["ranks"] for record in records} for split, records in judged.items()
    }
    # 12 updates, 4 on each rollout of 8
    assert [row["step"] for row in rollouts["train"]] == [0] * 8 + [4] * 8 + [8] * 8


SPLITS = {"train": "completions", "test": "evaluation"}


# --- The evaluation ---


def test_the_evaluation_is_what_the_judgements_say(loop):
    """Recomputed from the items that the judge saw, where a letter says who wrote what, and by the rule of the judge."""
    folder = loop.output / "evaluation"
    letters = {Path(path).name: letter for letter, path in json.loads((folder / "models.json").read_text()).items()}
    results = json.loads((loop.output / "evaluation.json").read_text())
    judge, by_prompt = lexicon_judge(), {}
    for item in read_items(folder):
        ranks = judge.rank([completion[0]["content"] for completion in item.completions])
        by_source = {
            name: [rank for rank, source in zip(ranks, item.sources, strict=True) if source == letter]
            for name, letter in letters.items()
        }
        assert len(by_source["sft"]) == len(by_source["policy"]) == 2  # no text twice, at this seed
        pairs = [(a, b) for a in by_source["sft"] for b in by_source["policy"]]
        by_prompt[item.id] = [sum(test(a, b) for a, b in pairs) / 4 for test in (int.__gt__, int.__eq__, int.__lt__)]
    rates = np.mean(list(by_prompt.values()), axis=0)
    assert [results[name]["mean"] for name in ("win_rate", "tie_rate", "lose_rate")] == pytest.approx(list(rates))
    assert results["num_prompts"] == 8 and results["num_comparisons"] == 32
    assert results["judges"] == ["judge-word-list"]


def test_the_evaluations_scores_are_the_reward_models(loop):
    results = json.loads((loop.output / "evaluation.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(loop.output / "reward_model")
    model = AutoModelForSequenceClassification.from_pretrained(loop.output / "reward_model").eval()
    for number, name in enumerate(("sft", "policy")):
        scores, lengths = [], []
        for line in (loop.output / "evaluation" / f"samples-{number}.jsonl").read_text().splitlines():
            row = json.loads(line)
            for (completion,) in row["completions"]:
                text = row["prompt"][0]["content"] + completion["content"] + tokenizer.eos_token
                with torch.no_grad():
                    scores.append(model(**tokenizer(text, return_tensors="pt")).logits.item())
                lengths.append(len(tokenizer.encode(completion["content"])))
        assert results["rewards"][name]["mean"] == pytest.approx(np.mean(scores), abs=1e-4)
        assert results["lengths"][name]["mean"] == pytest.approx(np.mean(lengths))


# --- Stages that are done again ---


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_redo_keeps_what_was_there(tmp_path):
    ours = [
        "completions/completions.jsonl",
        "completions/judgements-ann.jsonl",
        "sft/model.safetensors",
        "stages/sft.json",
    ]
    superseded = [
        *("completions/judgements-judge-x.jsonl", "rankings.parquet", "reward_model/a", "policy/b", "evaluation/c"),
        *("evaluation/judgements-ann.jsonl", "evaluation.md", "stages/rank.json", "stages/publish.json"),
    ]
    make_files(tmp_path, *ours, *superseded)
    begin_again(tmp_path, "rank")
    kept = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {name: name for name in ours} | {f"superseded-1/{name}": name for name in superseded}
    make_files(tmp_path, "rankings.parquet")
    begin_again(tmp_path, "rank")
    assert (tmp_path / "superseded-2" / "rankings.parquet").is_file()


def test_a_checkpoint_that_was_cut_is_not_resumed_from(tmp_path):
    make_files(tmp_path, "checkpoint-8/trainer_state.json", "checkpoint-10/trainer_state.json", "checkpoint-12/model")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nothing") is None


# --- People ---


def main_in(folder, monkeypatch, *args):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["rlhf.py", "--output_dir", "out", *args])
    rlhf.main()


def test_people_are_waited_for(tmp_path, monkeypatch, capsys):
    """The stages themselves are not run: what they leave for people to judge is made here."""
    ran = []

    def run_stage(folder, stage, launcher, environment):
        ran.append(stage.name)
        if stage.name in ("sample", "answer"):
            rows = [{"prompt": f"p{i}", "completions": ["x", "y"], "sources": ["A", "B"]} for i in range(4)]
            target = folder / {"sample": "completions", "answer": "evaluation"}[stage.name]
            target.mkdir(parents=True)
            (target / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_record(folder, stage, [], is_finished=True)
        return 1.0

    def judge(folder, count):
        judgements = Judgements(folder, "ann")
        for item in read_items(folder)[:count]:
            if item not in judgements:
                judgements.record(item, [1, 2])

    monkeypatch.setattr(rlhf, "run_stage", run_stage)
    for stage, number, folder in (("rank", 4, "completions"), ("evaluate", 8, "evaluation")):
        for count, said in ((0, "0 of 4"), (2, "2 of 4")):
            if count:
                judge(tmp_path / "out" / folder, count)
            with pytest.raises(SystemExit) as stopped:
                main_in(tmp_path, monkeypatch, "--people", "--enough", "0.75")
            assert stopped.value.code == 3
            printed = capsys.readouterr().out
            assert f"[{number}/8] {stage}" in printed and f"people have judged {said} (75% are enough)" in printed
            assert f"python {RECIPES / 'rank_completions.py'} --folder out/{folder}\n" in printed
            assert "python rlhf.py --output_dir out --people --enough 0.75\n" in printed
            assert stage not in ran
        judge(tmp_path / "out" / folder, 3)
    main_in(tmp_path, monkeypatch, "--people", "--enough", "0.75")
    assert ran == STAGES[:8]
    # No judge but people: the first exports what they ranked, the second reports on it
    records = {name: record_of(tmp_path / "out", name) for name in ("rank", "evaluate")}
    scripts = {name: [command["script"] for command in record["settings"]] for name, record in records.items()}
    assert scripts == {"rank": ["rank_completions.py"], "evaluate": ["rlhf_evaluate.py"]}


def test_the_judges_scores_are_equal_where_it_ties():
    texts = ["It is dull.", "It is warm.", "It is here.", "It is there.", "It is warm, witty, tender and superb."]
    scores = praise([[{"role": "assistant", "content": text}] for text in texts])
    assert scores == praise(texts)
    assert [1 + len({b for b in scores if b > a}) for a in scores] == lexicon_judge().rank(texts)


def test_a_folder_goes_on_that_was_begun_when_its_judge_had_another_name(tmp_path):
    (stage,) = (s for s in Plan(*parse([], rlhf.__doc__), tmp_path).stages() if s.name == "rank")
    write_record(tmp_path, stage, [], is_finished=True)
    record = tmp_path / "stages" / "rank.json"
    text = record.read_text()
    assert text.count(f'"{praise.__module__}.praise"') == 1
    record.write_text(text.replace(f'"{praise.__module__}.praise"', '"quickstart_judges.praise"'))
    check_unchanged(tmp_path, [stage])


# --- What is refused before anything is trained ---


def test_help_explains(tmp_path):
    command = [sys.executable, str(RECIPES / "rlhf.py"), "--help"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    options = [
        "--config",
        "--redo",
        "--demonstrations",
        "--judge_func",
        "--people",
        "--rubric",
        "--licence",
        "--namespace",
    ]
    assert [text for text in (*options, *STAGES) if text not in printed] == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (UNKNOWN_TOKEN, "The Hub does not know the token. Log in with `hf auth login`, or set HF_TOKEN."),
        (READ_TOKEN, "the token may only read"),
        (OTHER_TOKEN, "--namespace user: the token is other's, who may write to other."),
    ],
)
def test_a_wrong_token_is_told_at_once(tmp_path, monkeypatch, token, message):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path / "home", token)
        with pytest.raises(SystemExit, match=re.escape(message)) as stopped:
            main_in(tmp_path, monkeypatch, *PUBLISH)
        assert token not in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_what_should_be_private_is_not_trained_for_a_public_repository(tmp_path, monkeypatch):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path / "home")
        HfApi().create_repo("user/films-rankings", repo_type="dataset")
        with pytest.raises(SystemExit, match="--private: user/films-rankings is there already and public"):
            main_in(tmp_path, monkeypatch, *PUBLISH, "--private")
    assert not (tmp_path / "out").exists()


MODEL_AND_DATA = ["--model_name_or_path", "m", "--demonstrations", "d", "--prompts", "p"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--push_to_hub", "--name", "x"], "--push_to_hub needs --namespace and --licence as well"),
        (
            ["--push_to_hub", "--namespace", "u", "--name", "a b", "--licence", "l"],
            "--namespace u --name a b: Repo id",
        ),
        (
            ["--push_to_hub", "--namespace", "u", "--name", "a", "--licence", "CC BY 4.0"],
            "`--licence` takes .* Write 'cc-by-4.0'",
        ),
        (["--prompts", "p"], "Give --model_name_or_path, --demonstrations as well, or none"),
        (["--test_prompts", "p"], "--test_prompts goes with --model_name_or_path"),
        (MODEL_AND_DATA, "pass --config, for example .*rlhf_qwen.yaml"),
        ([*MODEL_AND_DATA, "--config", "tiny.yaml"], "Who judges"),
        (["--people", "--judge_func", "f.g"], "Give one judge, not --judge_func and --people"),
        (["--rubric", "good?"], "--rubric is for --judge_model"),
        (["--redo", "merge"], "--redo merge: there is no such stage. The stages are prepare, sft, sample"),
        (["--enough", "0"], "--enough must be above 0 and at most 1, got 0"),
        (["--config", "missing.yaml"], "--config missing.yaml: there is no such file"),
        (["--config", "section.yaml"], "section.yaml: unknown section ppo. The sections are loop, training, prepare"),
        (["--config", "list.yaml"], r"the section sft must hold `argument: value`, got \['max_steps'\]"),
        (["--config", "own.yaml"], "The section policy sets dataset_name, which the loop sets itself"),
        (["--config", "loop.yaml"], "the section loop has no argument epochs"),
    ],
)
def test_what_cannot_work_is_told_at_once(tmp_path, monkeypatch, args, message):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (tmp_path / "section.yaml").write_text("ppo: {max_steps: 1}")
    (tmp_path / "list.yaml").write_text("sft: [max_steps]")
    (tmp_path / "own.yaml").write_text("policy: {dataset_name: x}")
    (tmp_path / "loop.yaml").write_text("loop: {epochs: 1}")
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main_in(tmp_path, monkeypatch, *args)
    assert not (tmp_path / "out").exists()


def commands_of(args):
    """Returns the commands of all stages, as `(script, command line)`."""
    parsed, config = parse(args, rlhf.__doc__)
    for name in ("bf16", "use_cpu"):  # of this machine, not of the file
        config.setdefault("training", {})[name] = name == "use_cpu"
    return [(c.script, c) for stage in Plan(parsed, config, Path("out")).stages() for c in stage.commands]


def test_the_example_of_a_real_model_is_understood(monkeypatch):
    file = RECIPES / "rlhf_qwen.yaml"
    commands = commands_of(["--config", str(file), "--judge_model", "j", "--rubric", "Is it good?"])
    scripts = [script for script, _ in commands]
    assert scripts == [
        *("rlhf_prompts.py", "sft.py", "merge.py", "sample_completions.py", "judge_completions.py"),
        *("ranking_reward.py", "actor_critic.py", "sample_completions.py", "judge_completions.py", "rlhf_evaluate.py"),
    ]
    monkeypatch.setattr(sys, "argv", ["test"])  # which the check changes
    for script, command in commands:
        check(script, flags(command.arguments))
    sft, merge, reward_model, policy = (commands[i][1].arguments for i in (1, 2, 5, 6))
    assert sft["output_dir"] == merge["adapter"] == "out/sft-adapter"
    assert merge["output_dir"] == reward_model["model_name_or_path"] == policy["model_name_or_path"] == "out/sft"
    given = yaml.safe_load(file.read_text())
    trainer_class, script_args, training_args, model_args = actor_critic.parse(flags(policy))
    values = vars(model_args) | vars(training_args) | vars(script_args)
    expected = {**given["training"], **given["policy"], "bf16": False}
    assert {name: values[name] for name in expected if name != "report_to"} == {
        name: value for name, value in expected.items() if name != "report_to"
    }


def test_a_configuration_that_a_recipe_does_not_understand_is_refused(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"policy": {"lamda": 1}}))
    with pytest.raises(SystemExit, match=r"not understood. actor_critic.py: .*--lamda"):
        main_in(tmp_path, monkeypatch, "--config", "tiny.yaml")
    assert not (tmp_path / "out").exists()


def test_documented_commands_are_understood(monkeypatch):
    texts = [rlhf.__doc__, re.sub("^# ?", "", (RECIPES / "rlhf_qwen.yaml").read_text(), flags=re.MULTILINE)]
    monkeypatch.chdir(RECIPES.parent)
    for text, count in zip(texts, (2, 2), strict=True):
        lines = text.replace("\\\n", " ").splitlines()
        commands = [shlex.split(line) for line in lines if line.strip().startswith("python recipes/rlhf.py")]
        assert len(commands) == count
        for command in commands:
            Plan(*parse(command[2:], rlhf.__doc__), Path("out")).stages()


# --- Parts ---


def test_equal_texts_are_tied_and_what_nobody_ranked_is_left_out():
    rankings = [{'"a"': 1, '"b"': 2, '"c"': 2}, {'"a"': 2, '"b"': 1, '"c"': None}]
    assert compare(["a"], ["b"], rankings) == [-1, 1]
    assert compare(["b"], ["c"], rankings) == [0]
    assert compare(["b"], ["b"], []) == [0]
    assert compare(["c"], ["d"], rankings) == []


def test_the_interval_is_that_of_the_mean():
    values = [1.0] * 240 + [0.0] * 160  # 0.6 with a standard error of sqrt(0.6 * 0.4 / 400)
    found = interval(values)
    assert found["mean"] == pytest.approx(0.6)
    assert (found["low"], found["high"]) == pytest.approx((0.552, 0.648), abs=0.004)


def test_prompts_are_held_out_by_text():
    prompts = [f"p{i}" for i in range(10)]
    rest, test = divide(prompts, None, 3, seed=0)
    assert len(test) == 3 and sorted(rest + test) == prompts
    rest, test = divide(prompts, ["p3", "x", "p4"], 2, seed=0)
    assert test == ["p3", "x"] and rest == [p for p in prompts if p != "p3"]
    with pytest.raises(ValueError, match="--num_test 10 of 10 different prompts"):
        divide(prompts, None, 10, seed=0)
    with pytest.raises(ValueError, match="none to train on"):
        divide(["a"], ["a"], 1, seed=0)


def test_a_published_adapter_names_its_base_on_the_hub(tmp_path):
    source = tmp_path / "policy"
    make_files(
        source, "adapter_model.safetensors", "README.md", "critic/adapter/README.md", "checkpoint-2/x", "rollouts/y"
    )
    for folder in (source, source / "critic" / "adapter"):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "out/sft", "r": 8}))
    stage_model(source, tmp_path / "published", "user/films-sft")
    names = sorted(
        str(p.relative_to(tmp_path / "published")) for p in (tmp_path / "published").rglob("*") if p.is_file()
    )
    assert names == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "critic/adapter/adapter_config.json",
    ]
    for folder in ("", "critic/adapter"):
        config = json.loads((tmp_path / "published" / folder / "adapter_config.json").read_text())
        assert config == {"base_model_name_or_path": "user/films-sft", "r": 8}
    assert json.loads((source / "adapter_config.json").read_text())["base_model_name_or_path"] == "out/sft"  # ours


def test_what_trainers_log_is_shortened():
    line = "{'loss': '0.5', 'grad_norm': '1', 'kl/k1': '0.01', 'epoch': '0.25'}"
    assert shortened(line, ("loss", "accuracy", "kl/k1")) == "epoch 0.25: loss 0.5, kl/k1 0.01"
    assert shortened(line, ("reward",)) == ""
    assert shortened("{'a', broken", ("loss",)) == "{'a', broken"
    assert shortened("some text", ("loss",)) == "some text"
