"""Collecting rankings: nothing answered is lost, nothing is asked twice, and what comes out can be trained on."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from helpers import PROMPTS, RECIPES, build_policy, ranking_settings, run_program
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedConfig,
)

from trl_ext import RankingRewardConfig, RankingRewardTrainer
from trl_ext.data.collection import agreement, all_judgements, collected_rankings
from trl_ext.data.items import read_items
from trl_ext.data.judgements import Judgements
from trl_ext.data.rankings import prepare_rankings
from trl_ext.data.records import append_line, read_lines


TEXTS = {"prompt": "a", "completions": ["x", "y"]}
USER, REPLY = {"role": "user", "content": "a"}, [{"role": "assistant", "content": "x"}]
CHAT = {"prompt": [USER], "completions": [REPLY, [{"role": "assistant", "content": "y"}]]}


@pytest.fixture
def folder(tmp_path):
    rows = [
        {
            "prompt": f"the film {i}",
            "completions": [f" {word} {i}" for word in "good bad slow great".split()[: 2 + i % 3]],
        }
        for i in range(6)
    ]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def sessions(monkeypatch):
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module("collecting.session")


def test_judgements_are_on_disk_when_they_are_made(folder):
    items = read_items(folder)
    ann = Judgements(folder, "ann")
    ann.record(items[0], [2, 1], seconds=3.0)
    ann.record(items[1], None, flag="empty")
    again = Judgements(folder, "ann")
    assert [r["status"] for r in again] == ["ranked", "skipped"] and items[0] in again and items[2] not in again
    assert again[items[0].id]["ranks"] == [2, 1] and again[items[1].id]["flag"] == "empty"
    assert again.seconds_per_item == 3.0
    with pytest.raises(ValueError, match="was judged already"):
        again.record(items[0], [1, 2])
    assert again.undo() == items[1].id and items[1] not in Judgements(folder, "ann")
    assert again.undo() == items[0].id and again.undo() is None
    again.record(items[0], [1, 1])
    assert Judgements(folder, "ann")[items[0].id]["ranks"] == [1, 1]
    assert len((folder / "judgements-ann.jsonl").read_text().splitlines()) == 5  # nothing is rewritten


def test_a_line_cut_by_a_loss_of_power_is_asked_again(folder):
    items = read_items(folder)
    Judgements(folder, "ann").record(items[0], [1, 2])
    with open(folder / "judgements-ann.jsonl", "a") as file:
        file.write('{"id": "' + items[1].id + '", "status": "ran')
    ann = Judgements(folder, "ann")
    assert items[0] in ann and items[1] not in ann
    ann.record(items[1], [1, 1, 2])
    assert [r["ranks"] for r in Judgements(folder, "ann")] == [[1, 2], [1, 1, 2]]


KILLED = """
import sys
from trl_ext.data.items import read_items
from trl_ext.data.judgements import Judgements
ann = Judgements(sys.argv[1], "ann")
for item in read_items(sys.argv[1]):
    if item not in ann:
        ann.record(item, [1] * len(item.completions))
        print(item.id, flush=True)
