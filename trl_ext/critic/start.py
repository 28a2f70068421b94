"""The starts of a critic: the policy, its base, a reward model, or a critic that was saved."""

import copy
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, load_peft_weights
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GenericForSequenceClassification

from ..adapters.reward_adapters import reward_model_on_base
from ..adapters.shared_base import adapter_like, frozen_base
from ..compat import keep_4bit_unpacked
from ..models.dropout import stop_dropout
from ..models.quantization import is_quantized
from .critic import Critic, hidden_size_of
from .files import ADAPTER_CONFIG, ADAPTER_FILES, ADAPTER_NAME, CRITIC_NAME, VALUE_HEAD_FILE, local_folder


def start_critic(
    policy: PreTrainedModel | PeftModel,
    args,
    critic_model: PreTrainedModel | None,
    reward_funcs: list,
    reward_adapters: dict[int, str],
    reward_weights: torch.Tensor,
    is_fsdp: bool = False,
) -> Critic:
    """
    Makes the critic that a configuration asks for.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): The policy.
        args ([`ActorCriticConfig`]): The configuration; `critic`, and `critic_model_name_or_path`, say what is made.
        critic_model (`PreTrainedModel`, *optional*): The start of a separate critic.
        reward_funcs (`list`): Functions and models, one of which may be the start.
        reward_adapters (`dict[int, str]`): Folders or Hub ids of those that are adapters, by their index.
        reward_weights (`torch.Tensor` of shape `(N,)`): Weights of `reward_funcs`.
        is_fsdp (`bool`, *optional*, defaults to `False`): FSDP shards the policy.

    Raises:
        ValueError: for a start that is not there, or from which no critic can be made.
    """
    path = args.critic_model_name_or_path
    # With `prefix_rewards` the rewards that are left sum to no score, and the critic starts at 0
    weight = 0.0 if args.prefix_rewards else 1.0
    if args.critic == "shared":
        critic = shared_critic(policy, detach=args.critic_detach)
        if path is not None:
            critic.take_up_head(local_folder(path))
        return critic
    if args.critic == "adapter":
        if is_fsdp or is_deepspeed_zero3_enabled():
            raise ValueError(
                "`critic='adapter'` shares the policy's frozen base, whose weights FSDP and DeepSpeed ZeRO-3 split "
                "over the processes and gather only where the policy itself runs. Use DDP (or ZeRO-2), or "
                "`critic='shared'` or 'separate'."
            )
        if path == "reward_model":
            if not reward_adapters:
                raise ValueError(
                    "`critic_model_name_or_path='reward_model'` takes the critic from a reward adapter in "
                    "`reward_funcs`, given by its path or Hub id, and there is none. Pass one, or leave it unset."
                )
            index, path = next(iter(reward_adapters.items()))
            weight *= reward_weights[index].item()
        critic = critic_as_adapter(policy, path, weight)
    else:
        source = critic_model or path
        if source == "reward_model":
            models = [(i, func) for i, func in enumerate(reward_funcs) if isinstance(func, PreTrainedModel)]
            if not models:
                raise ValueError(
                    "`critic_model_name_or_path='reward_model'` takes the critic from a model in `reward_funcs`, but "
                    "none of them is a plain transformers model. Pass a path, or leave it unset to copy the policy."
                )
            index, source = models[0]
            weight *= reward_weights[index].item()
        critic = separate_critic(policy, source, weight, args.trust_remote_code)
    if args.disable_dropout:
        stop_dropout(critic)
    return critic


def separate_critic(
    policy: PreTrainedModel | PeftModel,
    source: PreTrainedModel | str | None,
    reward_weight: float = 1.0,
    trust_remote_code: bool = False,
) -> Critic:
    """Makes a critic with a trunk of its own, from `source` (see [`critic_from_model`]) or as a copy of the policy."""
    if source is not None:
        # A policy in 4 bits is no model for the dtype of what is to be trained
        dtype = torch.float32 if is_quantized(policy) else policy.dtype
        critic = critic_from_model(source, dtype, trust_remote_code, reward_weight)
        check_vocabulary(critic, policy)
    elif is_quantized(policy) or is_deepspeed_zero3_enabled():
        raise ValueError(
            "A separate critic cannot be copied from a policy that is quantized or sharded by ZeRO-3. Set "
            "`critic_model_name_or_path` to what it should start from, or use `critic='shared'`."
        )
    else:
        critic = critic_from_policy(policy)
    return critic.requires_grad_(True)


