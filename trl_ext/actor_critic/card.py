"""The model card of a policy."""

import re

from datasets import Dataset
from peft import PeftModel
from trl import GRPOConfig
from trl.data_utils import is_conversational

from ..critic.heads import ActionValueHead
from ..hub.curves import Panel
from ..hub.model_card import CardContent, shown
from ..training.card import ModelCardMixin


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


class PolicyCardMixin(ModelCardMixin):
    """The card says what the policy was trained to raise, how, and how its critic is used."""

    _template_file = "policy.md"
    _pipeline_tag = "text-generation"
    _method: str  # what the algorithm does, in a sentence or two

    def _card_content(self):
        rewards = list(zip(self.reward_func_names, self.reward_weights.tolist(), strict=True))
        names = {f"rewards/{name}/mean": name for name in self.reward_func_names}
        results = {"reward": ("mean_reward", "mean reward")}
        if len(names) > 1:
            results |= {metric: ("mean_reward", f"mean reward of {name} alone") for metric, name in names.items()}
        details = {
            "method": self._method,
            "is_chat": is_chat(self.train_dataset),
            "rewards": [(name, f"{weight:g}") for name, weight in rewards if weight != 0],
            "watched": [name for name, weight in rewards if weight == 0],
            "critic": None if self.critic is None else self.args.critic,
            "has_readable_values": self.critic is not None and self._has_readable_values,
            "has_action_values": self.critic is not None and isinstance(self.critic.value_head, ActionValueHead),
            "max_completion_length": self.max_completion_length,
            "examples": self._examples(),
        }
        return CardContent(
            model=self._policy,
            rows="prompts",
            metrics=["reward", *names, *METRICS],
            results=results,
            panels=PANELS,
            hyper_parameters=self._hyper_parameters(),
            papers=[self._paper],
            details=details,
        )

    @property
    def _has_readable_values(self) -> bool:
        """Whether [`token_values`] can read the critic: no trunk shows it the virtual tokens of a tuned prompt."""
        is_prompt = isinstance(self._policy, PeftModel) and self._policy.active_peft_config.is_prompt_learning
        return not (is_prompt and self.critic.reads_policy)

    def _hyper_parameters(self) -> dict[str, str]:
        """What this package's configuration adds to TRL's, and the training arguments people ask for first."""
        known = {*GRPOConfig.__dataclass_fields__, *WITHOUT_EFFECT}
        added = ["num_generations", *(name for name in self.args.__dataclass_fields__ if name not in known)]
        if self.critic is None:
            added = [name for name in added if "critic" not in name and name not in ("vf_coef", "cliprange_value")]
        return shown(self.args, [*TRAINING_ARGUMENTS, *added])

    def _examples(self) -> list[str]:
        """The last logged completions; none unless `log_completions` is on, as the card may be public."""
        if not self.log_completions:
            return []
        rewards = {name: list(values) for name, values in self._logs["rewards"].items()}
        logged = list(zip(self._logs["prompt"], self._logs["completion"], strict=True))
        examples = []
        for index in range(max(0, len(logged) - NUM_EXAMPLES), len(logged)):
            prompt, completion = (fenced(shortened(as_text(part))) for part in logged[index])
            scores = ", ".join(f"`{name}` {values[index]:.3g}" for name, values in rewards.items())
            examples.append(f"Prompt:\n\n{prompt}\n\nCompletion, {scores}:\n\n{completion}")
        return examples


def is_chat(dataset) -> bool:
    """Whether its prompts are conversations, as far as it can be known without drawing from a stream."""
    return isinstance(dataset, Dataset) and "prompt" in dataset.column_names and is_conversational(dataset[0])


def as_text(text_or_messages: str | list[dict]) -> str:
    """A conversation as a line for each message; of one with images, its texts."""
    if isinstance(text_or_messages, str):
        return text_or_messages
    return "\n".join(f"{message['role']}: {_text_of(message.get('content'))}" for message in text_or_messages)


def _text_of(content: str | list[dict] | None) -> str:
    if isinstance(content, list):
        return " ".join(part["text"] for part in content if part.get("text"))
    return content or ""


def shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_LENGTH else text[:EXAMPLE_LENGTH] + " ..."


def fenced(text: str) -> str:
    """As a block of its own in Markdown, whatever is in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
