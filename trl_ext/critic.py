"""
The critic: a head ([`value_heads`]: V(s), or Q(s, a)) on a trunk, which is the policy's own (shared), an adapter of its own on the policy's
frozen base (adapter), or another model's (separate).

The critic is a child module of the policy, so that one optimizer, one `zero_grad`, one gradient clipping and one DDP,
FSDP or DeepSpeed wrapper hold both. It runs inside the policy's forward, from two hooks, and its values are part of
that forward's output: distributed wrappers see every parameter used, and a shared trunk is not run twice.

On disk it lies beside the policy, which stays loadable without this package:

    value_head.safetensors             the head of a shared critic
    critic/                            a separate critic: its trunk, as `save_pretrained` writes it, and
    critic/value_head.safetensors      its head
    critic/adapter/                    or the adapter of one on the policy's base, beside that head; not in `critic/`
                                       itself, where transformers would take it for one of the policy's
"""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from .child_modules import keep_out_of_saves
from .compat import FusedCausalLMOutput
from .layouts import Layout, current, last_states
from .lm_head import base_causal_lm
from .reward_adapters import reward_model_on_base
from .shared_base import adapter_like, frozen_base
from .value_heads import ActionValueHead, Decisions, Estimate, ValueHead


CRITIC_NAME = "critic"  # attribute of the policy, prefix of the critic's parameters, and folder of a separate critic
VALUE_HEAD_FILE = "value_head.safetensors"
ADAPTER_NAME = "adapter"  # folder within the critic's
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = [f"{CRITIC_NAME}/*", VALUE_HEAD_FILE, ADAPTER_CONFIG, "adapter_model.safetensors"]


class Critic(nn.Module):
    """
    Values of a sequence's prefixes, by a `value_head` that starts as a [`ValueHead`].

    Args:
        hidden_size (`int`): Width of the trunk's last hidden state.
        trunk (`PreTrainedModel` or `PeftModel`, *optional*): The critic's own trunk; `None` shares the policy's.
        detach (`bool`, *optional*, defaults to `False`): Keep the value gradients off a shared trunk.
    """

    def __init__(self, hidden_size: int, trunk: PreTrainedModel | PeftModel | None = None, detach: bool = False):
        super().__init__()
        self.trunk = trunk
        self.detach = detach
        self.value_head = ValueHead(hidden_size)
        self._hidden_states: torch.Tensor | None = None
        self._recorded: list[torch.Tensor] | None = None
        self._num_states = 0
        self._hooks = []

    def forward(
        self, policy: PreTrainedModel | PeftModel, hidden_states: torch.Tensor | None, layout: Layout
    ) -> torch.Tensor:
        """
        Values of states, i.e. of the prefixes that they end.

        Args:
            policy (`PreTrainedModel` or `PeftModel`): The policy.
            hidden_states (`torch.Tensor` of shape `(R, L, H)`): Its trunk's; may be `None` if not `reads_policy`.
            layout ([`~layouts.Layout`]): What the policy's forward was given, and where in it the states lie.

        Returns:
            `torch.Tensor` of shape `(B, S)`, or `(B, S, 4)` of an action-value head, float32.
        """
        decisions = None
        if hidden_states is not None:
            hidden_states = layout.states(hidden_states)
            decisions = Decisions(base_causal_lm(policy), hidden_states, layout.actions, layout.mask)
        if self.trunk is not None:
            hidden_states = self.trunk_states(layout)
        elif self.detach:
            hidden_states = hidden_states.detach()
        return self.value_head(hidden_states, decisions)

    def trunk_states(self, layout: Layout) -> torch.Tensor:
        """`(B, S, H)`: the states of the critic's own trunk."""
        return layout.states(self.trunk(**layout.inputs_of(self.trunk), use_cache=False).last_hidden_state)

    @property
    def reads_policy(self) -> bool:
        """Whether it needs the hidden states of the policy's trunk."""
        return self.trunk is None or isinstance(self.value_head, ActionValueHead)

    @property
    def is_adapter(self) -> bool:
        """Whether the trunk is an adapter on the policy's base."""
        return isinstance(self.trunk, PeftModel)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """What trains with the critic only: all but a base that it shares."""
        return (p for p in self.parameters() if p.requires_grad) if self.is_adapter else self.parameters()

    def to_device(self, device: torch.device) -> "Critic":
        """To the policy's device, where an adapter's base is already (and may be too quantized to be moved)."""
        (self.value_head if self.is_adapter else self).to(device)
        return self

    @contextmanager
    def recording(self, num_states: int) -> Iterator[list[torch.Tensor]]:
        """
        Collect the values `(B, num_states, ...)` of every scoring forward of the policy within the context: of the last
        prefixes, where entry i from the end belongs to the sequence less its last i tokens.
        """
        self._recorded, self._num_states = [], num_states
        try:
            yield self._recorded
        finally:
            self._recorded = self._hidden_states = None


