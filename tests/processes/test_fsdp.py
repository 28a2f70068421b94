"""FSDP2 on two CPU processes: real generation, reward models, evaluation, saving and resuming are those of one process."""

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import FSDP2, count_good, launch, outputs_of, settings
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from processes.saving import CASES, RESUMED_FROM, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_ext import PPOConfig, PPOTrainer, load_critic, tie_parameters
from trl_ext.adapters import reward_adapters
from trl_ext.critic import start as critic_start


pytestmark = pytest.mark.slow

EXACT = {"loss", "reward", "eval_reward", "kl/k1", "values/mean", "returns/mean", "eval_loss", "eval_log_likelihood"}
EXACT |= {"rewards/count_good/mean", "log_likelihood", "kendall_tau_b", "tie/nu", "tie/theta", "tie/delta_2"}


@pytest.fixture(scope="module")
def reward_adapter_path(policy_path, tmp_path_factory):
    """A reward adapter on the policy's own base."""
    path = str(tmp_path_factory.mktemp("reward_adapter"))
    model = AutoModelForSequenceClassification.from_pretrained(policy_path, num_labels=1)
    torch.manual_seed(2)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(path)
    AutoTokenizer.from_pretrained(policy_path).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(policy_path, reward_model_path, reward_adapter_path, tmp_path_factory):
    """Outputs of one process with batch 4, and of two with batch 2, between which FSDP2 shards."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "sharded")]
    models = policy_path, reward_model_path, reward_adapter_path
    train(*models, folders[0], 4)
    launch(2, "saving.py", *models, folders[1], 2, config_file=FSDP2)
    return folders


@pytest.mark.parametrize("case", CASES)
def test_trains_and_evaluates_like_one_process(folders, case):
    one, two = (torch.load(folder / f"{case}.pt", weights_only=False) for folder in folders)
    assert (one["distributed_type"], two["distributed_type"]) == (DistributedType.NO, DistributedType.FSDP)
    assert one["num_sharded"] == 0 and two["num_sharded"] == len(two["weights"])
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            weight, two["weights"][name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for ours, theirs in zip(one["log_history"][:-1], two["log_history"][:-1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in EXACT & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_resumes_where_it_was(folders, case):
    """From weights of 0: with the checkpoint's, its optimizer and, of PPO, the rollout that it interrupted."""
    result = torch.load(folders[1] / f"{case}.pt", weights_only=False)
    for name, weight in result["weights"].items():
        assert torch.equal(weight, result["resumed"][name]), name


def load(case, folder):
    is_reward_model = "reward" in case
    if "lora" in case:
        auto_class = AutoPeftModelForSequenceClassification if is_reward_model else AutoPeftModelForCausalLM
    else:
        auto_class = AutoModelForSequenceClassification if is_reward_model else AutoModelForCausalLM
    return auto_class.from_pretrained(folder, **({"num_labels": 1} if is_reward_model else {}))


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_the_plain_model_that_was_trained(folders, case):
    outputs = []
    for folder in folders:
        model = load(case, folder / case)
        outputs.append(outputs_of(model, load_critic(model, str(folder / case)) if "ppo" in case else None))
    for name, expected in outputs[0].items():
        torch.testing.assert_close(outputs[1][name], expected, atol=1e-4, rtol=1e-4)
    # Some steps before, the checkpoint is a plain model, too
    checkpoint = outputs_of(load(case, folders[1] / case / f"checkpoint-{RESUMED_FROM}"))
    assert (checkpoint["logits"] - outputs[1]["logits"]).abs().max() > 1e-3
    if "ppo" not in case:
        assert tie_parameters(str(folders[0] / case))[1].tolist() == pytest.approx(
            tie_parameters(str(folders[1] / case))[1].tolist(), abs=1e-6
        )


def test_an_adapter_critic_is_refused(folders):
    for process in range(2):
        message = torch.load(folders[1] / f"refused_{process}.pt")
        assert "FSDP" in message and "`critic='shared'`" in message and "DDP" in message


def test_zero3_does_not_share_a_base(policy_path, reward_adapter_path, prompts, tmp_path, monkeypatch):
    for module in (reward_adapters, critic_start):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    for reward, critic in ((reward_adapter_path, "shared"), (count_good, "adapter")):
        args = PPOConfig(**settings(tmp_path, critic=critic))
        with pytest.raises(ValueError, match="ZeRO-3 split.*DDP"):
            PPOTrainer(policy_path, reward, args, prompts, peft_config=LoraConfig(target_modules="all-linear"))