def shared_critic(model: PreTrainedModel | PeftModel, detach: bool = False) -> Critic:
    """Makes a critic on the trunk of `model` that starts at V = 0."""
    return Critic(hidden_size_of(model), detach=detach)


def critic_as_adapter(
    model: PreTrainedModel | PeftModel, path: str | None = None, reward_weight: float = 1.0
) -> Critic:
    """
    Makes a critic with an adapter of its own on the frozen base of `model`, of the policy adapter's kind and size.

    Args:
        model (`PeftModel`): The policy.
        path (`str`, *optional*): Folder or Hub id of the start, in place of V = 0: a trained policy with such a critic
            beside it, or a reward adapter on the same base, whose score head becomes the value head.
        reward_weight (`float`, *optional*, defaults to `1.0`): Factor of a reward model's score, see
            [`critic_from_model`].
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "`critic='adapter'` puts a second adapter on the policy's frozen base, and this policy has none. Pass a "
            "`peft_config` such as `LoraConfig(target_modules='all-linear')`, or use `critic='shared'` or 'separate'."
        )
    base = frozen_base(model)
    if path is None:
        return Critic(hidden_size_of(model), trunk=adapter_like(model, base))
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=ADAPTER_FILES))
    if (folder / CRITIC_NAME / ADAPTER_NAME).is_dir():
        return read_adapter_critic(model, base, folder / CRITIC_NAME, is_trainable=True)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{path} holds neither a critic that is an adapter, beside a policy, nor a reward adapter. Pass another "
            "`critic_model_name_or_path`, or leave it unset to start at V = 0."
        )
    return critic_from_reward_adapter(model, base, str(folder), reward_weight)


def read_adapter_critic(policy: PeftModel, base: PreTrainedModel, folder: Path, is_trainable: bool = False) -> Critic:
    """Loads the critic whose adapter and head lie in `folder` onto the policy's base."""
    trunk = PeftModel.from_pretrained(base, folder / ADAPTER_NAME, is_trainable=is_trainable)
    critic = Critic(hidden_size_of(policy), trunk=trunk)
    critic.take_up_head(folder)
    return critic


@torch.no_grad()
def critic_from_reward_adapter(
    policy: PeftModel, base: PreTrainedModel, path: str, reward_weight: float = 1.0
) -> Critic:
    """Makes a critic on the policy's base of the reward adapter at `path`: V of a whole text is its reward."""
    reward_model = reward_model_on_base(policy, path)
    if reward_model is None:
        raise ValueError(
            f"The reward adapter {path} was trained on another base than the policy's, so the critic cannot start from "
            "it. Pass another `critic_model_name_or_path`, or leave it unset to start at V = 0."
        )
    critic = Critic(hidden_size_of(policy), trunk=adapter_like(reward_model, base))
    source = reward_model.get_base_model().base_model
    for name, parameter in critic.trunk.get_base_model().named_parameters():
        if parameter.requires_grad:
            parameter.copy_(source.get_parameter(name))
    score = load_peft_weights(path, device="cpu")["base_model.model.score.weight"]
    critic.value_head.take_up(reward_weight * score.to(critic.value_head.weight.device))
    return critic


