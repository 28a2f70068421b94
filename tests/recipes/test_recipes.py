"""The recipes as their user runs them: started as programs, in a folder of their own, on tiny models and local data."""

import copy
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import FAST, PROMPTS, RECIPES, TESTS, run_program, write_rows
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from trl_ext import RankingRewardConfig, load_critic, load_rollouts, tie_parameters, token_values


ACCELERATE_CONFIGS = RECIPES / "accelerate_configs"
REWARDS = "def count_letters(completions, **columns):\n    return [float(len(text)) for text in completions]\n"


def fill(folder):
    """Makes of `folder` the working directory of a user: prompts, demonstrations and a python reward."""
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    write_rows(folder / "questions.jsonl", [{"question": prompt} for prompt in PROMPTS])
    write_rows(folder / "texts.jsonl", [{"prompt": prompt, "completion": " good and warm"} for prompt in PROMPTS])
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path)


def changed(model, start):
    """True if any weight of `model` is other than in `start`."""
    return any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


# --- Help ---


@pytest.mark.parametrize(
    "script, args, options",
    [
        ("sft.py", [], ["--config", "--dataset_name", "--packing", "--use_peft", "--load_in_4bit", "--push_to_hub"]),
        (
            "actor_critic.py",
            ["--algorithm", "reinforce"],
            [
                "--config",
                "--algorithm",
                "--reward_model",
                "--reward_funcs",
                "--prompt_column",
                "--baseline",
                "--use_peft",
            ],
        ),
        ("ranking_reward.py", [], ["--config", "--ranking_model", "--max_tie_order", "--overlong", "--held_out"]),
        ("best_of_n.py", [], ["--config", "--num_rounds", "--threshold", "--reward_model", "--load_in_4bit"]),
        ("ranking_dpo.py", [], ["--config", "--ranking_model", "--beta", "--shared_prefix", "--use_peft"]),
    ],
)
def test_help_explains(run_recipe, capsys, tmp_path, script, args, options):
    with pytest.raises(SystemExit) as ended:
        run_recipe(script, *args, "--help", cwd=tmp_path)
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and "accelerate launch" in printed
    assert [option for option in options if option not in printed] == []


# --- Training ---


def test_reinforce_with_a_python_reward(folder, policy_path, run_recipe):
    run_program(
        *(RECIPES / "actor_critic.py", "--algorithm", "reinforce", *FAST),
        *("--model_name_or_path", policy_path, "--dataset_name", "prompts.jsonl", "--output_dir", "out"),
        *("--reward_funcs", "my_rewards.count_letters", "--max_completion_length", 4, "--save_rollouts"),
        *("--num_generations", 1),
        cwd=folder,
    )
    assert changed(
        AutoModelForCausalLM.from_pretrained(folder / "out"), AutoModelForCausalLM.from_pretrained(policy_path)
    )
    rollouts = load_rollouts(folder / "out")["train"]
    assert rollouts["step"] == [0] * 4 + [1] * 4 and sorted(rollouts["prompt"]) == sorted(PROMPTS)
    assert rollouts["reward/count_letters"] == [len(text) for text in rollouts["completion"]]
    card = (folder / "out" / "README.md").read_text()
    assert "| lam |" in card and "save_rollouts" not in card  # which is no setting of the training
    assert not (folder / "out" / "value_head.safetensors").exists()  # a mean return is the baseline
    run_recipe(
        *("actor_critic.py", "--algorithm", "ppo", *FAST, "--max_steps", 1, "--save_strategy", "steps"),
        *("--model_name_or_path", policy_path, "--dataset_name", "prompts.jsonl", "--output_dir", "out-ppo"),
        *("--reward_funcs", "my_rewards.count_letters", "--max_completion_length", 4, "--save_steps", 1),
        *("--pretrain_critic", "out"),
        cwd=folder,
    )
    state = json.loads((folder / "out-ppo" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["log_history"][0]["pretraining/rollouts"] == 8


def test_a2c_of_an_adapter_with_a_reward_model(folder, policy_path, reward_model_path, run_recipe):
    run_recipe(
        *("actor_critic.py", "--algorithm", "a2c", *FAST),
        *("--model_name_or_path", policy_path, "--dataset_name", "questions.jsonl", "--prompt_column", "question"),
        *("--reward_model", reward_model_path, "--max_completion_length", 4, "--output_dir", "out"),
        *("--use_peft", "--lora_r", 2, "--lora_target_modules", "q_proj", "v_proj"),
        cwd=folder,
    )
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy_path), folder / "out")
    trained = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]  # these start at 0
    assert trained and all(weight.any() for weight in trained)
    assert (folder / "out" / "value_head.safetensors").is_file()


