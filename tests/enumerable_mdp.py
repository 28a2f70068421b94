"""A token MDP small enough to list all that can happen in it: what is expected there is a sum, not an estimate."""

import itertools

import torch


VOCAB, HORIZON, EOS = 3, 3, 2
PREFIXES = [prefix for n in range(HORIZON) for prefix in itertools.product(range(VOCAB), repeat=n)]
STATE = {prefix: i for i, prefix in enumerate(PREFIXES)}


class TokenMDP:
    """A tabular policy and reward on an MDP small enough that all its episodes fit in one batch."""

    def __init__(self, early_end):
        generator = torch.Generator().manual_seed(0)
        self.early_end = early_end
        shape = (len(PREFIXES), VOCAB)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        # Away from 0, so that a baseline has something to take off
        self.reward_table = 2 + torch.randn(shape, generator=generator, dtype=torch.float64)

        episodes = sorted({self._ended(tokens) for tokens in itertools.product(range(VOCAB), repeat=HORIZON)})
        size = (len(episodes), HORIZON)
        self.mask = torch.zeros(size, dtype=torch.bool)
        self.states, self.actions = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
        for b, episode in enumerate(episodes):
            for t, token in enumerate(episode):
                self.mask[b, t], self.states[b, t], self.actions[b, t] = True, STATE[episode[:t]], token
        self.rewards = torch.where(self.mask, self.reward_table[self.states, self.actions], 99.0)

    def _ended(self, tokens):
        return tokens[: tokens.index(EOS) + 1] if self.early_end and EOS in tokens else tokens

    @property
    def logps(self):
        return torch.where(self.mask, self.logits.log_softmax(-1)[self.states, self.actions], 0)

    @property
    def probabilities(self):
        return self.logps.sum(dim=1).exp()

    def objective(self, gamma):
        """J, with gradient: the sum over all episodes of probability times discounted return."""
        discounts = gamma ** torch.arange(HORIZON, dtype=torch.float64)
        returns = (torch.where(self.mask, self.rewards, 0) * discounts).sum(dim=1)
        return (self.probabilities * returns).sum()

    def solve(self, gamma):
        """V `(S,)` and Q `(S, A)`, by backward induction from the longest prefixes."""
        policy = self.logits.detach().softmax(-1)
        values, action_values = torch.zeros(len(PREFIXES), dtype=torch.float64), self.reward_table.clone()
        for prefix in reversed(PREFIXES):
            s = STATE[prefix]
            for token in range(VOCAB):
                if (*prefix, token) in STATE and not (self.early_end and token == EOS):
                    action_values[s, token] += gamma * values[STATE[*prefix, token]]
            values[s] = policy[s] @ action_values[s]
        return values, action_values

    def followed_gradient(self, gamma):
        """
        sum_s d(s) sum_a grad pi(a|s) Q(s, a), with d(s) the expected number of visits to s, not discounted: what trainers
        follow, which put no gamma^t before a token.
        """
        policy = self.logits.softmax(-1)
        visits = torch.zeros(len(PREFIXES), dtype=torch.float64)
        visits[STATE[()]] = 1
        for prefix in PREFIXES:  # the shorter ones come first
            for token in range(VOCAB):
                if (*prefix, token) in STATE and not (self.early_end and token == EOS):
                    visits[STATE[*prefix, token]] = visits[STATE[prefix]] * policy[STATE[prefix], token].detach()
        _, action_values = self.solve(gamma)
        return torch.autograd.grad((visits.unsqueeze(1) * policy * action_values).sum(), self.logits)[0]

    def true_values(self, gamma):
        """V(s_t) of each episode, `(B, T)`."""
        return torch.where(self.mask, self.solve(gamma)[0][self.states], -99.0)

    def expected_gradient(self, weights):
        """E[sum_t grad log pi(a_t|s_t) w_t], exactly."""
        surrogate = (self.probabilities.detach().unsqueeze(1) * self.logps * weights).sum()
        return torch.autograd.grad(surrogate, self.logits)[0]

    def gradient_variance(self, weights):
        """Summed over the parameters, exactly."""
        scores = (self.logps * weights).sum(dim=1)
        gradients = torch.stack([torch.autograd.grad(s, self.logits, retain_graph=True)[0].flatten() for s in scores])
        probabilities = self.probabilities.detach()
        mean = probabilities @ gradients
        return probabilities @ (gradients - mean).square().sum(dim=1)

    def expectation_given_action(self, per_token, upto=HORIZON):
        """E[x_t | s_t, a_t] at `(S, A)`, nan where no episode passes within its first `upto` tokens."""
        own = self.mask & (torch.arange(HORIZON) < upto)
        where = (self.states * VOCAB + self.actions)[own]
        weights = self.probabilities.detach().unsqueeze(1).expand_as(per_token)[own]
        zeros = torch.zeros(len(PREFIXES) * VOCAB, dtype=torch.float64)
        total = zeros.index_add(0, where, weights * per_token[own])
        return (total / zeros.index_add(0, where, weights)).view(len(PREFIXES), VOCAB)
