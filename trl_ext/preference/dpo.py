"""Direct preference optimization from rankings with ties."""

import textwrap
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from trl import DPOConfig, DPOTrainer
from trl.data_utils import get_dataset_column_names

from ..compat import REFERENCE, disable_gradient_checkpointing, requires_grad_kept, use_adapter
from ..data.rankings import is_ranking
from ..models.dropout import stop_dropout
from ..models.reference import take_up_start
from ..training.arguments import document_fields
from ..training.head_scoring import COMPARED_TEXT, score_as_the_model_does
from .config import RankingArguments
from .metrics import policy_metrics
from .preparation import tokenize_for_dpo
from .trainer import RankingTrainer


# Arguments that say something of a chosen and a rejected completion, with the only value that rankings go with
PAIR_ARGUMENTS = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
    "precompute_ref_log_probs": False,
    "padding_free": False,
    "truncation_mode": "keep_start",
}


@document_fields
@dataclass
class RankingDPOConfig(RankingArguments, DPOConfig):
    __doc__ = f"""
    Configuration of [`RankingDPOTrainer`]: what it adds to [`~trl.DPOConfig`].

    Of that, {", ".join(f"`{name}`" for name in PAIR_ARGUMENTS)} are about a chosen and a rejected
    completion: with rankings anything but the default is an error.
    """

    overlong: str = field(
        default="truncate",
        metadata={
            "help": "What happens to completions that exceed `max_length` with their prompt: 'truncate' them as TRL "
            "does, 'prune' them from the ranking, or 'drop' the row. Counted in a warning.",
            "choices": ["truncate", "prune", "drop"],
        },
    )


