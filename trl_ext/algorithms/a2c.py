r"""
Advantage actor-critic (A2C): one on-policy update per batch.

    grad J = E[ sum_t grad log pi(a_t|s_t) A_t ],   A_t from generalized advantage estimation

with lambda = 1 by default, the return less the value, as in the original (which bootstraps where a rollout is cut).

Reference: Mnih et al. 2016, https://huggingface.co/papers/1602.01783, whose synchronous form this is.
"""

import textwrap
from dataclasses import dataclass

from ..actor_critic.config import ActorCriticConfig, check_on_policy
from ..actor_critic.trainer import ActorCriticTrainer
from ..training.arguments import document_fields


@document_fields
@dataclass
class A2CConfig(ActorCriticConfig):
    """Configuration of [`A2CTrainer`]."""

    def __post_init__(self):
        super().__post_init__()
        check_on_policy(self, "A2C")


class A2CTrainer(ActorCriticTrainer):
    """[`ActorCriticTrainer`] restricted to one on-policy update per batch, so that no ratio is ever clipped."""

    _tag_names = ["trl", "trl_ext", "a2c"]
    _name = "A2C"
    _paper = {
        "title": "Asynchronous Methods for Deep Reinforcement Learning",
        "id": "1602.01783",
        "citation": textwrap.dedent("""\
            @inproceedings{mnih2016a3c,
                title     = {{Asynchronous Methods for Deep Reinforcement Learning}},
                author    = {Volodymyr Mnih and Adri{\\`a} Puigdom{\\`e}nech Badia and Mehdi Mirza and Alex Graves and Timothy Lillicrap and Tim Harley and David Silver and Koray Kavukcuoglu},
                booktitle = {International Conference on Machine Learning},
                year      = 2016,
                eprint    = {arXiv:1602.01783},
            }"""),
    }
    _method = (
        "Advantages are the returns, smoothed by `lam`, less the critic's values (generalized advantage estimation), "
        "and each rollout is used for one on-policy update."
    )
    config_class = A2CConfig
