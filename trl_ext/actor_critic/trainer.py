r"""
[`ActorCriticTrainer`]: `GRPOTrainer` with token-level advantages from a critic.

The objective of the actor is TRL's surrogate (`loss_type`) with an advantage per token; the critic's is the squared
error to the lambda-return. With r_t from [`~trl_ext.token_mdp`] and A, G from generalized advantage estimation:

    L = L_surrogate(pi, A) + vf_coef * mean_t (V(s_t) - G_t)^2 / 2

The path of a batch:

1. TRL generates and scores; `_calculate_rewards` keeps the local scores.
2. Where one update follows on the whole rollout, or several of which the first is of the whole, the training forward
   gives the old log-probabilities and the values, and no pass is made for them. Where several minibatches follow, the
   pass in which TRL scores the rollout gives both. Only when the advantages' statistics span several micro-batches of
   one on-policy update is a pass of our own needed.
3. `_add_advantages` turns scores, values and log-probabilities into `advantages`, `returns` and `values`, `(B, T)`.
4. `_compute_loss` adds the value loss to TRL's.
"""

import math
import textwrap
import warnings
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from .. import token_mdp
from ..adapters.reward_adapters import RewardAdapterMixin, split_reward_adapters
from ..adapters.reward_models import with_loaded_reward_models
from ..compat import enable_checkpointing, get_config_model_id, paying_environments
from ..critic.critic import Critic
from ..critic.files import CRITIC_NAME, VALUE_HEAD_FILE, local_folder
from ..critic.heads import ValueHead
from ..critic.start import check_vocabulary, critic_as_adapter, critic_from_model, critic_from_policy, shared_critic
from ..models.dropout import active_dropout, stop_dropout
from ..models.quantization import is_quantized
from ..models.reference import take_up_start
from ..token_mdp import KLController, value_loss
from ..training.arguments import checked_args
from ..training.base import TrainerBase
from .card import policy_card
from .checkpoint import CheckpointingMixin, StartOfTraining
from .checks import check_base_for_vllm, check_dataset_size, check_prefix_rewards, check_turn_rewards, checked_rollout
from .compact_batches import CompactBatchesMixin
from .config import ActorCriticConfig
from .generation import PolicyGenerationMixin
from .notices import Notices
from .passes import PassesMixin
from .prompts import check_context
from .recording import RecordingMixin
from .reporting import ReportingMixin
from .rewards import RewardsMixin, distinct_names
from .stopping import StoppingMixin


logger = get_logger(__name__)


