"""Publishing datasets: what arrives is what was sent, the card tells the truth, and a failed upload loses nothing."""

import json
import re
import shlex

import pytest
from conftest import PROMPTS, RANKINGS, ranking_settings, settings
from datasets import Dataset, DatasetDict, Value, load_dataset
from hub_server import READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, connect, environment, run_against
from huggingface_hub import DatasetCard

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    hub,
    keep_best,
    load_rollouts,
    uploading,
)
from trl_ext.dataset_cards import describe_rankings
from trl_ext.hub import publish_rankings, publish_rollouts, publish_samples
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


def test_large_data_lies_in_several_files_and_replaces_what_was_there(server, collected, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SHARD_SIZE", collected.data.nbytes / 2.2)
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


def test_private_stays_private(server, collected, tmp_path):
    publish(collected, tmp_path / "out", private=True)
    assert server.repos["dataset", "user/films"].private


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
