"""trl_ext: token-level actor-critic RL for TRL."""

from .a2c import A2CConfig, A2CTrainer
from .actor_critic_config import ActorCriticConfig
from .actor_critic_trainer import ActorCriticTrainer
from .critic import Critic, load_critic, token_values
from .ppo import PPOConfig, PPOTrainer
from .reinforce import ReinforceConfig, ReinforceTrainer


__version__ = "0.1.0"

__all__ = [
    "A2CConfig",
    "A2CTrainer",
    "ActorCriticConfig",
    "ActorCriticTrainer",
    "Critic",
    "PPOConfig",
    "PPOTrainer",
    "ReinforceConfig",
    "ReinforceTrainer",
    "load_critic",
    "token_values",
]
