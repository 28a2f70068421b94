r"""
[`ActorCriticTrainer`]: `GRPOTrainer` with token-level advantages from a critic.

The objective of the actor is TRL's surrogate (`loss_type`) with an advantage per token; the critic's is the squared
error to the lambda-return. With r_t from [`~trl_ext.token_mdp`] and A, G from generalized advantage estimation:

    L = L_surrogate(pi, A) + vf_coef * mean_t (V(s_t) - G_t)^2 / 2

The trainer's methods stand in the order in which TRL calls them, each before those that it calls itself. A batch is one
[`Rollout`]: completed by `_generate`, rewarded by `_calculate_rewards`, credited with advantages and returns as soon as
a forward has given what they take, and then trained on by `_compute_loss`. [`ForwardPlan`] says which forward that is.
"""

import asyncio
import functools
import math
import textwrap
import warnings
from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from trl import GRPOTrainer

from .. import token_mdp
from ..adapters.reward_adapters import split_reward_adapters
from ..adapters.reward_models import with_loaded_reward_models
from ..compat import (
    MULTIMODAL_KEYS,
    disable_gradient_checkpointing,
    enable_checkpointing,
    first_scoring_by,
    generating_by,
    requires_grad_kept,
    rewarded_by,
    scoring_answered,
    strip_images_from_messages,
    trainables_kept,
    with_reference,
    without_kl_in_loss,
    without_masking_cut,
)
from ..critic.critic import Critic
from ..critic.files import CRITIC_NAME, VALUE_HEAD_FILE
from ..critic.heads import ValueHead
from ..critic.start import start_critic
from ..models.companion import OF_COMPANION
from ..models.dropout import stop_dropout, warn_of_dropout
from ..models.reference import take_up_start
from ..packing.micro_batches import LengthBatches
from ..training.arguments import checked_args
from ..training.base import TrainerBase
from ..training.head_scoring import COMPARED_TEXT, score_as_the_model_does
from .baseline import Baseline, PastMean
from .card import policy_card
from .checkpoint import StartOfTraining, load_state, save_state
from .checks import (
    check_balance_tokens,
    check_base_for_vllm,
    check_completion_ids,
    check_critic_model,
    check_dataset_size,
    check_pretraining,
    check_reference,
    checked_rollout,
    refuse_loss,
)
from .compact import CompactForwards
from .config import ActorCriticConfig
from .episodes import read_episodes
from .forward import Forward, ForwardPlan
from .generation import Generation, engine_settings
from .notices import Notices
from .optimizer import Rest, after_warmup, clip, warn_of_schedule
from .pretraining import HEAD_RATE, CriticPretraining
from .prompts import Prompts, check_context, refuse_missing_prompt
from .recording import Recorder
from .reporting import (
    CompletionsTable,
    CutPrompts,
    Throughput,
    credit_metrics,
    kl_metrics,
    kl_sums,
    update_metrics,
)
from .rewards import ready_rewards
from .rollout import Completed, Credit, Rewarded, Rollout
from .sampling import warn_of_altered
from .stopping import StopStrings, end_tokens_of, ended_metrics, have_ended, without_cut
from .trust_region import TrustRegion
from .turns import Turns


logger = get_logger(__name__)

# Added to the root mean square that advantages are divided by, as TRL does: rounding errors stay small
SMALLEST_SCALE = 1e-4
# The default rate of the critic's own parameters, as a multiple of the policy's
CRITIC_RATE = 10.0


