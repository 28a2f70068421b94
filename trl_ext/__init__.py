"""trl_ext: token-level actor-critic RL, and learning from rankings with ties, for TRL."""

from .actor_critic.config import ActorCriticConfig
from .actor_critic.trainer import ActorCriticTrainer
from .algorithms.a2c import A2CConfig, A2CTrainer
from .algorithms.best_of_n import CompletionSampler, keep_best
from .algorithms.nlpo import NLPOConfig, NLPOTrainer
from .algorithms.ppo import PPOConfig, PPOTrainer
from .algorithms.q_actor_critic import QActorCriticConfig, QActorCriticTrainer
from .algorithms.reinforce import ReinforceConfig, ReinforceTrainer
from .compat import stop_repacking
from .critic.critic import Critic
from .critic.reading import token_action_values, token_values
from .critic.start import load_critic
from .data.notation import format_ranking, parse_ranking
from .data.rollouts import load_rollouts
from .hub.merging import merge_adapter
from .models.tie_parameters import tie_parameters
from .preference.dpo import RankingDPOConfig, RankingDPOTrainer
from .preference.reward import RankingRewardConfig, RankingRewardTrainer
from .ranking import RANKING_MODELS, judgements_nll, predict_pair, ranking_nll
from .training.sft import SFTTrainer


# Here, as 4-bit models are mostly loaded by transformers and PEFT alone
stop_repacking()

__version__ = "0.1.0"

__all__ = [
    "RANKING_MODELS",
    "A2CConfig",
    "A2CTrainer",
    "ActorCriticConfig",
    "ActorCriticTrainer",
    "CompletionSampler",
    "Critic",
    "NLPOConfig",
    "NLPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "QActorCriticConfig",
    "QActorCriticTrainer",
    "RankingDPOConfig",
    "RankingDPOTrainer",
    "RankingRewardConfig",
    "RankingRewardTrainer",
    "ReinforceConfig",
    "ReinforceTrainer",
    "SFTTrainer",
    "format_ranking",
    "judgements_nll",
    "keep_best",
    "load_critic",
    "load_rollouts",
    "merge_adapter",
    "parse_ranking",
    "predict_pair",
    "ranking_nll",
    "tie_parameters",
    "token_action_values",
    "token_values",
]
