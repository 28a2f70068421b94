"""Fixtures: tiny offline models and data, each in a process without a Hub and without deprecated calls."""

import gc
import os

import deprecations  # it replaces what the libraries below import by name


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from agents import build_tool_model
from datasets import Dataset
from helpers import (
    PROMPTS,
    RANKINGS,
    build_policy,
    build_reward_model,
    build_tokenizer,
    tiny_config,
)
from transformers import LlamaForSequenceClassification


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """Fails a test in which this project's own code calls what a library has deprecated."""
    deprecations.found.clear()
    yield
    assert deprecations.found == []


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Accelerate collects garbage whenever training starts, and most of its time goes to what imports left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def policy(tokenizer):
    return build_policy(tokenizer)


@pytest.fixture(scope="session")
def policy_path(tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("policy"))
    build_policy(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reward_model_path(tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("reward_model"))
    torch.manual_seed(1)
    LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def prompts():
    return Dataset.from_dict({"prompt": PROMPTS})


@pytest.fixture(scope="session")
def chats():
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROMPTS]})


@pytest.fixture(scope="session")
def rankings():
    return Dataset.from_dict(RANKINGS)


@pytest.fixture
def reward_model(tokenizer):
    return build_reward_model(tokenizer)


@pytest.fixture
def tool_model():
    return build_tool_model()
