"""What the quickstart shows: progress bars, the table of before and after, completions, and the curves."""

import math
import warnings
from dataclasses import dataclass

import torch
from quickstart_judges import Judge
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback


def quiet() -> None:
    """Silence what says nothing to somebody who runs this script; errors and other warnings still show."""
    import datasets
    import transformers

    datasets.disable_progress_bars()  # of the maps that tokenize, a blink each
    transformers.utils.logging.disable_progress_bar()  # of loading and writing weights, likewise
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


class StageBar(ProgressCallback):
    """Trainer's progress bar with a name and the last value of some metrics, in place of a line per log."""

    def __init__(self, name: str, **metrics: str):
        super().__init__()
        self.name = name
        self.metrics = metrics  # shown as -> logged as

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"      {self.name}")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {name: f"{logs[key]:.2f}" for name, key in self.metrics.items() if key in logs}
            if shown:
                self.training_bar.set_postfix(shown)

    def on_prediction_step(self, args, state, control, **kwargs):
        pass


# --- Sampling and measuring ---


@dataclass
class Samples:
    """Completions as text, and `(B, L)` ids of prompt and completion with masks over them."""

    prompts: list[str]
    completions: list[str]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor  # up to and with the end-of-sequence token
    ended: torch.Tensor  # (B,) bool


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> Samples:
    """One completion for each prompt, drawn from the model as it is: no temperature, no top-k."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    inputs.pop("token_type_ids", None)
    model.eval()
    ids = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_new_tokens)
    prompt_length = inputs["input_ids"].size(1)
    completion_ids = ids[:, prompt_length:]
    is_end = completion_ids == tokenizer.eos_token_id
    mask = (is_end.cumsum(dim=1) - is_end.long() == 0).long()
    return Samples(
        prompts=prompts,
        completions=tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
        input_ids=ids,
        attention_mask=torch.cat([inputs["attention_mask"], mask], dim=1),
        completion_mask=mask,
        ended=is_end.any(dim=1),
    )


@torch.no_grad()
def token_logps(model: PreTrainedModel, samples: Samples) -> torch.Tensor:
    """`(B, T)` log-probability of each token of the completions; 0 after their end."""
    num_tokens = samples.completion_mask.size(1)
    positions = (samples.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(samples.input_ids, attention_mask=samples.attention_mask, position_ids=positions).logits
    logps = logits[:, -num_tokens - 1 : -1].float().log_softmax(dim=-1)
    logps = logps.gather(2, samples.input_ids[:, -num_tokens:].unsqueeze(2)).squeeze(2)
    return torch.where(samples.completion_mask.bool(), logps, 0)


@torch.no_grad()
def rewards_of(reward_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> torch.Tensor:
    """The reward model's score of prompt and completion, `(B,)`."""
    texts = [p + c for p, c in zip(samples.prompts, samples.completions, strict=True)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(reward_model.device)
    inputs.pop("token_type_ids", None)
    return reward_model.eval()(**inputs).logits[:, 0]


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    samples: Samples,
) -> dict[str, float]:
    """The table's column for `model`, from which `samples` were drawn."""
    scores = judge.score(samples.completions)
    num_tokens = samples.completion_mask.sum().item()
    logps = token_logps(model, samples).sum().item() / num_tokens
    logps_reference = token_logps(reference, samples).sum().item() / num_tokens
    bigrams = [pair for text in samples.completions for pair in zip(text.split(), text.split()[1:], strict=False)]
    return {
        "judge's score (never trained on)": sum(scores) / len(scores),
        "share the judge finds positive": sum(score > judge.neutral for score in scores) / len(scores),
        "reward (the reward model's)": rewards_of(reward_model, tokenizer, samples).mean().item(),
        "KL to the reference, nats per token": logps - logps_reference,
        "perplexity under the reference": math.exp(-logps_reference),
        "tokens per completion": num_tokens / len(samples.prompts),
        "share that ends by itself": samples.ended.float().mean().item(),
        "share of distinct completions": len(set(samples.completions)) / len(samples.completions),
        "share of distinct word pairs": len(set(bigrams)) / max(len(bigrams), 1),
    }


# --- Showing ---


def print_table(before: dict[str, float], after: dict[str, float]) -> None:
    print(f"      {'':38}{'before':>10}{'after':>10}")
    for name, value in before.items():
        print(f"      {name:38}{value:10.3f}{after[name]:10.3f}")


def print_completions(judge: Judge, before: Samples, after: Samples, count: int) -> None:
    for row in range(count):
        print(f"\n      {before.prompts[row]} ...")
        for name, samples in (("before", before), ("after", after)):
            text = samples.completions[row]
            print(f"      {name:>6} ({judge.score([text])[0]:+.2f}): {text.strip()}")


CURVES = [  # title, axis, {label: logged name}
    ("Reward model's score", "reward", {"reward": "rewards/reward_model/mean"}),
    ("Judge's score (not trained on)", "score", {"judge": "rewards/judge/mean"}),
    ("KL to the reference", "nats per token", {"k1": "kl/k1", "k3": "kl/k3"}),
    ("Explained variance of the critic", "share of the returns' variance", {"": "explained_variance"}),
    ("Value loss", "half squared error per token", {"": "value_loss"}),
    ("Length of completions", "tokens", {"mean": "completions/mean_length"}),
]


def plot_curves(log_history: list[dict], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    figure.suptitle(title)
    for axis, (name, unit, lines) in zip(axes.flat, CURVES, strict=True):
        for label, key in lines.items():
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
