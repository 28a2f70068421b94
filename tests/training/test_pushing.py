"""Every trainer on the Hub: what is pushed is complete, and a push that fails neither stops training nor loses anything."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import TESTS, build_reward_model, count_good, launch, outputs_of, ranking_settings, settings
from hub_server import READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, connect, environment, run_against
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from trl_ext import (
    PPOConfig,
    PPOTrainer,
    RankingDPOConfig,
    RankingDPOTrainer,
    RankingRewardConfig,
    RankingRewardTrainer,
    SFTTrainer,
    tie_parameters,
)
from trl_ext.algorithms import ALGORITHMS
from trl_ext.hub import uploading
from trl_ext.hub.uploading import PublishError
from trl_ext.training.pushing import HiddenToken
from trl_ext.training.resuming import checkpoint_from_hub


ACTOR_CRITICS = {
    "reinforce": ("reinforce", {}),
    "a2c": ("a2c", {"critic": "separate"}),
    "ppo": ("ppo", {}),
    "ppo-adapter": ("ppo", {"critic": "adapter"}),
    "nlpo": ("nlpo", {"mask_update_steps": 1}),
    "q-actor-critic": ("q_actor_critic", {}),
}
RANKERS = {
    "reward": (RankingRewardTrainer, RankingRewardConfig),
    "reward-adapter": (RankingRewardTrainer, RankingRewardConfig),
    "dpo": (RankingDPOTrainer, RankingDPOConfig),
    "dpo-adapter": (RankingDPOTrainer, RankingDPOConfig),
}
TRAINERS = [*ACTOR_CRITICS, *RANKERS, "sft"]


def lora(name):
    return {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if name.endswith("-adapter") else {}


def make_trainer(name, folder, policy_path, reward_model_path, **overrides):
    """Makes a trainer of a kind on the tiny models, with `overrides` of its arguments."""
    pushes = {
        "push_to_hub": True,
        "hub_model_id": f"user/{name}",
        "save_strategy": "steps",
        "save_steps": 1,
        "hub_strategy": "checkpoint",
        "hub_always_push": True,
    } | overrides
    if name in ACTOR_CRITICS:
        algorithm, own = ACTOR_CRITICS[name]
        config_class, trainer_class = ALGORITHMS[algorithm]
        args = config_class(**settings(folder, **own) | pushes)
        dataset = Dataset.from_dict({"prompt": ["the film was", "a dull plot but", "it", "the actor"] * 2})
        return trainer_class(policy_path, count_good, args, dataset, **lora(name))
    if name == "sft":
        dataset = Dataset.from_dict({"prompt": ["the film was", "it was"], "completion": [" good", " dull and slow"]})
        return SFTTrainer(policy_path, SFTConfig(**ranking_settings(folder) | pushes), train_dataset=dataset)
    trainer_class, config_class = RANKERS[name]
    data = {"prompt": ["it was", "a"], "completions": [[" good", " great", " bad"], [" warm", " dull", " sad"]]}
    dataset = Dataset.from_dict(data | {"ranks": [[1, 1, 2], [1, 2, 2]]})
    base = policy_path if name.startswith("dpo") else reward_model_path
    args = config_class(**ranking_settings(folder) | pushes)
    return trainer_class(base, args=args, train_dataset=dataset, **lora(name))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(uploading, "FIRST_WAIT", 0.01)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture(scope="module")
def pushed(policy_path, tmp_path_factory, tokenizer):
    """The server after every trainer has trained, pushing its checkpoints, and been pushed; and what they compute."""
    folder = tmp_path_factory.mktemp("pushed")
    # A reward model far enough from zero that a lost head would show
    reward_model_path = str(folder / "reward_model")
    build_reward_model(tokenizer).save_pretrained(reward_model_path)
    tokenizer.save_pretrained(reward_model_path)
    outputs = {}
    with pytest.MonkeyPatch.context() as patch, HubServer() as server:
        connect(server, patch, folder / "home")
        for name in TRAINERS:
            trainer = make_trainer(
                name, folder / name, policy_path, reward_model_path, hub_private_repo=True, hub_token=WRITE_TOKEN
            )
            trainer.train()
            trainer.push_to_hub()
            critic = getattr(trainer, "critic", None)
            outputs[name] = {k: v.tolist() for k, v in outputs_of(trainer.model, critic).items()}
        yield server, outputs, folder


LOAD = """
    import json, sys
    sys.path.insert(0, {tests!r})
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from helpers import outputs_of
    from trl_ext import load_critic, tie_parameters

    CLASSES = {{
        (False, False): AutoModelForCausalLM, (False, True): AutoPeftModelForCausalLM,
        (True, False): AutoModelForSequenceClassification, (True, True): AutoPeftModelForSequenceClassification,
    }}
    results = {{}}
    for name in {names!r}:
        repo_id = "user/" + name
        is_reward_model = name.startswith("reward")
        kwargs = {{"num_labels": 1}} if is_reward_model else {{}}
        model = CLASSES[is_reward_model, name.endswith("-adapter")].from_pretrained(repo_id, **kwargs)
        critic = load_critic(model, repo_id) if name in {critics!r} else None
        results[name] = {{k: v.tolist() for k, v in outputs_of(model, critic).items()}}
        results[name]["template"] = AutoTokenizer.from_pretrained(repo_id).chat_template
        if is_reward_model:
            results[name]["ties"] = repr(tie_parameters(repo_id))
    print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def loaded(pushed):
    """Returns what a new process computes with what lies on the Hub."""
    server, _, folder = pushed
    critics = [name for name in ACTOR_CRITICS if name != "reinforce"]
    code = LOAD.format(tests=str(TESTS), names=TRAINERS, critics=critics)
    run = run_against(server, code, folder / "fresh", token=READ_TOKEN)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_loaded_from_the_hub_computes_the_same(pushed, loaded, tokenizer, name):
    _, outputs, folder = pushed
    for what, expected in outputs[name].items():
        assert loaded[name][what] == expected, what
    assert loaded[name]["template"] == tokenizer.chat_template
    if name.startswith("reward"):
        assert loaded[name]["ties"] == repr(tie_parameters(str(folder / name)))


