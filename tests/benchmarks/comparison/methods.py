"""The methods that are compared, at their defaults."""

from dataclasses import dataclass, field

from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_ext import PPOConfig
from trl_ext.algorithms import ALGORITHMS


GROUP_SIZE = 8  # completions per prompt of the methods that compare them, on tasks of single samples, too
EPOCHS = PPOConfig.num_iterations


@dataclass(frozen=True)
class Method:
    """
    A trainer with what makes it this method.

    Args:
        config_class (`type`): Its configuration.
        trainer_class (`type`): Its trainer.
        overrides (`dict`): What it sets otherwise than the defaults.
        kl_option (`str`): The option that takes the task's price of a nat.
        compares_groups (`bool`): True if it needs several completions of a prompt and a reward for each as a whole.
        baselines (`tuple[str, ...]`): The methods that it is compared with, seed by seed.
        tuned (`dict[str, tuple]`): Values to try for options that are chosen on seeds of their own; multiples of the
            task's price for `kl_option`, on tasks that have one.
    """

    config_class: type
    trainer_class: type
    overrides: dict
    kl_option: str
    compares_groups: bool
    baselines: tuple[str, ...]
    tuned: dict[str, tuple] = field(default_factory=dict)


KL_MULTIPLES = (1.0, 1 / 3, 3.0)


def ours(algorithm: str, baselines: tuple[str, ...] = (), **overrides) -> Method:
    config_class, trainer_class = ALGORITHMS[algorithm]
    grpo = "grpo-epochs" if config_class.num_iterations > 1 else "grpo"
    tuned = {"kl_in_reward": KL_MULTIPLES}
    return Method(config_class, trainer_class, overrides, "kl_in_reward", False, (grpo, *baselines), tuned)


def of_trl(config_class: type, trainer_class: type, baselines: tuple[str, ...], tuned: dict, **overrides) -> Method:
    return Method(config_class, trainer_class, overrides, "beta", True, baselines, {**tuned, "beta": KL_MULTIPLES})


SCALES = {"scale_rewards": ("group", "batch", "none")}
NORMALIZED = {"normalize_advantages": (False, True)}
METHODS = {
    "grpo": of_trl(GRPOConfig, GRPOTrainer, (), SCALES),
    "grpo-epochs": of_trl(GRPOConfig, GRPOTrainer, (), SCALES, num_iterations=EPOCHS),
    "rloo": of_trl(RLOOConfig, RLOOTrainer, ("grpo",), NORMALIZED),
    "rloo-epochs": of_trl(RLOOConfig, RLOOTrainer, ("grpo-epochs",), NORMALIZED, num_iterations=EPOCHS),
    "reinforce-none": ours("reinforce", baseline="none"),
    "reinforce": ours("reinforce"),
    "reinforce-value": ours("reinforce", ("reinforce",), baseline="value"),
    "a2c": ours("a2c", ("reinforce",)),
    "q-actor-critic": ours("q_actor_critic", ("reinforce",)),
    "ppo": ours("ppo"),
    "nlpo": ours("nlpo", ("ppo",)),
}
