"""Configuration of [`ActorCriticTrainer`]."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from ..compat import OneGeneration, take_newer_names
from ..training.arguments import check_choices, document_fields


# Those of TRL 1.16, each of which was seen to take advantages of shape `(B, T)`
TOKEN_LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
# Those whose divisor is the number of tokens of the whole optimizer step
STEP_LOSS_TYPES = ("dapo", "cispo", "vespo")


@document_fields
@dataclass
class ActorCriticConfig(GRPOConfig):
    """Configuration of [`ActorCriticTrainer`]: what it adds to, or sets otherwise than, [`~trl.GRPOConfig`]."""

    num_generations: int | None = field(
        default=None,
        metadata={
            "help": "Completions per prompt; by default TRL's 8, or the most below that share out the generation batch. With "
            "several the mean of the others tells how hard the prompt is; one is enough where the critic can tell "
            "that, or where a prompt can be tried once only."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Stop dropout, which would make the ratio of the first update differ from 1: in modules of all kinds (an "
            "adapter's, too), and in numbers that the model hands to a function (`attention_dropout`, `layerdrop`)."
        },
    )
    scale_rewards: str = field(
        default="none",
        metadata={
            "help": "`'none'`: the completion's score is its weighted reward. `'group'` or `'batch'`: GRPO's normalized one, "
            "the reward less its prompt's mean over a standard deviation, which takes `num_generations >= 2`."
        },
    )
    loss_type: str = field(
        default=GRPOConfig.loss_type,
        metadata={
            "help": f"The policy's loss, one of TRL's: {', '.join(map(repr, TOKEN_LOSS_TYPES))}. 'vespo' picks its "
            "weights by the sign of each token's own advantage."
        },
    )

    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(
        default=1.0,
        metadata={
            "help": "Lambda of generalized advantage estimation. 1 is the return less the value, which is right on average "
            "whatever the critic says; less than 1 trusts the critic with what follows a token."
        },
    )
    lam_policy: float | None = field(
        default=None, metadata={"help": "Lambda of the policy's advantages, if not `lam` (VC-PPO)."}
    )
    lam_value: float | None = field(
        default=None, metadata={"help": "Lambda of the critic's targets, if not `lam` (VC-PPO: 1.0)."}
    )
    length_adaptive_alpha: float | None = field(
        default=None,
        metadata={"help": "Makes the policy's lambda 1 - 1/(alpha * length) for each completion (VAPO: 0.05)."},
    )
    scale_advantages: bool = field(
        default=True,
        metadata={
            "help": "Divide advantages by their root mean square over the chosen tokens of the global generation batch. They "
            "are not shifted: a shift would be a price of every token, and so of length."
        },
    )
    gate_critic: bool = field(
        default=True,
        metadata={
            "help": "Compare returns with a blend of the critic's values and the mean returns of other completions (of the "
            "batch, of the prompt, at the same step), with the weights that would have left past rollouts the least "
            "variance. A critic that knows nothing has no weight then. Without it they are compared with the critic "
            "alone."
        },
    )
    truncation: str = field(
        default="penalty",
        metadata={
            "help": "What a completion that reached `max_completion_length` without ending is worth. `'penalty'`: the limit "
            "is the MDP's horizon, the episode ended there, and its score is lowered by `missing_eos_penalty`. "
            "`'bootstrap'`: the episode was cut, so its score is not earned; the critic's value of the state it was "
            "cut in stands for what would have followed. `'mask'`: it is not trained on "
            "(`mask_truncated_completions`).",
            "choices": ["bootstrap", "penalty", "mask"],
        },
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata={"help": "Taken off the score of a cut completion with `truncation='penalty'`."}
    )

    prefix_rewards: bool = field(
        default=False,
        metadata={
            "help": "Reward models score every prefix of a completion, and each token earns what it adds. In sum that is the "
            "score of the whole less that of the prompt (which is logged as `reward`), so the best policy is the "
            "same, but credit is dense. A critic that starts from a reward model starts at 0 then: what the model "
            "says of a prefix has been paid when the prefix is there."
        },
    )
    turn_rewards: bool = field(
        default=False,
        metadata={
            "help": "An environment's `get_reward` is asked after every turn, not at the end alone, and each turn earns what "
            "it added. In sum that is what it says at the end."
        },
    )

    critic: str = field(
        default="shared",
        metadata={
            "help": "`'shared'`: a value head on the policy's trunk. `'adapter'`: a value head on an adapter of its own, on "
            "the policy's frozen base (with `peft_config`; not under FSDP or DeepSpeed ZeRO-3); the policy then feels "
            "nothing of the critic's gradients, at the memory of one base, for a forward and backward pass of its "
            "own. `'separate'`: a model of its own.",
            "choices": ["shared", "adapter", "separate"],
        },
    )
    critic_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "What the critic starts from. A shared one: the folder or Hub id of a trained policy, whose value head is "
            "taken up; by default 0. An adapter: the same with such a critic, or a reward adapter on the same base; "
            "by default 0. A separate one: a path or Hub id of a model, a reward model or a trained policy with a "
            "separate critic, or `'reward_model'` for the first model in `reward_funcs`; by default a copy of the "
            "policy."
        },
    )
    critic_detach: bool = field(
        default=True,
        metadata={
            "help": "Keep value gradients off a shared trunk, so that the critic's errors cannot move the policy. Without it the "
            "trunk learns what the critic needs to know, too, at the weight `vf_coef`; what it cannot know, such as "
            "how hard a prompt of a new kind is, comes as noise."
        },
    )
    critic_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the critic's own parameters; by default 10 times `learning_rate`."},
    )
    critic_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps in which only the critic's own parameters learn, at their full rate, and the policy stays as "
            "it is. The schedule of the learning rates, with its warm-up, begins after them."
        },
    )
    vf_coef: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the value loss, which is in units of the returns' variance. Of consequence with "
            "`critic_detach=False`: else the optimizer makes up for any weight."
        },
    )
    cliprange_value: float | None = field(
        default=None, metadata={"help": "Clip range of the value loss, in units of the return. Off by default."}
    )

    generate_merged: bool | None = field(
        default=None,
        metadata={
            "help": "Generate with the adapter merged into its base, which is restored to the bit: faster than running the "
            "adapter at every token. The base's weights are kept on CPU. By default where the base is in float32: in "
            "half precision what is sampled from would be the sum rounded, in which a young adapter is mostly lost. "
            "Never done on a quantized base, or where the adapted weights are another module's too."
        },
    )

    compact_generation: bool = field(
        default=True,
        metadata={
            "help": "Without vLLM or continuous batching: read a prompt once for all its completions, and drop "
            "completions from the batch as they end. Left to `generate`, with a warning: options that this does not "
            "know of, FSDP and DeepSpeed, images, prompt tuning, and models whose layers carry a state."
        },
    )

    length_batches: bool = field(
        default=True,
        metadata={
            "help": "Sort the completions of an optimizer step into micro-batches of similar length, and cut each to its own "
            "longest; reward models score so, too. Not done where the loss depends on who shares a micro-batch "
            "(`loss_type='bnpo'`, entropy bonuses and quantiles), nor with images or `pad_to_multiple_of`."
        },
    )
    balance_tokens: bool = field(
        default=False,
        metadata={
            "help": "With `length_batches`, put about as many tokens into each micro-batch of an optimizer step in place of "
            "as many completions, so that its peak of memory is lower. Only for a `loss_type` that is normalized over "
            "the whole step: `'dapo'`, `'cispo'` or `'vespo'`."
        },
    )
    compact_scoring: bool = field(
        default=True,
        metadata={
            "help": "Run the LM head only where a token is scored. Not done with images or prompt tuning, as a warning "
            "says."
        },
    )
    shared_prefix: str = field(
        default="auto",
        metadata={
            "help": "With `compact_scoring`, run a prompt once for all its completions in a micro-batch where that is "
            "less work; with `length_batches`, causal reward models do so, too. 'auto': where the model gives the same "
            "log-probabilities (or scores) so, which is checked on the first batch; 'always': an error where it does "
            "not; 'never'.",
            "choices": ["auto", "always", "never"],
        },
    )

    kl_in_reward: float = field(
        default=0.0,
        metadata={
            "help": "Coefficient of the per-token KL to the reference (k1) taken off the reward. `beta` puts the KL "
            "into the loss instead; only one of the two may be non-zero."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Steers `kl_in_reward` towards this KL per completion (nats, summed over its tokens)."},
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Completions in which the KL coefficient may move by a fifth."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Ends the epochs on a rollout once the KL per token between the policy and the one that sampled exceeds "
            "1.5 times this."
        },
    )

    save_rollouts: bool = field(
        default=False,
        metadata={
            "help": "Write every completion of training and evaluation, with its tokens, rewards, advantages, returns, "
            "values, KL and log-probabilities, to `output_dir/rollouts`, for `trl_ext.load_rollouts` to read. As all of "
            "`output_dir`, they are pushed with the model."
        },
    )

    def __post_init__(self):
        num_generations = self.num_generations
        if num_generations is None or num_generations == 1:
            self.num_generations = OneGeneration()
        take_newer_names(self)
        super().__post_init__()
        self.num_generations = self._fitting_generations() if num_generations is None else num_generations

        check_choices(self)
        # Two names for one thing: TRL's switch and ours
        if self.mask_truncated_completions:
            self.truncation = "mask"
        self.mask_truncated_completions = self.truncation == "mask"
        if self.missing_eos_penalty and self.truncation != "penalty":
            raise ValueError(
                f"`missing_eos_penalty={self.missing_eos_penalty}` has no effect with truncation={self.truncation!r}. "
                "Set `truncation='penalty'`, or remove the penalty."
            )
        if self.balance_tokens and (self.loss_type not in STEP_LOSS_TYPES or not self.length_batches):
            raise ValueError(
                "`balance_tokens=True` needs `length_batches=True` and a loss that is normalized over the optimizer "
                f"step, and `loss_type={self.loss_type!r}`, `length_batches={self.length_batches}`. Use "
                "`loss_type='dapo'`, 'cispo' or 'vespo', or leave it out."
            )
        if self.critic != "shared" and not self.critic_detach:
            raise ValueError(
                f"`critic_detach=False` concerns a shared trunk, and `critic={self.critic!r}` has one of its own. Remove it."
            )
        if self.beta and self.kl_in_reward:
            raise ValueError(
                f"The KL penalty is asked for twice: in the loss (`beta={self.beta}`) and in the reward "
                f"(`kl_in_reward={self.kl_in_reward}`). Set one of them to 0."
            )
        if self.kl_target is not None and not self.kl_in_reward:
            raise ValueError(
                "`kl_target` steers the coefficient of the KL in the reward, which is 0. Set `kl_in_reward` to the "
                "coefficient to start from (e.g. 0.05), or remove `kl_target`."
            )
        if self.loss_type not in TOKEN_LOSS_TYPES:
            raise ValueError(
                f"`loss_type={self.loss_type!r}` is none that is known to take token-level advantages. Use one of "
                f"{', '.join(map(repr, TOKEN_LOSS_TYPES))}."
            )
        if self.num_generations == 1 and not self.uses_raw_rewards:
            raise ValueError(
                "`scale_rewards='group'` or 'batch' and `multi_objective_aggregation='normalize_then_sum'` compare the "
                "completions of a prompt, but `num_generations=1`. Raise it, or use `scale_rewards='none'`."
            )
        if self.target_kl is not None and self.fp16:
            # The gradient scaler fails when a step brings it no gradients
            raise ValueError("`target_kl` skips updates, which fp16 loss scaling does not survive. Use bf16.")
        for name in ("kl_in_reward", "vf_coef", "critic_learning_rate", "critic_warmup_steps", "missing_eos_penalty"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("kl_target", "kl_horizon", "target_kl", "length_adaptive_alpha", "cliprange_value"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name in ("gamma", "lam", "lam_policy", "lam_value"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")

    def _fitting_generations(self) -> int:
        """Returns the most completions per prompt, up to TRL's default, that share out every batch."""
        batches = [self.generation_batch_size]
        if self.eval_strategy != "no" and self.num_generations_eval is None:
            batches.append(self.per_device_eval_batch_size * self.world_size)
        numbers = range(1, GRPOConfig.num_generations + 1)
        return max(n for n in numbers if all(batch % n == 0 for batch in batches))

    @property
    def uses_raw_rewards(self) -> bool:
        """True if a completion's reward is the weighted one, not one normalized within its group."""
        return self.scale_rewards == "none" and self.multi_objective_aggregation == "sum_then_normalize"


def check_on_policy(config: ActorCriticConfig, algorithm: str) -> None:
    """Refuses settings that would update the policy more than once per rollout."""
    if config.gradient_accumulation_steps % (config.steps_per_generation * config.num_iterations) != 0:
        raise ValueError(
            f"{algorithm} makes one on-policy update per rollout, but num_iterations={config.num_iterations} and "
            f"steps_per_generation={config.steps_per_generation} with gradient_accumulation_steps="
            f"{config.gradient_accumulation_steps} make several. Set `num_iterations=1` and leave "
            "`steps_per_generation` unset, or use PPO."
        )
