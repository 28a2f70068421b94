"""trl_ext: token-level actor-critic RL, and learning from rankings with ties, for TRL."""

from .a2c import A2CConfig, A2CTrainer
from .actor_critic_config import ActorCriticConfig
from .actor_critic_trainer import ActorCriticTrainer
from .best_of_n import CompletionSampler, keep_best
from .compat import stop_repacking
from .critic import Critic, token_action_values, token_values
from .critic_sources import load_critic
from .merging import merge_adapter
from .nlpo import NLPOConfig, NLPOTrainer
from .ppo import PPOConfig, PPOTrainer
from .q_actor_critic import QActorCriticConfig, QActorCriticTrainer
from .ranking import RANKING_MODELS, judgements_nll, predict_pair, ranking_nll
from .ranking_data import format_ranking, parse_ranking
from .ranking_dpo import RankingDPOConfig, RankingDPOTrainer
from .ranking_reward import RankingRewardConfig, RankingRewardTrainer
from .reinforce import ReinforceConfig, ReinforceTrainer
from .rollouts import load_rollouts
from .sft import SFTTrainer
from .tie_parameters import tie_parameters


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
