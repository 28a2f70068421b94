r"""
Pretraining of a critic: it is fitted to stored rollouts, of any algorithm, before the policy learns.

    min  mean_t (V(s_t) - G_t)^2 / 2

over the chosen tokens, with the Monte-Carlo returns of [`Episode`]s: values of the policy that sampled, without the
bias of a critic that knows nothing yet.

References: VC-PPO, Yuan et al. 2025, https://huggingface.co/papers/2503.01491, section 4.1; VAPO, Yue et al. 2025,
https://huggingface.co/papers/2504.05118, section 4.1.
"""

import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..compat import pad
from ..critic.critic import Critic
from ..critic.heads import ActionValueHead
from ..critic.reading import policy_states
from ..packing.layout import Layout, rows_layout
from ..token_mdp import combine_moments, explained_share, masked_moments, moments_of_all, value_loss
from .episodes import Episode, divided
from .optimizer import clip


PATIENCE = 3  # epochs without a smaller error
# The default of a head that learns alone: on 320 completions of SmolLM2-135M it explained .17 of the held-out returns of
# a reward of words, and .09 and .03 at 1e-4 and 1e-5; the best ridge regression explained .15
HEAD_RATE = 1e-3
MAX_KEPT_BYTES = 2**31  # of hidden states that do not change, and are kept on the CPU