"""


def test_a_killed_process_loses_nothing_that_was_answered(tmp_path):
    rows = [{"prompt": str(i), "completions": ["a", "b"]} for i in range(3000)]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answered = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(25):
            answered.append(process.stdout.readline().strip())
        os.kill(process.pid, signal.SIGKILL)
        answered += process.stdout.read().split()
        process.wait()
    assert len(answered) == len(set(answered)) >= 50  # and nothing was asked twice
    judged = {record["id"] for record in Judgements(tmp_path, "ann")}
    assert set(answered) <= judged and len(judged) <= len(answered) + 2  # on disk, and killed before it said so


def test_sampling_mixes_models_and_goes_on_where_it_was(policy_path, tokenizer, tmp_path, run_recipe):
    second = tmp_path / "second"
    build_policy(tokenizer, seed=1).save_pretrained(second)
    tokenizer.save_pretrained(second)
    prompts = [{"prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    command = ["sample_completions.py", "--dataset_name", "prompts.jsonl", "--output_dir", "out"]
    command += ["--num_completions", 3, "--max_completion_length", 6, "--batch_size", 4]
    command += ["--model_name_or_path", policy_path, second]
    run_recipe(*command, cwd=tmp_path)
    whole = (tmp_path / "out" / "completions.jsonl").read_text()
    items = read_items(tmp_path / "out")
    assert {item.prompt for item in items} == set(PROMPTS) and all(len(item.completions) == 3 for item in items)
    letters = json.loads((tmp_path / "out" / "models.json").read_text())
    assert sorted(letters) == ["A", "B"] and set(letters.values()) == {policy_path, str(second)}
    of_first = next(letter for letter, path in letters.items() if path == policy_path)
    assert all(item.sources.count(of_first) == 2 for item in items)  # two of three are the first model's
    assert len({tuple(item.sources) for item in items}) > 1
    # Stopped in the middle of the second model, after its first batch
    file = tmp_path / "out" / "samples-1.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    (tmp_path / "out" / "completions.jsonl").unlink()
    run_recipe(*command, cwd=tmp_path)
    assert (tmp_path / "out" / "completions.jsonl").read_text() == whole
    with pytest.raises(SystemExit, match="with other settings"):
        run_recipe(*command, "--temperature", 0.5, cwd=tmp_path)


@pytest.fixture
def sample_from(policy_path, tmp_path, monkeypatch):
    """Runs the recipe on these prompts with more arguments, and returns what it says where it stops."""
    monkeypatch.syspath_prepend(RECIPES)
    recipe = importlib.import_module("sample_completions")

    def run(prompts, *arguments, model=policy_path, column="prompt"):
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({column: p}) + "\n" for p in prompts))
        command = [
            "sample_completions.py",
            "--dataset_name",
            tmp_path / "prompts.jsonl",
            "--output_dir",
            tmp_path / "out",
        ]
        command += ["--num_completions", 2, "--model_name_or_path", model, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        try:
            recipe.main()
        except SystemExit as stop:
            return stop.code

    return run


def test_what_an_error_advises_can_be_done(sample_from, tmp_path):
    """Nothing is settled before the first sample."""
    long = " ".join(["film"] * 50)
    assert "Name the one that holds the prompts with --prompt_column" in sample_from([long], column="text")
    arguments = ["--prompt_column", "text"]
    said = sample_from(["the film", long], *arguments, "--max_completion_length", 20, column="text")
    assert "prompts.jsonl, row 1, column `text`: has 50 tokens" in said and "64 of" in said
    assert "lower --max_completion_length" in said and not (tmp_path / "out" / "settings.json").exists()
    arguments += ["--max_completion_length", 14]
    assert sample_from(["the film", long], *arguments, column="text") is None
    assert len(read_items(tmp_path / "out")) == 2
    assert "with other settings" in sample_from(["the film", long], *arguments, "--seed", 1, column="text")


def test_an_adapters_context_is_that_of_its_base(sample_from, policy_path, tokenizer, tmp_path):
    base, adapter = AutoModelForCausalLM.from_pretrained(policy_path), str(tmp_path / "adapter")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    assert "which with 256 for the completion are more than the 64 of" in sample_from(["the film"], model=adapter)
    assert sample_from(["the film"], "--max_completion_length", 4, model=adapter) is None
    assert len(read_items(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["the", None], "row 1, column `prompt`: must be a text or a list of messages, got None"),
        ([5, 6], "row 0, column `prompt`: must be a text or a list of messages, got 5"),
        (["the", ""], "row 1, column `prompt`: has no tokens for"),
        ([[USER], []], "row 1, column `prompt`: must be a text or a list of messages"),
        ([[USER], [USER | {"content": None}]], "row 1, column `prompt`: every message must have a text"),
        ([[USER], [USER, USER]], "row 1, column `prompt`: the chat template of .* refuses it .Roles must alternate"),
    ],
)
def test_a_prompt_that_cannot_be_sampled_is_named_before_any_is(sample_from, policy_path, tmp_path, prompts, message):
    model = str(shutil.copytree(policy_path, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    refusal = "{% if messages | length > 1 %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    tokenizer.chat_template = refusal + "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(model)
    said = sample_from(prompts, "--max_completion_length", 4, model=model)
    assert re.search(message, said) and not any((tmp_path / "out").iterdir())


def test_conversations_need_a_template_and_batches_padding(sample_from, policy_path, tmp_path):
    model = str(shutil.copytree(policy_path, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(model)
    assert "neither a padding nor an end-of-sequence token" in sample_from(["the"], model=model)
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(model)
    (tmp_path / "model" / "chat_template.jinja").unlink(missing_ok=True)
    assert "has no chat template" in sample_from(["the"], "--system_prompt", "a", model=model)


def test_the_order_is_random_and_each_annotators_own(folder):
    items = [item for item in read_items(folder) if len(item.completions) == 4]
    orders = {tuple(item.order_for(name)) for item in items for name in map(str, range(40))}
    assert len(orders) == 24
    assert all(item.order_for("ann") == item.order_for("ann") for item in items)


def test_rankings_are_kept_in_the_order_of_the_data(folder, sessions):
    session = sessions.Session(str(folder), "ann")
    while session.item is not None:
        best = min(session.shown)  # by the text, whatever letter it has
        letters = "ABCD"[: len(session.shown)]
        first = letters[session.shown.index(best)]
        session.submit(f"{first} > " + " = ".join(letters.replace(first, "")).lower())
    for row in collected_rankings(folder):
        expected = [1 if text == min(row["completions"]) else 2 for text in row["completions"]]
        assert row["ranks"] == expected


def test_the_page_goes_back_skips_and_says_what_is_wrong(folder, sessions):
    session = sessions.Session(str(folder), "ann")
    first = session.item
    assert session.undo() == ""
    with pytest.raises(ValueError, match="got 'Z'|got 'z'"):
        session.submit("a > z")
    with pytest.raises(ValueError, match="two completions at least"):
        session.submit("a")
    assert session.item is first and not (folder / "judgements-ann.jsonl").exists()
    session.submit("b > a")
    second = session.item
    session.skip("flagged")
    assert session.undo() == "" and session.item is second
    assert session.undo() == "B > A" and session.item is first
    # Judged in another window meanwhile: this one goes on
    other = sessions.Session(str(folder), "ann")
    other.submit("a = b")
    session.submit("a > b")
    assert session.item.id == second.id and Judgements(folder, "ann")[first.id]["ranks"] == [1, 1]
    assert session.status.startswith("1 of 6 done")


def test_annotators_agree_and_their_rankings_train_a_reward_model(
    folder, reward_model, tokenizer, tmp_path, run_recipe
):
    items = read_items(folder)
    assert agreement(folder) is None
    for name, last in (("ann", [1, 2]), ("bob", [2, 1])):
        theirs = Judgements(folder, name)
        for item in items[1:]:
            theirs.record(item, list(range(1, len(item.completions) + 1)))
        theirs.record(items[0], last)
    assert [j.annotator for j in all_judgements(folder)] == ["ann", "bob"]
    between = agreement(folder)
    pairs = sum(len(item.completions) * (len(item.completions) - 1) // 2 for item in items)
    assert between["num_pairs"] == pairs and between["agreement"] == pytest.approx(1 - 1 / pairs)
    file = folder / "rankings.parquet"
    printed = run_recipe("rank_completions.py", "--folder", folder, "--export", file, cwd=tmp_path)
    assert "12 rankings by 2 annotators" in printed and "alpha" in printed
    from datasets import load_dataset

    dataset = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    args = RankingRewardConfig(**ranking_settings(tmp_path / "out", max_steps=1))
    trainer = RankingRewardTrainer(reward_model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="is no completions.jsonl|no completions.jsonl"):
        read_items(tmp_path / "nothing")
    with pytest.raises(ValueError, match="part of a file's"):
        Judgements(folder, "../ann")
    item = read_items(folder)[0]
    for ranks in ([1], [1, None], [1, 2, 3], [1, -2], ["a", "b"]):
        with pytest.raises(ValueError, match="Expected 2 ranks"):
            Judgements(folder, "ann").record(item, ranks)
    with pytest.raises(ValueError, match="Nothing was ranked"):
        collected_rankings(folder)
    with open(folder / "completions.jsonl", "a") as file:
        file.write('{"prompt": "x", "completions": ["a"]}\n')
    with pytest.raises(ValueError, match="line 7, column `completions`: must be a list of two or more"):
        read_items(folder)


# --- Lines that people and other tools write ---


def written(folder, *rows):
    """A folder of these lines: bytes as they are, else JSON."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]
    (folder / "completions.jsonl").write_bytes(b"".join(lines))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "a", "completions": ["x", "y"]}\n{"prompt": "b", "completions": ["x", "y"]}',  # no last newline
        b'\xef\xbb\xbf{"prompt": "a", "completions": ["x", "y"]}\r\n\r\n{"prompt": "b", "completions": ["x", "y"]}\r\n',
        b'\n  \n{"id": 0, "prompt": "a", "completions": ["x", ""]}\n{"id": 1.0, "prompt": "", "completions": ["x", "y"]}',
    ],
)
def test_all_lines_are_read_however_they_end(tmp_path, content):
    items = read_items(written(tmp_path, content))
    assert len(items) == 2 and [item.completions[0] for item in items] == ["x", "x"]
    if b"id" in content:
        assert [item.id for item in items] == [0, 1] and all(type(item.id) is int for item in items)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TEXTS, {"prompt": None, "completions": ["x", "y"]}], "line 2, column `prompt`: is missing or null"),
        ([TEXTS, {"prompt": "b", "completions": ["x", None]}], "line 2, column `completions`.*got None to a text"),
        ([b"\n", TEXTS, {"prompt": "b", "completions": ["x", 2]}], "line 3, column `completions`.*got 2 to a text"),
        ([{"prompt": 1, "completions": ["x", "y"]}], "line 1, column `prompt`: must be text or a list of messages"),
        ([{"prompt": "a", "completions": ["x"]}], "line 1, column `completions`: must be a list of two or more"),
        ([{"prompt": "a", "completions": "x, y"}], "line 1, column `completions`.*got 'x, y'.*jsonl"),
        ([{"prompt": [], "completions": [[], []]}], "line 1, column `prompt`: must be text or a list of messages"),
        ([CHAT | {"completions": [[{"role": "assistant"}], REPLY]}], "`completions`: every message.*`content`"),
        ([CHAT | {"prompt": [USER, {"role": "user", "content": None}]}], "`prompt`: every message.*`content`"),
        ([CHAT | {"prompt": [{"role": "user", "content": 5}]}], "`prompt`: every message must have a text"),
        ([CHAT | {"prompt": [{"content": "a"}]}], "`prompt`: every message must have a `role`"),
        ([CHAT | {"completions": [REPLY, "y"]}], "`completions`: must all be of the kind of `prompt`"),
        ([TEXTS, CHAT], "line 2, column `prompt`: must be a text, as in line 1, got a conversation"),
        ([TEXTS | {"id": 0}, TEXTS | {"id": "0"}], "line 2, column `id`: must be a whole number, as in line 1"),
        (
            [TEXTS | {"id": 0}, TEXTS],
            "line 2, column `id`: must be a whole number, as in line 1, got a text, or absent",
        ),
        ([TEXTS | {"id": 0}, CHAT | {"id": 1}], "line 2, column `prompt`"),
        ([TEXTS | {"id": 7}, TEXTS | {"id": 8}, TEXTS | {"id": 7.0}], "line 3, column `id`.*got 7 again, of line 1"),
        ([TEXTS, TEXTS], "line 2, column `id`: must differ from row to row.*of line 1"),
        ([TEXTS | {"id": True}], "column `id`: must be text or a whole number, got True"),
        ([TEXTS | {"id": 0.5}], "column `id`: must be text or a whole number, got 0.5"),
        ([TEXTS | {"id": 2**63}], "column `id`: must be a number of 64 bits"),
        ([TEXTS | {"sources": ["A"]}], "column `sources`: must be 2 texts"),
        ([TEXTS | {"completions": ["x", "\ud83d"]}], "line 1, column `completions`: must be whole characters"),
        ([TEXTS | {"id": "\ude00"}], "line 1, column `id`: must be whole characters"),
        ([TEXTS, b'["a"]\n'], "line 2: must be one JSON object"),
        ([TEXTS, b"null\n"], "line 2: must be one JSON object"),
        ([b'{"prompt": "a", "prompt": "b", "completions": ["x", "y"]}'], "line 1: must be one JSON.* each key once"),
        ([TEXTS, b'{"prompt": "caf\xe9", "completions": ["x", "y"]}\n'], "line 2: must be one JSON object, in UTF-8"),
        ([json.dumps(TEXTS).encode("utf-16")], "line 1: must be one JSON object, in UTF-8"),
        ([TEXTS, b'{"prompt": "b", "compl'], "line 2: must be one JSON object.*if it was cut"),
        (
            [CHAT, CHAT | {"prompt": [USER | {"at": 1}]}, CHAT | {"prompt": [USER | {"at": "2"}]}],
            "line 3: does not fit",
        ),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_items(written(tmp_path, *rows))


