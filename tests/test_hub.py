"""Publishing rankings: what arrives is what was sent, the card tells the truth, and a failed upload loses nothing."""

import json
import shlex

import pytest
from conftest import RANKINGS, ranking_settings
from datasets import Dataset, DatasetDict, load_dataset
from hub_server import READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, connect, environment, run_against
from huggingface_hub import DatasetCard

from trl_ext import RankingRewardConfig, RankingRewardTrainer, uploading
from trl_ext.hub import describe_rankings, publish_rankings
from trl_ext.uploading import PublishError


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


def test_what_is_loaded_is_what_was_published(server, collected, tmp_path):
    splits = DatasetDict({"train": collected.select(range(3)), "test": collected.select(range(3, 5))})
    publish(splits, tmp_path / "out")
    code = """
        import json
        from datasets import load_dataset
        dataset = load_dataset("user/films")
        print(json.dumps({name: [split.to_list(), str(split.features)] for name, split in dataset.items()}))
    """
    run = run_against(server, code, tmp_path / "home", token=READ_TOKEN)
    assert run.returncode == 0, run.stderr[-2000:]
    loaded = json.loads(run.stdout.splitlines()[-1])
    assert loaded == {name: [split.to_list(), str(split.features)] for name, split in splits.items()}


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
    publish(collected, tmp_path / "out", title="Films, ranked", language=["en"], tags=["films"])
    text = (tmp_path / "out" / "README.md").read_text()
    card = DatasetCard(text)
    card.data.to_dict()
    assert card.data.license == "cc-by-4.0" and card.data.language == ["en"] and "films" in card.data.tags
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
    ]
    # 3 + 3 + 1 + 1 + 1 pairs, of which ann's [2, 2] and [1, 1] are ties
    assert "5 rankings of 12 completions of 3 prompts, by 2 annotators" in text
    assert "of 9 pairs that were ranked, 22.2% are ties" in text
    assert "By two friends" in text and "| `seconds` | float64 | how long it took |" in text
    assert "| `completions` | list of string | the answers |" in text
    # Of 4 pairs that both ranked they agree on 3
    assert "Two annotators agree on 75.0% of the pairs that both ranked, and on 100.0% where" in text
    assert '"prompt": "the film"' in text and "12 (3), 11 (1), 122 (1), 123 (1)" not in text
    assert "12 (2)" in text and "122 (1)" in text
    assert DatasetCard.load("user/films").text == card.text  # and it arrived


def test_the_cards_snippet_is_python_that_names_the_dataset(server, collected, tmp_path):
    publish(collected, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
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


def test_private_stays_private(server, collected, tmp_path):
    publish(collected, tmp_path / "out", private=True)
    assert server.repos["dataset", "user/films"].private


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
        from trl_ext import uploading
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
