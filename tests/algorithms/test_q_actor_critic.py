"""Q actor-critic: exact where all can be enumerated, and the same through the trainer."""

from types import SimpleNamespace

import pytest
import torch
from enumerable_mdp import PREFIXES, VOCAB, TokenMDP
from helpers import count_good, first_gradients, quantization_config, recorded, rows_of, scripted_rollout, settings
from peft import AutoPeftModelForCausalLM, LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_ext import (
    A2CConfig,
    A2CTrainer,
    QActorCriticConfig,
    QActorCriticTrainer,
    load_critic,
    merge_adapter,
    token_action_values,
    token_values,
)
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


@pytest.fixture(params=[False, True], ids=["horizon", "early-end"])
def enumerated(request):
    mdp = TokenMDP(early_end=request.param)
    policy = EnumeratedPolicy(mdp)
    hidden_states = torch.nn.functional.one_hot(mdp.states, len(PREFIXES)).float()
    return mdp, hidden_states, Decisions(policy, hidden_states, mdp.actions, mdp.mask)


def exact_head(mdp, gamma):
    head = ActionValueHead(ValueHead(len(PREFIXES)), VOCAB, rank=len(PREFIXES))
    _, action_values = mdp.solve(gamma)
    with torch.no_grad():
        head.projection.copy_(torch.eye(len(PREFIXES)))
        head.embedding.copy_(action_values.T)
    head.update_target(1.0)
    return head


def estimate(mdp, values, gamma, lam=0.95, lam_value=None, **args):
    """Advantages and targets as the trainer computes them."""
    args = SimpleNamespace(gamma=gamma, lam=lam, lam_value=lam_value, **args)
    return QActorCriticTrainer.compute_advantages(
        SimpleNamespace(args=args), mdp.rewards.float(), values, mdp.mask, None
    )


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@modes
def test_the_policy_gradient_is_exact(enumerated, gamma, policy_gradient):
    mdp, hidden_states, decisions = enumerated
    exact = mdp.followed_gradient(gamma).float()
    head = exact_head(mdp, gamma)
    head.all_actions = policy_gradient == "all_actions"
    values = head(hidden_states, decisions)
    if policy_gradient == "all_actions":
        weights = mdp.probabilities.detach().float().unsqueeze(1)
        objective = torch.where(mdp.mask, weights * values[..., Estimate.V], 0).sum()
        gradient = torch.autograd.grad(objective, decisions.policy.lm_head.weight)[0].T
    else:
        advantages, _ = estimate(mdp, values, gamma, policy_gradient=policy_gradient, q_target="sarsa")
        gradient = mdp.expected_gradient(advantages.detach()).float()
    torch.testing.assert_close(gradient, exact, atol=2e-6, rtol=1e-4)
    assert exact.abs().max() > 0.01


@targets
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_expected_target_of_the_true_critic_is_the_true_value(enumerated, q_target, lam):
    mdp, hidden_states, decisions = enumerated
    values = exact_head(mdp, 0.8)(hidden_states, decisions).detach()
    state_values, action_values = mdp.solve(0.8)
    torch.testing.assert_close(values[..., Estimate.V][mdp.mask], state_values[mdp.states][mdp.mask].float())
    _, returns = estimate(mdp, values, 0.8, lam, policy_gradient="q", q_target=q_target)
    expected = mdp.expectation_given_action(returns.double())
    reached = ~expected.isnan()
    torch.testing.assert_close(expected[reached], action_values[reached], atol=1e-5, rtol=1e-5)


@targets
def test_the_lambda_of_values_is_that_of_the_targets(enumerated, q_target):
    mdp, hidden_states, decisions = enumerated
    values = exact_head(mdp, 0.8)(hidden_states, decisions).detach()

    def targets(lam, lam_value=None):
        return estimate(mdp, values, 0.8, lam, lam_value, policy_gradient="advantage", q_target=q_target)[1]

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
    for step in range(800):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 800)
        values = head(hidden_states, decisions)
        _, returns = estimate(mdp, values.detach(), gamma, lam, policy_gradient="q", q_target=q_target)
        optimizer.zero_grad()
        (weights * value_loss(values[..., Estimate.Q], returns)).sum().backward()
        optimizer.step()
        head.update_target(0.1)
    values = head(hidden_states, decisions).detach()
    state_values, action_values = (x.float() for x in mdp.solve(gamma))
    own = mdp.mask
    q, v = action_values[mdp.states, mdp.actions][own], state_values[mdp.states][own]
    torch.testing.assert_close(values[..., Estimate.Q][own], q, atol=0.02, rtol=0)
    torch.testing.assert_close(values[..., Estimate.V][own], v, atol=0.02, rtol=0)
    advantages, _ = estimate(mdp, values, gamma, lam, policy_gradient="advantage", q_target=q_target)
    torch.testing.assert_close(advantages[own], q - v, atol=0.03, rtol=0)
    assert (q - v).abs().max() > 0.5 and (q - v).abs().min() < 0.5
    exact = mdp.followed_gradient(gamma).float()
    gradient = mdp.expected_gradient(advantages).float()
    torch.testing.assert_close(gradient, exact, atol=0.01, rtol=0)


