"""The end of the epochs on a rollout when the policy has moved too far from the one that sampled it (`target_kl`)."""

import torch
from accelerate import Accelerator


class TrustRegion:
    """
    Watches the KL between the policy and the one that sampled, optimizer step by optimizer step.

    Args:
        target_kl (`float`, *optional*): Nats per token; 1.5 times this ends the epochs. None never does.
        device (`torch.device`): The device that sums are kept on.
    """

    def __init__(self, target_kl: float | None, device: torch.device):
        self.target_kl = target_kl
        self.has_ended = False  # until the next rollout
        self.window = torch.zeros(2, device=device)  # sum of the KL and number of tokens within the optimizer step

    def begin_rollout(self) -> None:
        """Allows updates on a new rollout."""
        self.has_ended = False

    def observe(self, kl_sum: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Adds what a micro-batch of this process has seen."""
        self.window += torch.stack([kl_sum, num_tokens])

    def at_step(self, accelerator: Accelerator) -> bool:
        """Returns True if the optimizer step that is about to be made, and all later ones, are to be left out."""
        kl_sum, num_tokens = accelerator.reduce(self.window, reduction="sum").tolist()
        self.window.zero_()
        self.has_ended = self.has_ended or kl_sum > 1.5 * self.target_kl * max(num_tokens, 1)
        return self.has_ended