@pytest.mark.parametrize(
    "rows",
    [
        [TEXTS | {"id": 0}, TEXTS | {"id": 1, "prompt": "b", "sources": ["A", "B"]}],
        [TEXTS | {"id": "a"}, TEXTS | {"id": None}],
        [
            CHAT | {"id": ""},
            CHAT | {"prompt": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "f"}]}]},
        ],
        [CHAT | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "id": 0}],
    ],
)
def test_what_is_read_can_be_shown_ranked_and_exported(tmp_path, sessions, rows):
    session = sessions.Session(str(written(tmp_path, *rows)), "ann")
    while session.item is not None:
        assert all(session.shown) and sessions.as_text(session.item.prompt)
        session.submit("b > a")
    exported = collected_rankings(tmp_path)
    assert [row["id"] for row in exported] == [item.id for item in read_items(tmp_path)]
    assert len(exported) == len(rows)
    exported.to_parquet(str(tmp_path / "rankings.parquet"))
    assert prepare_rankings(exported)["ranks"] == exported["ranks"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"status": "ranked", "ranks": [1, 2]}\n', "line 2, field `id`"),
        (b'{"id": null, "status": "ranked", "ranks": [1, 2]}\n', "line 2, field `id`"),
        (b'{"id": 0, "ranks": [1, 2]}\n', "line 2, field `status`"),
        (b'{"id": 0, "status": "ranked"}\n', "line 2, field `ranks`"),
        (b'{"id": 0, "status": "ranked", "ranks": [1, "2"]}\n', "line 2, field `ranks`"),
        (b'{"id": 0, "status": "ranked", "ranks": [1, null]}\n', "line 2, field `ranks`"),
        (b'{"id": 0, "status": "ranked", "ranks": [true, 2]}\n', "line 2, field `ranks`"),
        (b'{"id": 0, "status": "ranked", "ranks": [1, 2], "seconds": "3"}\n', "line 2, field `seconds`"),
        (b'{"id": 0, "status": "ranked", "ranks": [1, 2], "flag": null}\n', "line 2, field `flag`"),
        (b'{"id": 0, "status": "ra\n', "line 2: must be one JSON object"),
        (b"[0]\n", "line 2: must be one JSON object"),
    ],
)
def test_a_line_that_is_no_judgement_is_named(tmp_path, line, message):
    (tmp_path / "judgements-ann.jsonl").write_bytes(b'{"id": 1, "status": "skipped"}\n' + line)
    with pytest.raises(ValueError, match=f"judgements-ann.jsonl, {message}"):
        Judgements(tmp_path, "ann")


