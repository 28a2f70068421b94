"""Language agents: tools and environments, credit over turns, and what an unanswered call is worth."""

import pytest
import torch
from agents import Till, episode, put, script_generation
from datasets import Dataset
from helpers import recorded, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trl_ext import A2CConfig, A2CTrainer, PPOConfig, PPOTrainer, ReinforceConfig, ReinforceTrainer, load_rollouts
from trl_ext.token_mdp import rewards_of_turns


CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("trainer_class, config_class", [(PPOTrainer, PPOConfig), (ReinforceTrainer, ReinforceConfig)])
def test_tools(tool_model, tmp_path, trainer_class, config_class):
    calls = []

    def multiply(a: int, b: int) -> int:
        """
        Multiplies two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            Their product.
        """
        calls.append((a, b))
        return a * b

    model, tokenizer = tool_model
    script_generation(model, tokenizer, [CALL, "It is 12.<|im_end|>"])
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "What is 3 times 4?"}]] * 4})
    args = config_class(**settings(tmp_path, max_completion_length=300, max_steps=1))
    trainer = recorded(trainer_class)(
        model,
        lambda completions, **kw: [1.0, 2.0, 3.0, 4.0],
        args,
        dataset,
        processing_class=tokenizer,
        tools=[multiply],
    )
    trainer.train()
    assert calls == [(3, 4)] * 4
    batch = trainer.updates[0]
    tool = batch["completion_mask"].bool() & ~batch["tool_mask"].bool()
    assert "12" in tokenizer.decode(batch["completion_ids"][0][tool[0]])
    assert (batch["advantages"][tool] == 0).all() and (batch["returns"][tool] == 0).all()
    own = batch["completion_mask"].bool() & ~tool
    assert batch["terminated"].all() and (batch["returns"][own] > 0).all()


def test_environments(tool_model, tmp_path):
    class Counter:
        def reset(self, **kwargs):
            self.total = 0
            return " Count to seven."

        def multiply(self, a: int, b: int) -> int:
            """
            Multiplies two integers and remembers the product.

            Args:
                a: The first integer.
                b: The second integer.

            Returns:
                Their product.
            """
            self.total += a * b
            return self.total

        def get_reward(self) -> float:
            return float(self.total)

    model, tokenizer = tool_model
    script_generation(model, tokenizer, [CALL, "Done.<|im_end|>"])
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "Go."}]] * 4})
    args = PPOConfig(**settings(tmp_path, max_completion_length=300, max_steps=1, lam=1.0))
    trainer = recorded(PPOTrainer)(model, None, args, dataset, processing_class=tokenizer, environment_factory=Counter)
    trainer.train()
    batch = trainer.updates[0]
    own = batch["completion_mask"].bool() & batch["tool_mask"].bool()
    assert (batch["returns"][own] == 12).all()


# --- Rewards of turns ---


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(-5, 5)), min_size=1, max_size=5))
@hypothesis_settings(max_examples=200, deadline=None)
def test_each_turn_earns_what_it_adds(turns):
    """Turns of so many chosen tokens, tool tokens after them, and that reward; the last one without tool tokens."""
    mask, totals = [], [0.0]
    for own, tool, reward in turns:
        mask += [1] * own + [0] * tool
        totals.append(totals[-1] + reward)
    mask = mask[: len(mask) - turns[-1][1]]
    rewards = rewards_of_turns(totals, mask)
    position = 0
    for own, tool, reward in turns:
        assert rewards[position : position + own] == [0.0] * (own - 1) + [reward]
        position += own + tool
    assert sum(rewards) == totals[-1]
    # What was there before the first turn is its, and what comes later the last one's
    later = rewards_of_turns([3.0, *[3.0 + total for total in totals[1:]], 3.0 + totals[-1] + 2], mask)
    assert sum(later) == totals[-1] + 5 and later[-1] == rewards[-1] + 2 + 3 * (len(turns) == 1)
    # Nothing known in between: all falls to the last turn
    silent = rewards_of_turns([None] * len(turns) + [totals[-1]], mask)
    assert silent == [0.0] * (len(mask) - 1) + [totals[-1]]


class SlowTill(Till):
    async def get_reward(self) -> float:
        return self.total


def test_environments_of_one_name_pay_their_own_turns(tool_model, tmp_path):
    """Two classes called `Till`, and a reward function that is called so too."""
    model, tokenizer = tool_model
    script_generation(model, tokenizer, [put(3), "Done.<|im_end|>"])
    twice = type("Till", (Till,), {"get_reward": lambda self: 2 * self.total})

    def flat(completions, **kwargs):
        return [0.5] * len(completions)

    flat.__name__ = "Till"
    question = [{"role": "user", "content": "Go."}]
    dataset = Dataset.from_list([{"prompt": question, "environment": name} for name in "abab"])
    args = A2CConfig(
        **settings(tmp_path, max_completion_length=600, max_steps=1, turn_rewards=True, save_rollouts=True)
    )
    A2CTrainer(
        *(model, flat, args, dataset),
        processing_class=tokenizer,
        environment_factory={"a": Till, "b": twice},
    ).train()
    rows = load_rollouts(tmp_path)["train"].to_list()
    columns = [tuple(row[f"reward/{name}"] for name in ("Till", "Till_2", "Till_3")) for row in rows]
    assert sorted(columns, key=str) == [(0.5, 3.0, None)] * 2 + [(0.5, None, 6.0)] * 2
    for row, (flat_reward, *own) in zip(rows, columns, strict=True):
        paid = [reward for reward in row["rewards"] if reward]
        assert paid == [next(x for x in own if x is not None), flat_reward]  # the turn's; the whole's, at the end


