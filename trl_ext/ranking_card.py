"""The model card of what was trained on rankings."""

import torch

from .model_card import final_metrics, shown, write_card
from .ranking import predict_pair
from .ranking_config import RankingArguments


TRAINING_ARGUMENTS = [
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_length",
    "max_grad_norm",
    "bf16",
    "seed",
]
FINAL_METRICS = [
    "loss",
    "accuracy",
    "rewards/accuracies",
    "three_way_accuracy",
    "kendall_tau_b",
    "tie_rate",
    "predicted_tie_rate",
    "tie_calibration_error",
    "log_likelihood",
    "baseline_log_likelihood",
    "margin",
    "rewards/margins",
    "mean_reward",
    "num_tokens",
]
LIKELIHOODS = {
    "bradley_terry": "the Bradley-Terry likelihood of all strict pairs; ties were left out",
    "soft_bradley_terry": "the Bradley-Terry likelihood of all pairs, a tie counting as half a win for each",
    "rao_kupper": "the Rao-Kupper likelihood of all pairs, which has ties",
    "davidson": "the Davidson likelihood of all pairs, which has ties",
    "plackett_luce": "the Plackett-Luce likelihood of each ranking, without ties",
    "plackett_luce_marginal": "the Plackett-Luce likelihood of each ranking, summed over the orders within ties",
    "plackett_luce_efron": "the Plackett-Luce likelihood of each ranking, with Efron's approximation at ties",
    "plackett_luce_breslow": "the Plackett-Luce likelihood of each ranking, with Breslow's approximation at ties",
    "davidson_luce": "the Davidson-Luce likelihood of each ranking, which is a distribution over all orders with ties",
}


class RankingCardMixin:
    """Replaces TRL's model card by one that says which rankings were learned from, how, and what the scores mean."""

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        on_rankings = "ranking_model" in self._model.config.to_dict()
        write_card(
            self,
            self._model,
            "ranking.md",
            {"model_name": model_name, "dataset_name": dataset_name, "tags": tags, "pipeline_tag": self._pipeline_tag},
            is_policy=self._pipeline_tag == "text-generation",
            on_rankings=on_rankings,
            likelihood=LIKELIHOODS[self.args.ranking_model] if on_rankings else "that of single pairs, as in TRL",
            tie_of_equals=None if self.ties is None else f"{self._tie_of_equals():.1%}",
            ties={} if self.ties is None else {name: f"{value:.4g}" for name, value in self._named_ties().items()},
            hyper_parameters=shown(self.args, [*TRAINING_ARGUMENTS, *self._own_arguments()]),
            metrics=final_metrics(self.state.log_history, FINAL_METRICS),
        )

    def _tie_of_equals(self) -> float:
        """How likely two completions with the same score tie, if nothing else is ranked with them."""
        _, tie, _ = predict_pair(torch.zeros(()), torch.zeros(()), self.args.ranking_model, self._log_tie())
        return tie.item()

    def _own_arguments(self) -> list[str]:
        own = [name for name in RankingArguments.__dataclass_fields__ if name not in ("log_tie", "on_error")]
        if self.ties is None:
            own = [name for name in own if "tie" not in name]
        return own + (["beta"] if self._pipeline_tag == "text-generation" else ["center_rewards_coefficient"])
