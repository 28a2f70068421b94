"""The direction of imports within the package, read from its source."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest


SOURCES = {path.stem: path.read_text() for path in (Path(__file__).parents[1] / "trl_ext").glob("*.py")}
PURE = {"token_mdp", "losses", "kl_controller", "masking", "ranking", "ranking_metrics"}
BASES = {"actor_critic_config", "actor_critic_trainer"}
ALGORITHMS = {"reinforce", "a2c", "ppo", "nlpo", "q_actor_critic", "ranking_reward", "ranking_dpo"}
CRITIC = {"critic", "critic_files", "critic_sources"}
BELOW_CRITIC = {"compat", "child_modules", "layouts", "lm_head", "value_heads", "shared_base", "reward_adapters"}
PARENTS = {"nlpo": {"ppo"}, "best_of_n": {"reinforce"}}
PUBLIC_TRL = re.compile(r"trl\.[A-Z]\w*|trl\.data_utils\.[a-z]\w*")


def imported_names(source):
    """Dotted names, wherever in the module they are imported: `from .critic import x` gives `trl_ext.critic.x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = {0: "", 1: "trl_ext."}.get(node.level, "<outside>.")
            base = package + (f"{node.module}." if node.module else "")
            yield from (base + alias.name for alias in node.names)


def internal_imports(source):
    """Modules of the package a source imports; a name taken from the package itself counts as `__init__`."""
    names = [name.split(".") for name in imported_names(source)]
    own = [[*name[1:], ""][0] for name in names if name[0] == "trl_ext"]
    return {name if name in SOURCES else "__init__" for name in own}


def violations(module, source):
    internal = internal_imports(source)
    if module in PURE and internal - ({"ranking"} if module == "ranking_metrics" else set()):
        yield f"a pure module imports {internal} from the package"
    if module in CRITIC and not internal <= BELOW_CRITIC | CRITIC:
        yield f"the critic imports {internal - BELOW_CRITIC - CRITIC}"
    if module in ("compat", "shared_base") and internal:
        yield f"{module} imports {internal}"
    forbidden = internal & (ALGORITHMS | {"__init__"}) - PARENTS.get(module, set())
    if module != "__init__" and forbidden:
        yield f"only the package's `__init__` may import {forbidden}"
    may_import_bases = ALGORITHMS | {"__init__", "actor_critic_trainer"}
    if module not in may_import_bases and internal & BASES:
        yield f"what trainers are made of imports {internal & BASES}"
    for name in imported_names(source):
        root, *rest = name.split(".")
        if root in ("recipes", "tests", "<outside>"):
            yield f"{name} is no part of the package"
        if module in PURE and root not in sys.stdlib_module_names | {"torch", "trl_ext"}:
            yield f"a pure module imports {name}"
        if module != "compat" and root == "trl" and not PUBLIC_TRL.fullmatch(name):
            yield f"{name} of TRL is for compat to import"
        if module != "compat" and root != "__future__" and any(part.startswith("_") for part in [root, *rest]):
            yield f"{name} is private"


def test_the_rules_concern_modules_that_exist():
    assert PURE | BASES | ALGORITHMS | CRITIC | {"compat", "__init__"} <= set(SOURCES)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_module_keeps_the_rules(module):
    assert list(violations(module, SOURCES[module])) == []


def test_no_module_is_needed_that_windows_lacks():
    recipes = {path.stem: path.read_text() for path in (Path(__file__).parents[1] / "recipes").glob("*.py")}
    lacking = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
    for module, source in {**SOURCES, **recipes}.items():
        assert lacking.isdisjoint(name.split(".")[0] for name in imported_names(source)), module


def test_no_text_is_in_what_windows_takes_by_default():
    """Files of JSON, YAML and cards are UTF-8 wherever they are read."""
    files = [path for folder in ("trl_ext", "recipes") for path in (Path(__file__).parents[1] / folder).glob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name not in ("read_text", "write_text", "open"):
                continue
            is_binary = any(
                isinstance(arg, ast.Constant | ast.IfExp) and "b" in ast.unparse(arg) for arg in node.args[1:]
            )
            assert is_binary or "encoding" in {keyword.arg for keyword in node.keywords}, (path.name, node.lineno)


def test_no_cycles():
    graph = {module: internal_imports(source) for module, source in SOURCES.items()}
    assert graph["ppo"] == BASES  # it does see edges
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("token_mdp", "import transformers"),
        ("token_mdp", "from trl import GRPOConfig"),
        ("token_mdp", "def f():\n    from peft import PeftModel"),
        ("losses", "from .token_mdp import masked_mean"),
        ("losses", "from trl_ext import token_mdp"),
        ("kl_controller", "import numpy as np"),
        ("critic", "from . import token_mdp"),
        ("critic", "from .checkpointing import x"),
        ("critic", "import trl_ext.losses"),
        ("compat", "from .critic import Critic"),
        ("checks", "from recipes.common import x"),
        ("checks", "from tests.conftest import x"),
        ("checks", "from ..tests import conftest"),
        ("checks", "from trl.trainer.utils import pad"),
        ("checks", "import trl.models.utils as utils"),
        ("checks", "from trl import trainer"),
        ("checks", "import trl"),
        ("checks", "from trl.data_utils import _tokenize"),
        ("checks", "from transformers import _private"),
        ("critic", "from transformers.utils._x import y"),
        ("a2c", "from .ppo import PPOConfig"),
        ("ppo", "from .reinforce import ReinforceTrainer"),
        ("reinforce", "from . import a2c"),
        ("reinforce", "from . import ActorCriticTrainer"),
        ("actor_critic_trainer", "from .ppo import PPOConfig"),
        ("actor_critic_config", "from .actor_critic_trainer import ActorCriticTrainer"),
        ("reporting", "from .actor_critic_config import ActorCriticConfig"),
    ],
)
def test_a_violation_is_seen(module, source):
    assert list(violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("token_mdp", "import math\nimport torch\nfrom torch.nn import functional as F"),
        ("critic", "from .compat import disable_dropout_in_model\nfrom transformers.utils import logging"),
        ("compat", "from trl.trainer.utils import _private"),
        ("checks", "from __future__ import annotations\nfrom trl.data_utils import is_conversational"),
        ("actor_critic_trainer", "from trl import GRPOTrainer\nfrom . import token_mdp\nfrom .critic import Critic"),
        ("ppo", "from .actor_critic_trainer import ActorCriticTrainer\nfrom .losses import value_loss"),
        ("__init__", "from .ppo import PPOTrainer\nfrom .critic import Critic"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert list(violations(module, source)) == []
