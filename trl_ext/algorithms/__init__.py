"""The algorithms by name, each with its configuration and its trainer."""

from .a2c import A2CConfig, A2CTrainer
from .nlpo import NLPOConfig, NLPOTrainer
from .ppo import PPOConfig, PPOTrainer
from .q_actor_critic import QActorCriticConfig, QActorCriticTrainer
from .reinforce import ReinforceConfig, ReinforceTrainer


ALGORITHMS = {
    "reinforce": (ReinforceConfig, ReinforceTrainer),
    "q_actor_critic": (QActorCriticConfig, QActorCriticTrainer),
    "a2c": (A2CConfig, A2CTrainer),
    "ppo": (PPOConfig, PPOTrainer),
    "nlpo": (NLPOConfig, NLPOTrainer),
}