@pytest.mark.parametrize("name", TRAINERS)
def test_the_repository_is_complete_and_private(pushed, name):
    server, _, _ = pushed
    repo = server.repos["model", f"user/{name}"]
    files = set(repo.at("main").files)
    adapter = name.endswith("-adapter")
    weights = {"adapter_model.safetensors", "adapter_config.json"} if adapter else {"model.safetensors", "config.json"}
    generates = not adapter and not name.startswith("reward")
    expected = weights | {"README.md", "tokenizer.json", "chat_template.jinja", "training_args.bin"}
    expected |= {"generation_config.json"} if generates else set()
    expected |= {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"}
    assert expected <= files, expected - files
    assert not any(file.startswith("checkpoint-") for file in files)
    assert {file for file in files if file.endswith(".md")} <= {"README.md", "last-checkpoint/README.md"}
    assert repo.private
    card = ModelCard(repo.at("main").files["README.md"].content.decode())
    assert "trl" in card.data.tags


@pytest.mark.parametrize("name", ["a2c", "ppo-adapter", "reward-adapter", "dpo"])
def test_what_is_pushed_in_training_lacks_nothing_that_is_pushed_at_the_end(
    server, policy_path, reward_model_path, tmp_path, name
):
    trainer = make_trainer(name, tmp_path / "out", policy_path, reward_model_path, hub_strategy="every_save")
    trainer.train()
    files = set(server.repos["model", f"user/{name}"].at("main").files)
    trainer.push_to_hub()
    assert files == set(server.repos["model", f"user/{name}"].at("main").files)


def test_no_token_reaches_the_hub(pushed):
    server, _, _ = pushed
    for (_, repo_id), repo in server.repos.items():
        for name, file in repo.at("main").files.items():
            assert WRITE_TOKEN.encode() not in file.content, (repo_id, name)


def test_strangers_cannot_read_a_private_model(pushed):
    server, _, folder = pushed
    code = "from transformers import AutoConfig; AutoConfig.from_pretrained('user/ppo')"
    run = run_against(server, code, folder / "stranger", token=None)
    assert run.returncode != 0 and "user/ppo" in run.stderr


# --- Resuming from the Hub ---


@pytest.mark.parametrize("name", ["ppo", "nlpo", "q-actor-critic", "reward-adapter"])
def test_training_goes_on_from_the_hub_as_if_it_had_not_stopped(
    server, policy_path, reward_model_path, tmp_path, name
):
    def run(folder, resume=None, **overrides):
        trainer = make_trainer(name, tmp_path / folder, policy_path, reward_model_path, **overrides)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", max_steps=4, push_to_hub=False, save_strategy="no")
    run("begun", max_steps=2)
    resumed = run("resumed", resume=f"user/{name}", max_steps=4, push_to_hub=False, save_strategy="no")
    assert resumed.state.global_step == 4
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for expected, actual in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_the_newest_of_all_checkpoints_is_taken(server, policy_path, tmp_path):
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, hub_strategy="all_checkpoints", max_steps=3)
    trainer.train()
    repo = server.repos["model", "user/ppo"]
    assert {"checkpoint-1/optimizer.pt", "checkpoint-3/optimizer.pt"} <= set(repo.at("main").files)
    downloaded = Path(checkpoint_from_hub("user/ppo"))
    assert json.loads((downloaded / "trainer_state.json").read_text())["global_step"] == 3
    local = Path(get_last_checkpoint(str(tmp_path / "out")))
    assert {p.name for p in downloaded.iterdir()} == {p.name for p in local.iterdir()}


