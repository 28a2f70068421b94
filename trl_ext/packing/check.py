"""Whether a model may run completions after a shared prefix, as one batch shows."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments


logger = get_logger(__name__)

# How many completions a rollout's check compares: a wrong mask or position shows in two
NUM_COMPARED = 4
# What a head that starts at zero says of packed and other completions alike
ALL_ZERO = "all scores are 0"


class PrefixCheck:
    """
    Asked before each batch, until one has shown it.

    Args:
        args (`TrainingArguments`): With `shared_prefix`: `"auto"`, `"always"` (an error where a model cannot) or
            `"never"`.
        accelerator (`Accelerator`): Of the processes, which must all take the same way.
        model (`PreTrainedModel` or `PeftModel`): Whose dtype says how exact it is.
        name (`str`, *optional*): For messages; by default that of the model's class.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        model: PreTrainedModel | PeftModel,
        name: str | None = None,
    ):
        self.mode, self.accelerator, self.name = args.shared_prefix, accelerator, name or type(model).__name__
        self.is_half = args.bf16 or args.fp16 or model.dtype != torch.float32
        self.verdict = False if self.mode == "never" else None

    def __call__(
        self,
        model: nn.Module,
        compare: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        shows: Callable[[], bool] = lambda: True,
    ) -> bool:
        """
        Args:
            model (`nn.Module`): The model.
            compare (`Callable`): Gives what the model says of the batch, in rows and packed.
            shows (`Callable`, *optional*): Whether anything is shared in the batch, so that a wrong mask would show. By
                default something is.
        """
        if self.verdict is None:
            any_shows = torch.tensor(float(shows()), device=self.accelerator.device)
            if self.accelerator.reduce(any_shows, reduction="sum").item() == 0:
                return False  # the next batch may
            reason = self._why_not(model, compare)
            verdict = torch.tensor([reason is not None, reason == ALL_ZERO], device=self.accelerator.device)
            num_failed, num_zero = self.accelerator.reduce(verdict.float(), reduction="sum").tolist()
            if num_zero > 0 and num_zero == num_failed:  # ask again after a step
                return self.mode == "always"
            if num_failed == 0:
                self.verdict = True
            else:
                message = (
                    f"{self.name} cannot run completions after a shared prefix ({reason or 'another process said so'})"
                )
                if self.mode == "always":
                    raise ValueError(f"{message}. Set `shared_prefix='auto'`, or another `attn_implementation`.")
                logger.warning(
                    f"{message}: the prompt is run again for each. Load it with `attn_implementation='sdpa'` if it has "
                    "another, or set `shared_prefix='never'` to be told no more."
                )
                self.verdict = False
        return self.verdict

    @torch.no_grad()
    def _why_not(self, model: nn.Module, compare: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> str | None:
        was_training = model.training
        model.eval()  # dropout would tell the two apart
        try:
            rows, packed = compare()
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            model.train(was_training)
        if not rows.any():
            return ALL_ZERO
        difference = ((rows - packed).abs().max() / rows.abs().max()).item()
        if not difference <= (5e-2 if self.is_half else 1e-3):
            return f"scores differ by {difference:.2g} of their size"
        return None
