"""Q actor-critic: exact where all can be enumerated, and the same through the trainer."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from enumerable_mdp import PREFIXES, VOCAB, TokenMDP
from helpers import (
    build_policy,
    count_good,
    first_gradients,
    quantization_config,
    recorded,
    rows_of,
    scripted_rollout,
    settings,
    variety,
)
from peft import AutoPeftModelForCausalLM, LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    QActorCriticConfig,
    QActorCriticTrainer,
    ReinforceConfig,
    ReinforceTrainer,
    load_critic,
    merge_adapter,
    token_action_values,
    token_values,
)
from trl_ext.actor_critic.baseline import Baseline, PastRollouts
from trl_ext.critic.heads import ActionValueHead, Decisions, Estimate, ValueHead
from trl_ext.models import lm_head as lm_head_module
from trl_ext.token_mdp.losses import value_loss


MODES = ["q", "advantage", "all_actions"]
TARGETS = ["sarsa", "expected_sarsa"]
modes = pytest.mark.parametrize("policy_gradient", MODES)
targets = pytest.mark.parametrize("q_target", TARGETS)


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def make(policy, tmp_path, prompts, trainer_class=QActorCriticTrainer, reward=length, kwargs=None, **overrides):
    args = QActorCriticConfig(**settings(tmp_path, **{"q_rank": 8, **overrides}))
    return recorded(trainer_class)(policy, reward, args, prompts, **(kwargs or {}))


# --- On an MDP that can be enumerated ---


class EnumeratedPolicy(torch.nn.Module):
    """The MDP's policy as a language model whose hidden states are its states, one-hot."""

    config = SimpleNamespace(get_text_config=lambda: None)

    def __init__(self, mdp):
        super().__init__()
        self.lm_head = torch.nn.Linear(len(PREFIXES), VOCAB, bias=False)
        self.lm_head.weight.data.copy_(mdp.logits.detach().T)

    def get_output_embeddings(self):
        return self.lm_head