class RankingDPOTrainer(RankingTrainer, DPOTrainer):
    """
    [`~trl.DPOTrainer`] for rankings with ties. What changes with respect to the parent:

    - a dataset may have columns `prompt`, `completions` and `ranks` (or `ranking`, or `pairs`), see [`~trl_ext.data.rankings`];
    - the loss is the negative log-likelihood of the ranking under `args.ranking_model`, of the implicit rewards

          s_i = beta (log pi(y_i | x) - log pi_ref(y_i | x));

    - the prompt is run once for all of its completions, where the model allows (`args.shared_prefix`);
    - of pairs (`chosen`, `rejected`) a boolean column `tie` may say that neither was better. Two completions with
      `rao_kupper` and `davidson` are DPO-RK and DPO-D of the paper.

    Args:
        All are [`~trl.DPOTrainer`]'s; `args` is a [`RankingDPOConfig`].
    """

    _tag_names = ["trl", "trl_ext", "dpo", "ranking"]
    _name = "Ranking DPO"
    _paper = {
        "title": "On Extending Direct Preference Optimization to Accommodate Ties",
        "id": "2409.17431",
        "citation": textwrap.dedent("""\
            @inproceedings{chen2025dpoties,
                title     = {{On Extending Direct Preference Optimization to Accommodate Ties}},
                author    = {Jinghong Chen and Guangyu Yang and Weizhe Lin and Jingbiao Mei and Chenxu Lyu and Bill Byrne},
                booktitle = {Advances in Neural Information Processing Systems},
                year      = 2025,
                eprint    = {arXiv:2409.17431},
            }"""),
    }
    config_class = RankingDPOConfig
    _task_type = "CAUSAL_LM"
    _pipeline_tag = "text-generation"
    _template_file = "dpo.md"
    _tokenized_columns = ["prompt_ids", "completion_ids"]
    _tokenize_ranking = staticmethod(tokenize_for_dpo)
    _metric_names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}

    def __init__(
        self, model, ref_model=None, args: RankingDPOConfig | None = None, data_collator=None, *other_args, **kwargs
    ):
        args = self._checked_args(args, model)
        super().__init__(model, ref_model, args, data_collator, *other_args, **kwargs)
        if ref_model is None:
            take_up_start(self.ref_model, model, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self._is_vision_dataset and any(is_ranking(get_dataset_column_names(data)) for data in self._datasets()):
            raise ValueError(
                "Rankings with images are not supported. Remove the columns `image` and `images`, or convert the "
                "dataset with `to_pairs`."
            )
        if args.disable_dropout:
            stop_dropout(self.model)
            if self.ref_model is not None:
                stop_dropout(self.ref_model)
        self._set_up_rankings(data_collator)
        self._heads_compared = self._is_vlm
        if not (self._is_vlm or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._compare_heads(self.model, self._tokenizer(COMPARED_TEXT)["input_ids"])

    def _check_for_rankings(self, args):
        for name, value in PAIR_ARGUMENTS.items():
            if getattr(args, name) != value:
                raise ValueError(
                    f"`{name}={getattr(args, name)!r}` is for pairs of a chosen and a rejected completion, and the "
                    f"dataset holds rankings. Leave it at {value!r}, or convert the dataset with `to_pairs`."
                )

    def _compare_heads(self, model, ids: list[int]) -> None:
        self._heads_compared = True
        score_as_the_model_does(
            model,
            [self._model] if self.ref_model is None else [self._model, self.ref_model],
            ids,
            is_half=self.args.bf16 or self.args.fp16 or self._model.dtype != torch.float32,
            is_sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )

    def compute_ref_log_probs(self, model, inputs):
        with requires_grad_kept(model):
            return super().compute_ref_log_probs(model, inputs)

    def _log_worths(self, model, inputs):
        if not self._heads_compared:
            self._compare_heads(model, inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist())
        packed = self._use_shared_prefix(model, inputs)
        logps, outputs = self._values(model, inputs, packed)
        ref_logps = self._reference_logps(inputs, packed)
        mode = "train" if self.model.training else "eval"
        for name, value in policy_metrics(self.accelerator, logps.detach(), outputs, inputs, packed).items():
            self._metrics[mode][name].append(value)
        return self.beta * (logps - ref_logps), outputs

    @torch.no_grad()
    def _reference_logps(self, inputs, packed: bool) -> torch.Tensor:
        """Returns log pi_ref(y_i | x), `(B, K)`."""
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is not None or not isinstance(self._model, PeftModel):
                return self._values(self.ref_model, inputs, packed)[0]
            # A new adapter's reference is the base model; one trained further has a copy of its start
            name = REFERENCE if REFERENCE in self._model.peft_config else None
            with requires_grad_kept(self._model), use_adapter(self._model, adapter_name=name):
                return self._values(self.model, inputs, packed)[0]

    def _values(self, model, inputs, packed):
        """Returns log pi(y_i | x), `(B, K)`."""
        prefix = "packed_" if packed else ""
        input_ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}completion_mask"]
        if packed:
            kwargs = self._packed_kwargs(model, inputs)
        else:
            kwargs = {"input_ids": input_ids, "attention_mask": inputs["attention_mask"], "use_cache": False}
        if self.aux_loss_enabled and model is not self.ref_model:
            kwargs["output_router_logits"] = True
        outputs = model(**kwargs, labels=input_ids.masked_fill(mask == 0, -100), fused_lm_head=True)
        # Prompt learning puts virtual tokens before the real ones
        logps = outputs.log_probs[:, -(input_ids.size(1) - 1) :].float()
        if not packed:
            return logps.sum(dim=1)[inputs["rows"]], outputs
        num_items = inputs["ranks"].size(1)
        segments = inputs["packed_segments"][:, 1:].clamp(min=0)  # what prefix and padding hold counts nowhere
        logps = torch.where(inputs["packed_completion_mask"][:, 1:].bool(), logps, 0)
        sums = logps.new_zeros(len(logps), num_items + 1).scatter_add(1, segments, logps)
        return sums[:, 1:], outputs

    def _further_loss(self, log_worths, outputs, inputs):
        loss = super()._further_loss(log_worths, outputs, inputs)
        if not self.aux_loss_enabled:
            return loss
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(outputs.aux_loss).mean().item())
        return loss + self.router_aux_loss_coef * outputs.aux_loss

    def _log_worth_metrics(self, log_worths):
        return {"rewards/mean": log_worths.mean()}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if prediction_loss_only or "ranks" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), (outputs.logits, outputs.ranks), ()