@dataclass
class ActorCriticOutput(FusedCausalLMOutput):
    """
    Output of a policy's scoring forward with the critic's `state_values` `(B, num_states, ...)`. (Not `values`: outputs are
    dictionaries, and DDP walks theirs by `values()`.)
    """

    state_values: torch.Tensor | None = None


def trunk_inputs(kwargs: dict) -> dict:
    """What another trunk takes of the arguments of a scoring forward."""
    return {
        k: v for k, v in kwargs.items() if k not in ("labels", "shift_labels", "fused_lm_head", "output_router_logits")
    }


def attach_critic(model: PreTrainedModel | PeftModel, critic: Critic) -> None:
    """Make `critic` a child of `model` that sees its scoring forwards (those that return log-probabilities)."""

    def keep_hidden_states(module, args, output):
        if critic._recorded is not None:
            critic._hidden_states = output.last_hidden_state

    def add_values(module, args, kwargs, output):
        if critic._recorded is None:
            return None
        layout = current() or last_states(**trunk_inputs(kwargs), num_states=critic._num_states)
        values = critic(module, critic._hidden_states, layout)
        critic._recorded.append(values)
        critic._hidden_states = None
        return ActorCriticOutput(**output, state_values=values)

    if isinstance(model, PeftModel) and CRITIC_NAME in model.peft_config:
        raise ValueError(f"An adapter is called {CRITIC_NAME!r}, which is the critic's name in the model. Rename it.")
    critic.to_device(model.device)
    model.add_module(CRITIC_NAME, critic)
    critic._hooks = [
        base_causal_lm(model).base_model.register_forward_hook(keep_hidden_states),
        model.register_forward_hook(add_values, with_kwargs=True),
    ]
    if critic.is_adapter:  # which PEFT would take for weights of the policy's
        critic._hooks.append(model.register_state_dict_post_hook(leave_out_critic))
    keep_out_of_saves(model, CRITIC_NAME)


def leave_out_critic(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """A hook after `state_dict`."""
    for name in [name for name in state_dict if name.startswith(f"{prefix}{CRITIC_NAME}.")]:
        del state_dict[name]


def detach_critic(model: PreTrainedModel | PeftModel) -> None:
    """Undo [`attach_critic`], if it was ever done."""
    critic = model._modules.pop(CRITIC_NAME, None)
    if critic is not None:
        for hook in critic._hooks:
            hook.remove()


def hidden_size_of(model: PreTrainedModel | PeftModel) -> int:
    """Width of the last hidden state: what the LM head takes, which some models project down to."""
    head = base_causal_lm(model).get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper):  # of a head that is trained whole, or some of its tokens
        head = head.original_module
    return (head.get_base_layer() if isinstance(head, BaseTunerLayer) else head).in_features


def shared_critic(model: PreTrainedModel | PeftModel, detach: bool = False) -> Critic:
    """A critic on the trunk of `model`, starting at V = 0."""
    return Critic(hidden_size_of(model), detach=detach)


def critic_as_adapter(model: PreTrainedModel | PeftModel, path: str | None = None) -> Critic:
    """
    A critic with an adapter of its own on the frozen base of `model`, of the policy adapter's kind and size.

    Args:
        model (`PeftModel`): The policy.
        path (`str`, *optional*): What it starts from, in place of V = 0: the folder or Hub id of a trained policy with
            such a critic beside it, or of a reward adapter on the same base, whose score head becomes the value head.
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
    return critic_from_reward_adapter(model, base, str(folder))


def read_adapter_critic(policy: PeftModel, base: PreTrainedModel, folder: Path, is_trainable: bool = False) -> Critic:
    """The critic whose adapter and head lie in `folder`, on the policy's base."""
    trunk = PeftModel.from_pretrained(base, folder / ADAPTER_NAME, is_trainable=is_trainable)
    critic = Critic(hidden_size_of(policy), trunk=trunk)
    read_value_head(critic, folder)
    return critic


@torch.no_grad()
def critic_from_reward_adapter(policy: PeftModel, base: PreTrainedModel, path: str) -> Critic:
    """A critic on the policy's base that starts as the reward adapter at `path`: V of a whole text is its reward."""
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
    critic.value_head.weight.copy_(load_peft_weights(path, device="cpu")["base_model.model.score.weight"])
    return critic


def adapter_weights(trunk: PeftModel) -> dict[str, torch.Tensor]:
    """An adapter as PEFT saves it: without the embeddings under it, which are the base's."""
    return get_peft_model_state_dict(trunk, save_embedding_layers=False)


