"""The direction of imports within the package, read from its source."""

import ast
import graphlib
import re
import sys

import pytest
from helpers import RECIPES, ROOT

from trl_ext import ActorCriticTrainer, RankingDPOTrainer, RankingRewardTrainer, SFTTrainer


PACKAGE = ROOT / "trl_ext"
# By dotted name within the package; a package's own `__init__` goes by the package's name, and the whole one's by ""
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path.read_text()
    for path in PACKAGE.rglob("*.py")
}
# A room may import those of lower levels, and itself. Rooms of one level do not know each other.
LEVELS = [
    {"token_mdp", "ranking", "compat"},
    {"models", "data"},
    {"packing", "adapters"},
    {"critic"},
    {"hub"},
    {"training"},
    {"actor_critic", "preference"},
    {"algorithms"},
    {""},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PURE = {"token_mdp", "ranking"}
# One algorithm does not know of another, but for what it is a kind of
KINDS = {"algorithms.nlpo": {"ppo", "masking_policy"}, "algorithms.best_of_n": {"reinforce"}}
PUBLIC_TRL = re.compile(r"trl\.[A-Z]\w*|trl\.data_utils\.[a-z]\w*")


def imported_names(module, source):
    """Dotted names, wherever in the module they are imported: `from ..critic import x` gives `trl_ext.critic.x`."""
    parts = ["trl_ext", *filter(None, module.split("."))]
    package = parts if module in LEVEL_OF else parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base if base or not node.level else ["<outside>"]
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def internal_imports(module, source):
    """Modules of the package that a source imports."""
    for name in imported_names(module, source):
        root, *parts = name.split(".")
        if root == "trl_ext":
            yield next(m for n in range(len(parts), -1, -1) if (m := ".".join(parts[:n])) in SOURCES)


def violations(module, source):
    room = module.split(".")[0]
    for imported in internal_imports(module, source):
        other = imported.split(".")[0]
        if other != room and LEVEL_OF[other] >= LEVEL_OF[room]:
            yield f"{module} imports {imported}, which is on its own level or above"
        is_algorithm = room == "algorithms" and module != room  # the room itself is the table of all
        if is_algorithm and other == room and imported.split(".")[1] not in KINDS.get(module, ()):
            yield f"{module} imports {imported}, another algorithm"
    for name in imported_names(module, source):
        root, *rest = name.split(".")
        if root in ("recipes", "tests", "<outside>"):
            yield f"{name} is no part of the package"
        if room in PURE and root not in sys.stdlib_module_names | {"torch", "trl_ext"}:
            yield f"a pure module imports {name}"
        if room != "compat" and root == "trl" and not PUBLIC_TRL.fullmatch(name):
            yield f"{name} of TRL is for compat to import"
        if room != "compat" and root != "__future__" and any(part.startswith("_") for part in [root, *rest]):
            yield f"{name} is private"


def test_the_levels_are_those_of_the_rooms_that_there_are():
    assert {module.split(".")[0] for module in SOURCES} == set(LEVEL_OF)
    assert set(KINDS) <= set(SOURCES)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_module_keeps_the_rules(module):
    assert list(violations(module, SOURCES[module])) == []


def test_no_module_is_needed_that_windows_lacks():
    recipes = {str(path): path.read_text() for path in RECIPES.rglob("*.py")}
    lacking = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
    for module, source in {**SOURCES, **recipes}.items():
        assert lacking.isdisjoint(name.split(".")[0] for name in imported_names(module, source)), module


def test_no_text_is_in_what_windows_takes_by_default():
    """Files of JSON, YAML and cards are UTF-8 wherever they are read."""
    files = [path for folder in ("trl_ext", "recipes") for path in (ROOT / folder).rglob("*.py")]
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
    graph = {module: set(internal_imports(module, source)) for module, source in SOURCES.items()}
    assert graph["algorithms.ppo"] == {
        "actor_critic.config",
        "actor_critic.trainer",
        "training.arguments",
    }  # it sees edges
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("token_mdp", "import transformers"),
        ("token_mdp.losses", "from trl import GRPOConfig"),
        ("token_mdp.nucleus", "def f():\n    from peft import PeftModel"),
        ("token_mdp.losses", "from ..ranking import ranking_nll"),
        ("ranking.metrics", "import numpy as np"),
        ("compat", "from ..critic.critic import Critic"),
        ("models.lm_head", "from ..data.rows import whole"),
        ("packing.layout", "from ..adapters.shared_base import frozen_base"),
        ("critic.critic", "from ..hub.record import duration"),
        ("critic.critic", "import trl_ext.training.pushing"),
        ("critic.critic", "from trl_ext import PPOTrainer"),
        ("hub.uploading", "from ..training.base import TrainerBase"),
        ("preference.reward", "from ..actor_critic.checks import check_rewards"),
        ("actor_critic.config", "from ..algorithms.ppo import PPOConfig"),
        ("algorithms.a2c", "from .ppo import PPOConfig"),
        ("algorithms.ppo", "from .reinforce import ReinforceTrainer"),
        ("algorithms.reinforce", "from . import a2c"),
        ("algorithms.reinforce", "from .. import ActorCriticTrainer"),
        ("actor_critic.checks", "from recipes.common import x"),
        ("actor_critic.checks", "from tests.helpers import x"),
        ("actor_critic.checks", "from ...tests import helpers"),
        ("actor_critic.checks", "from trl.trainer.utils import pad"),
        ("actor_critic.checks", "import trl.models.utils as utils"),
        ("actor_critic.checks", "from trl import trainer"),
        ("actor_critic.checks", "import trl"),
        ("actor_critic.checks", "from trl.data_utils import _tokenize"),
        ("actor_critic.checks", "from transformers import _private"),
        ("critic.critic", "from transformers.utils._x import y"),
    ],
)
def test_a_violation_is_seen(module, source):
    assert list(violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("token_mdp.losses", "import math\nimport torch\nfrom torch.nn import functional as F"),
        ("critic.critic", "from ..compat import FusedCausalLMOutput\nfrom transformers.utils import logging"),
        ("compat", "from trl.trainer.utils import _private"),
        ("actor_critic.checks", "from __future__ import annotations\nfrom trl.data_utils import is_conversational"),
        ("actor_critic.trainer", "from trl import GRPOTrainer\nfrom .. import token_mdp\nfrom .config import x"),
        ("algorithms.nlpo", "from ..actor_critic.trainer import ActorCriticTrainer\nfrom .ppo import PPOTrainer"),
        ("", "from .algorithms.ppo import PPOTrainer\nfrom .critic.critic import Critic"),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert list(violations(module, source)) == []


@pytest.mark.parametrize("trainer", [ActorCriticTrainer, RankingDPOTrainer, RankingRewardTrainer, SFTTrainer])
def test_a_trainer_has_at_most_two_bases_of_ours_beside_trls(trainer):
    ours = [base.__name__ for base in trainer.__mro__[1:] if base.__module__.startswith("trl_ext.")]
    assert ours[-1] == "TrainerBase" and len(ours) <= 2