class ActorCriticTrainer(
    CheckpointingMixin,
    ReportingMixin,
    PolicyGenerationMixin,
    StoppingMixin,
    PassesMixin,
    CompactBatchesMixin,
    RecordingMixin,
    RewardsMixin,
    RewardAdapterMixin,
    TrainerBase,
    GRPOTrainer,
):
    """
    [`~trl.GRPOTrainer`] with a critic. What changes with respect to the parent:

    - advantages are one per token, from generalized advantage estimation over the critic's values, not one per
      completion from its group; one completion per prompt is enough;
    - the critic's loss is added to the policy's, and the critic is saved beside the policy and restored with it;
    - the KL to the reference may be taken off the reward (`kl_in_reward`) instead of added to the loss;
    - padding, repeated prompts, positions without a token and completions that have ended are not run
      ([`CompactBatchesMixin`], [`decoding`]);
    - a reward model may be an adapter, by path or Hub id; it shares the policy's base if both were trained on the same
      and FSDP does not shard it.

    Args:
        critic_model ([`~transformers.PreTrainedModel`], *optional*):
            Start of a separate critic (see `critic_model_name_or_path` for what is taken up); it is copied.
        All others are [`~trl.GRPOTrainer`]'s. `args` is an [`ActorCriticConfig`]. If `optimizers` are given, the
        critic's parameters join the optimizer's last group, and `critic_learning_rate` has no effect.
    """

    _tag_names = ["trl", "trl_ext", "actor-critic"]
    _name = "Actor-Critic"
    _paper = {
        "title": "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "id": "1506.02438",
        "citation": textwrap.dedent("""\
            @inproceedings{schulman2016gae,
                title     = {{High-Dimensional Continuous Control Using Generalized Advantage Estimation}},
                author    = {John Schulman and Philipp Moritz and Sergey Levine and Michael I. Jordan and Pieter Abbeel},
                booktitle = {International Conference on Learning Representations},
                year      = 2016,
                eprint    = {arXiv:1506.02438},
            }"""),
    }
    _method = ""  # of `compute_advantages` nothing more is known
    config_class = ActorCriticConfig
    _task_type = "CAUSAL_LM"
    _pipeline_tag = "text-generation"
    _template_file = "policy.md"
    _saved_beside_model = (VALUE_HEAD_FILE, CRITIC_NAME)
    # Until `__init__` has made or read them
    critic: Critic | None = None
    turn_rewards = False

    def __init__(
        self, model, reward_funcs=None, args=None, *other_args, critic_model: PreTrainedModel | None = None, **kwargs
    ):
        args = checked_args(args, type(self), model)
        if critic_model is not None and (args.critic != "separate" or args.critic_model_name_or_path is not None):
            raise ValueError(
                "`critic_model` is the start of a separate critic. Set `critic='separate'`, and do not set "
                "`critic_model_name_or_path` as well."
            )
        reward_funcs, reward_adapters = split_reward_adapters(reward_funcs)
        self._num_given_rewards = (
            len(reward_funcs) if isinstance(reward_funcs, list) else int(reward_funcs is not None)
        )
        if args.use_vllm:
            check_base_for_vllm(model, args, kwargs.get("quantization_config"))
        if kwargs.get("rollout_func") is not None:
            kwargs["rollout_func"] = checked_rollout(kwargs["rollout_func"])
        needs_reference = args.beta != 0.0 or args.kl_in_reward != 0.0
        is_full_model = isinstance(model, PreTrainedModel) and kwargs.get("peft_config") is None
        if needs_reference and is_full_model and not get_config_model_id(model.config):
            raise ValueError(
                "The KL penalty needs a reference, which is loaded from where `model` came from, but `model` was built "
                "in memory. Save it with `model.save_pretrained(path)` and pass the path."
            )

        reward_funcs, other_args, kwargs = with_loaded_reward_models(reward_funcs, args, other_args, kwargs)

        # The parent prepares the reference if `args.beta` is not 0, wherever the KL is used afterwards
        beta, args.beta = args.beta, args.beta or args.kl_in_reward
        try:
            super().__init__(model, reward_funcs, args, *other_args, **kwargs)
        finally:
            args.beta = beta
        take_up_start(self.ref_model, model, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._set_up_sampling()

        self._stop_dropout()
        for func in self.reward_funcs:
            if isinstance(func, torch.nn.Module):
                func.eval()  # one built in memory may come in training mode
        self.reward_func_names = distinct_names(self.reward_func_names)
        self._paying_environments = paying_environments(self)  # classes, in the order of their rewards

        text_config = self.model.config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None)  # absent where positions are unbounded
        self.max_prompt_length = None if context is None else context - (self.max_completion_length or 1)
        check_context(self.max_prompt_length, self.max_completion_length or 1)
        if isinstance(self.train_dataset, Dataset):
            check_dataset_size(self.train_dataset, args.generation_batch_size // args.num_generations)
        self._check_prompts("train_dataset", self.train_dataset)
        self._check_prompts("eval_dataset", self.eval_dataset)

        self.kl_controller = KLController(args.kl_in_reward, args.kl_target, args.kl_horizon)
        self._policy = self.model  # before any distributed wrapper
        self._say_unused = Notices()
        Critic.detach_from(self._policy)  # an earlier trainer's
        self._reward_adapters = reward_adapters  # paths by their index in `reward_funcs`
        for index, path in reward_adapters.items():
            self._load_reward_adapter(index, path)
        self._set_up_reward_models()
        self.turn_rewards = args.turn_rewards
        if self.turn_rewards:
            check_turn_rewards(self._paying_environments, self.rollout_func)
        if args.prefix_rewards:
            check_prefix_rewards(self.reward_funcs, self.reward_processing_classes, self._tokenizer)
        self.critic = self._make_critic(critic_model)
        if self.critic is not None:
            self._set_head(self.critic)
            self.critic.attach_to(self._policy)
            if self.critic.trunk is not None and args.gradient_checkpointing:
                # The parent asks only the policy itself, in which PEFT hides children of its wrapper
                enable_checkpointing(self.critic.trunk, args)
            if self.optimizer is not None:
                self.optimizer.param_groups[-1]["params"].extend(self.critic.own_parameters())

        self.add_callback(StartOfTraining(self))
        self._scores = None  # (B,), of the completions being scored; nan where no reward function applies
        self._token_rewards = None  # (B, T), of the same; None if no reward is dense
        self._dense_totals = None  # (B,), what those are in the score
        self._reward_prefix_checks = {}  # by reward model
        self._records_values = False  # in the next pass
        self._skips_pass = False  # the next one, which the first epoch makes anyway
        self._passes = []  # (log-probabilities, values) of each scoring forward of the present batch
        self._awaiting = None  # batch whose advantages the forward under way will give
        self._epochs_ended = False  # by `target_kl`, until the next rollout
        self._is_first_update = False  # of a training, until it begins
        self._window_kl = torch.zeros(2, device=self.accelerator.device)  # sum and count within the optimizer step
        self._set_up_compact_batches()
        self._compare_heads()
        self._last_rollout = None  # time of its start and its number of completion tokens

    def _stop_dropout(self) -> None:
        """TRL stops modules of one kind; where it is to stay, say what that means."""
        if self.args.disable_dropout:
            stop_dropout(self.model)
            if self.ref_model is not None:
                stop_dropout(self.ref_model)
        elif active := active_dropout(self.model):
            name, probability = next(iter(active.items()))
            logger.warning(
                f"`disable_dropout=False`, and the policy has dropout ({len(active)} probabilities, such as `{name}` = "
                f"{probability}): gradients are then of another policy than the one that sampled, drawn anew in each "
                "forward, and no clipping or correction knows of it. Set `disable_dropout=True`."
            )

    # --- Critic ---

    def _make_critic(self, critic_model: PreTrainedModel | None) -> Critic | None:
        path = self.args.critic_model_name_or_path
        if self.args.critic == "shared":
            critic = shared_critic(self._policy, detach=self.args.critic_detach)
            if path is not None:
                critic.take_up_head(local_folder(path))
            return critic
        if self.args.critic == "adapter":
            if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
                raise ValueError(
                    "`critic='adapter'` shares the policy's frozen base, whose weights FSDP and DeepSpeed ZeRO-3 split "
                    "over the processes and gather only where the policy itself runs. Use DDP (or ZeRO-2), or "
                    "`critic='shared'` or 'separate'."
                )
            weight = 0.0 if self.args.prefix_rewards else 1.0
            if path == "reward_model":
                index, path = next(iter(self._reward_adapters.items()), (0, None))
                weight *= self.reward_weights[index].item()
                if path is None:
                    raise ValueError(
                        "`critic_model_name_or_path='reward_model'` takes the critic from a reward adapter in "
                        "`reward_funcs`, given by its path or Hub id, and there is none. Pass one, or leave it unset."
                    )
            critic = critic_as_adapter(self._policy, path, weight)
            if self.args.disable_dropout:
                stop_dropout(critic)
            return critic
        source, weight = critic_model or path, 0.0 if self.args.prefix_rewards else 1.0
        if source == "reward_model":
            index, source = next(
                ((i, f) for i, f in enumerate(self.reward_funcs) if isinstance(f, PreTrainedModel)), (0, None)
            )
            weight *= self.reward_weights[index].item()
            if source is None:
                raise ValueError(
                    "`critic_model_name_or_path='reward_model'` takes the critic from a model in `reward_funcs`, but "
                    "none of them is a plain transformers model. Pass a path, or leave it unset to copy the policy."
                )
        if source is not None:
            # A policy in 4 bits is no model for the dtype of what is to be trained
            dtype = torch.float32 if is_quantized(self._policy) else self._policy.dtype
            critic = critic_from_model(source, dtype, self.args.trust_remote_code, weight)
            check_vocabulary(critic, self._policy)
        elif is_quantized(self._policy) or is_deepspeed_zero3_enabled():
            raise ValueError(
                "A separate critic cannot be copied from a policy that is quantized or sharded by ZeRO-3. Set "
                "`critic_model_name_or_path` to what it should start from, or use `critic='shared'`."
            )
        else:
            critic = critic_from_policy(self._policy)
        if self.args.disable_dropout:
            stop_dropout(critic)
        return critic.requires_grad_(True)

    def _set_head(self, critic: Critic) -> None:
        """Give the critic the head that this algorithm needs."""
        if not isinstance(critic.value_head, ValueHead):
            raise ValueError(
                f"`critic_model_name_or_path={self.args.critic_model_name_or_path!r}` holds a critic of Q(s, a), and "
                f"{type(self).__name__} needs one of V(s). Use `QActorCriticTrainer`, or leave it unset."
            )

    @property
    def _in_critic_warmup(self) -> bool:
        return self.state.global_step < self.args.critic_warmup_steps

    @property
    def companion(self):
        return self.critic

    @property
    def _companion_settings(self):
        return {"lr": self.args.critic_learning_rate}

    def _card_content(self):
        return policy_card(self)

    # --- Rollout ---

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        self._check_reward_models(inputs[0])
        if mode == "train":
            self._epochs_ended = False
            self.kl_controller.update()
        self._passes = []
        # The first rollout of all has its pass, which shows if the policy differs from what it trains as
        self._skips_pass = mode == "train" and self._first_epoch_scores and not self._is_first_update
        self._records_values = self._parent_scores and not self._skips_pass
        batch = super()._generate_and_score_completions(inputs)
        batch["scores"] = self._scores
        if not self.args.uses_raw_rewards:
            batch["scores"] = batch["advantages"].masked_fill(self._scores.isnan(), math.nan)
        if self._token_rewards is not None:
            missing = batch["completion_ids"].size(1) - self._token_rewards.size(1)
            batch["token_rewards"] = torch.nn.functional.pad(self._token_rewards, (0, missing))
        batch["terminated"] = self._terminated(batch)
        batch["completion_index"] = torch.arange(len(inputs), device=self._scores.device)
        self._log_rollout(batch, mode)
        if self.args.truncation == "bootstrap" and self._metrics[mode]["completions/clipped_ratio"][-1] == 1.0:
            warnings.warn(
                "Every completion of this rollout was cut. With `truncation='bootstrap'` none of them earns its score, "
                "so nothing is learned from the reward. Raise `max_completion_length`, or use `truncation='penalty'`.",
                stacklevel=2,
            )

        old_logps = batch.get("old_per_token_logps")
        logps, values = next((p for p in self._passes if p[0] is old_logps), (None, None))
        if logps is None and old_logps is not None:
            raise RuntimeError("TRL no longer passes on the log-probabilities of its scoring pass as they were.")
        if logps is None and self._needs_pass:
            spans_micro_batches = mode == "train" and self.args.steps_per_generation > 1
            if not (spans_micro_batches and self._has_batch_statistics):
                batch["advantages"] = None  # the training forward gives them
                return batch
            logps, values = self._score_rollout(batch)
        self._add_advantages(batch, logps, values)
        return batch

    @staticmethod
    def _own_tokens(batch) -> torch.Tensor:
        """`(B, T)` bool: the tokens the policy chose, of completions that have a score."""
        mask = batch["completion_mask"].bool() & ~batch["scores"].isnan().unsqueeze(1)
        return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask

    # --- Advantages ---

    def compute_advantages(
        self,
        rewards: torch.Tensor,
        values: torch.Tensor | None,
        mask: torch.Tensor,
        bootstrap: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Advantages of the policy and targets of the critic, `(B, T)` each, from the arguments (and in the terms) of
        [`~trl_ext.token_mdp.generalized_advantage_estimate`]. Override it for another estimator.
        """
        args = self.args
        lam_policy = args.lam if args.lam_policy is None else args.lam_policy
        lam_value = args.lam if args.lam_value is None else args.lam_value
        if args.length_adaptive_alpha is not None:
            lam_policy = token_mdp.length_adaptive_lambda(mask.sum(dim=1), args.length_adaptive_alpha)
        return token_mdp.decoupled_advantage_estimate(
            rewards, values, mask, args.gamma, lam_policy, lam_value, bootstrap
        )

    @torch.no_grad()
    def _add_advantages(self, batch, logps: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """
        Fill in `advantages`, `returns` and `values`, from what the critic said: `values` `(B, T+1, ...)` ends with that
        of the final state.
        """
        mode = "train" if self.model.training else "eval"
        mask = self._own_tokens(batch)
        scores, cut = batch["scores"].nan_to_num(), ~batch["terminated"]
        bootstrap = None
        if self.args.truncation == "bootstrap":
            lengths = batch["completion_mask"].sum(dim=1, keepdim=True)
            final = self._state_values(values).gather(1, lengths).squeeze(1)
            bootstrap = torch.where(cut, final, 0)
            scores = torch.where(cut, 0, scores)
        elif self.args.truncation == "penalty":
            scores = scores - self.args.missing_eos_penalty * cut
        rewards = token_mdp.place_on_last_token(scores, mask)
        if "token_rewards" in batch:
            rewards = rewards + token_mdp.carry_to_own_token(batch["token_rewards"], mask)
        if batch.get("ref_per_token_logps") is not None and logps is not None:
            ref_logps = batch["ref_per_token_logps"]
            rewards = token_mdp.kl_penalized(rewards, logps, ref_logps, mask, self.kl_controller.coef)
            self._log_kl(logps, ref_logps, mask, mode)

        # Detached: a view, kept in the rollout, would keep the forward's graph
        values = None if values is None else values[:, :-1].detach()
        advantages, returns = self.compute_advantages(rewards, values, mask, bootstrap)
        values = None if values is None else self._fitted(values)
        self._log_advantages(batch, advantages, returns, values, mask, mode)
        credit = {"rewards": rewards, "advantages": advantages, "returns": returns, "values": values}
        self._record_credit(batch, mask, logps, **credit)
        if self.args.whiten_advantages:
            _, mean, var = self._global_moments(advantages, mask)
            advantages = token_mdp.masked_whiten(advantages, mask, mean, var)
        batch["advantages"], batch["returns"], batch["values"] = advantages, returns, values

    @staticmethod
    def _state_values(values: torch.Tensor) -> torch.Tensor:
        """V(s_t), `(B, T+1)`, from what the critic said."""
        return values

    @staticmethod
    def _fitted(values: torch.Tensor) -> torch.Tensor:
        """What is fitted to the returns, `(B, T)`, from what the critic said."""
        return values

    def _global_moments(self, x: torch.Tensor, mask: torch.Tensor):
        """Count, mean and variance over the own tokens of all processes."""
        moments = self.accelerator.gather(token_mdp.masked_moments(x, mask).unsqueeze(0))
        return token_mdp.combine_moments(moments)

    # --- Update ---

    def _compute_loss(self, model, inputs):
        if "scores" not in inputs:  # of no rollout of this trainer's: the surrogate alone
            return super()._compute_loss(model, inputs)
        self._passes, self._records_values = [], True
        self._awaiting = inputs if inputs["advantages"] is None else None
        in_warmup = self._in_critic_warmup and self.model.training
        if self.critic is not None:
            self.critic.detach = self.args.critic_detach or in_warmup
        with self._kl_only_in_reward():
            loss = super()._compute_loss(model, inputs)
        logps, values = self._passes[-1]
        mask = self._own_tokens(inputs)
        if in_warmup:
            loss = 0 * loss
        if self.critic is not None:
            values = self._fitted(values[:, :-1])
            per_token_loss = value_loss(values, inputs["returns"], inputs["values"], self.args.cliprange_value)
            per_token_loss = torch.where(mask, per_token_loss, 0)
            loss = loss + self.args.vf_coef * per_token_loss.sum() / self._tokens_per_window(inputs)
        else:
            per_token_loss = None
        self._log_update(inputs, logps.detach(), values, per_token_loss, mask)
        if self.num_iterations > 1 and self.model.training:  # for the epochs to come, if the first one scores
            inputs.setdefault("old_per_token_logps", logps.detach())
        self._check_finite(loss, inputs)
        return loss

    @contextmanager
    def _kl_only_in_reward(self):
        """The parent's loss without its KL term, where the KL is already in the reward."""
        beta = self.beta
        self.beta = 0.0 if self.args.kl_in_reward else beta
        try:
            yield
        finally:
            self.beta = beta

    def _tokens_per_window(self, inputs) -> torch.Tensor:
        """
        Tokens per process over which an optimizer step averages: the normalizer of TRL's default loss, whatever
        `loss_type` is, so that the value loss does not depend on how the window is cut into micro-batches.
        """
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens

    def _check_finite(self, loss: torch.Tensor, inputs) -> None:
        if loss.isfinite():
            return
        prompts = self._tokenizer.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        raise FloatingPointError(
            f"The loss is {loss.item()} in the update after step {self.state.global_step}; training stops here and "
            "the last checkpoint is kept. Common causes: too high a learning rate, or fp16. The batch's prompts: "
            + "; ".join(repr(prompt[:80]) for prompt in prompts)
        )

    def training_step(self, model, inputs, num_items_in_batch):
        rollout_is_due = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if self._epochs_ended and not rollout_is_due:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._in_critic_warmup:
            # Without a gradient the optimizer passes them over; zeros would still decay weights and count as steps
            for name, parameter in self._policy.named_parameters():
                if not name.startswith(f"{CRITIC_NAME}."):
                    parameter.grad = None
        if self.args.target_kl is not None and self.accelerator.sync_gradients:
            kl_sum, count = self.accelerator.reduce(self._window_kl, reduction="sum").tolist()
            self._window_kl.zero_()
            if kl_sum > 1.5 * self.args.target_kl * max(count, 1):
                self._epochs_ended = True
                model.zero_grad()  # nor is the update made that was about to be (DeepSpeed has made it)
            self._metrics["train"]["target_kl_exceeded"].append(float(self._epochs_ended))
        return loss
