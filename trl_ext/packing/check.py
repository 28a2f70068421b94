"""
The one comparison of packed rows with plain ones.

Some models run packed rows wrongly: their attention takes no mask of blocks, or they make positions of their own.
Before a model is trusted with packed rows it is run on a few sequences in both ways, once, and must say the same.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments


logger = get_logger(__name__)

# How many completions of a rollout are compared: a wrong mask or position shows in two
NUM_COMPARED = 4
# The reason of a head that starts at zero, which says the same of completions packed and in rows
ALL_ZERO = "all scores are 0"


class PrefixCheck:
    """
    Compares packed rows with plain ones, once per model: it is asked before each batch, until one has shown it.

    Args:
        args (`TrainingArguments`): With `shared_prefix`: `"auto"`, `"always"` (an error where a model cannot) or
            `"never"`.
        accelerator (`Accelerator`): Knows the processes, which must all take the same way.
        model (`PreTrainedModel` or `PeftModel`): The model, whose dtype says how exact it is.
        name (`str`, *optional*): Its name in messages; by default that of its class.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        model: PreTrainedModel | PeftModel,
        name: str | None = None,
    ):
        self.mode, self.accelerator, self.model = args.shared_prefix, accelerator, model
        self.name = name or type(model).__name__
        self.is_half = args.bf16 or args.fp16 or model.dtype != torch.float32
        self.verdict = False if self.mode == "never" else None

    def __call__(self, forward: Callable[[bool], torch.Tensor], shows: Callable[[], bool] = lambda: True) -> bool:
        """
        Tells if a batch, and those after it, may be packed.

        Args:
            forward (`Callable`): Given False, what the model says of the batch in plain rows; given True, in packed
                ones.
            shows (`Callable`, *optional*): Tells if anything is shared in the batch, so that a wrong mask would show.
                By default something is.
        """
        if self.verdict is None:
            if self._sum(shows())[0] == 0:
                return False  # the next batch may show it
            reason = self._why_not(forward)
            num_failed, num_zero = self._sum(reason is not None, reason == ALL_ZERO)
            if num_zero > 0 and num_zero == num_failed:  # ask again after a step
                return self.mode == "always"
            if num_failed > 0:
                self._tell(reason or "another process said so")
            self.verdict = num_failed == 0
        return self.verdict

    def _sum(self, *flags: bool) -> list[float]:
        """Returns the number of processes in which each flag is set."""
        local = torch.tensor(flags, dtype=torch.float, device=self.accelerator.device)
        return self.accelerator.reduce(local, reduction="sum").tolist()

    def _tell(self, reason: str) -> None:
        message = f"{self.name} cannot run completions after a shared prefix ({reason})"
        if self.mode == "always":
            raise ValueError(f"{message}. Set `shared_prefix='auto'`, or another `attn_implementation`.")
        logger.warning(
            f"{message}: the prompt is run again for each. Load it with `attn_implementation='sdpa'` if it has "
            "another, or set `shared_prefix='never'` to be told no more."
        )

    @torch.no_grad()
    def _why_not(self, forward: Callable[[bool], torch.Tensor]) -> str | None:
        was_training = self.model.training
        self.model.eval()  # dropout would tell the two apart
        try:
            with self.accelerator.autocast():
                rows, packed = (forward(is_packed).float() for is_packed in (False, True))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            self.model.train(was_training)
        if not rows.any():
            return ALL_ZERO
        difference = ((rows - packed).abs().max() / rows.abs().max()).item()
        if not difference <= (5e-2 if self.is_half else 1e-3):
            return f"scores differ by {difference:.2g} of their size"
        return None
