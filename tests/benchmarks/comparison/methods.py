"""The methods that are compared, each with the settings to choose from."""

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_ext import CompletionSampler, ReinforceConfig
from trl_ext.algorithms import ALGORITHMS


KL_PRICE = 0.2
END_PRICE = 1.0
GROUP_SIZE = 8  # completions per prompt of the methods that compare them


@dataclass(frozen=True)
class Setting:
    """
    A setting that a method is tried with.

    Args:
        learning_rate (`float`): Learning rate of the policy.
        is_on_policy (`bool`): True for one update on each 32 completions, False for 4 epochs of 2 updates on each 128.
        num_samples (`int`, *optional*, defaults to `4`): n of best-of-n.
        lam (`float`, *optional*): Lambda of generalized advantage estimation, if not the method's default.
    """

    learning_rate: float
    is_on_policy: bool
    num_samples: int = 4
    lam: float | None = None

    def __str__(self):
        lam = "" if self.lam is None else f"-{self.lam:g}"
        return f"{self.learning_rate:g}-{'on' if self.is_on_policy else 'epochs'}-{self.num_samples}{lam}"

    @property
    def updates_per_rollout(self) -> int:
        return 1 if self.is_on_policy else 8

    def arguments(self) -> dict:
        if self.is_on_policy:
            arguments = {"per_device_train_batch_size": 32, "steps_per_generation": 1, "num_iterations": 1}
        else:
            arguments = {"per_device_train_batch_size": 64, "steps_per_generation": 2, "num_iterations": 4}
        return arguments | ({} if self.lam is None else {"lam": self.lam})


ON_POLICY = [Setting(rate, True) for rate in (1e-4, 3e-4, 1e-3)]
EITHER = [Setting(3e-4, True), Setting(1e-3, True), Setting(3e-4, False)]
LAMBDAS = [Setting(3e-4, True), Setting(1e-3, True), Setting(1e-3, True, lam=1.0)]
FILTERING = [Setting(3e-4, True, 4), Setting(1e-3, True, 4), Setting(1e-3, True, 8)]


@dataclass(frozen=True)
class Method:
    """A trainer with what makes it this method, and the settings to choose from."""

    trainer_class: type
    config_class: type
    settings: list[Setting]
    overrides: dict
    is_dense: bool = True  # on the task of words


# Detached: through a trunk this small the value's gradients drown the policy's
WITH_CRITIC = {"critic_detach": True, "critic_learning_rate": 1e-2, "vf_coef": 0.5, "kl_in_reward": KL_PRICE}
OF_TRL = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}


def method(algorithm: str, settings: list[Setting], is_dense: bool = True, **overrides) -> Method:
    config_class, trainer_class = (ALGORITHMS | OF_TRL)[algorithm]
    return Method(trainer_class, config_class, settings, overrides, is_dense)


IN_GROUPS = {"num_generations": GROUP_SIZE, "beta": KL_PRICE, "is_dense": False}
METHODS = {
    "reinforce-bandit": method(
        "reinforce", ON_POLICY, is_dense=False, one_step_mdp=True, baseline="none", kl_in_reward=KL_PRICE
    ),
    "reinforce": method("reinforce", ON_POLICY, baseline="none", kl_in_reward=KL_PRICE),
    "reinforce-mean": method("reinforce", ON_POLICY, baseline="batch_mean", kl_in_reward=KL_PRICE),
    "q-actor-critic": method("q_actor_critic", EITHER, **WITH_CRITIC | {"vf_coef": 1.0}),
    "q-all-actions": method("q_actor_critic", EITHER, **WITH_CRITIC | {"vf_coef": 1.0}, policy_gradient="all_actions"),
    # With lambda 1, its default, this is REINFORCE with a value as baseline
    "a2c": method("a2c", ON_POLICY, **WITH_CRITIC),
    "ppo": method("ppo", LAMBDAS, **WITH_CRITIC),
    "nlpo": method("nlpo", LAMBDAS, **WITH_CRITIC, mask_update_steps=5),
    "best-of-n": Method(CompletionSampler, ReinforceConfig, FILTERING, {}, is_dense=False),
    "grpo": method("grpo", EITHER, **IN_GROUPS),
    "rloo": method("rloo", EITHER, **IN_GROUPS),
}
# On the task of words: those that can tell where in a text a word was, without being told
DELAYED = ["reinforce-mean", "ppo"]

METHODS |= {
    f"{name}-delayed": Method(m.trainer_class, m.config_class, m.settings, m.overrides, is_dense=False)
    for name, m in METHODS.items()
    if name in DELAYED
}

METHODS_OF_TASK = {
    "reviews": [name for name in METHODS if not name.endswith("-delayed")],
    "words": ["reinforce-bandit", "reinforce-mean", "q-actor-critic", "a2c", "ppo", "grpo", "rloo"]
    + [f"{name}-delayed" for name in DELAYED],
}