class CriticPretraining:
    """
    Fits a critic's own parameters, on a policy that stays as it is.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): The policy.
        critic ([`Critic`]): Its critic.
        fitted (`Callable`): Picks the values that are fitted out of the critic's.
        args ([`ActorCriticConfig`]): The configuration: sizes of batches, seed, Adam's numbers.
        accelerator (`Accelerator`): Knows the processes, which share each batch.
        learning_rate (`float`): The rate.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        critic: Critic,
        fitted: Callable[[torch.Tensor], torch.Tensor],
        args,
        accelerator: Accelerator,
        learning_rate: float,
    ):
        self.policy, self.critic, self.fitted, self.args, self.accelerator = policy, critic, fitted, args, accelerator
        self.weights = list(critic.own_parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
        )

    def fit(self, episodes: list[Episode], num_epochs: int) -> dict[str, float]:
        """
        Trains until the error on held-out episodes stops falling, and keeps the weights with the smallest.

        The error decides, not the explained variance: a critic that is off by a constant explains as much as one that
        is not, and is a worse baseline.

        Returns:
            `dict[str, float]`: How many rollouts and epochs it took, and the explained variance of the held-out
            returns before and after.
        """
        was_training = self.policy.training
        self.policy.eval()
        training, held_out = divided(episodes, self.args.seed)
        try:
            self._share_start()
            self._take_units(training)
            self._keep_states(episodes)
            lowest, before = self._judge(held_out)
            best, explained, waiting, epoch = self._copies(), before, 0, 0
            size = self.args.per_device_train_batch_size * self.accelerator.num_processes
            steps = num_epochs * math.ceil(len(training) / size)
            is_silent = self.args.disable_tqdm or not self.accelerator.is_main_process
            with tqdm(total=steps, desc="Pretraining the critic", disable=is_silent) as bar:
                while epoch < num_epochs and waiting < PATIENCE:
                    self._train(training, size, epoch, bar)
                    epoch, (error, share) = epoch + 1, self._judge(held_out)
                    bar.set_postfix(explained_variance=f"{share:.2f}")
                    waiting += 1
                    if error < lowest:
                        lowest, best, explained, waiting = error, self._copies(), share, 0
        finally:
            self.policy.train(was_training)
        with torch.no_grad():
            for weight, kept in zip(self.weights, best, strict=True):
                weight.grad = None
                weight.copy_(kept)
        if isinstance(self.critic.value_head, ActionValueHead):
            self.critic.value_head.update_target(1.0)
        return {
            "rollouts": float(len(episodes)),
            "epochs": float(epoch),
            "explained_variance_before": before,
            "explained_variance": explained,
        }

    @torch.no_grad()
    def _share_start(self) -> None:
        """Gives all processes the weights of the first, as DDP will: adapters begin with random numbers of each one's own."""
        if self.accelerator.num_processes > 1:
            for weight in self.policy.parameters():
                if weight.requires_grad:
                    weight.copy_(broadcast(weight.detach()))

    def _take_units(self, episodes: list[Episode]) -> None:
        """Gives the head the units of the returns that it is fitted to; one without units begins at their mean."""
        returns = torch.tensor([x for e in episodes for x, chosen in zip(e.returns, e.chosen, strict=True) if chosen])
        _, mean, var = combine_moments(masked_moments(returns, torch.ones_like(returns)).unsqueeze(0))
        self.critic.value_head.take_units(mean, var)

    def _copies(self) -> list[torch.Tensor]:
        return [weight.detach().to("cpu", copy=True) for weight in self.weights]

    def _train(self, episodes: list[Episode], size: int, epoch: int, bar: tqdm) -> None:
        """Makes an epoch of steps, each over `size` episodes of all processes together."""
        generator = torch.Generator().manual_seed(self.args.seed + epoch)
        order = torch.randperm(len(episodes), generator=generator).tolist()
        if self.critic.trunk is not None:
            self.critic.train()  # in which activations are recomputed, if they are to be
        for start in range(0, len(order), size):
            batch = [episodes[i] for i in order[start : start + size]]
            num_tokens = sum(sum(e.chosen) for e in batch)
            local = self._local(batch)
            if local:
                values, returns = self._values(local)
                losses = value_loss(values, returns) / self.critic.value_head.std.square()
                (losses.sum() / num_tokens).backward()
            if self.accelerator.num_processes > 1:
                for weight in self.weights:
                    grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    weight.grad = self.accelerator.reduce(grad, reduction="sum")
            if self.args.max_grad_norm > 0:
                clip(self.weights, self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            bar.update()
        self.critic.eval()

    @torch.no_grad()
    def _judge(self, episodes: list[Episode]) -> tuple[float, float]:
        """Returns the mean squared error, and the explained variance, over the chosen tokens of all processes."""
        parts = [self._values(batch) for batch in self._batches(self._local(episodes))]
        nothing = (torch.zeros(0, device=self.accelerator.device),) * 2  # a process may have no share
        values, returns = (torch.cat(x).unsqueeze(0) for x in zip(nothing, *parts, strict=True))
        mask = torch.ones_like(values, dtype=torch.bool)
        (_, mean_returns, var_returns), (count, bias, var_errors) = moments_of_all(
            [returns, returns - values], mask, self.accelerator.gather
        )
        error = var_errors * (count - 1) / count + bias.square()
        return error.item(), explained_share(var_errors, var_returns, mean_returns).item()

    def _local(self, episodes: list[Episode]) -> list[Episode]:
        """Returns this process's share."""
        return episodes[self.accelerator.process_index :: self.accelerator.num_processes]

    def _batches(self, episodes: list[Episode]) -> Iterator[list[Episode]]:
        size = self.args.per_device_train_batch_size
        return (episodes[start : start + size] for start in range(0, len(episodes), size))

    # --- Values ---

    def _values(self, episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns values and returns `(N,)` of the N chosen tokens of some episodes."""
        device = self.accelerator.device
        returns = torch.tensor(
            [x for e in episodes for x, chosen in zip(e.returns, e.chosen, strict=True) if chosen], device=device
        )
        if episodes[0].states is not None:
            states = torch.cat([e.states for e in episodes]).to(device)
            return self.critic.value_head(states.unsqueeze(0)).squeeze(0), returns
        layout, chosen = self._layout(episodes)
        with self.accelerator.autocast():
            values = self.critic(self.policy, policy_states(self.policy, self.critic, layout), layout)
        return self.fitted(values[:, :-1])[chosen], returns

    def _layout(self, episodes: list[Episode]) -> tuple[Layout, torch.Tensor]:
        """Returns the rows of some episodes, and where in them tokens were chosen, `(B, T)`."""

        def padded(rows, side, value=0):
            return pad([torch.tensor(row) for row in rows], padding_value=value, padding_side=side)

        prompts, completions = [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes]
        sides = ((prompts, "left"), (completions, "right"))
        ids = torch.cat([padded(rows, side) for rows, side in sides], dim=1)
        mask = torch.cat([padded([[1] * len(row) for row in rows], side) for rows, side in sides], dim=1)
        chosen, device = padded([e.chosen for e in episodes], "right", False), self.accelerator.device
        return rows_layout(ids.to(device), mask.to(device), chosen.size(1) + 1), chosen.to(device)

    @torch.no_grad()
    def _keep_states(self, episodes: list[Episode]) -> None:
        """Runs the policy once, if its hidden states are all that the critic takes, and there is room for them."""
        takes_states_alone = self.critic.trunk is None and not isinstance(self.critic.value_head, ActionValueHead)
        size = sum(sum(e.chosen) for e in episodes) * self.critic.value_head.weight.size(1)
        if not takes_states_alone or size * self.policy.dtype.itemsize > MAX_KEPT_BYTES:
            return
        for batch in self._batches(episodes):
            layout, chosen = self._layout(batch)
            with self.accelerator.autocast():
                states = layout.states(policy_states(self.policy, self.critic, layout))
            kept = states[:, :-1][chosen].cpu().split([sum(e.chosen) for e in batch])
            for episode, of_episode in zip(batch, kept, strict=True):
                episode.states = of_episode
