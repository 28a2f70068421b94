"""How [`ActorCriticTrainer`] generates: TRL's ways, with the plain policy, checked, and turn by turn."""

import asyncio
import functools
import inspect
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel

from ..adapters.merging import can_merge, merged
from ..adapters.precision import trainables_kept
from ..models.decoding import decode, settings_of, why_not_decode
from ..models.quantization import is_quantized
from .checks import check_completion_ids
from .dense import described, number_of
from .prompts import check_prompt_ids, check_prompts, cut_to_context, named_datasets, refuse_missing_prompt


class PolicyGenerationMixin:
    """
    Generates with the policy alone, its adapter merged where that is exact to undo, and keeps what the rest of the
    rollout needs to know of its turns: `_tool_mask`, `_turn_totals` (what each environment's reward was before the
    first turn and after each) and `_awaits_answer` (which completions end in a call that was not answered).
    """

    _merges = None  # whether to merge the adapter for generation, until the first one

    _num_cut_prompts = 0  # of the rollout under way
    _has_cut_prompts = False  # in any rollout yet
    _evaluated_dataset = ()  # by the evaluation under way

    # --- Prompts ---

    def _check_prompts(self, name: str, datasets) -> None:
        """Refuse what can be seen to be unusable before anything is generated of it."""

        def lengths_of(prompts):
            return [len(ids) for ids in super(PolicyGenerationMixin, self)._tokenize_prompts(prompts)[0]]

        for dataset_name, dataset in named_datasets(name, datasets):
            # An environment adds to the prompt, images are tokens, and `rollout_func` may do without a template
            is_text = "prompt" in dataset.column_names and len(dataset) > 0 and isinstance(dataset[0]["prompt"], str)
            is_as_given = not self._is_vlm and self.environment_factories is None
            can_count = is_as_given and (is_text or self.rollout_func is None)
            check_prompts(dataset, dataset_name, lengths_of if can_count else None, self.max_prompt_length)

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        self._check_prompts("eval_dataset", eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self._evaluated_dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        return super().get_eval_dataloader(eval_dataset)

    def _generate_and_score_completions(self, inputs):
        if not all(example.get("prompt", True) for example in inputs):  # of a stream: others were looked at before
            is_training = self.model.training
            dataset = self.train_dataset if is_training else self._evaluated_dataset
            refuse_missing_prompt(dataset, "`train_dataset`" if is_training else "`eval_dataset`")
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        check_prompt_ids(prompt_ids)
        limit = self.max_prompt_length
        self._num_cut_prompts = sum(limit is not None and len(ids) > limit for ids in prompt_ids)
        if self._num_cut_prompts and not self._is_vlm:  # placeholders of images cannot be cut
            prompt_ids = [cut_to_context(ids, limit, self._tokenizer.bos_token_id) for ids in prompt_ids]
        return prompt_ids, images, fields

    # --- Completions ---

    def _generate(self, prompts):
        self._turn_totals = [[] for _ in prompts]
        # The generation engine is sent the policy's weights: those of the critic would be unknown to it
        with self._without_companion(), self._merged_adapter():
            outputs = super()._generate(prompts)
        _, completion_ids, tool_mask, completions, *_ = outputs
        self._ask_environments()
        self._tool_mask = tool_mask or [[1] * len(ids) for ids in completion_ids]
        self._awaits_answer = [bool(self.tools) and bool(messages[-1].get("tool_calls")) for messages in completions]
        return outputs

    def _generate_single_turn(self, *args, **kwargs):
        self._ask_environments()
        # For continuous batching the parent casts the model, and leaves it so
        keeping = trainables_kept(self.model) if self.use_transformers_continuous_batching else nullcontext()
        with keeping, self._compact_generate():
            outputs = super()._generate_single_turn(*args, **kwargs)
        check_completion_ids(outputs[0], "The generation engine")
        return outputs

    @contextmanager
    def _compact_generate(self):
        """The parent's `generate` is [`decoding.decode`] where that does the same."""
        if not self.args.compact_generation or self.use_vllm or self.use_transformers_continuous_batching:
            yield
            return
        generate = self._policy.generate
        reason = None
        if "generate" in vars(self._policy):
            reason = "a `generate` was put on the policy, by you or, to mask what is sampled, by NLPO"
        elif self._is_vlm:
            reason = "the policy takes images"
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "FSDP or DeepSpeed has processes run equally many forwards, and their completions end apart"
        if reason is not None:
            self._say_not_compact(reason)
            yield
            return

        @functools.wraps(generate)
        def compact(*, generation_config, **model_inputs):
            settings = settings_of(self._policy, generation_config)
            reason = why_not_decode(self._policy, settings, model_inputs)
            if reason is None:
                return decode(self._policy, **model_inputs, settings=settings)
            self._say_not_compact(reason)
            return generate(generation_config=generation_config, **model_inputs)

        self._policy.generate = compact
        try:
            yield
        finally:
            del self._policy.generate

    def _say_not_compact(self, reason: str) -> None:
        self._say_unused(
            "compact_generation",
            reason,
            "`generate` reads a prompt once for each completion and runs completions that have ended: rollouts take "
            "longer, up to twice as long where lengths differ",
            "Remove what stands against it, or set `compact_generation=False` to be told no more.",
        )

    # --- The adapter ---

    def _merged_adapter(self):
        """Generation runs no adapter layers, where merging is exact to undo; vLLM merges for itself."""
        if self._merges is None:
            self._merges = self._should_merge()
            self._base_weights = {}  # kept while the adapter is merged into them
        return merged(self._policy, self._base_weights) if self._merges else nullcontext()

    def _should_merge(self) -> bool:
        if self.use_vllm or self.rollout_func is not None:  # then it is not generated here
            return False
        is_wanted = self.args.generate_merged
        if is_wanted is None:  # where rounding the sum loses nothing of the adapter
            is_wanted = self._policy.dtype == torch.float32
        reason = self._why_not_merge() if is_wanted else None
        if self.args.generate_merged and reason is not None:
            self._say_not_merged(reason)
        return is_wanted and reason is None

    def _why_not_merge(self) -> str | None:
        if not isinstance(self._policy, PeftModel):
            return "the policy has no adapter"
        if self._policy.active_peft_config.is_prompt_learning:
            return "virtual tokens cannot be merged"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "FSDP or DeepSpeed shards the base"
        if is_quantized(self._policy):
            return "a base in few bits cannot hold what an adapter adds to it"
        if not can_merge(self._policy):
            return "the adapter cannot be merged, or is on weights that another module shares"
        return None

    def _say_not_merged(self, reason: str) -> None:
        self._say_unused(
            "generate_merged",
            reason,
            "where the policy has an adapter, its layers are run for every token that is generated",
            "Leave `generate_merged` unset, which merges where that is possible.",
        )

    # --- Turns ---

    def _ask_environments(self) -> None:
        """Before each turn, and after the last one: what would each environment's reward be now?"""
        if not self.turn_rewards:
            return
        for environment, totals in zip(self.environments, self._turn_totals, strict=True):
            if type(environment) not in self._paying_environments:
                continue
            total = environment.get_reward()
            if inspect.isawaitable(total):
                total = asyncio.run_coroutine_threadsafe(total, self.async_loop).result()
            try:
                totals.append(None if total is None else number_of(total))
            except TypeError:
                raise TypeError(
                    f"`get_reward` of the environment {type(environment).__name__} returned {described(total)}. With "
                    "`turn_rewards` it is asked before the first turn and after each, and must return a number: the "
                    "reward up to then, or None while there is none."
                ) from None
