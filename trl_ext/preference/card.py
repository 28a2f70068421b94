"""The model cards of reward models, and of policies by DPO, from rankings or pairs."""

import torch

from ..hub.curves import Panel
from ..hub.model_card import CardContent, shown
from ..models.reward_inputs import RewardInput
from ..ranking import predict_pair
from .config import RankingArguments
from .metrics import named_ties


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
METRICS = [
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
]
RESULTS = {
    "accuracy": ("accuracy", "accuracy on pairs with a winner"),
    "rewards/accuracies": ("accuracy", "accuracy on pairs with a winner"),
    "three_way_accuracy": ("accuracy", "accuracy on win, tie or loss"),
    "kendall_tau_b": ("kendall_tau_b", "Kendall's tau-b"),
    "log_likelihood": ("log_likelihood", "log-likelihood per ranking, nats"),
}
PANELS = [
    Panel("Loss", "nats", "loss"),
    Panel("Accuracy on pairs with a winner", "share", "accuracy"),
    Panel("Accuracy on pairs with a winner", "share", "rewards/accuracies"),
    Panel("Log-likelihood (dotted: tie rates only)", "nats per ranking", "log_likelihood", "baseline_log_likelihood"),
    Panel("Rank correlation", "Kendall's tau-b", "kendall_tau_b"),
    Panel("Ties predicted (dotted: observed)", "share of pairs", "predicted_tie_rate", "tie_rate"),
    Panel("Margin of the winner", "score", "margin"),
    Panel("Margin of the winner", "score", "rewards/margins"),
]
EXPLANATION = (
    "`accuracy` is that of pairs with a winner. `log_likelihood` is per ranking, in nats; `baseline_log_likelihood` is "
    "what one gets by knowing how frequent ties are and nothing else."
)
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


def reading(how: RewardInput | None) -> dict:
    """Returns what a card says of how a reward model reads texts; nothing of other models."""
    if how is None:
        return {}
    left_out = []
    if how.special_tokens:
        left_out.append(f"the special tokens {', '.join(f'`{token}`' for token in how.special_tokens)}")
    if how.ending:
        left_out.append(f"the `{how.ending}` at their end")
    return {
        "is_tokenized": how.kind == "tokens",
        "is_bare": how.kind == "text" and not left_out,
        "has_ending": bool(how.ending),
        "left_out": " and ".join(left_out),
    }


def ranking_card(trainer, parents_paper: dict | None) -> CardContent:
    """Returns what a card says of the rankings or pairs that were learned from, how, and what the scores mean."""
    args, on_rankings = trainer.args, trainer._has_rankings
    # As last written to the config: one process writes the card, and cannot gather what is sharded
    ties = {} if trainer.ties is None else named_ties(args.ranking_model, trainer._model.config.log_tie)
    is_policy = trainer._pipeline_tag == "text-generation"
    details = {
        "on_rankings": on_rankings,
        "likelihood": LIKELIHOODS[args.ranking_model] if on_rankings else "that of single pairs, as in TRL",
        "explanation": EXPLANATION if on_rankings else None,
        "is_chat": trainer._is_chat,
        **reading(trainer.reward_input),
        "max_length": args.max_length,
        "learn_ties": args.learn_ties,
        "tie_of_equals": f"{tie_of_equals(trainer._model):.1%}" if ties else None,
        "ties": {name: f"{value:.4g}" for name, value in ties.items()},
    }
    return CardContent(
        model=trainer._model,
        rows="rankings" if on_rankings else "pairs",
        metrics=METRICS,
        results=RESULTS,
        panels=PANELS,
        hyper_parameters=shown(args, [*TRAINING_ARGUMENTS, *own_arguments(on_rankings, bool(ties), is_policy)]),
        papers=[paper for paper in ([trainer._paper] if on_rankings else []) + [parents_paper] if paper],
        details=details,
    )


def tie_of_equals(model) -> float:
    """Returns how likely two completions with the same log-worth tie, if nothing else is ranked with them."""
    log_tie = torch.tensor(model.config.log_tie)
    _, tie, _ = predict_pair(torch.zeros(()), torch.zeros(()), model.config.ranking_model, log_tie)
    return tie.item()


def own_arguments(on_rankings: bool, has_ties: bool, is_policy: bool) -> list[str]:
    """Returns the names of arguments that are shown beside those of any training."""
    if not on_rankings:
        return ["beta", "loss_type"] if is_policy else ["center_rewards_coefficient"]
    names = [name for name in RankingArguments.__dataclass_fields__ if name not in ("log_tie", "on_error")]
    names = [name for name in names if has_ties or "tie" not in name]
    return [*names, "beta" if is_policy else "center_rewards_coefficient"]
