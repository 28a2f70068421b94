"""A reward model is asked about what it was trained on, by whoever asks, and one text has one score."""

import json
import logging
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset
from helpers import (
    RECIPES,
    build_encoder,
    build_policy,
    build_reward_model,
    ranking_settings,
    recorded,
    run_snippets,
    settings,
    tiny_config,
)
from peft import LoraConfig
from tokenizers import Tokenizer, processors
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from trl import GRPOConfig, GRPOTrainer

from trl_ext import PPOConfig, PPOTrainer, RankingRewardConfig, RankingRewardTrainer, merge_adapter
from trl_ext.adapters.reward_models import RewardModel, load_reward_model, max_text_length
from trl_ext.data.items import Item
from trl_ext.models.reward_inputs import read_reward_input


sys.path.insert(0, str(RECIPES))

from collecting.judges import reward_model_scores  # noqa: E402


PROMPT = "the film was "
COMPLETIONS = ["good and great", "bad", "dull and sad but warm"]
RANKINGS = {
    "prompt": [PROMPT, "it was a slow plot but the ending is "],
    "completions": [COMPLETIONS, ["good", "bad and dull", "great"]],
    "ranks": [[1, 3, 2], [2, 3, 1]],
}
# As Qwen and SmolLM2 have them: a turn ends with a token, and more follows
TURNS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <eos> and ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def as_chat(text, role="assistant"):
    return [{"role": role, "content": text.strip()}]