@pytest.fixture(params=[(False, 0.0), (True, 0.0), (True, 1.0)], ids=["horizon", "early-end", "priced"])
def enumerated(request):
    """An MDP whose rewards are paid less a price of each token, which is known."""
    early_end, price = request.param
    mdp = TokenMDP(early_end)
    random = torch.randn(mdp.reward_table.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mdp.price_table = price * random
    mdp.reward_table -= mdp.price_table
    mdp.prices = mdp.price_table[mdp.states, mdp.actions]
    mdp.rewards = torch.where(mdp.mask, mdp.rewards - mdp.prices, 99.0)
    policy = EnumeratedPolicy(mdp)
    hidden_states = torch.nn.functional.one_hot(mdp.states, len(PREFIXES)).float()
    return mdp, hidden_states, Decisions(policy, hidden_states, mdp.actions, mdp.mask)


def head_of(table):
    """A head that says `table` `(S, A)`, and so does its target."""
    head = ActionValueHead(ValueHead(len(PREFIXES)), VOCAB, rank=len(PREFIXES))
    with torch.no_grad():
        head.projection.copy_(torch.eye(len(PREFIXES)))
        head.embedding.copy_(table.T)
    head.update_target(1.0)
    return head


def exact_head(mdp, gamma):
    """Q before prices."""
    return head_of(mdp.solve(gamma)[1] + mdp.price_table)


def estimator(mdp, trainer_class=QActorCriticTrainer, past=None, **args):
    """A trainer that can do no more than estimate credit of all episodes at once, by `_estimated`."""
    trainer = object.__new__(trainer_class)
    unset = {"lam_policy": None, "lam_value": None, "length_adaptive_alpha": None, "gate_critic": False}
    trainer.args = SimpleNamespace(**unset | {"gamma": 1.0, "lam": 1.0} | args)
    trainer.model, trainer.accelerator = SimpleNamespace(training=True), Accelerator(cpu=True)
    trainer._metrics, trainer.num_generations = {"train": defaultdict(list)}, 1
    trainer.baseline, trainer.past_advantages = Baseline(trainer.accelerator), PastRollouts(trainer.accelerator)
    if past is not None:
        trainer.past_advantages.moments.value = torch.tensor(past, dtype=torch.float64)
    trainer._rewards_of = lambda rollout: mdp.rewards + mdp.prices
    density = mdp.mask * mdp.probabilities.detach().unsqueeze(1)
    trainer._global_moments = lambda x, mask: (
        None,
        (density * x).sum() / density.sum(),
        None,
    )  # each in its due share
    return trainer


def estimate(mdp, values, gamma, lam=1.0, **args):
    """Credit as the trainer has it."""
    return credit_by(estimator(mdp, gamma=gamma, lam=lam, **args), mdp, values)


def credit_by(trainer, mdp, values):
    rollout = SimpleNamespace(chosen=mdp.mask, rewards=torch.zeros(len(mdp.mask)), index=torch.arange(len(mdp.mask)))
    return trainer._estimated(rollout, mdp.rewards, None if values is None else values.detach(), None)


def episode_gradients(mdp, decisions, values, credit):
    """Returns the gradient that an update follows in each episode, `(B, S, A)`: advantages of the sampled tokens and the sum over all."""
    scores = (mdp.logps * credit.advantages).sum(dim=1)
    gradients = torch.stack([torch.autograd.grad(x, mdp.logits, retain_graph=True)[0] for x in scores])
    if credit.action_weights is None:
        return gradients
    weight = decisions.policy.lm_head.weight
    sums = credit.action_weights * torch.where(mdp.mask, values[..., Estimate.V], 0).sum(dim=1)
    return gradients + torch.stack([torch.autograd.grad(x, weight, retain_graph=True)[0].T for x in sums])


def expected(mdp, x):
    return torch.tensordot(mdp.probabilities.detach(), x, dims=1)


def variance(mdp, x):
    return (mdp.probabilities.detach() @ (x - expected(mdp, x)).square().flatten(1).sum(dim=1)).item()


# Sums of squares and products, of Q - V and of sampled advantages, by which nothing, a part, or all was explained
UNTRUSTED, HALF, TRUSTED = None, [[1.0, 0.75], [0.75, 1.0]], [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("past", [UNTRUSTED, HALF, TRUSTED])
@modes
def test_the_policy_gradient_is_exact(enumerated, gamma, policy_gradient, past):
    """With the true critic, however far it is trusted, and whatever the known price of a token."""
    mdp, hidden_states, decisions = enumerated
    exact = mdp.followed_gradient(gamma)
    head = exact_head(mdp, gamma)
    head.all_actions = policy_gradient == "all_actions"
    values = head(hidden_states, decisions)
    credit = estimate(mdp, values, gamma, policy_gradient=policy_gradient, q_target="sarsa", past=past)
    gradient = expected(mdp, episode_gradients(mdp, decisions, values, credit))
    torch.testing.assert_close(gradient, exact, atol=2e-6, rtol=1e-4)
    assert exact.abs().max() > 0.01


@pytest.mark.parametrize("past", [UNTRUSTED, HALF, TRUSTED])
@pytest.mark.parametrize("seed", range(3))
def test_the_sum_over_all_actions_is_right_on_average_whatever_the_critic_says(enumerated, past, seed):
    mdp, hidden_states, decisions = enumerated
    generator = torch.Generator().manual_seed(seed)
    head = head_of(3 + 4 * torch.randn(len(PREFIXES), VOCAB, generator=generator))
    head.all_actions = True
    values = head(hidden_states, decisions)
    credit = estimate(mdp, values, 0.8, policy_gradient="all_actions", q_target="sarsa", past=past)
    assert (credit.action_weights > 0).all() == (past is not None)
    gradients = episode_gradients(mdp, decisions, values, credit)
    torch.testing.assert_close(expected(mdp, gradients), mdp.followed_gradient(0.8), atol=1e-5, rtol=1e-4)


def test_the_sum_over_all_actions_of_the_true_critic_has_less_variance_than_sampling(enumerated):
    mdp, hidden_states, decisions = enumerated
    head = exact_head(mdp, 1.0)
    head.all_actions = True
    values = head(hidden_states, decisions)
    sampled, both = (
        episode_gradients(
            mdp,
            decisions,
            values,
            estimate(mdp, values, 1.0, policy_gradient="all_actions", q_target="sarsa", past=past),
        )
        for past in (UNTRUSTED, TRUSTED)
    )
    assert variance(mdp, both) < 0.8 * variance(mdp, sampled)


@targets
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_expected_target_of_the_true_critic_is_the_true_value(enumerated, q_target, lam):
    """Before prices, which are none of the critic's business: those of later tokens are in the target, its own is not."""
    mdp, hidden_states, decisions = enumerated
    values = exact_head(mdp, 0.8)(hidden_states, decisions).detach()
    action_values = mdp.solve(0.8)[1] + mdp.price_table
    state_values = (mdp.logits.softmax(-1) * action_values).sum(-1).detach()
    torch.testing.assert_close(values[..., Estimate.V][mdp.mask], state_values[mdp.states][mdp.mask].float())
    returns = estimate(mdp, values, 0.8, lam, policy_gradient="q", q_target=q_target).returns
    found = mdp.expectation_given_action(returns)
    reached = ~found.isnan()
    torch.testing.assert_close(found[reached], action_values[reached], atol=1e-5, rtol=1e-5)


@targets
def test_the_lambda_of_values_is_that_of_the_targets(enumerated, q_target):
    mdp, hidden_states, decisions = enumerated
    values = exact_head(mdp, 0.8)(hidden_states, decisions).detach()

    def targets(lam, lam_value=None):
        args = {"policy_gradient": "advantage", "q_target": q_target, "lam_value": lam_value}
        return estimate(mdp, values, 0.8, lam, **args).returns

    assert torch.equal(targets(0.3, 0.9), targets(0.9)) and not torch.allclose(targets(0.3), targets(0.9))


@targets
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_the_critic_converges_to_the_true_values(enumerated, q_target, lam):
    """Q, V, A, and with them the gradient, from a head that starts at 0, with its slowly moving target."""
    mdp, hidden_states, decisions = enumerated
    gamma = 0.8
    head = ActionValueHead(ValueHead(len(PREFIXES)), VOCAB, rank=len(PREFIXES))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    weights = mdp.mask * mdp.probabilities.detach().float().unsqueeze(1)
    estimating = estimator(mdp, gamma=gamma, lam=lam, policy_gradient="q", q_target=q_target)
    for step in range(800):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 800)
        values = head(hidden_states, decisions)
        returns = credit_by(estimating, mdp, values).returns.float()
        optimizer.zero_grad()
        (weights * value_loss(values[..., Estimate.Q], returns)).sum().backward()
        optimizer.step()
        head.update_target(0.1)
    values = head(hidden_states, decisions).detach()
    action_values = mdp.solve(gamma)[1] + mdp.price_table
    state_values = (mdp.logits.softmax(-1) * action_values).sum(-1).detach().float()
    own = mdp.mask
    q, v = action_values[mdp.states, mdp.actions][own].float(), state_values[mdp.states][own]
    torch.testing.assert_close(values[..., Estimate.Q][own], q, atol=0.02, rtol=0)
    torch.testing.assert_close(values[..., Estimate.V][own], v, atol=0.02, rtol=0)
    assert (q - v).abs().max() > 0.5 and (q - v).abs().min() < 0.5
    credit = estimate(mdp, values, gamma, past=TRUSTED, policy_gradient="advantage", q_target=q_target)
    difference = credit.advantages[own] - (q - v - mdp.prices[own])
    assert (difference - difference.mean()).abs().max() < 0.03  # but for what is taken off all of them
    gradient = mdp.expected_gradient(credit.advantages)
    torch.testing.assert_close(gradient, mdp.followed_gradient(gamma), atol=0.01, rtol=0)


def test_a_critic_that_is_too_loud_is_not_followed(enumerated):
    """However well what it says is correlated with what was sampled."""
    mdp, hidden_states, decisions = enumerated
    values = exact_head(mdp, 1.0)(hidden_states, decisions).detach()
    sampled, loud = (
        estimate(mdp, values, 1.0, policy_gradient="advantage", q_target="sarsa", past=past).advantages
        for past in (UNTRUSTED, [[1e4, 99.0], [99.0, 1.0]])
    )
    torch.testing.assert_close(loud, sampled)


def test_its_gradient_varies_less_than_that_of_returns(enumerated):
    """Credit that holds nothing of what came after is for this."""
    mdp, hidden_states, decisions = enumerated
    values = exact_head(mdp, 1.0)(hidden_states, decisions).detach()
    sampled, trusted = (
        estimate(mdp, values, 1.0, policy_gradient="advantage", q_target="sarsa", past=past).advantages
        for past in (UNTRUSTED, TRUSTED)
    )
    assert mdp.gradient_variance(trusted) < 0.9 * mdp.gradient_variance(sampled)


@pytest.mark.parametrize("policy_gradient", ["advantage", "all_actions"])
def test_a_critic_that_is_wrong_is_not_followed(enumerated, policy_gradient):
    """One that calls the good tokens bad: what is left is REINFORCE, with its means of others, over rollouts."""
    mdp, hidden_states, decisions = enumerated
    head = exact_head(mdp, 1.0)
    right = head(hidden_states, decisions).detach()
    wrong = right.clone()
    wrong[..., Estimate.V] = 0
    wrong[..., Estimate.Q] = right[..., Estimate.V] - right[..., Estimate.Q]
    reinforce = estimator(mdp, ReinforceTrainer, baseline="batch_mean", one_step_mdp=False)
    ours, believing = (
        estimator(mdp, policy_gradient=policy_gradient, q_target="sarsa", gate_critic=True) for _ in range(2)
    )
    for rollout in range(4):
        credit, believed = credit_by(ours, mdp, wrong), credit_by(believing, mdp, right)
        expected_credit = credit_by(reinforce, mdp, None).advantages
        torch.testing.assert_close(credit.advantages, expected_credit, atol=1e-9, rtol=0)
        assert ours._metrics["train"]["action_values/weight"][-1] == 0
        assert credit.action_weights is None or not credit.action_weights.any()
        # The same critic, with its signs put right, is believed from the second rollout on
        assert (believing._metrics["train"]["action_values/weight"][-1] > 0.1) == (rollout > 0)
        assert torch.allclose(believed.advantages, expected_credit, atol=1e-3) == (rollout == 0)


# --- In the trainer ---


def trust(trainer, past):
    """Lets a training begin as if the critic had explained advantages so."""

    class Trust(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.past_advantages.moments.value = torch.tensor(past)

    trainer.add_callback(Trust())


def discounted(rewards, last=0.0):
    """Sums by their recursion: what is earned from each token on."""
    sums = []
    for reward in reversed(rewards.tolist()):
        last = reward + 0.9 * last
        sums.insert(0, last)
    return torch.tensor(sums)


def by_the_whole_table(policy, reference, head, units, row, is_detached):
    """Q of each token and V of each state, from the table of Q over all tokens and ordinary logits; unpadded."""
    prompt, completion = row
    ids, tokens = torch.tensor([[*prompt, *completion]]), torch.tensor(completion)[:, None]
    hidden = policy.model(ids).last_hidden_state[0, len(prompt) - 1 :]
    pi = (policy.lm_head(hidden) / 0.7).softmax(-1)
    states = hidden.detach() if is_detached else hidden
    with torch.no_grad():
        ref = (reference(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1).gather(1, tokens)[:, 0]
    mean, std = units
    tables = []
    for prefix in ("", "target_"):
        weight, bias, projection, embedding = (
            getattr(head, prefix + name) for name in ("weight", "bias", "projection", "embedding")
        )
        tables.append(mean + std * (states @ weight.T + bias + states @ projection.T @ embedding.T))
    table, target = tables[0], tables[1].detach()
    logps = pi[:-1].log().gather(1, tokens)[:, 0]
    return SimpleNamespace(
        logps=logps,
        prices=0.3 * (logps.detach() - ref),
        q=table[:-1].gather(1, tokens)[:, 0],
        v=(pi * table).sum(-1)[:-1].detach(),
        sum_over_all=(pi * table.detach()).sum(-1)[:-1].sum(),
        target_q=target[:-1].gather(1, tokens)[:, 0],
        target_v=(pi * target).sum(-1).detach(),
    )


@modes
@targets
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_gradient_equals_that_of_the_plain_objective(
    policy_path, tokenizer, prompts, tmp_path, policy_gradient, q_target, num_iterations, monkeypatch
):
    """Against autograd through the whole table of Q(s, a), row by row, unpadded; with several chunks of tokens."""
    monkeypatch.setattr(lm_head_module, "CHUNK_SIZE", 3)
    is_detached = num_iterations == 2
    trainer = make(
        policy_path,
        tmp_path,
        prompts,
        kwargs={"rollout_func": scripted_rollout},
        policy_gradient=policy_gradient,
        q_target=q_target,
        temperature=0.7,
        gamma=0.9,
        lam=0.95,
        vf_coef=0.5,
        num_iterations=num_iterations,
        truncation="bootstrap",
        kl_in_reward=0.3,
        critic_detach=is_detached,
    )
    head = trainer.critic.value_head
    for parameter in (head.weight, head.embedding, head.target_weight, head.target_embedding):
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(trainer.ref_model.lm_head.weight, std=0.2)
    trust(trainer, [[2.0, 1.8], [1.8, 3.0]])  # with w = 1 that leaves 3 - 2 x 1.8 + 2 of 3
    weight, share = 1.8 / 2.03, 1 - 1.4 / 3
    gradients = first_gradients(trainer)

    batch = trainer.updates[0]
    rows = [*rows_of(batch)]
    lengths, has_ended = [len(c) for _, c in rows], [c[-1] == tokenizer.eos_token_id for _, c in rows]
    paid = [torch.zeros(n) for n in lengths]
    for i, reward in enumerate(paid):
        reward[-1] = batch["scores"][i] if has_ended[i] else 0.0
    earned = torch.cat([discounted(reward) for reward in paid])
    units = earned.mean(), earned.std()
    plain = [by_the_whole_table(trainer.model, trainer.ref_model, head, units, row, is_detached) for row in rows]

    last = [0.0 if ended else x.target_v[-1].item() for x, ended in zip(plain, has_ended, strict=True)]
    net = [reward - x.prices for reward, x in zip(paid, plain, strict=True)]
    sampled = [discounted(reward, value) for reward, value in zip(net, last, strict=True)]
    followed, loss = [], 0
    center = torch.cat([x.q.detach() - x.v - x.prices for x in plain]).mean()
    for i, x in enumerate(plain):
        others = torch.cat([returns for j, returns in enumerate(sampled) if j != i]).mean()
        advantage, advantages, following = 0.0, [], last[i]
        for reward in reversed(net[i].tolist()):
            advantage = reward + 0.9 * following - others + 0.9 * 0.95 * advantage
            advantages.insert(0, advantage)
            following = others
        advantages, q = torch.tensor(advantages), x.q.detach()
        if policy_gradient == "q":
            advantages = q - x.prices
        elif policy_gradient == "advantage":
            advantages = (1 - share) * advantages + share * (q - x.v - x.prices - center)
        else:
            advantages = advantages - weight * (q - x.v)
        followed.append(advantages)
        of_next, returns, target = x.target_q if q_target == "sarsa" else x.target_v, [], last[i]
        for t in reversed(range(lengths[i])):
            if t + 1 < lengths[i]:
                target = 0.05 * of_next[t + 1].item() + 0.95 * target - x.prices[t + 1].item()
            target = paid[i][t].item() + 0.9 * target
            returns.insert(0, target)
        torch.testing.assert_close(batch["returns"][i, : lengths[i]], torch.tensor(returns), atol=1e-4, rtol=1e-4)
        loss = loss + 0.5 * 0.5 * (x.q - batch["returns"][i, : lengths[i]]).square().sum() / units[1] ** 2
    scale = 1 / (torch.cat(followed).square().mean().sqrt() + 1e-4)
    for i, (x, advantages) in enumerate(zip(plain, followed, strict=True)):
        torch.testing.assert_close(batch["advantages"][i, : lengths[i]], scale * advantages, atol=1e-4, rtol=1e-3)
        loss = loss - scale * (x.logps * advantages).sum()
        if policy_gradient == "all_actions":
            loss = loss - scale * weight * x.sum_over_all
    assert (
        len(set(lengths)) > 1 and len(set(has_ended)) == 2 and torch.cat([x.prices for x in plain]).abs().max() > 0.1
    )
    (loss / batch["completion_mask"].sum()).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_target_of_a_single_token_does_not_know_the_price_of_its_kl(policy_path, prompts, tmp_path):
    """The first update, before which there is no KL, is the same; in the second rollout the prices differ."""
    updates = []
    for coef in (0.01, 10.0):
        overrides = {"kl_in_reward": coef, "learning_rate": 0.1, "max_completion_length": 1}
        trainer = make(policy_path, tmp_path, prompts, reward=variety, **overrides)
        trainer.train()
        updates.append(trainer.updates[1])
    first, second = updates
    assert torch.equal(first["completion_ids"], second["completion_ids"])
    torch.testing.assert_close(first["returns"], second["returns"], atol=1e-5, rtol=1e-5)
    assert first["returns"].std() > 0.1 and (first["advantages"] - second["advantages"]).abs().max() > 0.1


@pytest.mark.parametrize("policy_gradient", ["advantage", "all_actions"])
def test_with_a_critic_that_says_nothing_it_is_reinforce(tokenizer, prompts, tmp_path, policy_gradient):
    overrides = {"num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 4}
    ours, theirs = build_policy(tokenizer), build_policy(tokenizer)
    kwargs = {"reward": variety, "kwargs": {"processing_class": tokenizer}, "critic_learning_rate": 0.0}
    make(ours, tmp_path, prompts, policy_gradient=policy_gradient, **kwargs, **overrides).train()
    args = ReinforceConfig(**settings(tmp_path, **overrides))
    ReinforceTrainer(theirs, variety, args, prompts, processing_class=tokenizer).train()
    moved = 0.0
    for (name, actual), (_, trained), start in zip(
        ours.named_parameters(), theirs.named_parameters(), build_policy(tokenizer).parameters(), strict=False
    ):
        torch.testing.assert_close(actual, trained, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        moved = max(moved, (trained - start).abs().max().item())
    assert moved > 1e-2


@pytest.mark.parametrize("all_actions", [False, True])
def test_no_table_of_all_tokens_and_actions_is_built(all_actions, monkeypatch):
    monkeypatch.setattr(lm_head_module, "CHUNK_SIZE", 8)
    batch, states, vocab, hidden, rank = 4, 16, 1000, 8, 4
    policy = SimpleNamespace(config=EnumeratedPolicy.config, get_output_embeddings=lambda: head_of_policy)
    head_of_policy = torch.nn.Linear(hidden, vocab)
    hidden_states = torch.randn(batch, states, hidden, requires_grad=True)
    actions = torch.randint(vocab, (batch, states))
    head = ActionValueHead(ValueHead(hidden), vocab, rank)
    head.all_actions = all_actions
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            largest = max([largest, *sizes])
            return out

    with Watch():
        mask = torch.ones(batch, states, dtype=torch.bool)
        head(hidden_states, Decisions(policy, hidden_states, actions, mask)).sum().backward()
    assert 8 * vocab <= largest < batch * states * vocab / 4


def test_the_target_moves_slowly_and_is_not_trained(policy, tokenizer, prompts, tmp_path):
    trainer = make(
        policy, tmp_path, prompts, kwargs={"processing_class": tokenizer}, target_update_rate=0.25, max_steps=4
    )  # of one rollout each
    head, online, targets = trainer.critic.value_head, [], []

    def in_returns(prefix):
        """The weights by which values are in units of returns, which change from rollout to rollout."""
        units = {"weight": head.std, "bias": head.std, "embedding": head.std, "projection": 1.0}
        weights = {name: unit * getattr(head, prefix + name).detach() for name, unit in units.items()}
        return weights | {"bias": weights["bias"] + head.mean}

    class Keep(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            targets.append(in_returns("target_"))
            online.append(in_returns(""))

    trainer.add_callback(Keep())
    trainer.train()
    for name, target in targets[0].items():
        for weights in online:
            target = 0.75 * target + 0.25 * weights[name]
        torch.testing.assert_close(in_returns("target_")[name], target)
        assert not torch.equal(target, online[-1][name])


def test_it_rolls_out_like_a_run_without_a_critic(policy_path, prompts, tmp_path):
    """Its random projection draws on no generator but its own."""
    first = make(policy_path, tmp_path, prompts, max_steps=1)
    first.train()
    args = A2CConfig(**settings(tmp_path, max_steps=1))
    second = recorded(A2CTrainer)(policy_path, length, args, prompts)
    second.train()
    assert torch.equal(first.rollouts[0]["completion_ids"], second.rollouts[0]["completion_ids"])


@modes
def test_warmup_leaves_the_policy_as_it_is(policy, tokenizer, prompts, tmp_path, policy_gradient):
    trainer = make(
        policy,
        tmp_path,
        prompts,
        kwargs={"processing_class": tokenizer},
        policy_gradient=policy_gradient,
        critic_warmup_steps=2,
        max_steps=2,
    )
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {f"critic.value_head.{name}" for name in ("weight", "bias", "projection", "embedding")}


@modes
@targets
def test_the_policy_learns(policy, tokenizer, prompts, tmp_path, policy_gradient, q_target):
    trainer = make(
        policy,
        tmp_path,
        prompts,
        reward=count_good,
        kwargs={"processing_class": tokenizer},
        policy_gradient=policy_gradient,
        q_target=q_target,
        per_device_train_batch_size=16,
        num_generations=2,
        max_steps=100,
        logging_steps=10,
        vf_coef=1.0,
        target_update_rate=0.2,
        critic_learning_rate=5e-2,
    )
    trainer.train()
    rewards = [logs["reward"] for logs in trainer.state.log_history[:-1]]
    assert rewards[0] < 0.45 and sum(rewards[-3:]) / 3 > 0.75, rewards


# --- What is saved ---


KINDS = {
    "shared": {},
    "separate": {"critic": "separate"},
    "lora": {"method": "lora"},
    "adapter": {"method": "lora", "critic": "adapter"},
    "4bit-adapter": {"method": "4bit", "critic": "adapter"},
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_critic_is_saved_whole_and_loaded(policy_path, prompts, tmp_path, kind):
    overrides = dict(KINDS[kind])
    method = overrides.pop("method", "full")
    kwargs = {"quantization_config": quantization_config(method)}
    if method != "full":
        kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make(
        policy_path,
        tmp_path,
        prompts,
        kwargs=kwargs,
        temperature=0.5,
        save_strategy="steps",
        save_steps=2,
        **overrides,
    )
    trainer.train()
    trainer.save_model()
    mask = torch.ones_like(IDS)
    trainer.model.eval()
    q, v = (f(trainer.model, trainer.critic, IDS, mask) for f in (token_action_values, token_values))
    assert q[0, 0].isnan() and (q[0, 1:] - v[0, :-1]).abs().max() > 1e-4
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        if method == "full":
            policy = AutoModelForCausalLM.from_pretrained(folder)
        else:
            policy = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=quantization_config(method))
        critic = load_critic(policy, str(folder))
        assert torch.equal(token_action_values(policy, critic, IDS, mask)[:, 1:], q[:, 1:])
        assert torch.equal(token_values(policy, critic, IDS, mask), v)
        saved = trainer.critic.value_head.state_dict()
        for name, weight in critic.value_head.state_dict().items():
            assert torch.equal(weight, saved[name]), name
    # Taken up by another run, and by a merged model
    overrides["critic_model_name_or_path"] = str(tmp_path)
    again = make(policy_path, tmp_path / "again", prompts, kwargs=kwargs, temperature=0.5, **overrides)
    assert torch.equal(again.critic.value_head.embedding, trainer.critic.value_head.embedding)
    with pytest.raises(ValueError, match=r"tells \d+ tokens apart by 8 numbers"):
        make(policy_path, tmp_path / "other", prompts, kwargs=kwargs, **{**overrides, "q_rank": 4})
    with pytest.raises(ValueError, match="needs one of V"):
        args = A2CConfig(**settings(tmp_path / "a2c", **overrides))
        A2CTrainer(policy_path, length, args, prompts, **kwargs)
    if method == "lora":
        merge_adapter(str(tmp_path), str(tmp_path / "merged"), "float32")
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        critic = load_critic(policy, str(tmp_path / "merged"))
        torch.testing.assert_close(
            token_action_values(policy, critic, IDS, mask), q, atol=1e-4, rtol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("policy_gradient", ["advantage", "all_actions"])
def test_resuming_amid_epochs_is_bit_exact(policy_path, prompts, tmp_path, policy_gradient):
    """With the target head, the units of values, how far the critic is trusted, and the credit of the rollout."""

    def run(folder, checkpoint=None):
        epochs = {"num_iterations": 3, "gradient_accumulation_steps": 2, "max_steps": 8}
        saving = {"save_strategy": "steps", "save_steps": 1, "num_generations": 2, "policy_gradient": policy_gradient}
        trainer = make(policy_path, folder, prompts, reward=variety, **epochs, **saving)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole, broken = run(tmp_path / "whole"), run(tmp_path / "broken", str(tmp_path / "whole" / "checkpoint-5"))
    head = whole.critic.value_head.state_dict()
    assert not torch.equal(head["target_embedding"], head["embedding"]) and head["target_embedding"].abs().max() > 0
    assert (
        whole.critic.value_head.num_rollouts == 3 and len(broken.rollouts) == 1
    )  # the second one's updates went on without another
    assert whole.critic.value_head.units == broken.critic.value_head.units
    for (name, first), second in zip(
        whole.model.state_dict().items(), broken.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name
    first, second = (torch.load(tmp_path / name / "checkpoint-8" / "past_rollouts.pt") for name in ("whole", "broken"))
    assert first["past_advantages"].diagonal().min() > 0
    assert torch.equal(first["past_advantages"], second["past_advantages"])
    assert torch.equal(first["num_tokens"], second["num_tokens"])
    assert all(torch.equal(first["baseline"][name], second["baseline"][name]) for name in ("moments", "means"))


def test_the_critic_is_trusted_by_the_rollouts_of_one_training_alone(policy, tokenizer, prompts, tmp_path):
    kwargs = {"processing_class": tokenizer, "eval_dataset": prompts}
    trainer = make(policy, tmp_path, prompts, reward=variety, kwargs=kwargs)
    trainer.past_advantages.moments.value = torch.tensor(TRUSTED)  # as by an earlier training
    trainer.train()
    logs = [entry["action_values/weight"] for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0] == 0
    past = trainer.past_advantages.moments.value.clone()
    assert past[-1, -1] > 0
    trainer.evaluate()
    assert torch.equal(trainer.past_advantages.moments.value, past)


def test_the_value_of_a_state_is_the_mean_of_its_actions_values(policy, tokenizer, prompts, tmp_path):
    """The mean is over every token that may follow, by the critic's own head; the target head says something else."""
    head = make(policy, tmp_path, prompts, kwargs={"processing_class": tokenizer}, temperature=0.7).critic.value_head
    for name in ("weight", "embedding", "target_weight", "target_embedding"):
        torch.nn.init.normal_(getattr(head, name), std=0.3)
    following = torch.arange(len(tokenizer))[:, None]
    for n in (1, 4, 6):
        prefix = IDS[:, :n]
        actions = torch.cat([prefix.expand(len(tokenizer), -1), following], dim=1)
        with torch.no_grad():
            pi = (policy(input_ids=prefix).logits[0, -1] / 0.7).softmax(-1)
        q = token_action_values(policy, policy.critic, actions, torch.ones_like(actions))[:, -1]
        v = token_values(policy, policy.critic, prefix, torch.ones_like(prefix))[0, -1]
        torch.testing.assert_close(v, pi @ q, atol=1e-5, rtol=1e-5)


def test_a_critic_of_states_has_no_action_values(policy, tokenizer, prompts, tmp_path):
    trainer = A2CTrainer(policy, length, A2CConfig(**settings(tmp_path)), prompts, processing_class=tokenizer)
    with pytest.raises(ValueError, match="values states, not actions"):
        token_action_values(policy, trainer.critic, IDS, torch.ones_like(IDS))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"policy_gradient": "v"}, "policy_gradient"),
        ({"q_target": "td"}, "q_target"),
        ({"q_rank": 0}, "q_rank"),
        ({"target_update_rate": 0.0}, "target_update_rate"),
        ({"policy_gradient": "q", "lam_policy": 0.9}, "lam_policy"),
        ({"policy_gradient": "q", "length_adaptive_alpha": 0.05}, "length_adaptive_alpha"),
        ({"policy_gradient": "all_actions", "loss_type": "dr_grpo"}, "loss_type"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        QActorCriticConfig(**settings(tmp_path, **overrides))


def test_evaluation_and_scripted_rollouts_work(policy, tokenizer, prompts, tmp_path):
    trainer = make(
        policy,
        tmp_path,
        prompts,
        kwargs={
            "processing_class": tokenizer,
            "eval_dataset": prompts,
            "rollout_func": scripted_rollout,
        },
        policy_gradient="all_actions",
        eval_strategy="steps",
        eval_steps=2,
        log_completions=True,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert logs and all(torch.tensor(entry["eval_loss"]).isfinite() for entry in logs)
