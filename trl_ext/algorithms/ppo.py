r"""
Proximal policy optimization (PPO): several epochs of minibatches on each rollout, held near it by clipping.

    L_t = -min( rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t ),   rho_t = pi(a_t|s_t) / pi_old(a_t|s_t)

with A_t from generalized advantage estimation, scaled over the global batch. In TRL's terms, epochs are
`num_iterations`, minibatches are `steps_per_generation / gradient_accumulation_steps`, and the clip range is `epsilon`
(and `epsilon_high`).

Reference: Schulman et al. 2017, https://huggingface.co/papers/1707.06347, eq. 7; defaults follow Huang et al. 2024,
The N+ Implementation Details of RLHF with PPO, https://huggingface.co/papers/2403.17031.
"""

import textwrap
from dataclasses import dataclass, field

from ..actor_critic.config import ActorCriticConfig
from ..actor_critic.trainer import ActorCriticTrainer
from ..training.arguments import document_fields


@document_fields
@dataclass
class PPOConfig(ActorCriticConfig):
    """Configuration of [`PPOTrainer`]."""

    num_iterations: int = field(default=4, metadata={"help": "Epochs over each rollout."})


class PPOTrainer(ActorCriticTrainer):
    """[`ActorCriticTrainer`] with the defaults of PPO: several epochs on each rollout."""

    _tag_names = ["trl", "trl_ext", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": textwrap.dedent("""\
            @article{schulman2017ppo,
                title  = {{Proximal Policy Optimization Algorithms}},
                author = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
                year   = 2017,
                eprint = {arXiv:1707.06347},
            }"""),
    }
    _method = (
        "Advantages are those of generalized advantage estimation, and each rollout is used for several updates, which "
        "clipping (`epsilon`) holds near the policy that sampled it."
    )
    config_class = PPOConfig