def as_chats(rankings):
    prompts = [as_chat(prompt, "user") for prompt in rankings["prompt"]]
    return rankings | {"prompt": prompts, "completions": [[*map(as_chat, row)] for row in rankings["completions"]]}


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    """Puts a token before each text; its padding is no end-of-sequence token."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing("<unk> $A", special_tokens=[("<unk>", 2)])
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TURNS, **tokens)


@pytest.fixture(scope="module")
def policy_with_bos(bos_tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("policy"))
    build_policy(bos_tokenizer).save_pretrained(path)
    bos_tokenizer.save_pretrained(path)
    return path


# --- One text, one score ---


def ids_by_hand(tokenizer, text):
    vocab = tokenizer.get_vocab()
    return [vocab[word] for word in text.split()]


FORMS = {
    "texts": "<unk> the film was {} <eos>",
    "bare": "the film was {}",
    "chats": "<|user|> the film was <eos> and <|assistant|> {} <eos> and",
    "adapter": "<unk> the film was {} <eos>",
    "pairs": "<unk> the film was {} <eos>",
}


@pytest.fixture(scope="module", params=FORMS)
def trained(request, bos_tokenizer, policy_with_bos, tmp_path_factory):
    """A reward model in its folder; what it reads of the prompt with each completion, by hand; and its scores of it."""
    case, folder = request.param, tmp_path_factory.mktemp(request.param)
    rankings = as_chats(RANKINGS) if case == "chats" else RANKINGS
    if case == "pairs":
        rankings = {"prompt": [PROMPT] * 2, "chosen": COMPLETIONS[:2], "rejected": COMPLETIONS[1:]}
    trainer = RankingRewardTrainer(
        policy_with_bos if case == "adapter" else build_reward_model(bos_tokenizer),
        RankingRewardConfig(**ranking_settings(folder, max_steps=1, learning_rate=0.1), bare_texts=case == "bare"),
        train_dataset=Dataset.from_dict(rankings),
        processing_class=bos_tokenizer,
        peft_config=LoraConfig(r=4) if case == "adapter" else None,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    model, ids = trainer.model.eval(), [ids_by_hand(bos_tokenizer, FORMS[case].format(c)) for c in COMPLETIONS]
    with torch.no_grad():
        scores = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
    assert torch.tensor(scores).sort().values.diff().min() > 1e-3  # so that it would show if another was asked
    return SimpleNamespace(case=case, folder=str(folder), ids=ids, scores=scores, trainer=trainer, model=model)


def test_training_reads_texts_so(trained):
    data = trained.trainer.train_dataset
    read = data["group_ids"][0] if trained.case != "pairs" else [*data["chosen_ids"], data["rejected_ids"][-1]]
    assert read == trained.ids


def test_judges_read_them_so(trained):
    prompt, completions = PROMPT, COMPLETIONS
    if trained.case == "chats":
        prompt, completions = as_chat(PROMPT, "user"), [*map(as_chat, COMPLETIONS)]
    scores = reward_model_scores(trained.folder, [prompt])(Item("", prompt, completions, []))
    assert scores == pytest.approx(trained.scores, abs=1e-5)


class Scripted(PPOTrainer):
    """Samples the completions in turn, the last of all without its end, and keeps their rewards."""

    def __init__(self, *args, **kwargs):
        def rollout(prompts, trainer):
            tokenizer = trainer.processing_class
            ids = [ids_by_hand(tokenizer, COMPLETIONS[i % 3] + " <eos>") for i in range(len(prompts))]
            ids[-1].pop()
            return {
                "prompt_ids": trainer._tokenize_prompts(prompts)[0],
                "completion_ids": ids,
                "logprobs": None,
            }

        self.seen = []
        super().__init__(*args, rollout_func=rollout, **kwargs)

    def _calculate_rewards(self, *args):
        self.seen.append(super()._calculate_rewards(*args)[:, 0].tolist())
        return torch.tensor(self.seen[-1]).unsqueeze(1)


def prompts_of(case, number=4):
    return Dataset.from_dict({"prompt": [as_chat(PROMPT, "user") if case == "chats" else PROMPT] * number})


@pytest.mark.parametrize("prefix_rewards", [False, True])
def test_rollouts_are_read_so(trained, policy_with_bos, bos_tokenizer, tmp_path, prefix_rewards):
    """One that was cut, too: what being cut costs is not for the reward model to say."""
    args = PPOConfig(**settings(tmp_path, max_steps=1), prefix_rewards=prefix_rewards)
    peft_config = LoraConfig(r=4) if trained.case == "adapter" else None
    trainer = Scripted(policy_with_bos, trained.folder, args, prompts_of(trained.case), peft_config=peft_config)
    trainer.train()
    of_prompt = 0.0
    if prefix_rewards:  # the score of the prompt is taken off, which the policy sees so
        form = "<|user|> the film was <eos> and <|assistant|>" if trained.case == "chats" else "<unk> the film was"
        with torch.no_grad():
            ids = torch.tensor([ids_by_hand(bos_tokenizer, form)])
            of_prompt = trained.model(input_ids=ids).logits.item()
    expected = [score - of_prompt for score in [*trained.scores, trained.scores[0]]]
    assert trainer.seen[0] == pytest.approx(expected, abs=1e-5)
    assert trainer.state.log_history[0]["reward"] == pytest.approx(sum(expected) / 4, abs=1e-5)


def test_the_card_reads_them_so(trained, bos_tokenizer):
    (scores,) = run_snippets(trained.folder)["printed"][:1]
    # The card's own texts, "A prompt and one answer" and so on, of which the tokenizer knows one word
    if trained.case == "chats":
        texts = [f"<|user|> x x x x x <eos> and <|assistant|> {answer} <eos> and" for answer in ("x x", "x x x")]
    else:
        texts = [FORMS[trained.case].replace("the film was {}", "x x and x x")] * 2
    with torch.no_grad():
        expected = [
            trained.model(
                input_ids=torch.tensor([ids_by_hand(bos_tokenizer, text.replace("x", "<unk>"))])
            ).logits.item()
            for text in texts
        ]
    assert [answer["score"] for answer in scores] == pytest.approx(expected, abs=1e-5)


def test_the_note_says_how(trained, tmp_path):
    text = {"kind": "text", "pad_token": "<pad>", "ending": "<eos>", "special_tokens": ["<unk>"]}
    bare = {"kind": "text", "pad_token": "<pad>", "ending": "", "special_tokens": []}
    notes = {"bare": bare, "chats": bare | {"kind": "chat"}}
    model, _ = load_reward_model(trained.folder)
    assert asdict(read_reward_input(model.config)) == notes.get(trained.case, text)
    if trained.case == "adapter":
        merge_adapter(trained.folder, str(tmp_path / "merged"), dtype="float32")
        item = Item("", PROMPT, COMPLETIONS, [])
        scores = reward_model_scores(str(tmp_path / "merged"), [PROMPT])(item)
        assert scores == pytest.approx(trained.scores, abs=1e-4)


def test_what_it_was_not_trained_on_is_refused(trained, policy_with_bos, tmp_path):
    """Before anything is sampled, whether or not one can look at the data before."""
    other = prompts_of("texts" if trained.case == "chats" else "chats")
    message = "was trained on (plain texts|conversations).*and the prompts are"
    args = PPOConfig(**settings(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match=message):
        Scripted(policy_with_bos, trained.folder, args, other)
    trainer = Scripted(policy_with_bos, trained.folder, args, other.to_iterable_dataset())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.seen == []
    with pytest.raises(ValueError, match=message):
        reward_model_scores(trained.folder, [other[0]["prompt"]])


def test_a_tokenizer_that_reads_otherwise_is_refused(bos_tokenizer, tokenizer, tmp_path):
    note = {"kind": "text", "pad_token": "<pad>", "ending": "<eos>", "special_tokens": ["<unk>"]}
    model = build_reward_model(tokenizer, reward_input=note)
    RewardModel(model, bos_tokenizer, "it").check(is_chat=False)
    with pytest.raises(ValueError, match=r"special tokens \['<unk>'\], and its tokenizer here adds \[\]"):
        RewardModel(model, tokenizer, "it").check(is_chat=False)
    with pytest.raises(ValueError, match="padding token '<other>', which its tokenizer here does not know"):
        RewardModel(build_reward_model(tokenizer, reward_input=note | {"pad_token": "<other>"}), bos_tokenizer, "it")


def test_padding_is_what_it_was_in_training(policy_with_bos, bos_tokenizer, tmp_path):
    """Else the score would be that of another token: here of the last but one."""
    note = {"kind": "text", "pad_token": "<pad>", "ending": "<eos>", "special_tokens": ["<unk>"]}
    model = build_reward_model(bos_tokenizer, reward_input=note).eval()
    ids = [ids_by_hand(bos_tokenizer, FORMS["texts"].format(completion)) for completion in COMPLETIONS]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy_with_bos, pad_token="<eos>")
    args = PPOConfig(**settings(tmp_path, max_steps=1))
    trainer = Scripted(policy_with_bos, model, args, prompts_of("texts"), reward_processing_classes=tokenizer)
    trainer.train()
    assert trainer.seen[0] == pytest.approx([*expected, expected[0]], abs=1e-5)


# --- Without a note ---


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_models_without_a_note_are_asked_as_trl_asks(
    policy_with_bos, bos_tokenizer, tmp_path, caplog, monkeypatch, kind, is_chat
):
    model = build_reward_model(bos_tokenizer) if kind == "llama" else build_encoder(bos_tokenizer)
    model.eval()
    names = ["input_ids", "attention_mask", *["token_type_ids"] * (kind == "bert")]
    monkeypatch.setattr(bos_tokenizer, "model_input_names", names)
    prompts = prompts_of("chats" if is_chat else "texts", 3)
    inputs = [{"prompt": prompt} for prompt in prompts["prompt"]]
    completions = [*map(as_chat, COMPLETIONS)] if is_chat else COMPLETIONS
    call = (inputs, prompts["prompt"], completions, [[5]] * 3)
    own = {"per_device_train_batch_size": 3}
    MultiProcessAdapter.warning_once.cache_clear()  # what was said of another test's model
    caplog.set_level(logging.WARNING)
    given = {"train_dataset": prompts, "reward_processing_classes": bos_tokenizer}
    trl_args = settings(tmp_path, **own) | {"num_generations": 3}
    trl_args.pop("critic_learning_rate")
    expected = GRPOTrainer(policy_with_bos, model, GRPOConfig(**trl_args), **given)._calculate_rewards(*call)
    for length_batches in (False, True):
        args = PPOConfig(**settings(tmp_path, **own), length_batches=length_batches)
        rewards = PPOTrainer(policy_with_bos, model, args, **given)._calculate_rewards(*call)
        torch.testing.assert_close(rewards, expected, atol=0 if not length_batches else 1e-6, rtol=0)
    warnings = [r.getMessage() for r in caplog.records if "does not say how it was trained" in r.getMessage()]
    assert bool(warnings) is not is_chat
    if not is_chat:  # what it advises is what TRL's RewardTrainer trains on
        note = json.loads("{" + warnings[0].split("Then put ")[1].split(" into its config.json")[0] + "}")
        assert note["reward_input"]["ending"] == "<eos>" and note["reward_input"]["special_tokens"] == ["<unk>"]


# --- Loading ---


def tokenizer_without(tokenizer, *names):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token", "eos_token") if name not in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **tokens)


@pytest.mark.parametrize("case", ["none", "tokenizer", "config", "eos"])
def test_padding_is_found_wherever_it_is(tokenizer, policy_path, tmp_path, case):
    """Or the lack of it is named before anything is sampled."""
    without = {"none": ["pad_token", "eos_token"], "config": ["pad_token", "eos_token"], "eos": ["pad_token"]}
    own = tokenizer_without(tokenizer, *without.get(case, []))
    pad_token_id = tokenizer.pad_token_id if case == "config" else None
    build_reward_model(tokenizer, pad_token_id=pad_token_id).save_pretrained(tmp_path / "reward")
    own.save_pretrained(tmp_path / "reward")
    path, args = str(tmp_path / "reward"), PPOConfig(**settings(tmp_path, max_steps=1))
    if case == "none":
        for ask in (
            lambda: PPOTrainer(policy_path, path, args, prompts_of("texts")),
            lambda: reward_model_scores(path, [PROMPT]),
        ):
            with pytest.raises(ValueError, match="has no padding token, nor its tokenizer, nor an end-of-sequence"):
                ask()
        return
    model = LlamaForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer(PROMPT + c)["input_ids"]])).logits.item() for c in COMPLETIONS]
    scores = reward_model_scores(path, [PROMPT])(Item("", PROMPT, COMPLETIONS, []))
    assert scores == pytest.approx(expected, abs=1e-5)
    trainer = Scripted(policy_path, path, args, prompts_of("texts"))
    trainer.train()
    assert trainer.seen[0] == pytest.approx([*expected, expected[0]], abs=1e-5)


@pytest.mark.parametrize("case", ["two labels", "no head"])
def test_models_without_one_trained_label_are_refused(tokenizer, policy_path, prompts, tmp_path, case):
    """A head with other labels, or none, would be drawn at random at each load."""
    path, message = policy_path, "has no weights for `score.weight`, which would be drawn at random"
    args = PPOConfig(**settings(tmp_path))
    if case == "two labels":
        path, message = str(tmp_path / "reward"), r"has 2 labels \(`score.weight`\), and a reward is one number"
        model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=2))
        with pytest.raises(ValueError, match="has 2 labels, and a reward is one number"):
            PPOTrainer(policy_path, model, args, prompts, reward_processing_classes=tokenizer)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    with pytest.raises(ValueError, match=message):
        PPOTrainer(policy_path, path, args, prompts)
    with pytest.raises(ValueError, match=message):
        reward_model_scores(path, [PROMPT])


def test_learned_positions_are_counted(tokenizer):
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"num_labels": 1, "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1}
    gpt2 = GPT2ForSequenceClassification(GPT2Config(n_positions=9, **sizes, **ends))
    # Begins to count after its padding
    roberta = RobertaForSequenceClassification(
        RobertaConfig(max_position_embeddings=9, intermediate_size=16, **sizes, **ends)
    )
    assert max_text_length(build_reward_model(tokenizer)) is None
    for model, longest in ((gpt2, 9), (roberta, 7)):
        assert max_text_length(model) == longest
        model(torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest + 1), 5))


def with_positions(tokenizer, n_positions):
    torch.manual_seed(0)
    ends = {"num_labels": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2ForSequenceClassification(GPT2Config(n_positions=n_positions, **sizes, **ends)).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


@pytest.mark.parametrize("prefix_rewards", [False, True])
def test_texts_beyond_its_positions_are_named_or_have_no_score(
    policy_path, tokenizer, tmp_path, caplog, prefix_rewards
):
    model = with_positions(tokenizer, 6)
    args = PPOConfig(**settings(tmp_path, max_steps=1), prefix_rewards=prefix_rewards)
    given = {"reward_processing_classes": tokenizer}
    with pytest.raises(ValueError, match="row 0 of `train_dataset` has 3 tokens for the reward model.*6 positions"):
        Scripted(policy_path, model, args, prompts_of("texts"), **given)
    # Of a stream nobody knows before
    trainer = Scripted(policy_path, model, args, prompts_of("texts").to_iterable_dataset(), **given)
    MultiProcessAdapter.warning_once.cache_clear()  # what was said of another test's model
    caplog.set_level(logging.WARNING)
    trainer.train()
    scores = torch.tensor(trainer.seen[0])
    # 3 + 3, 3 + 1, 3 + 5 and 3 + 3 tokens; prefixes are of the policy's tokens, with the end that three of them have
    assert scores.isnan().tolist() == [prefix_rewards, False, True, False]
    (warning,) = [r.getMessage() for r in caplog.records if "has learned 6 positions" in r.getMessage()]
    assert "They have no score" in warning
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    judged = reward_model_scores(str(tmp_path / "reward"), [PROMPT])(Item("", PROMPT, COMPLETIONS, []))
    assert judged[2] is None and None not in judged[:2]


# --- Prefix rewards ---


@pytest.mark.parametrize("truncation", ["penalty", "bootstrap"])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_prefix_rewards_leave_the_advantages_of_a_critic_that_starts_there(
    policy_with_bos, bos_tokenizer, tmp_path, truncation, gamma
):
    """
    A potential Phi in the rewards is the same as a critic that starts at Phi (Wiewiora 2003, proposition 1): with both
    of a reward model, the advantages are those of its score at the end, and a critic which starts at it.
    """
    note = {"kind": "chat", "pad_token": "<pad>", "ending": "", "special_tokens": []}
    results = []
    for prefix_rewards in (False, True):
        args = PPOConfig(
            **settings(tmp_path, max_steps=1, learning_rate=0.0, critic_learning_rate=0.0),
            prefix_rewards=prefix_rewards,
            critic="separate",
            critic_model_name_or_path="reward_model",
            reward_weights=[1.5],
            gamma=gamma,
            truncation=truncation,
            lam=0.95,
            gate_critic=False,  # the proposition is of a critic that is believed
            scale_advantages=False,
        )
        model = build_reward_model(bos_tokenizer, reward_input=note)
        given = {"reward_processing_classes": bos_tokenizer}
        trainer = recorded(Scripted)(policy_with_bos, model, args, prompts_of("chats"), **given)
        trainer.train()
        update = trainer.updates[0]
        results.append(update["advantages"])
        own = update["completion_mask"].bool()
        assert update["values"][own].abs().max() > 0.1 or prefix_rewards
    assert update["values"][own].abs().max() == 0  # what is still to come of what has been paid
    assert results[0][own].std() > 0.1
    torch.testing.assert_close(results[1][own], results[0][own], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "note",
    [
        "text",
        {"kind": "text"},
        {"kind": "plain", "pad_token": "<pad>"},
        {"kind": "text", "pad_token": "<pad>", "eos": ""},
    ]
    + [{"kind": "text", "pad_token": "<pad>", "special_tokens": "<bos>"}],
)
def test_a_note_that_cannot_be_read_is_refused(tokenizer, note):
    """People write it, where a warning advises them to."""
    with pytest.raises(
        ValueError, match="`reward_input` in the reward model's config must have a `kind`.*Mend or remove"
    ):
        RewardModel(build_reward_model(tokenizer, reward_input=note), tokenizer, "it")