def load_adapter_weights(trunk: PeftModel, folder: str | Path) -> None:
    """Fill an adapter from where one like it was saved, with an error where names or shapes differ."""
    weights = load_peft_weights(str(folder), device="cpu")
    own, saved = ({name: tuple(w.shape) for name, w in state.items()} for state in (adapter_weights(trunk), weights))
    if own != saved:
        differing = sorted(set(own.items()) ^ set(saved.items()))[0]
        raise ValueError(
            f"The adapter in {folder} does not fit the critic's (first difference: {differing}). Use the same rank and "
            "`target_modules` for the policy's `peft_config` as it was trained with."
        )
    set_peft_model_state_dict(trunk, weights)


def critic_from_policy(model: PreTrainedModel | PeftModel) -> Critic:
    """A separate critic whose trunk starts as a copy of the policy's (adapters merged), at V = 0."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"A separate critic cannot be copied from a policy under {model.active_peft_config.peft_type.value}, "
            "whose prompt is no weight of the model. Set `critic_model_name_or_path`, or use `critic='shared'`."
        )
    copied = copy.deepcopy(model)
    if isinstance(copied, PeftModel):
        copied = copied.merge_and_unload()
    return Critic(hidden_size_of(model), trunk=copied.base_model)


def critic_from_model(source: str | PreTrainedModel, dtype: torch.dtype, trust_remote_code: bool = False) -> Critic:
    """
    A separate critic of `dtype` from a model or its path or Hub id: a folder with a separate critic (trunk and head
    are taken up), a reward model (its score head becomes the value head, Ouyang et al. 2022), or any causal model
    (V starts at 0).
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
        architectures = AutoConfig.from_pretrained(source).architectures or [""]
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
            critic.value_head.weight.copy_(model.score.weight)
    elif isinstance(source, str) and (Path(source) / VALUE_HEAD_FILE).is_file():
        read_value_head(critic, source)
    return critic


def check_vocabulary(critic: Critic, policy: PreTrainedModel | PeftModel) -> None:
    """Refuse a separate critic that cannot read the policy's tokens."""
    known, needed = (m.config.get_text_config().vocab_size for m in (critic.trunk, policy))
    if known < needed:
        raise ValueError(
            f"The critic's model knows {known} tokens and the policy {needed}: they do not share a tokenizer. Pass a "
            "`critic_model_name_or_path` (or `critic_model`) of the policy's family."
        )


def local_folder(path: str) -> Path:
    """`path` itself if it is a folder, else the critic's files of the Hub repository of that name."""
    folder = Path(path)
    return (
        folder
        if folder.is_dir()
        else Path(snapshot_download(path, allow_patterns=[f"{CRITIC_NAME}/*", VALUE_HEAD_FILE]))
    )


def save_critic(critic: Critic, directory: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """
    Write the critic beside the policy, in the layout this module describes.

    Args:
        critic ([`Critic`]): What to write.
        directory (`str`): The policy's folder.
        state_dict (`dict[str, torch.Tensor]`, *optional*): The critic's gathered weights, where they are sharded.
    """
    state_dict = critic.state_dict() if state_dict is None else state_dict
    folder = Path(directory)
    # An earlier run's critic of the other kind must not be taken for this one's
    if critic.trunk is None:
        shutil.rmtree(folder / CRITIC_NAME, ignore_errors=True)
    else:
        (folder / VALUE_HEAD_FILE).unlink(missing_ok=True)
        folder = folder / CRITIC_NAME
        if folder.is_dir() and (folder / ADAPTER_NAME).is_dir() != critic.is_adapter:
            shutil.rmtree(folder)
        if critic.is_adapter:
            critic.trunk.save_pretrained(folder / ADAPTER_NAME, save_embedding_layers=False)
            (folder / ADAPTER_NAME / "README.md").unlink(missing_ok=True)  # PEFT's, which says nothing of a critic
        else:
            trunk = {name.removeprefix("trunk."): w for name, w in state_dict.items() if name.startswith("trunk.")}
            critic.trunk.save_pretrained(folder, state_dict=trunk)
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        name.removeprefix("value_head."): weight.float().contiguous()
        for name, weight in state_dict.items()
        if name.startswith("value_head.")
    }
    save_file(head, folder / VALUE_HEAD_FILE, metadata={"format": "pt"})


def read_value_head(critic: Critic, folder: str | Path) -> None:
    """Give the critic the head that is saved in `folder`, of either kind."""
    path = value_head_file(folder)
    with safe_open(path, framework="pt") as file:
        shape = file.get_slice("embedding").get_shape() if "embedding" in file.keys() else None
    if shape is not None:
        critic.value_head = ActionValueHead(critic.value_head, *shape)
    load_value_head(critic, folder)