def test_its_gradient_varies_less_than_that_of_returns(enumerated):
    """The sum over all actions is for this, and so is credit that holds nothing of what came after."""
    mdp, hidden_states, decisions = enumerated
    values = exact_head(mdp, 1.0)(hidden_states, decisions).detach()
    advantages, returns = estimate(mdp, values, 1.0, 1.0, policy_gradient="advantage", q_target="sarsa")
    baseline = returns - values[..., Estimate.V]
    assert mdp.gradient_variance(advantages) < 0.9 * mdp.gradient_variance(baseline)


# --- In the trainer ---


def plain_estimates(policy, head, prompt, completion, temperature):
    """Q of each token and V of each state, by the whole table of Q and ordinary logits; unpadded."""
    ids = torch.tensor([[*prompt, *completion]])
    hidden = policy.model(ids).last_hidden_state[0, len(prompt) - 1 :]
    pi = (policy.lm_head(hidden) / temperature).softmax(-1)
    table = (hidden @ head.weight.T + head.bias) + hidden @ head.projection.T @ head.embedding.T
    return table, pi


@modes
@targets
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_gradient_equals_that_of_the_plain_objective(
    policy, tokenizer, prompts, tmp_path, policy_gradient, q_target, num_iterations, monkeypatch
):
    """Against autograd through the whole table of Q(s, a), row by row, unpadded; with several chunks of tokens."""
    monkeypatch.setattr(lm_head_module, "CHUNK_SIZE", 3)
    trainer = make(
        policy,
        tmp_path,
        prompts,
        kwargs={"processing_class": tokenizer, "rollout_func": scripted_rollout},
        policy_gradient=policy_gradient,
        q_target=q_target,
        temperature=0.7,
        gamma=0.9,
        vf_coef=0.5,
        num_iterations=num_iterations,
        truncation="bootstrap",
    )
    head = trainer.critic.value_head
    for parameter in (head.weight, head.embedding, head.target_weight, head.target_embedding):
        torch.nn.init.normal_(parameter, std=0.3)
    gradients = first_gradients(trainer)

    batch, loss, lengths = trainer.updates[0], 0, set()
    for i, (prompt, completion) in enumerate(rows_of(batch)):
        n = len(completion)
        table, pi = plain_estimates(policy, head, prompt, completion, 0.7)
        lengths.add(n)
        logps = pi[:-1].log().gather(1, torch.tensor(completion)[:, None])[:, 0]
        q = table[:-1].gather(1, torch.tensor(completion)[:, None])[:, 0]
        v = (pi * table).sum(-1)
        if policy_gradient == "all_actions":
            loss = loss - (pi * table.detach()).sum(-1)[:-1].sum()
        else:
            loss = loss - (logps * (q if policy_gradient == "q" else q - v[:-1]).detach()).sum()
        # Targets by their recursion, from the whole table of the target head
        with torch.no_grad():
            hidden = policy.model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0, len(prompt) - 1 :]
            target_table = hidden @ head.target_weight.T + head.target_bias
            target_table = target_table + hidden @ head.target_projection.T @ head.target_embedding.T
            target_v = (pi * target_table).sum(-1)
            target_q = target_table[:-1].gather(1, torch.tensor(completion)[:, None])[:, 0]
            is_cut = completion[-1] != tokenizer.eos_token_id
            returns = [0.0] * n
            returns[-1] = 0.9 * target_v[-1].item() if is_cut else float(batch["scores"][i])
            of_next = target_q if q_target == "sarsa" else target_v
            for t in reversed(range(n - 1)):
                returns[t] = 0.9 * (0.05 * of_next[t + 1].item() + 0.95 * returns[t + 1])
        torch.testing.assert_close(batch["returns"][i, :n], torch.tensor(returns), atol=1e-4, rtol=1e-4)
        loss = loss + 0.5 * 0.5 * (q - batch["returns"][i, :n]).square().sum()
    assert len(lengths) > 1 and batch["terminated"].any() and not batch["terminated"].all()
    (loss / batch["completion_mask"].sum()).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


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
    )
    head, online = trainer.critic.value_head, []

    class Keep(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            online.append({name: p.detach().clone() for name, p in head.named_parameters()})

    start = {name: p.detach().clone() for name, p in head.named_parameters()}
    trainer.add_callback(Keep())
    trainer.train()
    for name, target in start.items():
        for weights in online:
            target = 0.75 * target + 0.25 * weights[name]
        torch.testing.assert_close(getattr(head, f"target_{name}"), target)
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


def test_resuming_restores_the_target_too(policy_path, prompts, tmp_path):
    def run(folder, **overrides):
        return make(policy_path, folder, prompts, save_strategy="steps", save_steps=2, max_steps=4, **overrides)

    whole = run(tmp_path / "whole")
    whole.train()
    broken = run(tmp_path / "broken")
    broken.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    head = whole.critic.value_head.state_dict()
    assert not torch.equal(head["target_embedding"], head["embedding"]) and head["target_embedding"].abs().max() > 0
    for (name, first), second in zip(
        whole.model.state_dict().items(), broken.model.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


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
        ({"lam_policy": 0.9}, "lam_policy"),
        ({"length_adaptive_alpha": 0.05}, "length_adaptive_alpha"),
        ({"policy_gradient": "all_actions", "whiten_advantages": True}, "whiten_advantages"),
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
