"""Publishing datasets: what arrives is what was sent, the card tells the truth, and a failed upload loses nothing."""

import datetime
import decimal
import io
import json
import math
import re
import shlex
from types import SimpleNamespace

import PIL.Image
import pytest
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from helpers import PROMPTS, RANKINGS, ranking_settings, settings
from hub_server import READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, connect, environment, run_against
from huggingface_hub import DatasetCard, HfApi

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    keep_best,
    load_rollouts,
)
from trl_ext.hub import publication, publish_rankings, publish_rollouts, publish_samples, uploading
from trl_ext.hub.dataset_cards import describe_rankings
from trl_ext.hub.first_row import first_row
from trl_ext.hub.uploading import PublishError


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path)
        monkeypatch.setattr(uploading, "FIRST_WAIT", 0.01)
        yield server


@pytest.fixture
def collected():
    """Two annotators on two items, one of which they rank differently, and one by one of them alone."""
    items = [
        ("the film", [" good", " bad", " slow"], {"ann": [1, 2, 2], "bob": [1, 2, 3]}),
        ("it was", [" great", " sad"], {"ann": [1, 2], "bob": [1, 2]}),
        ("but", [" dull", " warm"], {"ann": [1, 1]}),
    ]
    rows = [
        {"id": str(i), "prompt": p, "completions": c, "ranks": ranks, "annotator": name, "seconds": 3.5, "flag": ""}
        for i, (p, c, by) in enumerate(items)
        for name, ranks in by.items()
    ]
    return Dataset.from_list(rows)


def publish(dataset, folder, **overrides):
    kwargs = {"licence": "cc-by-4.0", "collected": "By two friends, who were told to like good films."}
    return publish_rankings(dataset, "user/films", folder=folder, **kwargs | overrides)


def assert_loads(server, repo_id, splits, home):
    """A fresh process gets the same rows and features from the Hub."""
    code = f"""
        import json
        from datasets import load_dataset
        dataset = load_dataset({repo_id!r})
        print(json.dumps({{name: [split.to_list(), str(split.features)] for name, split in dataset.items()}}))
    """
    loaded = json.loads(output_of(server, code, home, token=READ_TOKEN).splitlines()[-1])
    assert loaded == {name: [split.to_list(), str(split.features)] for name, split in splits.items()}