def test_ppo_from_a_file(folder, policy_path, reward_model_path, run_recipe):
    config = {
        "algorithm": "ppo",
        "model_name_or_path": policy_path,
        "dataset_name": "prompts.jsonl",
        "reward_model": reward_model_path,
        "reward_funcs": ["my_rewards.count_letters"],
        "reward_weights": [0.5, 1.0],
        "critic": "separate",
        "num_iterations": 2,
        "max_completion_length": 4,
        "max_steps": 50,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    command_line = [*FAST, "--output_dir", "out", "--save_strategy", "steps", "--save_steps", 1]
    run_recipe("actor_critic.py", "--config", "run.yaml", *command_line, cwd=folder)
    assert changed(
        AutoModelForCausalLM.from_pretrained(folder / "out"), AutoModelForCausalLM.from_pretrained(policy_path)
    )
    critic = folder / "out" / "critic"
    assert (critic / "value_head.safetensors").is_file() and (critic / "model.safetensors").is_file()
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2  # the command line wins
    assert "rewards/count_letters/mean" in state["log_history"][0]


FLAGS = {"ppo": [], "nlpo": ["--use_peft", "--mask_update_steps", 1], "q_actor_critic": ["--q_rank", 4]}


@pytest.fixture(scope="module")
def two_processes(policy_path, tmp_path_factory):
    """The folder in which two processes have run actor_critic.py for several algorithms."""
    folder = fill(tmp_path_factory.mktemp("two_processes"))
    common = [
        *FAST,
        "--save_strategy",
        "steps",
        "--save_steps",
        2,
        "--num_iterations",
        2,
        "--max_completion_length",
        4,
    ]
    common += ["--model_name_or_path", policy_path, "--dataset_name", "prompts.jsonl"]
    common += ["--reward_funcs", "my_rewards.count_letters"]
    runs = [[*common, "--algorithm", name, "--output_dir", name, *flags] for name, flags in FLAGS.items()]
    (folder / "runs.json").write_text(json.dumps([[*map(str, run)] for run in runs]))
    # With `--cpu` accelerate would start one process; so it is told of GPUs, and the script to do without
    run_program(
        *("-m", "accelerate.commands.launch", "--config_file", ACCELERATE_CONFIGS / "multi_gpu.yaml"),
        *("--num_processes", 2, "--main_process_port", 0, "--mixed_precision", "no"),
        *(TESTS / "processes" / "repeating.py", RECIPES / "actor_critic.py", "runs.json"),
        cwd=folder,
    )
    return folder


@pytest.mark.parametrize("algorithm", FLAGS)
def test_two_processes(two_processes, policy_path, algorithm):
    output = two_processes / algorithm
    (checkpoint,) = output.glob("checkpoint-*")
    # One model and critic between them; a random state and a rollout of each
    assert len([*checkpoint.glob("*.safetensors")]) == 2
    assert sorted(path.name for path in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert sorted(path.name for path in checkpoint.glob("rollout*")) == ["rollout_0.pt", "rollout_1.pt"]
    start = AutoModelForCausalLM.from_pretrained(policy_path)
    if algorithm == "nlpo":
        assert (checkpoint / "masking_policy.pt").is_file()
        trained = PeftModel.from_pretrained(copy.deepcopy(start), checkpoint).merge_and_unload()
    else:
        trained = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert changed(trained, start)
    assert (output / "value_head.safetensors").is_file()


def test_sft(folder, policy_path, run_recipe):
    run_recipe(
        *("sft.py", *FAST, "--model_name_or_path", policy_path),
        *("--dataset_name", "texts.jsonl", "--output_dir", "out"),
        cwd=folder,
    )
    assert changed(
        AutoModelForCausalLM.from_pretrained(folder / "out"), AutoModelForCausalLM.from_pretrained(policy_path)
    )


RANKING = {"completions": [" good", " bad", " sad", " warm and bright"], "ranking": "D > A > B = C"}


def test_reward_model_from_rankings(folder, policy_path, run_recipe):
    write_rows(folder / "rankings.jsonl", [{"prompt": prompt, **RANKING} for prompt in PROMPTS])
    run_recipe(
        *("ranking_reward.py", *FAST, "--model_name_or_path", policy_path, "--learning_rate", 0.01),
        *("--dataset_name", "rankings.jsonl", "--held_out", 0.25, "--max_steps", 20, "--output_dir", "out"),
        cwd=folder,
    )
    evaluation = json.loads((folder / "out" / "eval_results.json").read_text())
    assert evaluation["eval_accuracy"] == 1  # the same completions after other prompts
    card = (folder / "out" / "README.md").read_text()
    assert "on 6 rankings" in card and re.search(r"\| accuracy \| [\d.]+ \| 1 \|", card) and "tie/delta_2" in card
    model = AutoModelForSequenceClassification.from_pretrained(folder / "out")
    assert tie_parameters(str(folder / "out"))[0] == model.config.ranking_model == "davidson_luce"


def test_adapter_of_a_reward_model_keeps_its_head(folder, policy_path, run_recipe):
    write_rows(folder / "rankings.jsonl", [{"prompt": prompt, **RANKING} for prompt in PROMPTS])
    run_recipe(
        *("ranking_reward.py", *FAST, "--model_name_or_path", policy_path, "--held_out", 0),
        *("--dataset_name", "rankings.jsonl", "--output_dir", "out", "--ranking_model", "davidson"),
        *("--use_peft", "--lora_r", 2, "--lora_target_modules", "q_proj", "v_proj"),
        cwd=folder,
    )
    assert any("score" in name for name in load_file(folder / "out" / "adapter_model.safetensors"))
    assert json.loads((folder / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert tie_parameters(str(folder / "out"))[0] == "davidson"
    assert not (folder / "out" / "eval_results.json").exists()


def test_everything_on_one_4bit_base(folder, policy_path, run_recipe):
    """From rankings to a merged policy with its critic, by `--use_peft --load_in_4bit` alone."""
    write_rows(folder / "rankings.jsonl", [{"prompt": prompt, **RANKING} for prompt in PROMPTS])
    quantized = ["--model_name_or_path", policy_path, "--use_peft", "--load_in_4bit", *FAST]
    run_recipe(
        *("ranking_reward.py", *quantized, "--dataset_name", "rankings.jsonl", "--output_dir", "reward"),
        cwd=folder,
    )
    run_recipe(
        *("actor_critic.py", *quantized, "--algorithm", "ppo", "--dataset_name", "prompts.jsonl"),
        *("--critic", "adapter", "--critic_learning_rate", 0.1, "--reward_model", "reward", "--kl_in_reward", 0.05),
        *("--max_completion_length", 4, "--output_dir", "policy", "--max_steps", 4),
        cwd=folder,
    )
    config = json.loads((folder / "policy" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 14  # all linear layers of the two
    printed = run_recipe("merge.py", "--adapter", "policy", "--output_dir", "merged", cwd=folder)
    assert re.search(r"precision_loss: \d+\.\d\d% of what the adapter changes", printed)
    assert "critic_precision_loss" in printed
    model = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 7, 8]])
    values = token_values(model, load_critic(model, str(folder / "merged")), ids, torch.ones_like(ids))
    assert values.abs().min() > 0


def test_the_card_of_an_adapter_says_how_to_use_it(folder, policy_path, run_recipe):
    """Its first snippet is run as it stands, in the folder where it was trained."""
    write_rows(folder / "rankings.jsonl", [{"prompt": prompt, **RANKING} for prompt in PROMPTS])
    run_recipe(
        *("ranking_reward.py", *FAST, "--model_name_or_path", policy_path, "--use_peft", "--held_out", 0),
        *("--dataset_name", "rankings.jsonl", "--output_dir", "out"),
        cwd=folder,
    )
    snippet = re.search(r"```python\n(.*?)```", (folder / "out" / "README.md").read_text(), re.DOTALL)[1]
    (folder / "use.py").write_text(snippet)
    printed = run_recipe(folder / "use.py", cwd=folder)
    trained = AutoPeftModelForSequenceClassification.from_pretrained(str(folder / "out"), num_labels=1).eval()
    ids = AutoTokenizer.from_pretrained(folder / "out")("A prompt and one answer<eos>", return_tensors="pt")
    with torch.no_grad():
        expected = trained(**ids).logits.item()
    assert float(re.search(r"'score': (-?[\d.e-]+)", printed)[1]) == pytest.approx(expected, rel=1e-4)


def test_dpo_from_pairs_with_ties(folder, policy_path, run_recipe):
    rows = [{"prompt": p, "chosen": " good", "rejected": " bad", "tie": i % 2 == 0} for i, p in enumerate(PROMPTS)]
    write_rows(folder / "pairs.jsonl", rows)
    run_recipe(
        *("ranking_dpo.py", *FAST, "--model_name_or_path", policy_path, "--ranking_model", "rao_kupper"),
        *("--dataset_name", "pairs.jsonl", "--held_out", 0.25, "--output_dir", "out"),
        cwd=folder,
    )
    assert changed(
        AutoModelForCausalLM.from_pretrained(folder / "out"), AutoModelForCausalLM.from_pretrained(policy_path)
    )
    assert json.loads((folder / "out" / "eval_results.json").read_text())["eval_tie_rate"] in (0, 0.5, 1)
    assert "tie/theta" in (folder / "out" / "README.md").read_text()


def test_a_prompt_is_held_out_with_all_its_rankings(tmp_path, recipe):
    write_rows(tmp_path / "rankings.jsonl", [{"prompt": prompt, **RANKING} for prompt in PROMPTS * 3])
    args = recipe("shared.rankings").RankingRecipeArguments(
        dataset_name=str(tmp_path / "rankings.jsonl"), held_out=0.25
    )
    settings = RankingRewardConfig(str(tmp_path), use_cpu=True, bf16=False)
    train, test = recipe("shared.rankings").load_rankings(args, settings)
    assert len(train) == 18 and len(test) == 6 and not set(train["prompt"]) & set(test["prompt"])
    with pytest.raises(ValueError, match="--held_out"):
        recipe("shared.rankings").RankingRecipeArguments(held_out=1.0)


# --- Files ---


@pytest.mark.parametrize("path", sorted(ACCELERATE_CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config(path):
    config = load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    nested = {**(config.deepspeed_config or {}), **(config.fsdp_config or {})}
    assert [name for name in nested if name not in known] == []  # accelerate passes over what it does not know
    assert config.mixed_precision == "bf16"
    assert config.num_processes == (1 if path.stem == "single_gpu" else 8)


@pytest.mark.parametrize("script, example", [("sft", "sft.yaml"), ("actor_critic", "ppo.yaml")])
def test_example_file_is_understood(tmp_path, recipe, script, example):
    text = (RECIPES / example).read_text()
    comment = text[: text.index("\n\n")]
    assert "Hardware:" in comment and "accelerate launch" in comment
    parsed = recipe(script).parse(
        ["--config", str(RECIPES / example), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    )
    values = {
        name: value
        for arguments in parsed
        if not isinstance(arguments, type)
        for name, value in vars(arguments).items()
    }
    given = yaml.safe_load(text)
    del given["output_dir"]
    assert {name: values[name] for name in given} == given


@pytest.mark.parametrize(
    ("script", "count"), [("sft", 3), ("actor_critic", 4), ("best_of_n", 2), ("ranking_reward", 2), ("ranking_dpo", 3)]
)
def test_documented_commands_are_understood(tmp_path, recipe, monkeypatch, script, count):
    monkeypatch.chdir(RECIPES.parent)
    documented = recipe(script).__doc__.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in documented if line.startswith("    accelerate launch")]
    assert len(commands) == count
    for command in commands:
        assert Path(command[command.index("--config_file") + 1]).is_file()
        args = command[command.index(f"recipes/{script}.py") + 1 :]
        recipe(script).parse([*args, "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"])


def test_data_saved_to_disk(tmp_path, recipe, prompts):
    prompts.save_to_disk(tmp_path / "saved")
    args = recipe("actor_critic").ActorCriticArguments(dataset_name=str(tmp_path / "saved"))
    assert recipe("shared.rewards").load_prompts(args, "train")["prompt"] == PROMPTS
    with pytest.raises(ValueError, match="no split 'test', only train"):
        recipe("shared.rewards").load_prompts(args, "test")


# --- Errors, all of them before a model is loaded ---


def run_main(recipe, monkeypatch, *args):
    """`main` of actor_critic.py with a model that does not exist."""
    module = recipe("actor_critic")
    argv = ["actor_critic.py", "--use_cpu", "--bf16", "false", "--model_name_or_path", "no/model", *map(str, args)]
    monkeypatch.setattr(sys, "argv", argv)
    module.main()


def test_no_reward(tmp_path, recipe, monkeypatch):
    with pytest.raises(ValueError, match="No reward: pass --reward_model .* --reward_funcs"):
        run_main(recipe, monkeypatch, "--output_dir", tmp_path)


def test_unknown_algorithm(tmp_path, recipe, monkeypatch):
    with pytest.raises(
        ValueError, match="--algorithm dqn is unknown. Choose one of reinforce, q_actor_critic, a2c, ppo, nlpo."
    ):
        run_main(recipe, monkeypatch, "--output_dir", tmp_path, "--algorithm", "dqn")
    (tmp_path / "run.yaml").write_text("algorithm: sac")
    with pytest.raises(ValueError, match="--algorithm sac is unknown"):
        run_main(recipe, monkeypatch, "--output_dir", tmp_path, "--config", tmp_path / "run.yaml")


def test_no_prompts(folder, recipe, monkeypatch, prompts):
    prompts.rename_column("prompt", "question").save_to_disk(folder / "saved")
    monkeypatch.chdir(folder)
    args = ["--output_dir", "out", "--reward_funcs", "my_rewards.count_letters"]
    with pytest.raises(ValueError, match=r"no column 'prompt', only \['question'\].*--prompt_column"):
        run_main(recipe, monkeypatch, *args, "--dataset_name", "saved")
    with pytest.raises(ValueError, match="pass --dataset_name"):
        run_main(recipe, monkeypatch, *args)


def test_quantization_without_an_adapter(tmp_path, recipe, monkeypatch):
    with pytest.raises(ValueError, match="nothing to train. Add --use_peft"):
        run_main(recipe, monkeypatch, "--output_dir", tmp_path, "--load_in_4bit")
    with pytest.raises(ValueError, match="pass --model_name_or_path"):
        recipe("shared.arguments").prepare_model_args(ModelConfig(), SFTConfig(output_dir=str(tmp_path), bf16=False))


@pytest.mark.parametrize("precision, dtype", [("bf16", "bfloat16"), ("fp16", "float16"), (None, "float32")])
def test_a_4bit_base_computes_in_what_training_computes_in(recipe, precision, dtype):
    """Though TRL's flag for the dtype, which says both, is float32 by default."""
    training_args = SimpleNamespace(model_init_kwargs=None, bf16=precision == "bf16", fp16=precision == "fp16")
    model_args = ModelConfig(model_name_or_path="model", use_peft=True, load_in_4bit=True)
    assert get_quantization_config(model_args).bnb_4bit_compute_dtype == torch.float32
    recipe("shared.arguments").prepare_model_args(model_args, training_args)
    quantization_config = get_quantization_config(model_args)
    assert quantization_config.bnb_4bit_compute_dtype == getattr(torch, dtype)
    assert quantization_config.bnb_4bit_quant_type == "nf4"
    assert training_args.model_init_kwargs["dtype"] == dtype
    assert get_peft_config(model_args).target_modules == "all-linear"


def test_what_is_said_of_a_base_goes_first(recipe):
    training_args = SimpleNamespace(model_init_kwargs={"dtype": "float16"}, bf16=True, fp16=False)
    model_args = ModelConfig(
        "model", use_peft=True, load_in_4bit=True, dtype="float16", lora_target_modules=["q_proj"]
    )
    recipe("shared.arguments").prepare_model_args(model_args, training_args)
    assert training_args.model_init_kwargs["dtype"] == model_args.dtype == "float16"
    assert get_peft_config(model_args).target_modules == "q_proj"  # which TRL makes of a list of one


@pytest.mark.parametrize("path", ["no_such_module.reward", "json.no_such_function", "reward"])
def test_reward_that_cannot_be_imported(recipe, path):
    with pytest.raises(ValueError, match=f"--reward_funcs {path}"):
        recipe("shared.rewards").import_reward(path)