def test_checkpoints_are_looked_for_on_the_branch_that_they_are_pushed_to(server, policy_path, tmp_path):
    HfApi().create_repo("user/ppo")
    HfApi().create_branch("user/ppo", branch="trial")
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, hub_revision="trial", max_steps=1)
    trainer.train()
    again = make_trainer("ppo", tmp_path / "again", policy_path, None, hub_revision="trial", max_steps=2)
    again.train(resume_from_checkpoint="user/ppo")
    assert again.state.global_step == 2
    with pytest.raises(ValueError, match="without checkpoints"):
        checkpoint_from_hub("user/ppo")


def test_a_folder_that_is_not_there_is_said_to_be_so(server, policy_path, tmp_path):
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, push_to_hub=False)
    with pytest.raises(ValueError, match="`resume_from_checkpoint='out/checkpoint-10'` is no folder here"):
        trainer.train(resume_from_checkpoint="out/checkpoint-10")


def test_a_repository_without_checkpoints_says_how_they_get_there(server, policy_path, tmp_path):
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, hub_strategy="end", max_steps=1)
    trainer.train()
    trainer.push_to_hub()
    with pytest.raises(ValueError, match="`resume_from_checkpoint='user/ppo'`.*hub_strategy='checkpoint'"):
        trainer.train(resume_from_checkpoint="user/ppo")


# --- Faults ---


def test_training_outlives_a_hub_that_fails(server, policy_path, tmp_path, caplog):
    """Nothing that is pushed arrives; the command of the warning brings it there afterwards."""
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, hub_private_repo=True)
    server.fail("POST", "/commit/", 500, times=float("inf"))
    trainer.train()
    assert trainer.state.global_step == 2
    warnings = [r.getMessage() for r in caplog.records if "Training goes on" in r.getMessage()]
    assert len(warnings) == 4  # of two steps the model and the checkpoint
    assert set(server.repos["model", "user/ppo"].at("main").files) <= {".gitattributes"}
    with HubServer() as other:
        commands = {message.split("Finish with: ")[1] for message in warnings}
        for command in commands:
            code = f"import subprocess, sys; sys.exit(subprocess.run({shlex.split(command)!r}).returncode)"
            run = run_against(other, code, tmp_path / "home2")
            assert run.returncode == 0, run.stderr[-2000:]
        repo = other.repos["model", "user/ppo"]
        files = set(repo.at("main").files)
        assert repo.private
    assert {"model.safetensors", "value_head.safetensors", "last-checkpoint/optimizer.pt"} <= files
    assert not any(file.startswith("checkpoint-") for file in files)


@pytest.mark.parametrize(
    "method, path, status", [("POST", "/commit/", 500), ("POST", "/commit/", 429), ("POST", "/preupload/", 503)]
)
def test_a_push_that_fails_for_a_while_arrives(server, policy_path, tmp_path, caplog, method, path, status):
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, save_strategy="no", max_steps=1)
    trainer.train()
    server.fail(method, path, status, times=2)
    pushed = trainer.push_to_hub(commit_message="At last")
    assert pushed.commit_url.startswith(f"{server.endpoint}/user/ppo/commit/")
    assert pushed.commit_message == "At last"
    files = server.repos["model", "user/ppo"].at("main").files
    assert files["model.safetensors"].content == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert WRITE_TOKEN not in caplog.text


def test_an_upload_cut_in_the_middle_arrives(server, policy_path, tmp_path):
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, save_strategy="no", max_steps=1)
    trainer.train()
    server.cut("PUT", ".*", times=1)
    trainer.push_to_hub()
    sent = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert server.repos["model", "user/ppo"].at("main").files["model.safetensors"].content == sent