def test_a_last_judgement_without_newline_counts_and_one_that_was_cut_does_not(tmp_path):
    items = read_items(written(tmp_path, *(TEXTS | {"id": i, "prompt": str(i)} for i in range(3))))
    file = tmp_path / "judgements-ann.jsonl"
    file.write_bytes('\ufeff{"id": 0, "status": "ranked", "ranks": [2, 1]}'.encode())  # as an editor may leave it
    ann = Judgements(tmp_path, "ann")
    ann.record(items[1], [1, 1])
    assert [record["id"] for record in ann] == [0, 1] and ann[0]["ranks"] == [2, 1]
    with open(file, "ab") as opened:
        opened.write('{"id": 2, "status": "ranked", "flag": "é'.encode()[:-1])  # in the middle of a letter
    ann.record(items[2], [1, 2])
    assert [record["id"] for record in Judgements(tmp_path, "ann")] == [0, 1, 2]
    assert [row["ranks"] for row in collected_rankings(tmp_path)] == [[2, 1], [1, 1], [1, 2]]


def test_a_judgement_is_of_the_texts_that_were_shown(tmp_path, sessions, caplog):
    """Under the same id there may be others by now: these are asked again, and the ranking is not exported."""
    session = sessions.Session(str(written(tmp_path, TEXTS | {"id": 0}, TEXTS | {"id": 1, "prompt": "b"})), "ann")
    session.submit("a > b")
    session.submit("a > b")
    written(tmp_path, TEXTS | {"id": 0, "completions": ["y", "x"]}, TEXTS | {"id": 1, "prompt": "b"})
    again = sessions.Session(str(tmp_path), "ann")
    assert again.item.id == 0 and again.status.startswith("1 of 2")
    assert [row["id"] for row in collected_rankings(tmp_path)] == [1]
    assert "Left out 1 rankings" in caplog.text
    written(tmp_path, TEXTS | {"id": 0, "completions": ["y", "x"]})  # the last judged is there no longer
    again = sessions.Session(str(tmp_path), "ann")
    assert again.undo() == "" and again.item.id == 0
    again.submit("a > b")
    assert again.item is None and again.undo() == "A > B"