class ActorCriticTrainer(TrainerBase, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] with a critic. What changes with respect to the parent:

    - advantages are one per token, from generalized advantage estimation over the critic's values, not one per
      completion from its group; one completion per prompt is enough;
    - the critic's loss is added to the policy's, and the critic is saved beside the policy and restored with it;
    - the KL to the reference may be taken off the reward (`kl_in_reward`) instead of added to the loss;
    - padding, repeated prompts, positions without a token and completions that have ended are not run
      ([`packing`], [`~trl_ext.models.decoding`]);
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
    _has_critic = True  # False for an algorithm, or a setting of it, without one
    _reads_head = False  # True for an algorithm that computes logits from hidden states itself
    critic: Critic | None = None  # until `__init__` has made it, which looks for the model's companion before that
    turns: Turns | None = None  # made with `turn_rewards` alone
    stop_strings: StopStrings | None = None  # made where the engine stops at any
    _head_scoring: list | None = []  # the models whose own LM head scores; None until they have been compared
    train_sampler = None  # the last one; streams have none
    _evaluated_dataset = None  # the last one
    # The stages of the rollout under way, which TRL's hooks cannot hand to each other
    completed: Completed | None = None
    rewarded: Rewarded | None = None
    table: CompletionsTable | None = None
    _values: list[torch.Tensor] | None = None  # of the critic, in a forward that asks for them

    def __init__(
        self, model, reward_funcs=None, args=None, *other_args, critic_model: PreTrainedModel | None = None, **kwargs
    ):
        args = checked_args(args, type(self), model)
        check_critic_model(args, critic_model)
        check_balance_tokens(args)
        check_reference(args, model, kwargs.get("peft_config"))
        if args.use_vllm:
            check_base_for_vllm(model, args, kwargs.get("quantization_config"))
        if kwargs.get("rollout_func") is not None:
            kwargs["rollout_func"] = checked_rollout(kwargs["rollout_func"])
        reward_funcs, reward_adapters = split_reward_adapters(reward_funcs)
        reward_funcs, other_args, kwargs = with_loaded_reward_models(reward_funcs, args, other_args, kwargs)
        with with_reference(args):
            super().__init__(model, reward_funcs, args, *other_args, **kwargs)
        take_up_start(self.ref_model, model, self._is_sharded)
        self._stop_dropout()
        self._set_up_sampling()
        self._set_up_prompts()
        self.rewards = ready_rewards(self, reward_adapters)
        if args.turn_rewards:
            self.turns = Turns(self.rewards.environment_classes, self._run_coroutine)
        self._set_up_critic(critic_model, reward_adapters)
        self._set_up_rollouts()
        if self._is_vlm or not self._is_sharded:
            self._compare_heads(self._tokenizer(COMPARED_TEXT)["input_ids"])
        else:
            self._head_scoring = None  # until there is a text of every process
        self.add_callback(StartOfTraining(self))

    def _stop_dropout(self) -> None:
        """Stops dropout everywhere, where TRL stops modules of one kind; warns where it is to stay."""
        if self.args.disable_dropout:
            stop_dropout(self.model)
            if self.ref_model is not None:
                stop_dropout(self.ref_model)
        else:
            warn_of_dropout(self.model)
        for func in self.reward_funcs:
            if isinstance(func, torch.nn.Module):
                func.eval()  # one built in memory may come in training mode

    def _set_up_sampling(self) -> None:
        """Reads where the engine ends completions, and warns of what it does to the policy's distribution."""
        settings = engine_settings(self)
        ends = end_tokens_of(settings, self.eos_token_ids)
        if None in ends and self.rollout_func is None and not self.use_vllm:
            raise ValueError(
                "The policy's tokenizer has no end-of-sequence token to end completions with. Set `tokenizer.eos_token`, "
                "or name the tokens to stop at: `generation_kwargs={'eos_token_id': [...]}`."
            )
        self.eos_token_ids = ends
        strings = settings.get("stop") if self.use_vllm else settings.get("stop_strings")
        if strings:
            self.stop_strings = StopStrings(self._tokenizer, strings)
        if self.rollout_func is None and self.accelerator.is_main_process:
            self._warn_of_altered_sampling(settings)

    def _warn_of_altered_sampling(self, settings: dict) -> None:
        given = {} if self.use_vllm else self.generation_kwargs
        warn_of_altered(settings, self.temperature, given, self.use_vllm, self._corrects_sampling)

    @property
    def _is_sharded(self) -> bool:
        """Returns True if FSDP or DeepSpeed splits the weights over processes."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def _corrects_sampling(self) -> bool:
        """True if the parent compares log-probabilities of the engine that sampled with the policy's."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    def _set_up_prompts(self) -> None:
        """Refuses datasets that can be seen to be unusable, and finds how long prompts may be."""
        text_config = self.model.config.get_text_config()
        context = getattr(text_config, "max_position_embeddings", None)  # absent where positions are unbounded
        max_length = None if context is None else context - (self.max_completion_length or 1)
        check_context(max_length, self.max_completion_length or 1)
        self.prompts = Prompts(max_length, self._tokenizer.bos_token_id, is_cut=not self._is_vlm)
        if isinstance(self.train_dataset, Dataset):
            check_dataset_size(self.train_dataset, self.args.generation_batch_size // self.args.num_generations)
        self._check_prompts("train_dataset", self.train_dataset)
        self._check_prompts("eval_dataset", self.eval_dataset)

    def _check_prompts(self, name: str, datasets) -> None:
        """Refuses what can be seen to be unusable before anything is generated of it."""

        def lengths_of(prompts):
            return [len(ids) for ids in super(ActorCriticTrainer, self)._tokenize_prompts(prompts)[0]]

        # An environment adds to the prompt, images are tokens, and `rollout_func` may do without a template
        can_count = not self._is_vlm and self.environment_factories is None
        self.prompts.check(name, datasets, lengths_of if can_count else None, self.rollout_func is None)

    def _run_coroutine(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.async_loop).result()

    def _set_up_critic(self, critic_model: PreTrainedModel | None, reward_adapters: dict[int, str]) -> None:
        """Makes the critic, if the algorithm has one, a child of the policy."""
        Critic.detach_from(self._model)  # an earlier trainer's
        if not self._has_critic:
            return
        self.critic = start_critic(
            self._model,
            self.args,
            critic_model,
            self.reward_funcs,
            reward_adapters,
            self.reward_weights,
            self.is_fsdp_enabled,
        )
        self._set_head(self.critic)
        self.critic.attach_to(self._model)
        if self.critic.trunk is not None and self.args.gradient_checkpointing:
            # The parent asks only the policy itself, in which PEFT hides children of its wrapper
            enable_checkpointing(self.critic.trunk, self.args)
        if self.optimizer is not None:
            group = self.optimizer.param_groups[-1]
            group["params"].extend(self.critic.own_parameters())
            group[OF_COMPANION] = True
        warn_of_schedule(self.args, is_given=self.lr_scheduler is not None)

    def _set_head(self, critic: Critic) -> None:
        """Gives the critic the head that this algorithm needs."""
        if not isinstance(critic.value_head, ValueHead):
            raise ValueError(
                f"`critic_model_name_or_path={self.args.critic_model_name_or_path!r}` holds a critic of Q(s, a), and "
                f"{type(self).__name__} needs one of V(s). Use `QActorCriticTrainer`, or leave it unset."
            )

    def _set_up_rollouts(self) -> None:
        """Makes the objects that rollouts go through, and those that outlive them."""
        args, policy = self.args, self._model
        self._compares_in_groups = not args.uses_raw_rewards  # what is earned are TRL's advantages then
        self.notices = Notices()  # of options that are on and cannot be used
        # These three leave out what need not be computed: while sampling, in a loss's padding, in a scoring pass
        self.generation = Generation(
            policy,
            args,
            self.notices,
            use_vllm=self.use_vllm,
            has_rollout_func=self.rollout_func is not None,
            is_vlm=self._is_vlm,
            is_sharded=self._is_sharded,
        )
        self.length_batches = LengthBatches(
            args, self.notices, self.pad_to_multiple_of, self._loss_depends_on_micro_batches
        )
        self.compact = CompactForwards(
            policy, self.critic, args, self.accelerator, self.notices, self.num_generations, self._is_vlm
        )
        self.compact.check_always(balances_experts=self.aux_loss_enabled)
        # These outlive a rollout: the coefficient of the KL in the reward, the end of epochs by `target_kl`, the
        # weights of what returns are compared with, and the number of tokens
        self.kl_controller = token_mdp.KLController(args.kl_in_reward, args.kl_target, args.kl_horizon)
        self.trust_region = TrustRegion(args.target_kl, self.accelerator.device)
        self.baseline, self.num_tokens = Baseline(self.accelerator), PastMean()
        # These tell of rollouts, and decide nothing
        self.recorder = Recorder(args.output_dir, self.accelerator.process_index)
        self.throughput = Throughput()
        self.cut_prompts = CutPrompts(self.prompts.max_length, self.prompts.is_cut)

    @property
    def _loss_depends_on_micro_batches(self) -> bool:
        """True if the parent takes means, or quantiles, over the tokens of a micro-batch."""
        is_of_entropy = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        return self.loss_type == "bnpo" or is_of_entropy or self.aux_loss_enabled

    def _compare_heads(self, ids: list[int]) -> None:
        """Lets the model's own LM head score where TRL's fused one gives other log-probabilities of a text."""
        self._head_scoring = []
        if not self._is_vlm:
            self._head_scoring = score_as_the_model_does(
                self.model,
                [self._model] if self.ref_model is None else [self._model, self.ref_model],
                ids,
                temperature=self.temperature,
                is_half=self.args.bf16 or self.args.fp16 or self._model.dtype != torch.float32,
                is_sharded=self._is_sharded,
                reads_head=self._reads_head,
            )

    # --- A training begins ---

    def _get_train_sampler(self, dataset=None):
        self.train_sampler = super()._get_train_sampler(dataset)
        return self.train_sampler

    @property
    def companion(self):
        return self.critic

    @property
    def _companion_settings(self):
        rate = self.args.critic_learning_rate
        return {"lr": CRITIC_RATE * self.args.learning_rate if rate is None else rate}

    def create_scheduler(self, num_training_steps, optimizer=None):
        warmup, is_given = self.args.critic_warmup_steps, self.lr_scheduler is not None
        if not warmup or is_given:
            return super().create_scheduler(num_training_steps, optimizer)
        # The schedule is that of the steps in which the policy learns; there may be none
        scheduler = super().create_scheduler(max(num_training_steps - warmup, 1), optimizer)
        if isinstance(scheduler, LambdaLR):
            self.lr_scheduler = after_warmup(scheduler, warmup)
        return self.lr_scheduler

    def pretrain_critic(
        self, rollouts: Dataset, num_epochs: int = 20, learning_rate: float | None = None
    ) -> dict[str, float]:
        """
        Fits the critic's own parameters to stored rollouts, before training or in place of `critic_warmup_steps`; the
        policy stays as it is. See [`pretraining`].

        Args:
            rollouts ([`~datasets.Dataset`]): Completions that some training, of any algorithm, recorded with
                `save_rollouts=True`, such as `load_rollouts(output_dir)["train"]`, by a policy like this one, and with
                the same rewards.
            num_epochs (`int`, *optional*, defaults to `20`): Epochs at most. Training ends before them when the error on
                the tenth that is held out no longer falls, and the best weights are kept.
            learning_rate (`float`, *optional*): Rate of AdamW; by default that of training, but for a head on the
                policy's own states, which alone learns here, 1e-3.

        Returns:
            `dict[str, float]`: Numbers of `rollouts` and `epochs`, and `explained_variance_before` and
            `explained_variance`, of the returns that were held out. They are logged with the first update, as
            `pretraining/...`.

        Raises:
            ValueError: where there is no critic, or FSDP or DeepSpeed shards it; and for rollouts that do not fit.
        """
        check_pretraining(self)
        episodes = read_episodes(
            rollouts,
            self._tokenizer,
            self._model.get_input_embeddings().num_embeddings,
            lambda prompts: self._tokenize_prompts(prompts)[0],
            self._targets_of,
            self.args.truncation,
        )
        if learning_rate is None:
            learning_rate = HEAD_RATE if self.critic.trunk is None else self._companion_settings["lr"]
        pretraining = CriticPretraining(
            self._model, self.critic, self._fitted, self.args, self.accelerator, learning_rate
        )
        found = pretraining.fit(episodes, num_epochs)
        for name, value in found.items():
            self._metrics["train"][f"pretraining/{name}"].append(value)
        return found

    def begin_training(self, step: int) -> None:
        """Resets what outlives a rollout, before training from `step` on; a checkpoint may restore some of it."""
        self._step, self._buffered_inputs = 0, None
        self.trust_region = TrustRegion(self.args.target_kl, self.accelerator.device)
        self.baseline, self.num_tokens = Baseline(self.accelerator), PastMean()
        self.recorder.begin(step, moves_files=self.args.save_rollouts and self.args.should_save)

    # --- A step, within which the parent calls what follows ---

    def training_step(self, model, inputs, num_items_in_batch):
        rollout_is_due = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        if self.trust_region.has_ended and not rollout_is_due:  # this micro-batch is of the rollout that is done with
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._in_critic_warmup:
            # The optimizer passes over weights without a gradient; zeros would still decay them and count as steps
            for name, parameter in self._model.named_parameters():
                if not name.startswith(f"{CRITIC_NAME}."):
                    parameter.grad = None
        if self.args.target_kl is not None and self.accelerator.sync_gradients:
            if self.trust_region.at_step(self.accelerator):
                model.zero_grad()  # which cancels the update that was about to be made (DeepSpeed has made it)
            self._log_all({"target_kl_exceeded": float(self.trust_region.has_ended)})
        return loss

    @property
    def _clips_apart(self) -> bool:
        """
        True if policy and critic are clipped by norms of their own: else a critic that has no part in the policy would
        scale its steps. DeepSpeed clips in its engine, FSDP1 knows the norm of the whole alone, and Accelerate unscales
        gradients of fp16 under FSDP2 as often as it is asked for a part.
        """
        is_whole = self.is_fsdp_enabled and (not self.accelerator.is_fsdp2 or self.args.fp16)
        return self.critic is not None and not self.is_deepspeed_enabled and not is_whole

    def _clip_grad_norm(self, model):
        if not self._clips_apart:
            return super()._clip_grad_norm(model)
        norm = super()._clip_grad_norm(Rest(model, self.critic))  # before the critic's: it unscales all
        self._log_all({"critic/grad_norm": clip(self.critic.own_parameters(), self.args.max_grad_norm)})
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is not None or not self._clips_apart:
            return super()._get_grad_norm(model, grad_norm)
        norm = super()._get_grad_norm(Rest(model, self.critic))  # `max_grad_norm=0` clips nothing
        self._log_all({"critic/grad_norm": clip(self.critic.own_parameters(), math.inf)})
        return norm

    @property
    def _in_critic_warmup(self) -> bool:
        return self.state.global_step < self.args.critic_warmup_steps

    @property
    def _is_first_update(self) -> bool:
        """True until a training has made its first forward with gradient."""
        return self.is_in_train and self.model.training and self.state.global_step == 0 and self._step == 0

    def _prepare_inputs(self, generation_batch):
        earlier = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._buffered_inputs is not earlier:  # a new rollout
            self._buffered_inputs = self.length_batches.arranged(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    # --- A rollout ---

    def _generate_and_score_completions(self, inputs):
        is_training, is_first = self.model.training, self._is_first_update
        self._check_rows(inputs)
        if is_training:
            self.trust_region.begin_rollout()
            self.kl_controller.update()
            self._log_all(self.throughput.at_rollout())
        plan, forward = self.forward_plan, None

        def answer(*args, **kwargs):
            nonlocal forward
            if not plan.trl_may_score(is_training, is_first):
                return None, None, None
            forward = self.forward(*args, **kwargs)
            return forward[:3]

        scoring = first_scoring_by(self, answer) if plan.trl_scores else nullcontext()
        # The parent would mask what ended with a stop string, too
        masking = without_masking_cut(self) if self._masks_cut else nullcontext()
        # The parent may switch to the reference's adapter and back
        keeping = requires_grad_kept(self._model) if isinstance(self._model, PeftModel) else nullcontext()
        with scoring, masking, keeping:
            batch = super()._generate_and_score_completions(inputs)
        rollout = self._begun(batch)
        if self.critic is not None and is_training:
            forward = self._take_units(rollout, forward)
        if forward is None and plan.statistics_take_pass and is_training:
            forward = self._scored(batch)
        if forward is not None or not plan.credit_takes_forward:
            self.credited(rollout, forward).into(batch)
        return batch

    def _check_rows(self, inputs: list[dict]) -> None:
        if not all(example.get("prompt", True) for example in inputs):  # of a stream: others were looked at before
            is_training = self.model.training
            dataset = self.train_dataset if is_training else self._evaluated_dataset
            refuse_missing_prompt(dataset, "`train_dataset`" if is_training else "`eval_dataset`")
        self.rewards.check_row(inputs[0])

    @property
    def _masks_cut(self) -> bool:
        """True if completions that were cut are masked here, as the parent does not know which ended with a string."""
        return self.mask_truncated_completions and self.stop_strings is not None

    @property
    def forward_plan(self) -> ForwardPlan:
        """The table of which forward of the policy gives which result."""
        return ForwardPlan.of(
            self.args,
            corrects_sampling=self._corrects_sampling,
            takes_forward=self.critic is not None or self.args.kl_in_reward != 0.0,
            has_batch_statistics=self._has_batch_statistics,
        )

    @property
    def _has_batch_statistics(self) -> bool:
        """True if a completion's advantages depend on other completions of the generation batch."""
        return self.args.scale_advantages or self._has_baseline

    @property
    def _has_baseline(self) -> bool:
        """True if returns are compared with those of other completions, too."""
        return self.args.gate_critic

    def _generate(self, prompts):
        if self.turns is not None:
            self.turns.begin(len(prompts))
        # The generation engine is sent the policy's weights: those of the critic would be unknown to it
        with self._without_companion(), self._merged_adapter():
            outputs = super()._generate(prompts)
            prompt_ids, completion_ids, tool_mask, completions, *_ = outputs
            if self._head_scoring is None:
                self._compare_heads(prompt_ids[0] + completion_ids[0])
        if self.turns is not None:
            self.turns.ask(self.environments)
        is_chosen = tool_mask or [[1] * len(ids) for ids in completion_ids]
        end_tokens = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        has_ended = have_ended(prompt_ids, completion_ids, end_tokens, self.stop_strings)
        if self.stop_strings is not None:
            for name, value in ended_metrics(has_ended, is_chosen, self.accelerator).items():
                self._metrics[self._mode][name][-1] = value
        # A call that was not answered ends nothing
        awaits_answer = [bool(self.tools) and bool(messages[-1].get("tool_calls")) for messages in completions]
        has_ended = [ended and not awaits for ended, awaits in zip(has_ended, awaits_answer, strict=True)]
        if self.rollout_func is None:
            self._log_all(self.cut_prompts.at_rollout(self.prompts.num_too_long, len(prompts), self.accelerator))
        totals = [] if self.turns is None else self.turns.totals
        self.completed = Completed(prompt_ids, has_ended, is_chosen, totals)
        return outputs

    def _merged_adapter(self):
        """Merges the adapter into its base, where that can be, within the context in which completions are sampled."""
        return nullcontext() if self.rollout_func is not None else self.generation.merged_adapter()

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        return self.prompts.cut(prompt_ids), images, fields

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.turns is not None:
            self.turns.ask(self.environments)
        # For continuous batching the parent casts the model, and leaves it so
        keeping = trainables_kept(self.model) if self.use_transformers_continuous_batching else nullcontext()
        with keeping, self.generation.compact(), self._generate_knows_tokenizer():
            completion_ids, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.stop_strings is not None:
            completion_ids, logps = self.stop_strings.cut(prompt_ids, completion_ids, logps)
        check_completion_ids(completion_ids, "The generation engine")
        return completion_ids, logps

    def _generate_knows_tokenizer(self):
        """Gives `generate` the tokenizer that it reads stop strings by, within the context; the parent gives none."""
        if self.stop_strings is None:
            return nullcontext()
        return generating_by(
            self._model, lambda generate, *args, **kwargs: generate(*args, tokenizer=self._tokenizer, **kwargs)
        )

    # --- Its forwards ---

    def forward(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs) -> Forward:
        """Runs the policy, with the critic, on completions; the arguments are those of TRL's scoring pass."""
        # The critic values the states before each of the T tokens, and the one after the last
        self._values = None if self.critic is None else []
        try:
            outputs = self._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
            return Forward(*outputs, values=self._values[0] if self._values else None)
        finally:
            self._values = None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *args, **kwargs
    ):
        """Makes the parent's scoring pass, of policy or reference, without the work that can be left out."""
        scoring = functools.partial(self.compact, model, logits_to_keep, self._values)
        if batch_size is None or batch_size >= len(input_ids):
            return super()._get_per_token_logps_and_entropies(
                scoring, input_ids, attention_mask, logits_to_keep, batch_size, *args, **kwargs
            )
        rows = self.compact.order(input_ids, attention_mask, logits_to_keep)
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            scoring, input_ids[rows], attention_mask[rows], logits_to_keep, batch_size, *args, **kwargs
        )
        back = rows.argsort()
        if self._values:
            self._values[:] = [torch.cat(self._values)[back]]
        return logps[back], None if entropies is None else entropies[back], aux_loss

    def _forward_of(self, model, inputs: dict, **kwargs) -> Forward:
        """Runs the policy on TRL's batch."""
        return self.forward(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **kwargs,
            **{key: inputs[key] for key in MULTIMODAL_KEYS if key in inputs},
        )

    def _scored(self, inputs: dict) -> Forward:
        """Makes a pass without gradient over a rollout, as the parent does."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._forward_of(self.model, inputs, batch_size=self.args.per_device_train_batch_size)

    # --- Its rewards ---

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        asked, dense = self.rewards.asked_by_trl(
            self.reward_funcs,
            self.reward_func_names,
            self.reward_weights,
            completions,
            completion_ids_list,
            self.completed,
        )
        with rewarded_by(self, asked):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rewarded = self.rewards.rewarded(rewards_per_func, self.reward_weights, dense)
        if self.args.save_rollouts:
            self.recorder.begin_rollout(
                self.state.global_step,
                self.model.training,
                prompt=[strip_images_from_messages(prompt) for prompt in prompts],
                completion=[strip_images_from_messages(completion) for completion in completions],
                completion_ids=completion_ids_list,
                tokens=[self._tokenizer.convert_ids_to_tokens(ids) for ids in completion_ids_list],
                rewards=self.rewarded.named(self.reward_func_names),
            )
        return rewards_per_func

    def _begun(self, batch: dict) -> Rollout:
        """Makes a [`Rollout`] of TRL's batch, its rewards, and the ends of its completions."""
        terminated = torch.tensor(self.completed.has_ended, device=batch["completion_ids"].device)
        if self._masks_cut:
            batch |= without_cut(batch, terminated, self.accelerator)
        rewards = self.rewarded.rewards
        if self._compares_in_groups:  # then the parent's advantages are what is earned
            rewards = batch["advantages"].masked_fill(rewards.isnan(), math.nan)
        rollout = Rollout.begun(batch, rewards, self.rewarded.token_rewards, terminated)
        self._log_rollout(rollout, batch["num_items_in_batch"])
        if self.model.training:
            # Losses that are divided by the number of tokens are so by that of past rollouts: divided by its own, a
            # rollout of few tokens would weigh more, and whatever is added to all rewards would pay for short texts
            num_tokens = batch["num_items_in_batch"].float()
            batch["num_items_in_batch"] = self.num_tokens.before(num_tokens, learns=True)
        return rollout

    def _take_units(self, rollout: Rollout, forward: Forward | None) -> Forward | None:
        """
        Gives the critic the units of the rewards, before the rollout's first forward with gradient, and returns the one
        that the parent asked for before there were rewards, with values in these units.
        """
        head = self.critic.value_head
        keeps_weights = self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2)
        if keeps_weights and head.has_units:
            return forward  # DeepSpeed and FSDP1 have weights of their own, and would undo the change
        for module in self._model.modules():  # FSDP2 leaves whole weights in place of its own, after a forward
            if isinstance(module, FSDPModule):
                module.reshard()
        rewards = self._rewards_of(rollout)
        count, mean, var = self._global_moments(self.returns_of(rewards, rollout.chosen, None), rollout.chosen)
        if count == 0:  # nothing was scored
            return forward
        old_mean, old_std = head.mean.clone(), head.std.clone()
        begins = head.take_units(mean, var)
        if forward is None or not begins:
            return forward
        return forward._replace(values=head.mean + head.std * (forward.values - old_mean) / old_std)

    def _log_rollout(self, rollout: Rollout, num_tokens: torch.Tensor) -> None:
        metrics, num_rows = self._metrics[self._mode], len(rollout.rewards)
        if (self.num_generations if self.model.training else self.num_generations_eval) == 1:
            metrics.pop("frac_reward_zero_std", None)  # groups of one have no spread
        if self.log_completions:
            self.table = CompletionsTable(self._logs, num_rows * self.accelerator.num_processes)
        if self.model.training:
            self.throughput.num_tokens = num_tokens
        if self.args.truncation == "bootstrap" and metrics["completions/clipped_ratio"][-1] == 1.0:
            warnings.warn(
                "Every completion of this rollout was cut. With `truncation='bootstrap'` none of them earns its score, "
                "so nothing is learned from the reward. Raise `max_completion_length`, or use `truncation='penalty'`.",
                stacklevel=2,
            )

    # --- Its credit ---

    @torch.no_grad()
    def credited(self, rollout: Rollout, forward: Forward | None) -> Rollout:
        """Returns the rollout with its [`Credit`], from a forward of the policy if that takes one."""
        logps, values = (None, None) if forward is None else (forward.logps, forward.values)
        mask, bootstrap = rollout.chosen, None
        if self.args.truncation == "bootstrap":
            lengths = rollout.completion_mask.sum(dim=1, keepdim=True)
            final_values = self._state_values(values).gather(1, lengths).squeeze(1)
            bootstrap = torch.where(rollout.terminated, 0, final_values)
        rewards = self._rewards_of(rollout)
        if rollout.ref_logps is not None and logps is not None:
            rewards = token_mdp.kl_penalized(rewards, logps, rollout.ref_logps, mask, self.kl_controller.coef)
            self._observe_kl(rollout, logps)

        # Detached: a view, kept in the rollout, would keep the forward's graph
        values = None if values is None else values[:, :-1].detach()
        credit = self._estimated(rollout, rewards, values, bootstrap)
        rollout = replace(rollout, credit=credit)
        self._log_all(credit_metrics(credit, mask, self.accelerator))
        if self.log_completions:
            self.table.add(rollout, self._tokenizer, self.accelerator)
        if self.args.save_rollouts:
            self.recorder.add_credit(rollout, rewards)
            if logps is not None:
                self.recorder.add_logps(rollout, logps)
        if self.args.scale_advantages:
            _, mean_square, _ = self._global_moments(credit.advantages.square(), mask)
            credit = credit.scaled(1 / (mean_square.sqrt() + SMALLEST_SCALE))
        return replace(rollout, credit=credit)

    def _rewards_of(self, rollout: Rollout) -> torch.Tensor:
        """Returns the rewards of tokens, `(B, T)`, before any KL."""
        return token_mdp.rewards_of_completions(
            rollout.rewards,
            rollout.terminated,
            rollout.chosen,
            self.args.truncation,
            self.args.missing_eos_penalty,
            rollout.token_rewards,
        )

    @staticmethod
    def _state_values(values: torch.Tensor) -> torch.Tensor:
        """Picks V(s_t), `(B, T+1)`, out of the critic's values."""
        return values

    def _estimated(
        self, rollout: Rollout, rewards: torch.Tensor, values: torch.Tensor | None, bootstrap: torch.Tensor | None
    ) -> Credit:
        """Estimates the credit of tokens, with the critic's values as far as they are of use."""
        baseline = self._baseline_of(rollout, rewards, values, bootstrap)
        advantages, returns = self.compute_advantages(rewards, baseline, rollout.chosen, bootstrap)
        return Credit(advantages, returns, values)

    def _baseline_of(
        self, rollout: Rollout, rewards: torch.Tensor, values: torch.Tensor | None, bootstrap: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Returns the baseline of each token, `(B, T)`, from state values and the returns of other completions."""
        if not self._has_baseline:
            return values
        returns = self.returns_of(rewards, rollout.chosen, bootstrap)
        is_training = self.model.training
        group_size = self.num_generations if is_training else self.num_generations_eval
        baseline, metrics = self.baseline(returns, values, rollout.chosen, rollout.index, group_size, is_training)
        self._log_all(metrics)
        return baseline

    def returns_of(self, rewards: torch.Tensor, mask: torch.Tensor, bootstrap: torch.Tensor | None) -> torch.Tensor:
        """Returns what was earned from each token on, `(B, T)`, by sampling alone."""
        return token_mdp.discounted_returns(rewards, mask, self.args.gamma, bootstrap)

    def _targets_of(self, rewards: torch.Tensor, mask: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        """Returns what the critic is fitted to where nothing is known but what was sampled, `(B, T)`."""
        return self.returns_of(rewards, mask, None)

    def compute_advantages(
        self,
        rewards: torch.Tensor,
        values: torch.Tensor | None,
        mask: torch.Tensor,
        bootstrap: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Estimates advantages of the policy and targets of the critic, `(B, T)` each, from the arguments (and in the
        terms) of [`~trl_ext.token_mdp.generalized_advantage_estimate`]. Override this for another estimator.

        `values` are the critic's as far as they have explained returns so far, blended with the mean returns of other
        completions (see [`~trl_ext.token_mdp.baseline`]); the critic's own with `gate_critic=False`.
        """
        args = self.args
        lam_policy = args.lam if args.lam_policy is None else args.lam_policy
        lam_value = args.lam if args.lam_value is None else args.lam_value
        if args.length_adaptive_alpha is not None:
            lam_policy = token_mdp.length_adaptive_lambda(mask.sum(dim=1), args.length_adaptive_alpha)
        return token_mdp.decoupled_advantage_estimate(
            rewards, values, mask, args.gamma, lam_policy, lam_value, bootstrap
        )

    @staticmethod
    def _fitted(values: torch.Tensor) -> torch.Tensor:
        """Picks the values that are fitted to the returns, `(B, T)`, out of the critic's."""
        return values

    def _observe_kl(self, rollout: Rollout, logps: torch.Tensor) -> None:
        sums = kl_sums(rollout, logps, self.accelerator)
        self._log_all(kl_metrics(sums))
        if self.args.kl_in_reward:
            self._log_all({"kl/coef": self.kl_controller.coef})
        if self.model.training and not self._in_critic_warmup:
            self.kl_controller.observe(sums["k1"], int(sums["completions"]))

    def _global_moments(self, x: torch.Tensor, mask: torch.Tensor):
        """Returns count, mean and variance of `x` `(B, T)` over the chosen tokens of all processes."""
        return token_mdp.moments_of_all([x], mask, self.accelerator.gather)[0]

    # --- The loss ---

    def _compute_loss(self, model, inputs):
        rollout, in_warmup = Rollout.of(inputs), self._in_critic_warmup and self.model.training
        if rollout is None:  # of no rollout of this trainer's: the surrogate alone
            return super()._compute_loss(model, inputs)
        if self.critic is not None:
            self.critic.detach = self.args.critic_detach or in_warmup
        forward = self._forward_of(model, inputs, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled)
        if rollout.credit is None:
            rollout = self.credited(rollout, forward)
            rollout.into(inputs)
        kl_in_loss = without_kl_in_loss(self) if self.args.kl_in_reward else nullcontext()
        with scoring_answered(self, forward[:3]), kl_in_loss:
            loss = super()._compute_loss(model, inputs)
        if in_warmup:
            loss = 0 * loss
        loss, value_losses = self._with_critic_loss(loss, rollout, forward, self._tokens_per_window(inputs))
        self._end_update(rollout, forward, value_losses)
        if self.num_iterations > 1 and self.model.training:  # for the epochs to come, if the first one scores
            inputs.setdefault("old_per_token_logps", forward.logps.detach())
        if not loss.isfinite():
            prompts = self._tokenizer.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
            refuse_loss(loss.item(), self.state.global_step, prompts)
        return loss

    def _with_critic_loss(
        self, loss: torch.Tensor, rollout: Rollout, forward: Forward, num_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Adds the critic's loss to the policy's.

        Returns:
            `tuple`: The sum, and the critic's loss `(B, T)` by itself, 0 where no token was chosen; None without a
            critic.
        """
        if self.critic is None:
            return loss, None
        values, credit = self._fitted(forward.values[:, :-1]), rollout.credit
        losses = token_mdp.value_loss(values, credit.returns, credit.values, self.args.cliprange_value)
        losses = torch.where(rollout.chosen, losses, 0) / self.critic.value_head.std.square()
        return loss + self.args.vf_coef * losses.sum() / num_tokens, losses

    def _tokens_per_window(self, inputs) -> torch.Tensor:
        """
        Counts the tokens per process over which an optimizer step averages: the normalizer of TRL's default loss,
        whatever `loss_type` is, so that the value loss does not depend on how the window is cut into micro-batches.
        """
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens

    def _end_update(self, rollout: Rollout, forward: Forward, value_losses: torch.Tensor | None) -> None:
        """Logs and records what a forward with gradient has shown, and tells the trust region."""
        logps = forward.logps.detach()
        values = None if self.critic is None else self._fitted(forward.values[:, :-1])
        sums, metrics = update_metrics(
            rollout, logps, values, value_losses, self.args, self.accelerator, self._is_first_update
        )
        self._log_all(metrics)
        if self.args.target_kl is not None and self.model.training:
            self.trust_region.observe(sums["approx_kl"], sums["tokens"])
        if self.args.save_rollouts:
            self.recorder.add_logps(rollout, logps)  # where no estimator took them

    # --- Metrics ---

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log_all(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[self._mode][name].append(value)

    # --- Evaluation ---

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        self._check_prompts("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluated_dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self.recorder.begin_evaluation(metric_key_prefix)
        return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)

    # --- Checkpoints and the card ---

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        save_state(self, output_dir)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_state(self, checkpoint)

    def state_of_rollouts(self) -> dict:
        """Returns what is remembered of past rollouts, for a checkpoint."""
        # Sharded weights are restored by FSDP, which knows nothing of the units that they are in
        units = {} if self.critic is None else self.critic.value_head.units
        return {"baseline": self.baseline.state_dict(), "num_tokens": self.num_tokens.value, "units": units}

    def load_state_of_rollouts(self, state: dict) -> None:
        """Takes up what [`state_of_rollouts`] has returned."""
        self.baseline.load_state_dict(state["baseline"])
        self.num_tokens.value = state["num_tokens"]
        if self.critic is not None:
            self.critic.value_head.units = state["units"]

    def _card_content(self):
        return policy_card(self)