def critic_from_policy(model: PreTrainedModel | PeftModel) -> Critic:
    """Makes a separate critic whose trunk is a copy of the policy's (adapters merged), at V = 0."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"A separate critic cannot be copied from a policy under {model.active_peft_config.peft_type.value}, "
            "whose prompt is no weight of the model. Set `critic_model_name_or_path`, or use `critic='shared'`."
        )
    copied = copy.deepcopy(model)
    if isinstance(copied, PeftModel):
        copied = copied.merge_and_unload()
    return Critic(hidden_size_of(model), trunk=copied.base_model)


def critic_from_model(
    source: str | PreTrainedModel, dtype: torch.dtype, trust_remote_code: bool = False, reward_weight: float = 1.0
) -> Critic:
    """
    Makes a separate critic of `dtype` from a model or its path or Hub id: a folder with a separate critic (trunk and head
    are taken up), a reward model (its score head becomes the value head, Ouyang et al. 2022), or any causal model
    (V starts at 0).

    Args:
        source (`str` or `PreTrainedModel`): The model.
        dtype (`torch.dtype`): Type of the critic's weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`): True lets code in its repository run.
        reward_weight (`float`, *optional*, defaults to `1.0`):
            Factor of a reward model's score Phi(s): V starts at this times Phi. Under `prefix_rewards` Phi has been paid
            by the time s is reached, and the rewards still to come start at Phi(s) - Phi(s) = 0.
    """
    model_init_kwargs = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if isinstance(source, PreTrainedModel):
        model = copy.deepcopy(source).to(dtype)
    else:
        if (Path(source) / CRITIC_NAME).is_dir():
            source = str(Path(source) / CRITIC_NAME)
        if (Path(source) / ADAPTER_CONFIG).is_file() or (Path(source) / ADAPTER_NAME).is_dir():
            raise ValueError(
                f"{source} is an adapter, which a separate critic cannot start from. Use `critic='adapter'`, or merge "
                "it into its base first (`merge_adapter`)."
            )
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        architectures = config.architectures or [""]
        is_reward_model = architectures[0].endswith("ForSequenceClassification")
        auto_class = AutoModelForSequenceClassification if is_reward_model else AutoModel
        model = auto_class.from_pretrained(source, **model_init_kwargs)
    trunk = model.base_model
    critic = Critic(trunk.config.get_text_config().hidden_size, trunk=trunk)
    if type(model).__name__.endswith("ForSequenceClassification"):
        if model.config.num_labels != 1:
            raise ValueError(
                f"A critic can be warm-started from a reward model with one label, but this {type(model).__name__} has "
                f"{model.config.num_labels}. Pass another `critic_model_name_or_path` or `critic_model`."
            )
        if not isinstance(model, GenericForSequenceClassification):
            raise ValueError(
                f"A critic values prefixes, so it needs a causal model; {type(model).__name__} is not one of those "
                "whose `score` can be taken up. Pass another `critic_model_name_or_path` or `critic_model`."
            )
        with torch.no_grad():
            critic.value_head.take_up(reward_weight * model.score.weight)
    elif isinstance(source, str) and (Path(source) / VALUE_HEAD_FILE).is_file():
        critic.take_up_head(source)
    return critic


def check_vocabulary(critic: Critic, policy: PreTrainedModel | PeftModel) -> None:
    """Refuses a separate critic that cannot read the policy's tokens."""
    known, needed = (m.config.get_text_config().vocab_size for m in (critic.trunk, policy))
    if known < needed:
        raise ValueError(
            f"The critic's model knows {known} tokens and the policy {needed}: they do not share a tokenizer. Pass a "
            "`critic_model_name_or_path` (or `critic_model`) of the policy's family."
        )


def load_critic(model: PreTrainedModel | PeftModel, path: str) -> Critic:
    """
    Loads the critic that lies beside a trained policy.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy, loaded from the same `path` the usual way.
        path (`str`): Its folder or Hub id.

    Returns:
        [`Critic`]: In eval mode, on the model's device and of its dtype; give it to [`token_values`] or, if it was
        trained by [`QActorCriticTrainer`], to [`token_action_values`].

    Raises:
        FileNotFoundError: when no critic lies there.
        ValueError: when the critic does not fit `model`.
    """
    keep_4bit_unpacked(model)
    folder = local_folder(path)
    if (folder / CRITIC_NAME / ADAPTER_NAME).is_dir():
        if not isinstance(model, PeftModel):
            raise ValueError(
                f"The critic in {path} is an adapter on the base of the policy, which is not at hand: the policy is a "
                "plain model. Load it as an adapter (`AutoPeftModelForCausalLM`), unmerged."
            )
        critic = read_adapter_critic(model, frozen_base(model), folder / CRITIC_NAME)
    elif (folder / CRITIC_NAME).is_dir():
        critic = critic_from_model(str(folder), model.dtype)
    else:
        critic = shared_critic(model)
        critic.take_up_head(folder)
    return critic.to_device(model.device).eval()