def output_of(server, code, home, token=WRITE_TOKEN):
    run = run_against(server, code, home, token)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def snippets(folder):
    """The python of a card."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def test_what_is_loaded_is_what_was_published(server, collected, tmp_path):
    splits = DatasetDict({"train": collected.select(range(3)), "test": collected.select(range(3, 5))})
    publish(splits, tmp_path / "out")
    assert_loads(server, "user/films", splits, tmp_path / "home")


def test_a_name_alone_is_a_list_of_one(collected, tmp_path, monkeypatch):
    monkeypatch.setattr(publication, "upload", lambda *args, **kwargs: SimpleNamespace(commit_url=""))
    cards = []
    for form in (str, lambda name: [name]):
        publish(collected, tmp_path, models=form("user/model"), tags=form("films"), language=form("en"))
        cards.append((tmp_path / "README.md").read_text())
    assert cards[0] == cards[1] and "- films\n" in cards[0] and "(https://huggingface.co/user/model)" in cards[0]


def test_large_data_lies_in_several_files_and_replaces_what_was_there(server, collected, tmp_path, monkeypatch):
    monkeypatch.setattr(publication, "SHARD_SIZE", collected.data.nbytes / 2.2)
    publish(collected, tmp_path / "out")
    assert len(list((tmp_path / "out" / "data").iterdir())) == 3
    assert_loads(server, "user/films", {"train": collected}, tmp_path / "home")
    # Fewer rows are fewer files, beside the old ones
    publish(collected.select([4, 0]), tmp_path / "again")
    assert len(list((tmp_path / "again" / "data").iterdir())) == 1
    assert_loads(server, "user/films", {"train": collected.select([4, 0])}, tmp_path / "home")


def test_a_published_dataset_trains_a_reward_model_unchanged(server, rankings, reward_model, tokenizer, tmp_path):
    publish(rankings, tmp_path / "out")
    published = load_dataset(
        "parquet",
        data_files=str(tmp_path / "out" / "data" / "train-*"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    losses = []
    for dataset in (rankings, published):
        args = RankingRewardConfig(**ranking_settings(tmp_path / "model", max_steps=1))
        trainer = RankingRewardTrainer(reward_model, args, train_dataset=dataset, processing_class=tokenizer)
        losses.append(trainer.evaluate(dataset)["eval_loss"])
    assert losses[0] == losses[1]


def test_the_card_tells_what_is_in_it(server, collected, tmp_path):
    trained = ["user/judge", "user/critic"]
    publish(collected, tmp_path / "out", title="Films, ranked", language=["en"], tags=["films"], models=trained)
    text = (tmp_path / "out" / "README.md").read_text()
    card = DatasetCard(text)
    card.data.to_dict()
    assert card.data.license == "cc-by-4.0" and card.data.language == ["en"] and "films" in card.data.tags
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*-of-00001.parquet"}]}
    ]
    # 3 + 3 + 1 + 1 + 1 pairs, of which ann's [2, 2] and [1, 1] are ties
    assert "5 rankings of 12 completions of 3 prompts, by 2 annotators" in text
    assert "of 9 pairs that were ranked, 22.2% are ties" in text
    assert "By two friends" in text and "| `seconds` | float64 | how long it took |" in text
    assert "| `completions` | list of string | the answers |" in text
    # Of 4 pairs that both ranked they agree on 3
    assert "Two annotators agree on 75.0% of the pairs that both ranked, and on 100.0% where" in text
    addresses = [f"[{name}](https://huggingface.co/{name})" for name in trained]
    assert f"Trained on it: {', '.join(addresses)}." in text
    assert '"prompt": "the film"' in text and "12 (3), 11 (1), 122 (1), 123 (1)" not in text
    assert "12 (2)" in text and "122 (1)" in text
    assert DatasetCard.load("user/films").text == card.text  # and it arrived


def test_the_cards_snippet_is_python_that_names_the_dataset(server, collected, tmp_path):
    publish(collected, tmp_path / "out")
    (snippet,) = snippets(tmp_path / "out")
    compile(snippet, "card", "exec")
    assert 'load_dataset("user/films", split="train")' in snippet


def test_pairs_that_amount_to_no_order_are_counted(rankings):
    rows = {"prompt": ["a"], "completions": [["x", "y", "z"]], "pairs": [[[0, 1, 0], [1, 2, 0], [0, 2, 1]]]}
    content = describe_rankings(DatasetDict({"train": Dataset.from_dict(rows)}))
    assert content["num_pairs"] == 3 and content["tie_rate"] == "66.7%" and content["agreement"] is None
    content = describe_rankings(DatasetDict({"train": rankings}))
    assert content["num_rows"] == len(RANKINGS["prompt"]) and content["annotators"] is None


def test_what_nobody_could_use_is_refused(server, collected, tmp_path):
    with pytest.raises(ValueError, match="`licence` is empty"):
        publish(collected, tmp_path, licence=" ")
    with pytest.raises(ValueError, match="`collected` is empty"):
        publish(collected, tmp_path, collected="")
    with pytest.raises(ValueError, match="row 0"):
        publish(Dataset.from_list([{"prompt": "a", "completions": ["x", "y"], "ranks": [1]}]), tmp_path)
    assert not server.repos and not list(tmp_path.glob("**/*.parquet"))


def test_private_stays_private(server, collected, tmp_path, caplog):
    publish(collected, tmp_path / "out", private=True)
    assert server.repos["dataset", "user/films"].private and not caplog.records
    publish(collected, tmp_path / "out")
    assert "user/films is there already and private, and stays so" in caplog.text
    assert server.repos["dataset", "user/films"].private


def test_what_should_be_private_is_not_uploaded_to_a_public_repository(server, collected, tmp_path):
    HfApi().create_repo("user/films", repo_type="dataset")
    repo = server.repos["dataset", "user/films"]
    settings_page = f"{server.endpoint}/datasets/user/films/settings"
    with pytest.raises(
        PublishError, match=f"is there already and public.*{settings_page}.*See that .*Finish with: hf"
    ):
        publish(collected, tmp_path / "out", private=True)
    assert len(repo.commits) == 1 and not server.called("POST", "preupload")
    repo.private = True
    publish(collected, tmp_path / "out", private=True)
    assert "README.md" in repo.at().files


# --- What the Hub would refuse ---


def test_a_licence_is_refused_before_the_upload_with_the_one_that_was_meant(server, collected, tmp_path):
    # The names are those of the Hub's list, or of SPDX, or what one reads in repositories
    meant = {
        "CC BY 4.0": "cc-by-4.0",
        "Creative Commons Attribution Non Commercial Share Alike 3.0": "cc-by-nc-sa-3.0",
        "Creative Commons Zero v1.0 Universal": "cc0-1.0",
        "Apache License 2.0": "apache-2.0",
        "MIT": "mit",
        "The MIT License": "mit",
        "GPL-3.0-or-later": "gpl-3.0",
        "GNU Affero General Public License v3.0": "agpl-3.0",
        "BSD 3-Clause License": "bsd-3-clause",
        "Llama 3.1": "llama3.1",
    }
    for written, identifier in meant.items():
        with pytest.raises(ValueError, match=f"`licence` takes .*Write '{re.escape(identifier)}' if you mean"):
            publish(collected, tmp_path / "out", licence=written)
    with pytest.raises(ValueError, match="'mine' is none. They are listed on .* licence='other' with `licence_name`"):
        publish(collected, tmp_path / "out", licence="mine")
    with pytest.raises(ValueError, match="licence='other' says nothing without `licence_name`"):
        publish(collected, tmp_path / "out", licence="other")
    assert not server.calls and not (tmp_path / "out").exists()


def test_a_language_is_refused_before_the_upload_with_the_code_that_was_meant(server, collected, tmp_path):
    meant = {"English": "en", "en-US": "en", "zh_CN": "zh", "DE": "de", "Norwegian bokmal": "nb"}
    for written, code in meant.items():
        with pytest.raises(ValueError, match=f"`language` takes .*'{written}' is none. Write '{code}' for "):
            publish(collected, tmp_path / "out", language=["fr", written])
    for written in ("xx", "", "Klingonese"):
        with pytest.raises(ValueError, match="is none. A country"):
            publish(collected, tmp_path / "out", language=written)
    assert not server.calls and not (tmp_path / "out").exists()


def test_what_the_hub_takes_arrives(server, collected, tmp_path):
    named = {"licence_name": "films-1.0", "licence_link": "https://films.example/licence"}
    languages = ["en", "gsw", "code", "multilingual"]
    publish(collected, tmp_path / "out", licence="other", language=languages, **named)
    data = DatasetCard.load("user/films").data
    assert (data.license, data.license_name, data.license_link) == ("other", *named.values())
    assert data.language == languages
    publish(collected, tmp_path / "out", language="en")
    assert DatasetCard.load("user/films").data.language == ["en"]


# --- What is uploaded, and what is not ---


def test_only_what_was_written_is_uploaded_and_what_was_withdrawn_goes(server, collected, tmp_path, monkeypatch):
    """Also by the command that finishes an upload."""
    HfApi().create_repo("user/films", repo_type="dataset")
    for name in ("LICENSE", "data/notes.txt"):
        HfApi().upload_file(path_or_fileobj=b"a", path_in_repo=name, repo_id="user/films", repo_type="dataset")
    out, repo = tmp_path / "out", server.repos["dataset", "user/films"]
    with monkeypatch.context() as patch:
        patch.setattr(publication, "SHARD_SIZE", collected.data.nbytes / 2.2)
        publish(DatasetDict(train=collected, test=collected.select([0])), out)
    kept = {".gitattributes", "LICENSE", "data/notes.txt", "README.md"}
    assert set(repo.at().files) - kept == {
        *(f"data/train-{i:05d}-of-00003.parquet" for i in range(3)),
        "data/test-00000-of-00001.parquet",
    }
    for name in (".env", "judgements.jsonl", "data/more.parquet", "data/train-old.parquet"):
        (out / name).write_bytes(b"not to be seen")
    server.fail("POST", "/commit/", 403, words="Private repository storage limit reached, please upgrade your plan")
    before = len(repo.commits)
    with pytest.raises(PublishError, match="answered 403: Private repository storage limit reached") as raised:
        publish(collected.select([0, 1]), out)
    assert "may not write" not in str(raised.value) and len(repo.commits) == before
    command = shlex.split(str(raised.value).split("Finish with: ")[1])
    code = f"import subprocess, sys; sys.exit(subprocess.run({command!r}).returncode)"
    output_of(server, code, tmp_path / "home")
    assert set(repo.at().files) == {*kept, "data/train-00000-of-00001.parquet"} and len(repo.commits) == before + 1
    publish(collected, out)  # nothing is left over for the next
    assert set(repo.at().files) == {*kept, "data/train-00000-of-00001.parquet"}
    assert Dataset.from_parquet(str(out / "data" / "train-00000-of-00001.parquet")).to_list() == collected.to_list()


def test_a_name_without_namespace_is_the_users(server, collected, tmp_path):
    publish_rankings(collected, "films", "cc0-1.0", "By hand.", tmp_path / "out")
    assert 'load_dataset("user/films", split="train")' in DatasetCard.load("user/films").text
    server.fail("GET", "/api/whoami-v2", 503, times=float("inf"))
    with pytest.raises(PublishError, match="answered 503.*such as 'your-name/films'"):
        publish_rankings(collected, "films", "cc0-1.0", "By hand.", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_columns_of_every_kind_are_described(server, collected, tmp_path):
    image = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(image, "png")
    when = datetime.datetime(2026, 1, 2, 3, 4)
    features = {
        "when": (Value("timestamp[us]"), when),
        "day": (Value("date32"), when.date()),
        "price": (Value("decimal128(10, 2)"), decimal.Decimal("1.50")),
        "raw": (Value("binary"), b"abc"),
        "nested": ({"list": List({"at": Value("timestamp[s]"), "raw": Value("binary")})}, {"list": [{"at": when}]}),
        "image": (Image(), {"bytes": image.getvalue(), "path": None}),
        "images": (List(Image()), [{"bytes": image.getvalue(), "path": None}]),
        "sound": ({"bytes": Value("binary"), "path": Value("string")}, {"bytes": b"abc", "path": None}),
        "no_number": (Value("float64"), math.nan),
        "infinite": (Value("float64"), -math.inf),
        "none": (Value("string"), None),
        "kind": (ClassLabel(names=["good", "bad"]), 1),
        "a|b": (Value("string"), "x"),
    }
    types, values = ({name: entry[i] for name, entry in features.items()} for i in (0, 1))
    rows = [row | values for row in collected.to_list()]
    dataset = Dataset.from_list(rows, features=Features({**collected.features, **types}))
    dataset = dataset.cast_column("sound", Audio())  # whose decoder is not installed
    publish(dataset.with_format("numpy"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    row = json.loads(text.split("```json\n")[1].split("```")[0])
    assert row == collected[0] | {
        "when": "2026-01-02T03:04:00",
        "day": "2026-01-02",
        "price": "1.50",
        "raw": "(3 bytes)",
        "nested": {"list": [{"at": "2026-01-02T03:04:00", "raw": None}]},
        "image": {"bytes": f"({len(image.getvalue())} bytes)", "path": None},
        "images": [{"bytes": f"({len(image.getvalue())} bytes)", "path": None}],
        "sound": {"bytes": "(3 bytes)", "path": None},
        "no_number": "nan",
        "infinite": "-inf",
        "none": None,
        "kind": 1,
        "a|b": "x",
    }
    table = dict(re.findall(r"^\| `(.+)` \| (.+) \| .*\|$", text, re.MULTILINE))
    assert table["images"] == "list of image" and table["sound"] == "audio" and table["kind"] == "one of 2 classes"
    assert table["price"] == "decimal128(10, 2)" and table["a\\|b"] == "string"
    assert table["nested"] == "{list: list of {at: timestamp[s], raw: binary}}"


@pytest.mark.parametrize("kind", ["rankings", "samples", "rollouts"])
def test_long_texts_do_not_make_long_cards(server, collected, samples, tmp_path, kind):
    long, other = "word " * 200_000, {"cells": ["entry " * 20] * 1000}
    if kind == "rankings":
        rows = [row | {"completions": [long] * len(row["completions"])} | other for row in collected.to_list()]
        publish(Dataset.from_list(rows), tmp_path)
    elif kind == "samples":
        rows = [row | {"completion": long, "reward/length": 1.0} | other for row in samples.to_list()]
        publish_samples(Dataset.from_list(rows), "user/best", folder=tmp_path, **MADE)
    else:
        numbers = dict.fromkeys(("rewards", "advantages", "returns", "values", "kl", "logps"), [0.5] * 1000)
        tokens = {"completion_ids": [1] * 1000, "tokens": ["word"] * 1000, "own": [True] * 1000}
        messages = {name: [{"role": "user", "content": long}] for name in ("prompt", "completion")}
        row = {"step": 0, "score": 1.0, "terminated": True} | messages | numbers | tokens
        publish_rollouts(Dataset.from_list([row]), "user/rollouts", folder=tmp_path, **MADE)
    text = (tmp_path / "README.md").read_text()
    assert len(text) < 25_000
    assert re.search("The first row, .*no more than 8 entries.*:\n|The first row, .*no more than 500 characters", text)
    row = json.loads(text.split("```json\n")[1].split("```")[0])
    shown = row["completions"][0] if kind == "rankings" else row["completion"]
    assert (shown if isinstance(shown, str) else shown[0]["content"]) == long[:500] + " ..."


@pytest.mark.parametrize("row", [{"a": ["x" * 60] * 8} | {str(i): "y" * 500 for i in range(100)}])
def test_a_row_of_many_columns_is_shown_more_shortly(row):
    shown = first_row(Dataset.from_list([row]))
    assert len(shown["first_row"]) < 20_000 and shown["limits"] == {"entries": 4, "characters": 50}
    assert json.loads(shown["first_row"])["a"] == ["x" * 50 + " ..."] * 4


def test_what_is_no_dataset_is_refused(server, collected, tmp_path):
    with pytest.raises(ValueError, match=r"'train' is a IterableDataset. .*Dataset.from_list\(list\(stream\)\)"):
        publish(collected.to_iterable_dataset(), tmp_path / "out")


# --- Rollouts ---


def score(completion_ids, **kwargs):
    return [None if len(ids) == 2 else float(len(ids)) for ids in completion_ids]


@pytest.fixture(scope="module", params=["a2c-chat", "reinforce-text"])
def rollouts(request, policy_path, prompts, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    trainer_class, config_class, dataset, options = {
        "a2c-chat": (A2CTrainer, A2CConfig, chats, {"kl_in_reward": 0.1}),
        "reinforce-text": (ReinforceTrainer, ReinforceConfig, prompts, {}),
    }[request.param]
    evaluation = {"eval_strategy": "steps", "eval_steps": 2}
    args = config_class(**settings(folder, save_rollouts=True, max_steps=4, **evaluation, **options))
    trainer_class(policy_path, score, args, dataset, eval_dataset=dataset.select(range(4))).train()
    return load_rollouts(folder)


MADE = {"licence": "cc0-1.0", "collected": "By A2C on eight openings, paid by length."}


def test_rollouts_arrive_and_the_card_is_true(server, rollouts, tmp_path):
    options = {"model": "user/policy", "reward": "user/judge", "language": ["en"], "title": "Short films"}
    publish_rollouts(rollouts, "user/rollouts", folder=tmp_path / "out", **MADE, **options)
    assert list(rollouts) == ["train", "eval"] and rollouts.num_rows == {"train": 16, "eval": 8}
    assert_loads(server, "user/rollouts", rollouts, tmp_path / "home")
    card = DatasetCard.load("user/rollouts")
    assert card.text == DatasetCard.load(tmp_path / "out" / "README.md").text
    assert card.data.license == "cc0-1.0" and card.data.pretty_name == "Short films" and card.data.language == ["en"]
    assert [split["split"] for split in card.data.configs[0]["data_files"]] == ["train", "eval"]
    text = card.text
    assert "24 completions of 8 prompts" in text and "By A2C on eight openings" in text
    assert "[user/policy](https://huggingface.co/user/policy)" in text
    assert "[user/judge](https://huggingface.co/user/judge)" in text
    for name, steps in (("train", "0 to 3"), ("eval", "2 to 4")):
        frame = rollouts[name].to_pandas()
        mean_length, ended = frame["tokens"].str.len().mean(), frame["terminated"].mean()
        line = f"| {name} | {len(frame)} | {steps} | {frame['score'].mean():.4g} | {mean_length:.4g} | {ended:.1%} |"
        assert line in text
    has_critic = rollouts["train"][0]["values"] is not None
    assert ("return, value, KL to the reference and log-probability" in text) == has_critic
    assert ("return and log-probability" in text) != has_critic
    assert "| `reward/score` | float32 | what the reward function `score` gave; null where it does not apply |" in text
    described = re.findall(r"^\| `(\S+)` \| .+ \| \S.* \|$", text, re.MULTILINE)
    assert described == rollouts["train"].column_names
    # Completions have no more than 6 tokens, so none is cut
    assert json.loads(text.split("```json\n")[1].split("```")[0]) == rollouts["train"][0]


def test_the_rollouts_snippets_run_and_say_what_is_so(server, rollouts, tmp_path):
    publish_rollouts(rollouts, "user/rollouts", folder=tmp_path / "out", **MADE)
    printed = output_of(server, "\n".join(snippets(tmp_path / "out")), tmp_path / "home", READ_TOKEN)
    last = rollouts["train"][-1]
    largest = max(range(len(last["tokens"])), key=lambda t: abs(last["advantages"][t]))
    assert f"{last['advantages'][largest]:+.3f} {last['tokens'][largest]!r}\n" in printed
    scores = [s for s, step in zip(rollouts["train"]["score"], rollouts["train"]["step"], strict=True) if step == 3]
    scores = [s for s in scores if s is not None]
    assert printed.splitlines()[-1] == f"3 {sum(scores) / len(scores)}"


def test_what_are_no_rollouts_is_refused(server, rollouts, collected, tmp_path):
    def refuse(data, message, **options):
        with pytest.raises(ValueError, match=message):
            publish_rollouts(data, "user/rollouts", folder=tmp_path / "out", **MADE | options)

    refuse(collected, "The split 'train' lacks step, completion, .*; it has id, prompt")
    refuse(DatasetDict(), "no split to publish")
    refuse(rollouts, "`licence` is empty", licence="")
    refuse(rollouts, "`model` takes Hub ids, e.g. 'user/name', and './out/model' is none", model="./out/model")
    refuse(DatasetDict({"a-b": rollouts["train"]}), "'a-b' cannot be the name of a split")
    refuse(DatasetDict({"train": rollouts["train"], "eval": rollouts["eval"].select([])}), "'eval' has no rows")
    other = rollouts["eval"].cast_column("score", Value("float64"))
    refuse(DatasetDict({"train": rollouts["train"], "eval": other}), "'train' and 'eval' differ in their features")
    assert not server.repos and not (tmp_path / "out").exists()


# --- Samples ---


@pytest.fixture
def samples():
    """Three completions of each prompt; the longest is the best, and one has no score."""
    texts = [" good", " great and warm", " slow film"]
    rows = [
        {"prompt_index": i, "prompt": prompt, "completion": text, "score": float(len(text)), "reward/length": None}
        for i, prompt in enumerate(PROMPTS[:4])
        for text in texts
    ]
    samples = Dataset.from_list(rows[:-1] + [rows[-1] | {"score": None}])
    return samples.cast_column("reward/length", Value("float64"))


def test_samples_arrive_and_the_card_is_true(server, samples, tmp_path):
    splits = DatasetDict(samples=samples, kept=keep_best(samples))
    publish_samples(splits, "user/best", folder=tmp_path / "out", **MADE, model="user/policy", reward="user/judge")
    assert_loads(server, "user/best", splits, tmp_path / "home")
    card = DatasetCard.load("user/best")
    assert card.data.license == "cc0-1.0" and card.data.task_categories == ["text-generation"]
    assert (
        "Completions of 4 prompts, sampled from [user/policy]" in card.text and "scored by [user/judge]" in card.text
    )
    # 5, 15 and 10 characters, which are the scores: 4 of each less the last 10; the means of 11 and of 12
    assert "| samples | 12 | 4 | 10 | 10 |" in card.text and "| kept | 4 | 4 | 15 | 15 |" in card.text
    assert "| `completion` | string | of the same kind |" in card.text and '"completion": " good"' in card.text
    with pytest.raises(ValueError, match="'train' lacks prompt, completion, score; it has text"):
        publish_samples(Dataset.from_dict({"text": ["a"]}), "user/best", folder=tmp_path / "out", **MADE)


def test_the_samples_snippet_trains_the_policy_they_are_from(server, samples, policy_path, tmp_path):
    uploading.upload(policy_path, "user/policy", "model")
    splits = DatasetDict(samples=samples, kept=keep_best(samples))
    publish_samples(splits, "user/best", folder=tmp_path / "out", **MADE, model="user/policy")
    (snippet,) = snippets(tmp_path / "out")
    # What a machine without a GPU needs
    fast = f'SFTConfig({str(tmp_path / "model")!r}, use_cpu=True, bf16=False, max_steps=1, report_to="none")'
    assert 'SFTConfig("my-model")' in snippet
    snippet = snippet.replace('SFTConfig("my-model")', fast) + "\nprint(trainer.train_dataset[0])"
    printed = output_of(server, snippet, tmp_path / "home", READ_TOKEN)
    assert "'train_loss'" in printed and "'prompt': 'the film was', 'completion': ' great and warm<eos>'" in printed


# --- Faults ---


@pytest.mark.parametrize(
    "method, path, status",
    [("POST", "/api/repos/create", 503), ("POST", "/commit/", 500), ("POST", "/commit/", 429)],
)
def test_what_fails_for_a_while_is_tried_again(server, collected, tmp_path, method, path, status):
    server.fail(method, path, status, times=2)
    publish(collected, tmp_path / "out")
    files = server.repos["dataset", "user/films"].at("main").files
    assert {"README.md", "data/train-00000-of-00001.parquet"} <= set(files)


def test_publishing_needs_no_accelerator(server, collected, tmp_path):
    """Also when something is to be logged, in a process that trains nothing."""
    collected.to_parquet(tmp_path / "rankings.parquet")
    code = f"""
        from datasets import Dataset
        from trl_ext.hub import uploading
        from trl_ext.hub import publish_rankings

        uploading.FIRST_WAIT = 0.01
        rankings = Dataset.from_parquet({str(tmp_path / "rankings.parquet")!r})
        publish_rankings(rankings, "user/films", "cc0-1.0", "By hand.", {str(tmp_path / "out")!r})
    """
    server.fail("POST", "/commit/", 500, times=1)
    run = run_against(server, code, tmp_path / "home")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "again in" in run.stderr and "README.md" in server.repos["dataset", "user/films"].at("main").files


def test_a_connection_cut_in_the_middle_of_a_file_is_taken_up(server, collected, tmp_path):
    server.cut("PUT", ".*", times=1)
    publish(collected, tmp_path / "out")
    sent = (tmp_path / "out" / "data" / "train-00000-of-00001.parquet").read_bytes()
    assert server.repos["dataset", "user/films"].at("main").files["data/train-00000-of-00001.parquet"].content == sent


@pytest.mark.parametrize(
    "path, status, words, message",
    [
        ("/commit/", 400, "bad commit", "The Hub answered 400: bad commit. The same would be refused again: mend it"),
        (
            "/api/validate-yaml",
            400,
            ['"license" must be one of [mit, other]', '"x" is wrong'],
            r'The Hub answered 400: "license" must be one of \[mit, other\] "x" is wrong. The same would be refused',
        ),
        ("/commit/", 403, "Access to it is disabled", r"answered 403: Access to it is disabled\. What was"),
        (
            "/preupload/",
            403,
            "You need to be a member",
            "answered 403: You need to be a member. The token may not write",
        ),
        (
            "/commit/",
            413,
            "Too large. " * 100,
            r"answered 413: (Too large\. ){54}Too la \.\.\. What was to be published",
        ),
        ("/commit/", 429, "Slow down", "The Hub answered 429: Slow down. What was"),
    ],
)
def test_the_hubs_own_words_are_shown(server, collected, tmp_path, path, status, words, message):
    server.fail("POST", path, status, times=float("inf"), words=words)
    with pytest.raises(PublishError, match=message):
        publish(collected, tmp_path / "out")
    assert len(server.called("POST", path)) == (5 if status == 429 else 1)


@pytest.mark.parametrize(
    "token, message", [(UNKNOWN_TOKEN, "does not know the token"), (READ_TOKEN, "may not write to user/films")]
)
def test_a_wrong_token_says_what_to_do_and_the_command_finishes_it(server, collected, tmp_path, token, message):
    with pytest.raises(PublishError, match=message) as raised:
        publish(collected, tmp_path / "out", token=token)
    said = str(raised.value)
    assert token not in said and WRITE_TOKEN not in said
    command = shlex.split(said.split("Finish with: ")[1])
    code = f"import subprocess, sys; sys.exit(subprocess.run({command!r}).returncode)"
    run = run_against(server, code, tmp_path / "home", token=WRITE_TOKEN)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "README.md" in server.repos["dataset", "user/films"].at("main").files


def test_a_hub_that_is_down_loses_nothing(server, collected, tmp_path):
    server.fail("POST", "/api/repos/create", 500, times=float("inf"))
    with pytest.raises(PublishError, match="answered 500.*Finish with: hf upload user/films"):
        publish(collected, tmp_path / "out")
    again = Dataset.from_parquet(str(tmp_path / "out" / "data" / "train-00000-of-00001.parquet"))
    assert again.to_list() == collected.to_list() and (tmp_path / "out" / "README.md").is_file()


def test_no_token_is_written_anywhere(server, collected, tmp_path, caplog):
    server.fail("POST", "/commit/", 500, times=1)
    publish(collected, tmp_path / "out", token=WRITE_TOKEN)
    files = server.repos["dataset", "user/films"].at("main").files.values()
    assert all(WRITE_TOKEN.encode() not in file.content for file in files)
    assert WRITE_TOKEN not in caplog.text and "again in" in caplog.text
    assert environment(server, tmp_path, None).get("HF_TOKEN") is None
