"""The model card of a policy."""

import re

from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig
from trl.data_utils import is_conversational

from ..critic.critic import Critic
from ..critic.heads import ActionValueHead
from ..hub.curves import Panel
from ..hub.model_card import CardContent, shown
from .config import ActorCriticConfig


TRAINING_ARGUMENTS = [
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "world_size",
    "max_completion_length",
    "temperature",
    "top_p",
    "loss_type",
    "epsilon",
    "epsilon_high",
    "beta",
    "max_grad_norm",
    "bf16",
    "seed",
]
# On what is learned
WITHOUT_EFFECT = [
    "save_rollouts",
    "compact_generation",
    "compact_scoring",
    "length_batches",
    "balance_tokens",
    "shared_prefix",
]
METRICS = [
    "returns/mean",
    "values/mean",
    "explained_variance",
    "value_loss",
    "kl/k1",
    "kl/k3",
    "kl",
    "ratio/mean",
    "clip_ratio/region_mean",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
]
PANELS = [
    Panel("Reward", "weighted sum", "reward"),
    Panel("KL to the reference", "nats per token", "kl/k3"),
    Panel("Entropy", "nats per token", "entropy"),
    Panel("Length of completions", "tokens", "completions/mean_length"),
    Panel("Loss of the critic", "half squared error", "value_loss"),
    Panel("Returns explained by the critic", "share of variance", "explained_variance"),
]
NUM_EXAMPLES, EXAMPLE_LENGTH = 3, 600  # completions, and characters of each


def policy_card(trainer) -> CardContent:
    """Returns what a card says of the rewards that a policy was trained to raise, how, and how its critic is used."""
    rewards = list(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
    names = {f"rewards/{name}/mean": name for name in trainer.reward_func_names}
    results = {"reward": ("mean_reward", "mean reward")}
    if len(names) > 1:
        results |= {metric: ("mean_reward", f"mean reward of {name} alone") for metric, name in names.items()}
    args, policy, critic = trainer.args, trainer._model, trainer.critic
    details = {
        "method": trainer._method,
        "is_chat": is_chat(trainer.train_dataset),
        "rewards": [(name, f"{weight:g}") for name, weight in rewards if weight != 0],
        "watched": [name for name, weight in rewards if weight == 0],
        "critic": None if critic is None else args.critic,
        "has_readable_values": critic is not None and has_readable_values(policy, critic),
        "has_action_values": critic is not None and isinstance(critic.value_head, ActionValueHead),
        "max_completion_length": trainer.max_completion_length,
        "examples": examples(trainer._logs) if trainer.log_completions else [],  # the card may be public
    }
    return CardContent(
        model=policy,
        rows="prompts",
        metrics=["reward", *names, *METRICS],
        results=results,
        panels=PANELS,
        hyper_parameters=hyper_parameters(args, critic is not None),
        papers=[trainer._paper],
        details=details,
    )


def has_readable_values(policy, critic: Critic) -> bool:
    """Returns True if [`token_values`] can read the critic: no trunk shows it the virtual tokens of a tuned prompt."""
    is_prompt = isinstance(policy, PeftModel) and policy.active_peft_config.is_prompt_learning
    return not (is_prompt and critic.reads_policy)


def hyper_parameters(args: ActorCriticConfig, has_critic: bool) -> dict[str, str]:
    """Returns those of this package that are not TRL's, and the training arguments people ask for first."""
    known = {*GRPOConfig.__dataclass_fields__, *WITHOUT_EFFECT}
    added = ["num_generations", *(name for name in args.__dataclass_fields__ if name not in known)]
    if not has_critic:
        added = [name for name in added if "critic" not in name and name not in ("vf_coef", "cliprange_value")]
    return shown(args, [*TRAINING_ARGUMENTS, *added])


def examples(logs: dict) -> list[str]:
    """Returns the last logged completions with their prompts and rewards."""
    rewards = {name: list(values) for name, values in logs["rewards"].items()}
    logged = list(zip(logs["prompt"], logs["completion"], strict=True))
    found = []
    for index in range(max(0, len(logged) - NUM_EXAMPLES), len(logged)):
        prompt, completion = (fenced(shortened(as_text(part))) for part in logged[index])
        earned = ", ".join(f"`{name}` {values[index]:.3g}" for name, values in rewards.items())
        found.append(f"Prompt:\n\n{prompt}\n\nCompletion, {earned}:\n\n{completion}")
    return found


def is_chat(dataset) -> bool:
    """
    Returns True if the dataset's prompts are conversations, as far as can be known without drawing from a stream.
    """
    return isinstance(dataset, Dataset) and "prompt" in dataset.column_names and is_conversational(dataset[0])


def as_text(text_or_messages: str | list[dict]) -> str:
    """Returns a conversation as a line for each message; of one with images, its texts."""
    if isinstance(text_or_messages, str):
        return text_or_messages
    return "\n".join(f"{message['role']}: {_text_of(message.get('content'))}" for message in text_or_messages)


def _text_of(content: str | list[dict] | None) -> str:
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if part.get("text"))
    return content or ""


def shortened(text: str) -> str:
    """Returns the beginning of a long text."""
    return text if len(text) <= EXAMPLE_LENGTH else text[:EXAMPLE_LENGTH] + " ..."


def fenced(text: str) -> str:
    """Returns a text as a block of its own in Markdown, whatever is in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
