"""Deprecated names that this project's own calls use are errors in its tests, whoever's code it is that says so."""

import inspect
import sys
import warnings

import deprecations
import pytest
from helpers import build_policy, count_good, settings
from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from trl_ext import PPOConfig, PPOTrainer, RankingDPOConfig, RankingRewardConfig


def run_as(path, code, **scope):
    """Runs `code` as if it were written in `path`; the deprecations that are found."""
    deprecations.found.clear()
    with warnings.catch_warnings(action="ignore"):
        exec(compile(code, str(deprecations.ROOT / path), "exec"), scope)
    found = list(deprecations.found)
    deprecations.found.clear()
    return found


OLD_NAMES = """
def forward(self, old=None, **kwargs):
    import warnings
    warnings.warn("`old` is deprecated", FutureWarning, stacklevel=2)
def generate(self, old=None):
    from transformers.utils import logging
    logging.get_logger("transformers").warning("`old` will be removed in v7")
"""


@pytest.mark.parametrize("path", ["trl_ext/module.py", "recipes/recipe.py", "tests/test_module.py"])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_own_calls_are_found(tokenizer, monkeypatch, path, is_adapter):
    """A model is called, its adapter, and a property."""
    policy = model = build_policy(tokenizer)
    library = {}
    exec(compile(OLD_NAMES, sys.modules[type(policy).__module__].__file__, "exec"), library)
    if is_adapter:
        model = get_peft_model(policy, LoraConfig(r=2, task_type="CAUSAL_LM"))
    monkeypatch.setattr(type(policy), "forward", library["forward"])
    monkeypatch.setattr(type(policy), "generate", library["generate"])
    calls = ["model(old=1)", "model.generate(old=1)", "model.is_gradient_checkpointing"]
    found = run_as(path, "\n".join(calls), model=model)
    assert [place.split(": ")[0] for place in found] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_those_of_libraries_are_theirs(tokenizer):
    policy = build_policy(tokenizer)
    calls = "with disable_gradient_checkpointing(policy, {}):\n    get_peft_model(policy, config)"
    scope = {"policy": policy, "config": LoraConfig(r=2, task_type="CAUSAL_LM")}
    scope |= {"disable_gradient_checkpointing": disable_gradient_checkpointing, "get_peft_model": get_peft_model}
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        with disable_gradient_checkpointing(policy, {}):
            pass
    assert run_as("trl_ext/module.py", calls, **scope) == []


@pytest.mark.parametrize("config_class", [PPOConfig, RankingRewardConfig, RankingDPOConfig])
def test_trls_defaults_are_set_by_their_newer_names(config_class, tmp_path):
    """Nobody is told to change what he did not set; the names mean the same, and the newer one counts."""
    common = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False}
    with warnings.catch_warnings(action="error"):
        default = config_class(**common)
        old = config_class(**common, gradient_checkpointing=False, gradient_checkpointing_kwargs={"a": 1})
        new = config_class(**common, activation_checkpointing=False, activation_checkpointing_kwargs={"a": 1})
    assert default.activation_checkpointing is default.gradient_checkpointing is True
    for args in (old, new):
        assert args.activation_checkpointing is args.gradient_checkpointing is False
        assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == {"a": 1}


@pytest.mark.parametrize("given", [None, {"every_n_layers": 2}])
def test_checkpointing_is_reentrant_where_trl_needs_it(policy_path, prompts, tmp_path, monkeypatch, given):
    """With PEFT under ZeRO-3, which this stands in for: TRL sets it by the older name, transformers reads the newer."""
    init = GRPOTrainer.__init__

    def init_under_zero_3(self, model, reward_funcs, args, *rest, **kwargs):
        init(self, model, reward_funcs, args, *rest, **kwargs)
        args.gradient_checkpointing_kwargs = args.gradient_checkpointing_kwargs or {}
        args.gradient_checkpointing_kwargs["use_reentrant"] = True

    monkeypatch.setattr(GRPOTrainer, "__init__", init_under_zero_3)
    assert 'args.gradient_checkpointing_kwargs["use_reentrant"] = True' in inspect.getsource(init)
    args = PPOConfig(**settings(tmp_path), activation_checkpointing_kwargs=given)
    trainer = PPOTrainer(policy_path, count_good, args, prompts, peft_config=LoraConfig(r=2))
    assert trainer.args.activation_checkpointing_kwargs == {"use_reentrant": True} | (given or {})
