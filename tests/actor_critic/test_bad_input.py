"""Bad input fails early, with an error that names the argument and the mend."""

import decimal
import functools
import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import PROMPTS, build_encoder, build_policy, count_good, recorded, scripted_rollout, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig
from transformers import BitsAndBytesConfig
from trl import GRPOConfig, GRPOTrainer

from trl_ext import A2CConfig, A2CTrainer, ActorCriticConfig, PPOConfig, PPOTrainer, ReinforceConfig, load_rollouts
from trl_ext.actor_critic.prompts import check_prompts, cut_to_context


def make(model, tokenizer, tmp_path, reward_funcs=count_good, prompts=PROMPTS, config=None, **kwargs):
    dataset = Dataset.from_dict({"prompt": prompts})
    args = A2CConfig(**settings(tmp_path, **config or {}))
    return A2CTrainer(model, reward_funcs, args, dataset, processing_class=tokenizer, **kwargs)


# --- Configuration ---


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"beta": 0.1, "kl_in_reward": 0.1}, "asked for twice"),
        ({"loss_type": "vesbo"}, "none that is known to take token-level advantages. Use one of 'grpo'"),
        ({"kl_target": 6.0}, "Set `kl_in_reward`"),
        ({"truncation": "drop"}, r"`truncation` must be one of \['bootstrap', 'penalty', 'mask'\]"),
        ({"truncation": "bootstrap", "missing_eos_penalty": 1.0}, "Set `truncation='penalty'`"),
        ({"critic": "none"}, r"`critic` must be one of \['shared', 'adapter', 'separate'\]"),
        ({"critic": "separate", "critic_detach": False}, "has one of its own. Remove it"),
        ({"scale_rewards": "group"}, "use `scale_rewards='none'`"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "num_generations=1"),
        ({"gamma": 1.5}, r"`gamma` must lie in \[0, 1\]"),
        ({"lam_value": -0.1}, "`lam_value`"),
        ({"kl_in_reward": 0.1, "kl_target": 0.0}, "`kl_target` must be positive"),
        ({"kl_horizon": 0}, "`kl_horizon` must be positive"),
        ({"kl_in_reward": -0.1}, "`kl_in_reward` must not be negative"),
        ({"critic_warmup_steps": -1}, "`critic_warmup_steps` must not be negative"),
        ({"target_kl": 0.1, "fp16": True, "bf16": False}, "Use bf16"),
    ],
)
def test_config_is_refused(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        ActorCriticConfig(**settings(tmp_path) | overrides)


@pytest.mark.parametrize("config_class", [A2CConfig, ReinforceConfig])
@pytest.mark.parametrize("overrides", [{"num_iterations": 2}, {"steps_per_generation": 2}])
def test_on_policy_algorithms_refuse_several_updates(tmp_path, config_class, overrides):
    with pytest.raises(ValueError, match="one on-policy update.*or use PPO"):
        config_class(**settings(tmp_path, **overrides))


def test_reinforce_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`baseline` must be one of \['none', 'batch_mean', 'value'\]"):
        ReinforceConfig(**settings(tmp_path, baseline="mean"))
    with pytest.raises(ValueError, match="Set `baseline='value'`"):
        ReinforceConfig(**settings(tmp_path, truncation="bootstrap"))
    with pytest.raises(ValueError, match="Set `baseline='value'`"):
        ReinforceConfig(**settings(tmp_path, critic="separate"))


def test_reinforce_refuses_what_only_a_critic_uses(tmp_path):
    with pytest.raises(ValueError, match="critic_warmup_steps would do nothing"):
        ReinforceConfig(**settings(tmp_path, critic_warmup_steps=3))


def test_one_generation_keeps_trls_other_checks(tmp_path):
    args = PPOConfig(**settings(tmp_path, per_device_train_batch_size=3))
    assert args.num_generations == 1 and type(args.num_generations) is int
    with pytest.raises(ValueError, match="must be divisible by num_generations"):
        PPOConfig(**settings(tmp_path, per_device_train_batch_size=3, num_generations=2))
    with pytest.raises(ValueError, match="vllm_importance_sampling_clip_min"):
        PPOConfig(**settings(tmp_path, vllm_importance_sampling_clip_min=4.0))


# --- Construction ---


def test_other_configs_are_refused(policy, tokenizer, prompts, tmp_path):
    with pytest.raises(TypeError, match="`args` must be a `PPOConfig`, got `GRPOConfig`"):
        PPOTrainer(policy, count_good, GRPOConfig(**settings_of_grpo(tmp_path)), prompts, processing_class=tokenizer)


def settings_of_grpo(tmp_path):
    ours = settings(tmp_path)
    del ours["critic_learning_rate"]
    return ours | {"num_generations": 2}


def test_no_reward_function_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="reward_funcs"):
        make(policy, tokenizer, tmp_path, reward_funcs=None)