def test_a_file_of_judgements_with_another_name_is_named(folder):
    (folder / "judgements-ann (copy).jsonl").write_text("")
    with pytest.raises(ValueError, match=r"judgements-ann \(copy\).jsonl: must have letters.*Rename"):
        all_judgements(folder)


def test_one_writer_at_a_time(tmp_path):
    file = tmp_path / "judgements-ann.jsonl"

    def write(name):
        for i in range(30):
            append_line(file, {"id": i, "by": name, "text": "x" * 5000})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, "abc"))
    assert sorted((row["by"], row["id"]) for row in read_lines(file)) == [(n, i) for n in "abc" for i in range(30)]


# --- The page ---


def functions_of(page, folder):
    """Returns what the page does, by name, and its parts by their `elem_id`."""
    blocks = page.Page(str(folder), read_items(folder)).blocks
    ids = {getattr(block, "elem_id", None): block for block in blocks.blocks.values()}
    return {fn.fn.__name__: fn.fn for fn in blocks.fns.values() if fn.fn is not None}, ids


def test_nothing_is_recorded_of_what_the_window_did_not_show(folder, sessions, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[collect]'")
    page = importlib.import_module("collecting.page")
    functions, ids = functions_of(page, folder)
    view = functions["start"]("ann")
    session = next(value for value in view.values() if isinstance(value, sessions.Session))
    key, prompt = view[ids["shown-key"]], view[ids["prompt"]]
    assert prompt == session.item.prompt
    view = functions["answer"](session, key, "b > a")
    second = session.item
    assert len(Judgements(folder, "ann")) == 1 and view[ids["prompt"]] == second.prompt != prompt
    # Enter twice: what the window still shows was answered, and the next item was not seen
    view = functions["answer"](session, key, "b > a")
    assert len(Judgements(folder, "ann")) == 1 and view[ids["prompt"]] == second.prompt
    # An item that cannot be shown
    monkeypatch.setattr(page, "as_text", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        functions["answer"](session, view[ids["shown-key"]], "b > a")
    assert len(Judgements(folder, "ann")) == 2
    third, stale = session.item, view[ids["shown-key"]]
    for put_aside in (functions["answer"], lambda *args: functions["<lambda>"](*args[:2])):
        with pytest.raises(ZeroDivisionError):
            put_aside(session, stale, "b > a")
    monkeypatch.undo()
    assert len(Judgements(folder, "ann")) == 2 and session.item is third
    # A window whose server was started anew
    view = functions["answer"](None, key, "b > a")
    assert ids["prompt"] not in view and len(Judgements(folder, "ann")) == 2
    # Another annotator's file is broken: the page goes on, and says so
    (folder / "judgements-bob.jsonl").write_text("[]\n")
    view = functions["answer"](session, session.key, "b > a")
    assert "judgements-bob.jsonl, line 1" in view[ids["status"]] and len(Judgements(folder, "ann")) == 3


# --- The page in a browser ---


def test_the_page_is_worked_by_keyboard_alone(folder, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[collect]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("there is no Chromium on this machine")
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "rank_completions.py"), "--folder", str(folder), "--port", "7899"],
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"},
    )
    try:
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            window = browser.new_page()
            for _ in range(120):
                try:
                    window.goto("http://127.0.0.1:7899")
                    break
                except playwright.Error:
                    time.sleep(1)
            window.wait_for_selector("#name input, #name textarea")
            keyboard = window.keyboard

            def wait(text):
                window.wait_for_function(
                    "t => document.querySelector('#status')?.innerText.startsWith(t)", arg=text, timeout=20_000
                )
                window.wait_for_function(
                    "() => document.activeElement.closest('#ranking') !== null", timeout=20_000
                )  # fmt: skip

            keyboard.type("ann")
            keyboard.press("Enter")
            wait("0 of 6")
            keyboard.type("b>a")
            keyboard.press("Enter")
            wait("1 of 6")
            keyboard.press("Alt+s")
            wait("2 of 6")
            keyboard.press("Alt+f")
            wait("3 of 6")
            keyboard.press("Alt+u")
            wait("2 of 6")
            window.screenshot(path=str(tmp_path / "page.png"))
            window.click("#place-0 label:nth-child(3)")
            window.click("#place-1 label:nth-child(2)")
            window.wait_for_function(
                "() => document.querySelector('#ranking textarea, #ranking input').value === 'B > A'", timeout=20_000
            )
            browser.close()
    finally:
        process.terminate()
        process.wait()
    items, ann = read_items(folder), Judgements(folder, "ann")
    assert [r["status"] for r in ann] == ["ranked", "skipped"]
    order = items[0].order_for("ann")
    assert ann[items[0].id]["ranks"] == [2 - order.index(0), 2 - order.index(1)]
    assert (tmp_path / "page.png").stat().st_size > 10_000


