"""
Filtering instead of gradients: sample n completions per prompt, keep the best, imitate them.

With one round this is best-of-n (or rejection-sampling) fine-tuning, with several it is expert iteration: the policy
moves towards what it would have chosen from n of its own samples, which for the best of n costs at most
log n - (n - 1) / n nats of KL (Stiennon et al. 2020, https://huggingface.co/papers/2009.01325, appendix G.3). The
imitation itself is TRL's `SFTTrainer`; see `recipes/best_of_n.py`.
"""

from collections import defaultdict

from accelerate.utils import gather_object
from datasets import Dataset

from ..data.rows import plain, whole
from .reinforce import ReinforceTrainer


ROW = "prompt_index"
INPUT_ROW = "_row_of_sample"  # beside the dataset's own columns, one of which may be called as above


class CompletionSampler(ReinforceTrainer):
    """
    [`ReinforceTrainer`] that only samples and scores: [`sample`] gives `args.num_generations` completions of each
    prompt, by whatever generation and `reward_funcs` the parent has.
    """

    _name = "Completion sampler"
    _samples = None  # rows, while it samples

    def sample(self, prompts: Dataset) -> Dataset:
        """
        Samples completions and asks for their rewards.

        Args:
            prompts ([`~datasets.Dataset`]): With a column `prompt`; the others go to the reward functions.

        Returns:
            [`~datasets.Dataset`]: A row for each completion, by prompt: `prompt_index`, `prompt`, `completion`, `score`
            (the weighted sum of rewards; null where none applies) and `reward/<name>` of each function.
        """
        prompts = whole(prompts)
        self._samples = []
        self.evaluate(prompts.add_column(INPUT_ROW, list(range(len(prompts)))))
        groups = defaultdict(list)
        for row in gather_object(self._samples):
            groups[row[ROW]].append(row)
        self._samples = None
        # Processes repeat some prompts to have as many each
        return Dataset.from_list([row for i in sorted(groups) for row in groups[i][: self.num_generations_eval]])

    def _warn_of_altered_sampling(self, settings):
        """Does nothing: what is imitated later may be sampled in any way, for no log-probability is trained here."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self._samples is None:  # an evaluation of the user's own
            return rewards_per_func
        named = self.rewarded.named(self.reward_func_names)
        for example, completion, rewards in zip(inputs, completions, named, strict=True):
            self._samples.append(
                {ROW: example[INPUT_ROW], "prompt": example["prompt"], "completion": completion, **rewards}
            )
        return rewards_per_func


def keep_best(samples: Dataset, num_kept: int | None = 1, threshold: float | None = None) -> Dataset:
    """
    Picks the completions that are worth imitating.

    Args:
        samples ([`~datasets.Dataset`]): From [`CompletionSampler.sample`].
        num_kept (`int`, *optional*, defaults to `1`): So many of each prompt at most, the best; `None` is all.
        threshold (`float`, *optional*): Only with this score or a higher one.

    Returns:
        [`~datasets.Dataset`]: Their rows, by prompt and from the best on, each text once. Completions without a score
        are left out.

    Raises:
        ValueError: if none is left.
    """
    samples, groups = plain(samples), defaultdict(list)
    for row in samples:
        if row["score"] is not None and (threshold is None or row["score"] >= threshold):
            groups[row[ROW]].append(row)
    kept = []
    for i in sorted(groups):
        texts = []
        for row in sorted(groups[i], key=lambda row: -row["score"])[:num_kept]:
            if row["completion"] not in texts:
                texts.append(row["completion"])
                kept.append(row)
    if not kept:
        scores = [score for score in samples["score"] if score is not None]
        best = max(scores, default=None)
        raise ValueError(f"No completion reaches `threshold={threshold}`; the best has a score of {best}. Lower it.")
    return Dataset.from_list(kept, features=samples.features)
