"""Checks of input that would fail late, or silently. Each error names the argument and the mend."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from typing import NoReturn

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from ..adapters.shared_base import base_of_adapter, is_adapter
from ..compat import get_config_model_id, is_async_callable
from ..models.quantization import is_quantized
from ..models.score_head import has_score_head
from .dense import described, is_finite


def check_critic_model(args, critic_model: PreTrainedModel | None) -> None:
    """Refuses a start of the critic where none is asked for, or another is."""
    if critic_model is not None and (args.critic != "separate" or args.critic_model_name_or_path is not None):
        raise ValueError(
            "`critic_model` is the start of a separate critic. Set `critic='separate'`, and do not set "
            "`critic_model_name_or_path` as well."
        )


def check_reference(args, model, peft_config) -> None:
    """Refuses a KL to a reference that nobody could load."""
    needs_reference = args.beta != 0.0 or args.kl_in_reward != 0.0
    is_full_model = isinstance(model, PreTrainedModel) and peft_config is None
    if needs_reference and is_full_model and not get_config_model_id(model.config):
        raise ValueError(
            "The KL penalty needs a reference, which is loaded from where `model` came from, but `model` was built "
            "in memory. Save it with `model.save_pretrained(path)` and pass the path."
        )


def check_base_for_vllm(model, args, quantization_config) -> None:
    """Refuses a policy in few bits, given so, loaded so, or stored so."""
    init_kwargs = args.model_init_kwargs or {}
    quantization_config = quantization_config or init_kwargs.get("quantization_config")
    if isinstance(model, str) and quantization_config is None:
        model = base_of_adapter(model)[0] if is_adapter(model) else model
        loading = {name: init_kwargs[name] for name in ("revision", "trust_remote_code") if name in init_kwargs}
        config = AutoConfig.from_pretrained(model, **{"trust_remote_code": args.trust_remote_code} | loading)
        quantization_config = getattr(config, "quantization_config", None)  # absent from other models
    if quantization_config is not None or (not isinstance(model, str) and is_quantized(model)):
        raise ValueError(
            "`use_vllm=True` merges the adapter into its base for every sync, which on a quantized base loses much of "
            "what it learned and wears the base. Set `use_vllm=False`, or load the base in bfloat16 (leave out "
            "`quantization_config`, or `--load_in_4bit`; of a checkpoint that is stored quantized, take the original)."
        )


def check_balance_tokens(args) -> None:
    """Refuses micro-batches of different sizes in several processes."""
    if args.balance_tokens and args.world_size > 1:
        raise ValueError(
            "`balance_tokens=True` gives micro-batches of different numbers of completions, and TRL gathers metrics "
            "of equally many from each process. Leave it out, or train in one process."
        )


def check_dataset_size(dataset: Dataset, prompts_per_rollout: int) -> None:
    """Refuses a dataset smaller than one rollout: incomplete rollouts are dropped, so it would train on nothing."""
    if len(dataset) < prompts_per_rollout:
        raise ValueError(
            f"`train_dataset` has {len(dataset)} prompts, but one rollout takes {prompts_per_rollout}, and incomplete "
            "rollouts are dropped: there would be no training step. Add prompts, raise `num_generations`, or lower "
            "`per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`."
        )


def check_completion_ids(completion_ids: list[list[int]], source: str) -> None:
    """Refuses empty completions: they have no action to give credit to."""
    for row, ids in enumerate(completion_ids):
        if len(ids) == 0:
            raise ValueError(
                f"{source} returned an empty completion (row {row} of the batch). A completion holds at least its "
                "end-of-sequence token; check the generation settings (e.g. stop strings, `max_completion_length`)."
            )


def check_prefix_rewards(reward_funcs: list, reward_processing_classes: list, tokenizer) -> None:
    """Refuses `prefix_rewards` where no reward model can score the policy's tokens one by one."""
    models = [
        (func, other)
        for func, other in zip(reward_funcs, reward_processing_classes, strict=True)
        if isinstance(func, torch.nn.Module)
    ]
    if not models:
        raise ValueError(
            "`prefix_rewards` has reward models score every prefix, and there is none in `reward_funcs`. Pass one, or "
            "remove it: functions return rewards of tokens by themselves."
        )
    for model, other in models:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if not has_score_head(model):
            raise ValueError(
                f"`prefix_rewards` needs a causal reward model with a `score` head, and {type(base).__name__} is none. "
                "Remove `prefix_rewards`, or pass another."
            )
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"`prefix_rewards` scores the policy's own tokens, and the reward model {type(base).__name__} has "
                "another vocabulary. Remove `prefix_rewards`, or pass a reward model of the policy's family."
            )


