"""The recipe of best-of-n: rounds of sampling, filtering and imitation, and the samples it publishes."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from helpers import FAST, PROMPTS, write_rows
from hub_server import HubServer, connect


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path / "home")
        yield server


@pytest.mark.parametrize(
    "flags", [["--learning_rate", "0.02"], ["--learning_rate", "0.1", "--use_peft"]], ids=["full", "lora"]
)
def test_rounds_of_filtering_raise_the_score(policy_path, tmp_path, flags, hub, run_recipe):
    """As a user runs it: each round starts from what the last one learned."""
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS * 4])
    (tmp_path / "my_rewards.py").write_text(
        "def good(completions, **columns):\n    return [float(text.split().count('good')) for text in completions]\n"
    )
    printed = run_recipe(
        *("best_of_n.py", *FAST, "--model_name_or_path", policy_path, "--dataset_name", "prompts.jsonl"),
        *("--reward_funcs", "my_rewards.good", "--num_generations", 8, "--num_rounds", 3, "--max_steps", 20),
        *("--max_completion_length", 6, "--output_dir", "out", *flags),
        *("--publish_samples_to", "user/best", "--samples_licence", "cc0-1.0"),
        cwd=tmp_path,
    )
    rounds = re.findall(
        r"Round \d: 256 completions with a mean score of ([\d.e-]+); kept \d+ with ([\d.e-]+)", printed
    )
    assert len(rounds) == 3
    means, kept = ([float(value) for value in values] for values in zip(*rounds, strict=True))
    assert means[0] < means[1] < means[2] and means[2] > 1.5 * means[0]
    assert all(k > m for k, m in zip(kept, means, strict=True))
    files = {name: str(tmp_path / "out" / "round-3" / f"{name}.parquet") for name in ("samples", "kept")}
    data = load_dataset("parquet", data_files=files)
    assert sum(data["samples"]["score"]) / 256 == pytest.approx(means[2], rel=1e-3)
    assert set(data["kept"].column_names) == {"prompt_index", "prompt", "completion", "score", "reward/good"}
    weights = "adapter_model.safetensors" if "--use_peft" in flags else "model.safetensors"
    assert (tmp_path / "out" / weights).is_file()
    repo = hub.repos["dataset", "user/best"]
    assert f"Samples: {hub.endpoint}/{repo.page}/commit/" in printed
    for name, rows in data.items():
        file = repo.at().files[f"data/{name}-00000-of-00001.parquet"]
        published = Dataset(pq.read_table(pa.BufferReader(file.content)))
        assert set(published["round"]) == {1, 2, 3}
        assert published.filter(lambda row: row["round"] == 3).remove_columns("round").to_list() == rows.to_list()
    card = repo.at().files["README.md"].content.decode()
    assert "8 completions of each prompt by policy0 at temperature 1, scored by my_rewards.good" in card
    (mean,) = re.findall(r"\| samples \| 768 \| 8 \| (\S+) \|", card)
    assert float(mean) == pytest.approx(sum(means) / 3, rel=1e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--publish_samples_to", "user/best"], "--publish_samples_to and --samples_licence need each other"),
        (["--publish_samples_to", "a/b/c", "--samples_licence", "mit"], "Repo id must be"),
        (["--publish_samples_to", "a/b", "--samples_licence", "MIT"], "`--samples_licence` takes .* Write 'mit'"),
    ],
)
def test_what_cannot_be_published_is_told_before_training(recipe, flags, message):
    with pytest.raises(ValueError, match=message):
        recipe("best_of_n").parse(["--output_dir", "out", *flags])
