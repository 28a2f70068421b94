"""Models whose code lies beside their weights, which runs only if the user trusts it."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config
from transformers import LlamaModel, dynamic_module_utils

from trl_ext.actor_critic.checks import check_base_for_vllm
from trl_ext.critic.start import critic_from_model


CODE = """
from transformers import LlamaConfig, LlamaModel


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaModel):
    config_class = OwnConfig
"""


@pytest.fixture
def remote_code_path(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "remote_code"
    LlamaModel(tiny_config(tokenizer)).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_own.py").write_text(CODE)
    return str(path)


def test_a_critic_starts_from_code_that_is_trusted(remote_code_path):
    critic = critic_from_model(remote_code_path, torch.float32, trust_remote_code=True)
    assert type(critic.trunk).__name__ == "OwnModel"


@pytest.mark.parametrize("by_init_kwargs", [True, False])
def test_a_policy_for_vllm_may_have_code_of_its_own(remote_code_path, by_init_kwargs):
    """Trusted by either of the two arguments that TRL loads it by."""
    init_kwargs = {"trust_remote_code": True} if by_init_kwargs else None
    args = SimpleNamespace(model_init_kwargs=init_kwargs, trust_remote_code=not by_init_kwargs)
    check_base_for_vllm(remote_code_path, args, None)
