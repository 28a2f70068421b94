"""The python blocks of every README run as they stand, offline, where folders lie under the names of Hub repositories."""

import re
import shutil

import datasets.config
import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import PROMPTS, build_policy, build_reward_model, settings
from hub_server import HubServer, connect
from peft import LoraConfig
from readmes import READMES, name
from transformers import training_args

from trl_ext import PPOConfig, PPOTrainer, RankingRewardConfig, RankingRewardTrainer


SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = {name(readme): SNIPPET.findall(readme.read_text(encoding="utf-8")) for readme in READMES}
POLICIES = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")


def message(role, text):
    return [{"role": role, "content": text}]


def rankings():
    completions = [[message("assistant", text) for text in ("good", "great", "dull and slow")]] * 2
    prompts = [message("user", text) for text in PROMPTS[:2]]
    return Dataset.from_dict({"prompt": prompts, "completions": completions, "ranks": [[1, 1, 2], [1, 2, 3]]})


@pytest.fixture(scope="module")
def shelf(tokenizer, tmp_path_factory):
    """A folder of all that snippets load: models, prompts, an adapter, a file of rankings, the results of a training."""
    folder = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        longer = {"max_position_embeddings": 640}  # as completions are of up to 512 tokens by default
        models = {path: build_policy(tokenizer, **longer) for path in POLICIES}
        for model in models.values():  # half of the words end a completion, so that all are short
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(5, 15)]
        models["trl-lib/Qwen2-0.5B-Reward"] = build_reward_model(tokenizer, **longer)
        for path, model in models.items():
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        prompts = Dataset.from_dict({"prompt": [message("user", text) for text in PROMPTS]})
        prompts.to_parquet("trl-lib/ultrafeedback-prompt/train.parquet")
        rankings().to_parquet("rankings.parquet")
        args = RankingRewardConfig(
            "my-reward-adapter", max_steps=1, use_cpu=True, bf16=False, report_to="none", learning_rate=1e-2
        )
        lora = LoraConfig(r=2, target_modules="all-linear")
        trainer = RankingRewardTrainer(POLICIES[1], args, train_dataset=rankings(), peft_config=lora)
        trainer.train()
        trainer.save_model()
        args = PPOConfig(**settings("qwen-ppo", max_steps=1, save_rollouts=True))
        trainer = PPOTrainer(POLICIES[0], "trl-lib/Qwen2-0.5B-Reward", args, prompts)
        trainer.train()
        trainer.save_model()
    return folder


@pytest.fixture
def run(shelf, monkeypatch, tmp_path):
    """Runs the snippets of a README one after another, as its reader does; the names that they leave."""

    def run(readme):
        scope = {}
        for snippet in SNIPPETS[readme]:
            exec(compile(snippet, readme, "exec"), scope)
        return scope

    shutil.copytree(shelf, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # On a CPU alone the reader would be told to set `use_cpu`; bfloat16 is TRL's default
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)
    return run


SPECIAL = {"README.md", "trl_ext/hub/README.md"}
OTHERS = sorted(readme for readme, snippets in SNIPPETS.items() if snippets and readme not in SPECIAL)


@pytest.mark.parametrize("readme", OTHERS)
def test_snippets_run(run, readme):
    scope = run(readme)
    if "trainer" in scope:
        assert scope["trainer"].state.global_step > 0


def test_snippets_of_the_top(run, capsys):
    shutil.rmtree("qwen-ppo")
    scope = run("README.md")
    critic = scope["critic"]
    assert torch.isfinite(scope["values"]).all() and scope["values"].shape == scope["inputs"]["input_ids"].shape
    assert any(parameter.abs().max() > 0 for parameter in critic.parameters())
    assert re.search(r"film [+-]0\.\d\d\n", capsys.readouterr().out)
    assert scope["trainer"].model.config.reward_input["kind"] == "text"


def test_snippets_of_the_hub(run, monkeypatch, tmp_path):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path / "home")
        scope = run("trl_ext/hub/README.md")
        assert {repo_id for _, repo_id in server.repos} == {"user/films", "user/qwen-ppo-rollouts", "user/my-model"}
        files = server.repos["dataset", "user/films"].at("main").files
        (parquet,) = (path for path in files if path.endswith(".parquet"))
        (tmp_path / "films.parquet").write_bytes(files[parquet].content)
    published = load_dataset("parquet", data_files=str(tmp_path / "films.parquet"), split="train")
    assert published["ranks"][:] == rankings()["ranks"][:]
    assert scope["trainer"].state.global_step == scope["trainer"].state.max_steps