# --- Judges ---


def test_a_function_ranks_by_its_scores(folder, tmp_path, run_recipe):
    (folder / "my_rewards.py").write_text(
        "def length(completions, **columns):\n    return [float(len(text) // 2) for text in completions]\n"
    )
    command = ["judge_completions.py", "--folder", folder, "--reward_func", "my_rewards.length"]
    run_program(RECIPES / command[0], *command[1:], cwd=folder)
    for row in collected_rankings(folder):
        scores = [len(text) // 2 for text in row["completions"]]
        assert row["ranks"] == [1 + len({s for s in scores if s > mine}) for mine in scores]
        assert row["annotator"] == "judge-my_rewards.length"
    assert "6 items judged" in run_recipe(*command, cwd=folder)  # again: nothing is judged twice
    assert len((folder / "judgements-judge-my_rewards.length.jsonl").read_text().splitlines()) == 6


def test_a_reward_model_ranks_by_its_scores(folder, reward_model_path, tokenizer, run_recipe):
    run_recipe("judge_completions.py", "--folder", folder, "--reward_model", reward_model_path, cwd=folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_path)
    for row in collected_rankings(folder):
        scores = [model(**tokenizer(row["prompt"] + c, return_tensors="pt")).logits.item() for c in row["completions"]]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        gaps = [scores[i] - scores[j] for i, j in itertools.pairwise(order)]
        if min(gaps) > 1e-4:
            assert row["ranks"] == [1 + order.index(i) for i in range(len(scores))]


def test_grades_are_read_from_what_a_language_model_says(folder, sessions, monkeypatch):
    """By a judge whose replies are scripted; ties where grades are equal, skipped where there is none."""
    judge = importlib.import_module("collecting.judges")
    replies = {"good": "10", "bad": "I say 3.", "slow": "3/10", "great": "none"}
    asked = []

    def sample(model, tokenizer, questions, count, **settings):
        asked.extend(questions)
        return [[next(reply for word, reply in replies.items() if f" {word} " in question)] for question in questions]

    model = SimpleNamespace(config=PreTrainedConfig())
    monkeypatch.setattr(judge, "load_model", lambda *args: (model, SimpleNamespace(chat_template=None)))
    monkeypatch.setattr(judge, "sample", sample)
    score = judge.grades("judge", "Is it kind?")
    item = next(item for item in read_items(folder) if len(item.completions) == 4)
    assert score(item) == [10.0, 3.0, 3.0, None]
    assert "Is it kind?" in asked[0] and item.prompt in asked[0] and item.completions[0] in asked[0]


def test_what_is_too_long_for_a_judge_has_no_score(folder, policy_path, tokenizer, sessions, monkeypatch, caplog):
    """A language model's questions or a reward model's texts may be too long, and no trainer has set up the logger."""
    judge = importlib.import_module("collecting.judges")
    with open(folder / "completions.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "the film", "completions": [" good", " good" * 60]}))
    item = read_items(folder)[-1]
    asked = []
    PartialState._reset_state()
    monkeypatch.setattr(judge, "sample", lambda *args, **settings: asked.extend(args[2]) or [["7"] for _ in args[2]])
    assert judge.grades(policy_path, "Is it?")(item) == [7.0, None] and len(asked) == 1
    settings = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 12, "vocab_size": len(tokenizer)}
    config = GPT2Config(**settings, num_labels=1, pad_token_id=0, reward_input={"kind": "text", "pad_token": "<pad>"})
    GPT2ForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    PartialState._reset_state()
    first, second = judge.reward_model_scores(str(folder / "model"), [item.prompt])(item)
    assert first is not None and second is None
    assert [w in caplog.text for w in ("has a context of 64 tokens", "has learned 12 positions")] == [True, True]


@pytest.mark.parametrize("returned", ["None", "0.5", "[1.0]", "['good', 'bad']"])
def test_what_a_function_does_not_score_is_named(folder, sessions, monkeypatch, returned):
    judge = importlib.import_module("judge_completions")
    judges = importlib.import_module("collecting.judges")
    monkeypatch.setattr(judges, "import_reward", lambda path: eval(f"lambda **columns: {returned}"))
    command = ["judge", "--folder", str(folder), "--reward_func", "mine.reward"]
    monkeypatch.setattr(sys, "argv", command)
    item_id = read_items(folder)[0].id
    with pytest.raises(
        SystemExit, match=re.escape(f"item '{item_id}', mine.reward returned {returned} for 2 completions")
    ):
        judge.main()
    monkeypatch.setattr(sys, "argv", [*command, "--export", "rankings.csv"])
    with pytest.raises(SystemExit, match="ends in .parquet or .jsonl"):
        judge.main()
    monkeypatch.setattr(sys, "argv", [*command[:3], "--judge_model", str(folder / "nowhere")])
    with pytest.raises(SystemExit, match="error: .*nowhere"):
        judge.main()


def test_a_whole_line_of_a_log_is_never_dropped(tmp_path):
    """Though a key is there twice, and the last newline is not: it was written by hand, and not cut."""
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="line 1: .*each key once"):
        list(read_lines(log))
    append_line(log, {"b": 1})
    assert log.read_bytes() == b'{"a": 1, "a": 2}\n{"b": 1}\n'