def check_turn_rewards(paying_environments: list[type], rollout_func: Callable | None) -> None:
    """Refuses `turn_rewards` where nobody could be asked."""
    if not paying_environments:
        raise ValueError(
            "`turn_rewards` asks the environment for its reward after every turn, and there is none with a method "
            "`get_reward`. Pass an `environment_factory` of such, or remove it."
        )
    if rollout_func is not None:
        raise ValueError(
            "`turn_rewards` asks the environment after every turn that the trainer generates, and `rollout_func` "
            "generates by itself. Remove one of them; a reward function may return one reward per token."
        )


def check_pretraining(trainer) -> None:
    """Refuses to pretrain a critic that is not there, is sharded, or reads what rollouts do not hold."""
    if trainer.critic is None:
        raise ValueError(
            f"{type(trainer).__name__} has no critic to pretrain with these settings. Use another algorithm, or "
            "`baseline='value'` of REINFORCE."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "FSDP and DeepSpeed shard the critic, and gather its weights only where the policy runs. Pretrain it in one "
            "process, or under DDP, save it with `save_model`, and start from there by `critic_model_name_or_path`."
        )
    if trainer._is_vlm or trainer.environment_factories is not None:
        raise ValueError(
            "Rollouts hold neither the images of their prompts nor what an environment has added to them, so the critic "
            "cannot read them again. Use `critic_warmup_steps`."
        )


def checked_rollout(rollout_func: Callable) -> Callable:
    """Returns a `rollout_func` that refuses an empty completion."""

    @functools.wraps(rollout_func)
    def rollout(*args, **kwargs):
        output = rollout_func(*args, **kwargs)
        check_completion_ids(output["completion_ids"], "`rollout_func`")
        return output

    return rollout


def check_rewards(
    rewards: Iterable | None, name: str, num_completions: int, totals: Callable[[list], list]
) -> list[float | None]:
    """
    Makes one finite number, or None for 'not applicable', of what a reward function returned for each completion. What
    TRL takes is taken (lists, tensors, arrays, series, generators); `totals` reads the items and sums up dense ones.

    Raises:
        TypeError: for no rewards at all (a number, a text, a dict, a coroutine that nobody awaits), and for an item that
            is none.
        ValueError: for None, another number of rewards, and rewards that are nan or infinite.
    """
    mend = "Return a list with one reward per completion."
    if rewards is None:
        raise ValueError(f"The reward function '{name}' returned None. {mend}")
    if inspect.iscoroutine(rewards):
        rewards.close()
        raise TypeError(
            f"The reward function '{name}' returned a coroutine, but it is no coroutine function, so nobody awaits it. "
            "Define it by `async def`, or return the rewards themselves."
        )
    has_no_order = isinstance(rewards, str | bytes | Mapping | Set)
    if has_no_order or not isinstance(rewards, Iterable) or getattr(rewards, "ndim", 1) == 0:
        raise TypeError(f"The reward function '{name}' returned {described(rewards)}. {mend}")
    rewards = list(rewards)
    if len(rewards) != num_completions:
        raise ValueError(
            f"The reward function '{name}' returned {len(rewards)} rewards, but {num_completions} were expected. {mend}"
        )
    rewards = totals(rewards)
    for row, reward in enumerate(rewards):
        if reward is not None and not is_finite(reward):
            raise ValueError(
                f"The reward function '{name}' returned {reward} for row {row} of the batch. Return a finite number, "
                "or None where it does not apply."
            )
    return rewards


def checked_reward(reward_func: Callable, name: str, totals: Callable[[list], list]) -> Callable:
    """`reward_func` (sync or async) with one finite number for each completion, or None, as [`check_rewards`] says."""
    if is_async_callable(reward_func):

        async def reward(*, completions, **kwargs):
            rewards = await reward_func(completions=completions, **kwargs)
            return check_rewards(rewards, name, len(completions), totals)

    else:

        def reward(*, completions, **kwargs):
            return check_rewards(reward_func(completions=completions, **kwargs), name, len(completions), totals)

    return reward


def refuse_loss(loss: float, step: int, prompts: list[str]) -> NoReturn:
    """Refuses to go on training with a loss that is nan or infinite."""
    raise FloatingPointError(
        f"The loss is {loss} in the update after step {step}; training stops here and the last checkpoint is kept. "
        "Common causes: too high a learning rate, or fp16. The batch's prompts: "
        + "; ".join(repr(prompt[:80]) for prompt in prompts)
    )