def load_value_head(critic: Critic, folder: str | Path) -> None:
    """Fill the critic's head from the file in `folder`, or say why it does not fit."""
    path = value_head_file(folder)
    state = load_file(path)
    saved = {name: tuple(weight.shape) for name, weight in state.items()}
    expected = {name: tuple(weight.shape) for name, weight in critic.value_head.state_dict().items()}
    if saved != expected:
        raise ValueError(
            f"{path} does not fit this model: the file holds {saved}, its trunk needs {expected}. Load the model that "
            "the critic was saved with, or start a new critic by removing the file."
        )
    critic.value_head.load_state_dict(state)


def value_head_file(folder: str | Path) -> Path:
    path = Path(folder) / VALUE_HEAD_FILE
    if not path.is_file():
        raise FileNotFoundError(f"No {VALUE_HEAD_FILE} in {folder}: no critic was saved there.")
    return path


def restore_critic(critic: Critic, directory: str) -> None:
    """Fill an existing critic (of either kind) from what [`save_critic`] wrote to `directory`."""
    if critic.trunk is None:
        load_value_head(critic, directory)
        return
    folder = Path(directory) / CRITIC_NAME
    if not folder.is_dir() or (folder / ADAPTER_NAME).is_dir() != critic.is_adapter:
        kind = "adapter" if critic.is_adapter else "separate"
        raise FileNotFoundError(f"No {CRITIC_NAME}/ folder of a critic of kind {kind!r} in {directory}.")
    if critic.is_adapter:
        load_adapter_weights(critic.trunk, folder / ADAPTER_NAME)
        load_value_head(critic, folder)
        return
    trunk = AutoModel.from_pretrained(folder, dtype=critic.trunk.dtype)
    critic.trunk.load_state_dict(trunk.state_dict())
    load_value_head(critic, folder)


def load_critic(model: PreTrainedModel | PeftModel, path: str) -> Critic:
    """
    Load the critic that lies beside a trained policy.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy, loaded from the same `path` the usual way.
        path (`str`): Its folder or Hub id.

    Returns:
        [`Critic`]: In eval mode, on the model's device and of its dtype; give it to [`token_values`] or, if it was
        trained by [`QActorCriticTrainer`], to [`token_action_values`].

    Raises:
        FileNotFoundError: when no critic lies there.
        ValueError: when it does not fit `model`.
    """
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
        read_value_head(critic, folder)
    return critic.to_device(model.device).eval()


def token_values(
    model: PreTrainedModel | PeftModel, critic: Critic, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    V of every prefix: entry t is the value of the state in which tokens 0..t have been seen.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The policy; run only if the critic needs it.
        critic ([`Critic`]): From [`load_critic`], or a trainer's `critic`. One of Q gives sum_a pi(a|s) Q(s, a).
        input_ids (`torch.Tensor` of shape `(B, L)`): Prompts and completions.
        attention_mask (`torch.Tensor` of shape `(B, L)`): 1 at real tokens.

    Returns:
        `torch.Tensor` of shape `(B, L)`, float32.
    """
    values = all_estimates(model, critic, input_ids, attention_mask)
    return values if values.dim() == 2 else values[..., Estimate.V]


def token_action_values(
    model: PreTrainedModel | PeftModel, critic: Critic, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """
    Q of every token: entry t is the value of token t after tokens 0..t-1. Less [`token_values`] at t-1 it is the
    token's advantage.

    Args:
        model, input_ids, attention_mask: As [`token_values`] takes them.
        critic ([`Critic`]): Of Q: from [`load_critic`] for a policy of [`QActorCriticTrainer`], or its `critic`.

    Returns:
        `torch.Tensor` of shape `(B, L)`, float32; nan at the first token, which has no state before it.

    Raises:
        ValueError: when the critic is one of V.
    """
    if not isinstance(critic.value_head, ActionValueHead):
        raise ValueError(
            "This critic values states, not actions: use `token_values`, or train a `QActorCriticTrainer`."
        )
    q = all_estimates(model, critic, input_ids, attention_mask)[:, :-1, Estimate.Q]
    return nn.functional.pad(q, (1, 0), value=torch.nan)


@torch.no_grad()
def all_estimates(model, critic, input_ids, attention_mask) -> torch.Tensor:
    """What the critic says of every prefix, `(B, L)` or `(B, L, 4)`."""
    layout = last_states(input_ids, attention_mask, num_states=input_ids.size(1))
    hidden_states = None
    if critic.reads_policy:
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ValueError("`token_values` does not see the virtual tokens of a prompt-tuned policy.")
        hidden_states = base_causal_lm(model).base_model(**layout.inputs, use_cache=False).last_hidden_state
    return critic(model, hidden_states, layout)
