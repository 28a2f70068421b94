"""The task that a study needs to know: a start, rewards, sizes and an objective."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Places:
    """
    The places of what a study reads and writes.

    Args:
        output_dir (`str`): The folder of runs, tables, pictures, and models that tasks start from.
        smollm2 (`str`, *optional*): A folder with SmolLM2-135M-Instruct.
        data (`str`, *optional*): A file of film reviews with `text` and `label`.
        corpus_size (`int`, *optional*): The number of reviews that the quickstart's language model learns from.
    """

    output_dir: str
    smollm2: str | None = None
    data: str | None = None
    corpus_size: int | None = None


@dataclass
class Start:
    """
    The beginning of a run: the same for every method at the same seed.

    Args:
        model (`PreTrainedModel` or `str`): The policy.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`list`): Texts or conversations, whose order the trainer draws by its seed.
        rewards (`list[Callable]`): Reward functions, each of weight 1.
        objective (`Callable`): The objective of completions of the rollouts, for tasks that are not evaluated: a
            function of `prompts, completions, completion_ids` that returns a number for each.
        measure (`Callable`, *optional*): The evaluation: a function of the policy that returns numbers by name, among
            them `objective`.
        peft_config (`PeftConfig`, *optional*): The adapter to train, in place of the whole model.
    """

    model: PreTrainedModel | str
    tokenizer: PreTrainedTokenizerBase
    prompts: list
    rewards: list[Callable]
    objective: Callable | None = None
    measure: Callable | None = None
    peft_config: PeftConfig | None = None


@dataclass
class Task:
    """
    A task, with what the study sets for all methods.

    Args:
        name (`str`): Its name on the command line.
        begin (`Callable`): A function of `places, seed, is_dense` that returns a [`Start`]. `is_dense` is True for methods
            that take a reward at the token which earns it, where the task has such; others have the sum at the end.
        max_completion_length (`int`): The most tokens of a completion.
        budget (`int`): Tokens that a run samples.
        max_rollouts (`int`): Rollouts after which it ends in any case: a policy that ends every completion at once
            would sample forever.
        rollout_size (`int`): Completions per rollout.
        num_generations (`int`): Completions per prompt; methods that compare them take 8 where this is 1.
        kl_price (`float`): The price of a nat of KL to the start, in units of the reward.
        num_evaluations (`int`): Evaluations of a run; 0 where the rollouts themselves are the measure.
        prepare (`Callable`): A function of `places` that makes what all runs share, if it is not there already.
        needs (`tuple[str, ...]`): The options of the command line that give what the task cannot do without.
        learning_rate (`float`, *optional*): The rate in the middle; tuned for GRPO where none is given.
        num_seeds (`int`): Seeds by default.
    """

    name: str
    begin: Callable
    max_completion_length: int
    budget: int
    max_rollouts: int
    rollout_size: int = 64
    num_generations: int = 8
    kl_price: float = 0.0
    num_evaluations: int = 0
    prepare: Callable = lambda places: None
    needs: tuple[str, ...] = ()
    learning_rate: float | None = None
    num_seeds: int = 5

    def missing(self, places: Places) -> str:
        """Returns the options that are needed and not given, as words."""
        return " and ".join(f"--{name}" for name in self.needs if getattr(places, name) is None)


class Recorder:
    """A reward function of weight 0 that counts the tokens which are sampled, and keeps each rollout's objective."""

    __name__ = "recorder"

    def __init__(self, objective: Callable | None = None):
        self.objective = objective
        self.tokens = 0
        self.points = []

    def __call__(self, prompts, completions, completion_ids, **columns) -> list[float]:
        self.tokens += sum(map(len, completion_ids))
        if self.objective is not None:
            values = self.objective(prompts, completions, completion_ids)
            self.points.append({"tokens": self.tokens, "objective": sum(values) / len(values)})
        return [0.0] * len(completion_ids)