def test_a_push_at_the_end_that_fails_raises_when_all_is_on_disk(server, policy_path, tmp_path):
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, save_strategy="no", max_steps=1)
    trainer.train()
    server.fail("POST", "/commit/", 403, times=float("inf"))
    with pytest.raises(PublishError, match="may not write to user/ppo.*Finish with: hf upload user/ppo"):
        trainer.push_to_hub()
    server.faults.clear()
    server.fail("POST", "/commit/", 403, times=float("inf"), words="Private repository storage limit reached")
    with pytest.raises(PublishError, match="answered 403: Private repository storage limit reached. What was to be"):
        trainer.push_to_hub()
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "value_head.safetensors", "tokenizer.json", "README.md"} <= saved
    later = trainer.push_to_hub(blocking=False)
    assert isinstance(later.exception(timeout=60), PublishError)


def test_a_push_that_the_hub_finds_malformed_says_how_to_finish_it(server, policy_path, tmp_path):
    """The client's error of this status is a `ValueError`, too."""
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, save_strategy="no", max_steps=1)
    trainer.train()
    server.fail("POST", "/commit/", 400, times=float("inf"))
    with pytest.raises(PublishError, match="answered 400: fault on demand. The same .*Finish with"):
        trainer.push_to_hub()


def test_a_licence_that_the_hub_does_not_know_is_refused_when_all_is_on_disk(server, policy_path, tmp_path):
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, save_strategy="no", max_steps=1)
    for given, message in (
        ({"license": "Apache 2.0"}, "`license` takes .* Write 'apache-2.0' if you mean that one"),
        ({"license": "other"}, "license='other' says nothing without `license_name`"),
        ({"license": ["mit", "Apache 2.0"]}, "'Apache 2.0' is none"),
        ({"language": ["de", "en-US"]}, "`language` takes .* Write 'en' for English"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.push_to_hub(**given)
    assert (tmp_path / "out" / "model.safetensors").is_file() and not server.called("POST", "preupload")
    trainer.push_to_hub(license="other", license_name="films-1.0", license_link="LICENSE", language=["en", "code"])
    data = ModelCard(server.repos["model", "user/ppo"].at().files["README.md"].content.decode()).data
    assert (data.license, data.license_name, data.license_link) == ("other", "films-1.0", "LICENSE")


# --- Private ---


def test_a_public_repository_is_refused_before_training_where_it_should_be_private(server, policy_path, tmp_path):
    HfApi().create_repo("user/ppo")
    message = f"user/ppo is there already and public.*{server.endpoint}/user/ppo/settings.*push_to_hub=False"
    with pytest.raises(PublishError, match=message):
        make_trainer("ppo", tmp_path / "out", policy_path, None, hub_private_repo=True)
    server.repos["model", "user/ppo"].private = True
    make_trainer("ppo", tmp_path / "out", policy_path, None, hub_private_repo=True)


@pytest.mark.parametrize("name", ["ppo", "sft"])
def test_a_private_push_to_a_public_repository_is_refused_when_all_is_on_disk(server, policy_path, tmp_path, name):
    out = tmp_path / "out"
    trainer = make_trainer(name, out, policy_path, None, push_to_hub=False, save_strategy="no", max_steps=1)
    HfApi().create_repo(f"user/{name}")
    repo = server.repos["model", f"user/{name}"]
    with pytest.raises(PublishError, match="is there already and public.*Finish with: hf upload .*--private"):
        trainer.push_to_hub(private=True)
    assert (out / "model.safetensors").is_file() and (out / "README.md").is_file()
    assert len(repo.commits) == 1 and not server.called("POST", "preupload")
    HfApi().delete_repo(f"user/{name}")
    trainer = make_trainer(name, out, policy_path, None, push_to_hub=False, save_strategy="no", max_steps=1)
    trainer.push_to_hub(private=True)
    repo = server.repos["model", f"user/{name}"]
    assert repo.private and "model.safetensors" in repo.at().files


def test_secrets_and_judgements_in_the_folder_are_not_pushed(server, policy_path, tmp_path, caplog):
    out = tmp_path / "out"
    trainer = make_trainer("ppo", out, policy_path, None, hub_strategy="every_save", max_steps=1)
    (out / "more").mkdir(parents=True)
    (out / ".env").write_text("HF_TOKEN=hf_secret")
    (out / "more" / "judgements.jsonl").write_text("{}")
    trainer.train()
    assert re.search(
        "Training goes on, but step 1 was not pushed.*/.env, .*/more/judgements.jsonl with it", caplog.text
    )
    with pytest.raises(PublishError, match="/.env, .*/more/judgements.jsonl with it: move.*Finish with: ") as raised:
        trainer.push_to_hub()
    assert not server.called("POST", "preupload") and (out / "model.safetensors").is_file()
    with pytest.raises(PublishError, match="/.env, .*push_to_hub=False"):
        make_trainer("ppo", out, policy_path, None)
    command = shlex.split(str(raised.value).split("Finish with: ")[1])
    code = f"import subprocess, sys; sys.exit(subprocess.run({command!r}).returncode)"
    assert run_against(server, code, tmp_path / "home2").returncode == 0
    files = set(server.repos["model", "user/ppo"].at().files)
    assert {"model.safetensors", "README.md"} <= files and not any("env" in f or "judgements" in f for f in files)


def test_checkpoints_wait_until_the_repository_is_seen_to_be_private(server, policy_path, tmp_path, caplog):
    HfApi().create_repo("user/ppo")
    server.fail("POST", "/api/repos/create", 503, times=1)
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, hub_private_repo=True, max_steps=1)
    trainer.train()
    assert "Training goes on, but step 1 was not pushed. user/ppo is there already and public" in caplog.text
    assert not server.called("POST", "preupload")


@pytest.mark.parametrize("token, message", [(UNKNOWN_TOKEN, "does not know the token"), (READ_TOKEN, "may not write")])
def test_a_wrong_token_is_told_before_training_begins(server, policy_path, tmp_path, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=message) as raised:
        make_trainer("ppo", tmp_path / "out", policy_path, None)
    assert token not in str(raised.value) and "push_to_hub=False" in str(raised.value)


def test_a_token_that_is_wrong_afterwards_loses_nothing(server, policy_path, tmp_path, monkeypatch):
    """`push_to_hub()` of a trainer that was told of no Hub saves the model before it fails."""
    trainer = make_trainer("ppo", tmp_path / "out", policy_path, None, push_to_hub=False, save_strategy="no")
    trainer.train()
    monkeypatch.setenv("HF_TOKEN", UNKNOWN_TOKEN)
    with pytest.raises(PublishError, match="does not know the token"):
        trainer.push_to_hub()
    assert (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    trainer.push_to_hub()
    assert "model.safetensors" in server.repos["model", "user/ppo"].at("main").files


def test_a_hub_that_is_down_when_training_begins_is_used_when_it_is_back(server, policy_path, tmp_path, caplog):
    server.fail("POST", "/api/repos/create", 503, times=1)
    args = {"hub_model_id": None, "hub_private_repo": True, "max_steps": 1}  # named after the folder
    trainer = make_trainer("ppo", tmp_path / "a-model", policy_path, None, **args)
    assert "a-model will be created" in caplog.text
    trainer.train()
    trainer.push_to_hub()
    repo = server.repos["model", "user/a-model"]
    assert "model.safetensors" in repo.at("main").files and repo.private
    assert (
        'model = AutoModelForCausalLM.from_pretrained("user/a-model")' in repo.at().files["README.md"].content.decode()
    )


def test_two_processes_push_once(server, policy_path, tmp_path):
    client = environment(server, tmp_path / "home2")
    names = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_TOKEN", "NO_PROXY")
    launch(2, "pushing.py", policy_path, tmp_path / "out", **{name: client[name] for name in names})
    files = server.repos["model", "user/two"].at("main").files
    assert {"model.safetensors", "last-checkpoint/rollout_0.pt", "last-checkpoint/rollout_1.pt"} <= set(files)


# --- Tokens ---


def test_a_hidden_token_is_used_but_neither_shown_nor_saved(tmp_path, policy_path):
    args = PPOConfig(**settings(tmp_path, max_steps=1, hub_token="hf_secret"))
    args.model_init_kwargs = {"token": "hf_secret"}
    dataset = Dataset.from_dict({"prompt": ["the film was", "it", "a", "but"]})
    trainer = PPOTrainer(policy_path, count_good, args, dataset)
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret" and f"Bearer {trainer.args.hub_token}" == "Bearer hf_secret"
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.learning_rate == args.learning_rate
    assert "secret" not in repr(HiddenToken("hf_secret"))