def test_reference_of_an_in_memory_model_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        make(policy, tokenizer, tmp_path, config={"kl_in_reward": 0.1})


def test_empty_prompt_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` has an empty prompt in row 3"):
        make(policy, tokenizer, tmp_path, prompts=["a", "b", "c", "", "d"])


def test_too_long_prompt_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="row 1 of the dataset has 60 tokens.*leaves 58"):
        make(policy, tokenizer, tmp_path, prompts=["a", "good " * 60, "a", "b"])


LONG = " ".join(["good"] * 60)
CHATS = [[{"role": "user", "content": text}] for text in ["a", "b a", LONG, "c"]]


@pytest.mark.parametrize("texts, num_tokens", [(["a", "b a", LONG, "c"], 60), (CHATS, 62)])
def test_too_long_prompts_are_refused_wherever_one_can_look(policy, tokenizer, tmp_path, texts, num_tokens):
    """Chats with what their template adds; data for evaluation, given at the start, in a dict or later on."""
    message = f"row 2 of the dataset has {num_tokens} tokens.*leaves 58 .1 rows of `%s` are too long"
    data, short = Dataset.from_dict({"prompt": texts}), Dataset.from_dict({"prompt": [*texts[:2], *texts[:2]]})
    with pytest.raises(ValueError, match=message % "train_dataset"):
        make(policy, tokenizer, tmp_path, prompts=texts)
    with pytest.raises(ValueError, match=message % "eval_dataset"):
        make(policy, tokenizer, tmp_path, prompts=short["prompt"], eval_dataset=data)
    with pytest.raises(ValueError, match=message % r"eval_dataset\['b'\]"):
        make(policy, tokenizer, tmp_path, prompts=short["prompt"], eval_dataset={"a": short, "b": data})
    trainer = make(policy, tokenizer, tmp_path, prompts=short["prompt"], eval_dataset=short)
    with pytest.raises(ValueError, match=message % "eval_dataset"):
        trainer.evaluate(data)


@given(st.lists(st.lists(st.text("aé好", max_size=12), min_size=1, max_size=3), min_size=1, max_size=5), st.booleans())
@hypothesis_settings(max_examples=40, deadline=None)
def test_no_prompt_is_too_long_unseen(rows, are_chats):
    """By counting each, of a tokenizer of bytes that adds a beginning, in a template that says much."""
    prompts = [[{"role": "user", "content": text} for text in row] if are_chats else "a" + row[0] for row in rows]

    def lengths_of(prompts):
        said, each = "You are an assistant. " * 5, "<|message|>" * 8
        texts = [said + "".join(each + m["content"] for m in p) if are_chats else p for p in prompts]
        return [1 + len(text.encode()) for text in texts]

    longest = max(lengths_of(prompts))
    data = Dataset.from_dict({"prompt": prompts})
    check_prompts(data, "`data`", lengths_of, longest)
    with pytest.raises(ValueError, match=f"row {lengths_of(prompts).index(longest)} of the dataset has {longest} tok"):
        check_prompts(data, "`data`", lengths_of, longest - 1)


@pytest.mark.parametrize("prompts", [[*["a", "b a", LONG, "c"] * 2], CHATS * 2])
def test_too_long_prompts_of_a_stream_are_cut_and_counted(policy, tokenizer, tmp_path, prompts, caplog):
    """From the left, and the run goes on; in an evaluation too."""
    stream = Dataset.from_dict({"prompt": prompts}).to_iterable_dataset()
    args = A2CConfig(**settings(tmp_path, max_steps=3))
    trainer = recorded(A2CTrainer)(policy, count_good, args, stream, stream, processing_class=tokenizer)
    trainer.train()
    trainer.evaluate()
    whole = (
        trainer._tokenizer(LONG)["input_ids"]
        if prompts[2] == LONG
        else tokenizer.apply_chat_template(prompts[2], add_generation_prompt=True)["input_ids"]
    )
    cut = [
        ids[mask.bool()].tolist()
        for batch in trainer.rollouts
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        if mask.sum() > 10
    ]
    assert all(ids == whole[-58:] for ids in cut)
    logs = trainer.state.log_history
    num_cut = [4 * entry.get("prompts/clipped_ratio", 0) for entry in logs]
    assert len(cut) == sum(num_cut) + 2 >= 4 and logs[-1]["eval_prompts/clipped_ratio"] == 2 / 8
    assert caplog.text.count("prompts of a rollout have more than the 58 tokens") == 1
    assert "lost their first tokens" in caplog.text


def test_a_cut_prompt_keeps_its_beginning_of_sequence():
    assert cut_to_context([1, 5, 6, 7, 8], 3, bos_token_id=1) == [1, 7, 8]
    assert cut_to_context([4, 5, 6, 7, 8], 3, bos_token_id=1) == [6, 7, 8]
    assert cut_to_context([1, 5, 6], 3, bos_token_id=None) == [1, 5, 6]
    assert cut_to_context([1, 5, 6], 1, bos_token_id=1) == [6]


@pytest.mark.parametrize("empty", [None, ""])
def test_a_row_without_a_prompt_is_named(policy, tokenizer, tmp_path, empty):
    """In all data, also in what is only seen as it comes, which is shuffled then."""
    data = Dataset.from_dict({"prompt": [*PROMPTS[:5], empty, *PROMPTS[5:]]})
    message = f"%s has an empty prompt in row 5: {empty!r}. Remove it"
    with pytest.raises(ValueError, match=message % "`train_dataset`"):
        make(policy, tokenizer, tmp_path, prompts=data["prompt"])
    with pytest.raises(ValueError, match=message % "`eval_dataset`"):
        make(policy, tokenizer, tmp_path, eval_dataset=data)
    args = A2CConfig(**settings(tmp_path, max_steps=6))
    stream = data.to_iterable_dataset()
    trainer = A2CTrainer(policy, count_good, args, stream, {"x": stream}, processing_class=tokenizer)
    with pytest.raises(ValueError, match=message % "`train_dataset`"):
        trainer.train()
    with pytest.raises(ValueError, match=message % "`eval_dataset`"):
        trainer.evaluate()


def test_prompts_of_another_kind_are_refused(policy, tokenizer, tmp_path):
    with pytest.raises(TypeError, match="`train_dataset` has a prompt in row 0 that is neither.*: 3 .`int`."):
        make(policy, tokenizer, tmp_path, prompts=[3, 4, 5, 6])


def test_completions_as_long_as_the_context_are_refused(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`max_completion_length=64` leaves no room.*context has 64 positions"):
        make(policy, tokenizer, tmp_path, config={"max_completion_length": 64})


def test_dataset_smaller_than_a_rollout_is_refused(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="has 3 prompts, but one rollout takes 4"):
        make(policy, tokenizer, tmp_path, prompts=["a", "b", "c"])


def test_critic_model_needs_a_separate_critic(policy, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="Set `critic='separate'`"):
        make(policy, tokenizer, tmp_path, critic_model=policy)


def test_critic_from_reward_model_needs_one(policy, tokenizer, tmp_path):
    config = {"critic": "separate", "critic_model_name_or_path": "reward_model"}
    with pytest.raises(ValueError, match="none of them is a plain transformers model"):
        make(policy, tokenizer, tmp_path, config=config)


def test_copying_a_quantized_policy_is_refused(policy_path, tokenizer, tmp_path):
    quantized = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
        "peft_config": LoraConfig(target_modules="all-linear"),
    }
    with pytest.raises(ValueError, match="Set `critic_model_name_or_path`"):
        make(policy_path, tokenizer, tmp_path, config={"critic": "separate"}, **quantized)


def test_critic_of_another_vocabulary_is_refused(policy, tokenizer, tmp_path):
    smaller = build_policy(tokenizer, vocab_size=10)
    with pytest.raises(ValueError, match="knows 10 tokens and the policy 27"):
        make(policy, tokenizer, tmp_path, config={"critic": "separate"}, critic_model=smaller)


def test_critic_from_an_encoder_is_refused(policy, tokenizer, tmp_path):
    encoder = build_encoder(tokenizer)
    with pytest.raises(ValueError, match="needs a causal model; BertForSequenceClassification is not"):
        make(policy, tokenizer, tmp_path, config={"critic": "separate"}, critic_model=encoder)


def test_shared_critic_from_a_folder_without_one_is_refused(policy_path, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no critic was saved there"):
        make(policy_path, tokenizer, tmp_path, config={"critic_model_name_or_path": policy_path})


def test_copying_a_prompt_tuned_policy_is_refused(policy_path, tokenizer, tmp_path):
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PROMPT_TUNING.*Set `critic_model_name_or_path`"):
        make(policy_path, tokenizer, tmp_path, config={"critic": "separate"}, peft_config=prompt_tuning)


class Judge:
    def __init__(self, reward):
        self.reward = reward

    def __call__(self, completions, **kwargs):
        return [self.reward] * len(completions)


def test_rewards_of_one_name_are_told_apart(policy, tokenizer, reward_model_path, tmp_path, caplog):
    """In metrics, in what is recorded, and in samples: folders, lambdas, partials and objects."""
    folders = [tmp_path / run / "checkpoint-100" for run in "ab"]
    for folder in folders:
        folder.parent.mkdir()
        folder.symlink_to(reward_model_path)

    def constant(completions, reward, **kwargs):
        return [reward] * len(completions)

    def constant_2(completions, **kwargs):
        return [7.0] * len(completions)

    functions = [
        *(
            lambda completions, **kwargs: [1.0] * len(completions),
            lambda completions, **kwargs: [2.0] * len(completions),
        ),
        *(functools.partial(constant, reward=3.0), functools.partial(constant, reward=4.0), constant_2),
        *(Judge(5.0), Judge(6.0)),
    ]
    names = ["checkpoint-100", "checkpoint-100_2", "<lambda>", "<lambda>_2", "constant", "constant_3", "constant_2"]
    names += ["Judge", "Judge_2"]
    config = {"save_rollouts": True, "max_steps": 1, "reward_weights": [1.0] * 9}
    trainer = make(policy, tokenizer, tmp_path, [*map(str, folders), *functions], config=config)
    assert "Several rewards are called '<lambda>': number 4 of them all" in caplog.text
    trainer.train()
    expected = dict(zip(names[2:], [1.0, 2.0, 3.0, 4.0, 7.0, 5.0, 6.0], strict=True))
    rows = load_rollouts(tmp_path)["train"].to_list()
    for name in names:
        column = [row[f"reward/{name}"] for row in rows]
        assert len(column) == 4 and (name not in expected or set(column) == {expected[name]})
        assert trainer.state.log_history[0][f"rewards/{name}/mean"] == pytest.approx(sum(column) / 4)
    assert [name for name in rows[0] if name.startswith("reward/")] == [f"reward/{name}" for name in names]


# --- Rollouts ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_async", [False, True])
def test_rewards_that_are_not_finite_are_refused(policy, tokenizer, tmp_path, value, is_async):
    def broken(completions, **kwargs):
        return [0.0, value, *[0.0] * (len(completions) - 2)]

    async def broken_async(completions, **kwargs):
        return broken(completions)

    trainer = make(policy, tokenizer, tmp_path, broken_async if is_async else broken)
    with pytest.raises(ValueError, match=f"'broken(_async)?' returned {value} for row 1"):
        trainer.train()


def test_wrong_number_of_rewards_is_refused(policy, tokenizer, tmp_path):
    trainer = make(policy, tokenizer, tmp_path, lambda completions, **kwargs: [0.0])
    with pytest.raises(ValueError, match="returned 1 rewards, but 4 were expected"):
        trainer.train()


def test_a_reward_function_without_a_result_is_refused(policy, tokenizer, tmp_path):
    trainer = make(policy, tokenizer, tmp_path, lambda completions, **kwargs: None)
    with pytest.raises(ValueError, match="returned None. Return a list"):
        trainer.train()


def returning(rewards, is_async=False):
    """A reward function called `mine`, of `rewards` or of what that gives."""

    def mine(**kwargs):
        return rewards() if callable(rewards) else rewards

    async def mine_async(**kwargs):
        return mine()

    mine_async.__name__ = "mine"
    return mine_async if is_async else mine


def rewards_by(trainer, reward_func, trainer_class=A2CTrainer):
    """Returns what `trainer_class` makes of `reward_func` for four completions of three tokens."""
    trainer.reward_funcs, trainer.reward_func_names = [reward_func], ["mine"]
    completion_ids = [trainer.processing_class("great film")["input_ids"] + [1]] * 4
    inputs = [{"prompt": prompt} for prompt in PROMPTS[:4]]
    return trainer_class._calculate_rewards(trainer, inputs, PROMPTS[:4], ["great film"] * 4, completion_ids)


@pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy:UserWarning")
def test_rewards_of_every_kind_that_trl_takes_are_taken(policy, tokenizer, tmp_path):
    """Beside TRL's own reading of them."""
    numbers, column = [1.0, 0.0, -2.5, 4.0], torch.tensor([[1.0], [0.0], [-2.5], [4.0]])
    trainer = make(policy, tokenizer, tmp_path, returning(numbers, is_async=True))
    for rewards in (
        numbers,
        tuple(numbers),
        torch.tensor(numbers, dtype=torch.bfloat16),
        column,  # what a head of one label gives
        column.clone().requires_grad_(),
        list(column),
        [torch.tensor([[x]]) for x in numbers],
        [torch.tensor(x) for x in numbers],
        np.array(numbers),
        [np.float16(x) for x in numbers],
        [1, False, decimal.Decimal("-2.5"), np.bool_(True)],
        [1.0, None, torch.tensor(2), np.int64(3)],
        lambda: (x for x in numbers),
        dict(enumerate(numbers)).values(),
    ):
        for is_async in (False, True):
            ours, theirs = (
                rewards_by(trainer, returning(rewards, is_async), trainer_class)
                for trainer_class in (A2CTrainer, GRPOTrainer)
            )
            assert torch.equal(ours.nan_to_num(99), theirs.nan_to_num(99)), rewards
            assert trainer.rewarded.token_rewards is None
    for rewards in (column.numpy(), [np.array(x) for x in numbers]):  # which TRL does not take
        assert rewards_by(trainer, returning(rewards)).flatten().tolist() == numbers


@pytest.mark.parametrize(
    "dense",
    [torch.tensor([0.25, 0.0, 1.0]), torch.tensor([[0.25], [0.0], [1.0]]), np.array([[0, 5, 0.25], [6, 10, 1.0]])],
)
def test_tensors_of_several_elements_are_dense(policy, tokenizer, tmp_path, dense):
    trainer = make(policy, tokenizer, tmp_path)
    expected = [0.25, 0.0, 1.0] if len(dense) == 3 else [0.25, 1.0, 0.0]
    assert rewards_by(trainer, returning([dense, 0.5, None, dense])).nansum() == 3.0
    assert trainer.rewarded.token_rewards.tolist() == [expected, [0.0] * 3, [0.0] * 3, expected]


def test_what_is_no_reward_names_the_function_and_the_mend(policy, tokenizer, tmp_path):
    trainer = make(policy, tokenizer, tmp_path, returning(None, is_async=True))
    for rewards, error, message in (
        ({"a": 1.0}, TypeError, "{'a': 1.0} (`dict`). Return a list with one reward per completion"),
        ("good", TypeError, "'good' (`str`). Return a list"),
        (0.5, TypeError, "0.5 (`float`). Return a list"),
        (torch.tensor(0.5), TypeError, "tensor(0.5000) (`Tensor`). Return a list"),
        ({1.0, 2.0, 3.0, 4.0}, TypeError, "{1.0, 2.0, 3.0, 4.0} (`set`). Return a list"),
        ([0.5] * 5, ValueError, "5 rewards, but 4 were expected. Return a list"),
        (torch.zeros(1, 4), ValueError, "1 rewards, but 4 were expected"),
        ([0, {"a": 1}, 0, 0], TypeError, "for row 1 of the batch {'a': 1} (`dict`), which is no number. Return a"),
        ([0, 0, "0.5", 0], TypeError, "for row 2 of the batch '0.5' (`str`), which is no number"),
        ([0, 0, np.str_("2"), 0], TypeError, "for row 2 of the batch np.str_('2') (`str_`), which is no number"),
        (
            [0, 0, 0, np.complex64(1)],
            TypeError,
            "for row 3 of the batch np.complex64(1+0j) (`complex64`), which is no",
        ),
        ([0, 0, 0, 1j], TypeError, "for row 3 of the batch 1j (`complex`), which is no number"),
        ([0, [0.1, "0.5", 0.2], 0, 0], TypeError, "for row 1 of the batch '0.5' (`str`), which is no number"),
        ([0, [(None, 4, 1.0)], 0, 0], ValueError, "for row 1 of the batch the span None to 4 of a text of 10"),
        ([0, [(0, 4, None)], 0, 0], TypeError, "for row 1 of the batch None (`NoneType`), which is no number"),
        ([0, 1e39, 0, 0], ValueError, "1e+39 for row 1 of the batch. Return a finite number"),
        ([10**400, 0, 0, 0], ValueError, "for row 0 of the batch int too large"),
        ([0, torch.tensor([float("nan")]), 0, 0], ValueError, "nan for row 1 of the batch"),
    ):
        for is_async in (False, True):
            with pytest.raises(error, match=re.escape(f"The reward function 'mine' returned {message}")):
                rewards_by(trainer, returning(rewards, is_async))


def test_a_coroutine_that_nobody_awaits_is_refused(policy, tokenizer, tmp_path):
    coroutine = returning([0.0] * 4, is_async=True)
    trainer = make(policy, tokenizer, tmp_path, lambda **kwargs: coroutine(**kwargs))
    with pytest.raises(TypeError, match="returned a coroutine.*Define it by `async def`"):
        trainer.train()


def test_empty_completion_is_refused(policy, tokenizer, tmp_path):
    def one_empty(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        output["completion_ids"][2] = []
        return output

    trainer = make(policy, tokenizer, tmp_path, rollout_func=one_empty)
    with pytest.raises(ValueError, match=r"`rollout_func` returned an empty completion \(row 2"):
        trainer.train()


def test_prompt_without_tokens_is_refused(policy, tokenizer, tmp_path):
    trainer = make(policy, tokenizer, tmp_path, prompts=["a", " ", "b", "c"])
    with pytest.raises(ValueError, match="has no tokens"):
        trainer.train()


def test_nan_in_the_loss_stops_and_keeps_the_last_checkpoint(tokenizer, tmp_path):
    policy = build_policy(tokenizer)

    def poison_after_two(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 2:
            policy.lm_head.weight.data[0, 0] = math.nan
        return count_good(completions)

    config = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    trainer = make(policy, tokenizer, tmp_path, poison_after_two, config=config)
    with pytest.raises(
        FloatingPointError, match="The loss is nan in the update after step 2.*'(the|a|it|but)"
    ) as error:
        trainer.train()
    assert any(prompt in str(error.value) for prompt in PROMPTS)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")["state"]


def test_bootstrapping_when_every_completion_is_cut_warns(policy, tokenizer, tmp_path):
    def never_ends(prompts, trainer):
        output = scripted_rollout(prompts, trainer)
        output["completion_ids"] = [[7, 8, 9] for _ in prompts]
        return output

    trainer = make(policy, tokenizer, tmp_path, config={"truncation": "bootstrap"}, rollout_func=never_ends)
    with pytest.warns(UserWarning, match="none of them earns its score"):
        trainer.train()