def turns_of(batch, row=0):
    """For each run of chosen tokens its first and last position."""
    own = (batch["completion_mask"][row].bool() & batch["tool_mask"][row].bool()).tolist()
    starts = [t for t, x in enumerate(own) if x and (t == 0 or not own[t - 1])]
    ends = [t for t, x in enumerate(own) if x and (t + 1 == len(own) or not own[t + 1])]
    return list(zip(starts, ends, strict=True))


@pytest.mark.parametrize("environment", [Till, SlowTill])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_rewards_land_on_the_turn_that_earned_them(tool_model, tmp_path, environment, gamma):
    script = [
        put(3),
        put(-1),
        '<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call><|im_end|>',
        put(5),
        "Done.<|im_end|>",
    ]
    trainer, batch = episode(tool_model, tmp_path, script, environment, gamma=gamma)
    assert trainer.state.log_history[0]["reward"] == 7.0  # as TRL has it
    turns = turns_of(batch)
    assert len(turns) == 5
    assert batch["token_rewards"][0].nonzero()[:, 0].tolist() == [turns[i][1] for i in (0, 1, 3)]
    assert batch["token_rewards"][0, [turns[i][1] for i in range(5)]].tolist() == [3, -1, 0, 5, 0]
    # Discounted by chosen tokens alone, whatever the environment said between them
    lengths = [end - start + 1 for start, end in turns]
    for turn, (start, _) in enumerate(turns):
        expected, passed = 0.0, 0
        for later in range(turn, 5):
            passed += lengths[later]
            expected += gamma ** (passed - 1) * [3, -1, 0, 5, 0][later]
        assert batch["returns"][0, start].item() == pytest.approx(expected, abs=1e-4)


def test_without_the_option_the_whole_earns_it(tool_model, tmp_path):
    _, batch = episode(tool_model, tmp_path, [put(3), put(5), "Done.<|im_end|>"], turn_rewards=False)
    turns = turns_of(batch)
    assert [batch["returns"][0, start].item() for start, _ in turns] == [8, 8, 8]
    assert "token_rewards" not in batch


def test_parallel_calls_are_one_turn(tool_model, tmp_path):
    both = put(3).removesuffix("<|im_end|>") + "\n" + put(4)
    _, batch = episode(tool_model, tmp_path, [both, "Done.<|im_end|>"])
    turns = turns_of(batch)
    assert len(turns) == 2 and batch["token_rewards"][0, turns[0][1]] == 7


def test_an_episode_cut_at_a_call_bootstraps(tool_model, tmp_path):
    """The number of calls is limited: the last one was answered by nobody, and is worth the value of what follows."""
    torch.manual_seed(0)
    for calls, is_cut in ((1, True), (4, False)):
        trainer, batch = episode(
            tool_model,
            tmp_path,
            [put(3), put(4), "Done.<|im_end|>"],
            truncation="bootstrap",
            max_tool_calling_iterations=calls,
            critic_learning_rate=0.0,
            learning_rate=0.0,
        )
        assert batch["terminated"].tolist() == [not is_cut] * 4
        if is_cut:  # V begins at the mean of what tokens are known to have earned: those of the first turn 3 each
            first, second = (end + 1 - start for start, end in turns_of(batch))
            assert batch["returns"][0, 0].item() == pytest.approx(3.0 + 3.0 * first / (first + second))
        else:
            assert batch["returns"][0, 0].item() == 7.0


def test_what_the_cut_off_answer_paid_is_kept(tool_model, tmp_path):
    """An answer too long for the budget is dropped from the text, but the environment has moved on, and paid."""
    model, tokenizer = tool_model
    room = len(tokenizer(put(3))["input_ids"]) + 5
    _, batch = episode(tool_model, tmp_path, [put(3), put(4)], max_completion_length=room)
    assert len(turns_of(batch)) == 1 and batch["token_rewards"][0].sum() == 3
    assert not batch["terminated"].any()


def test_an_environment_without_a_reward_has_none_as_in_trl(tool_model, tmp_path):
    says = [None, 2, None]  # before the first turn, after it, and when the episode is over

    class Silent(Till):
        def reset(self, **kwargs):
            super().reset()
            self.says = iter(says)

        def get_reward(self):
            return next(self.says)

    trainer, batch = episode(tool_model, tmp_path, [put(3), "Done.<|im_end|>"], Silent)
    assert "token_rewards" not in batch or not batch["token_rewards"].any()
    says[2] = torch.tensor([5])
    _, batch = episode(tool_model, tmp_path, [put(3), "Done.<|im_end|>"], Silent)
    assert batch["token_rewards"][0].sum() == 5 and (batch["token_rewards"][0] == 2).sum() == 1
    says[1] = "2"
    with pytest.raises(TypeError, match=r"`get_reward` of the environment Silent returned '2' \(`str`\)"):
        episode(tool_model, tmp_path, [put(3), "Done.<|im_end|>"], Silent)


def test_turn_rewards_need_somebody_to_ask(tool_model, tmp_path, prompts):
    model, tokenizer = tool_model
    args = PPOConfig(**settings(tmp_path, turn_rewards=True))
    with pytest.raises(ValueError, match="there is none with a method `get_reward`"):
        PPOTrainer(model, lambda **kwargs: 0, args, prompts, processing_class=tokenizer)
