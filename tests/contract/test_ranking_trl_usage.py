"""Uses of TRL's `RewardTrainer` and `DPOTrainer` give with their subclasses what TRL gives."""

import copy
import json
from dataclasses import dataclass

import datasets
import deprecations
import pytest
import torch
from datasets import Dataset
from helpers import build_policy, build_reward_model, make_rankings, ranking_settings, tiny_config
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    HfArgumentParser,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    TrainerCallback,
)
from trl import BEMACallback, DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from trl_ext import RankingDPOConfig, RankingDPOTrainer, RankingRewardConfig, RankingRewardTrainer, tie_parameters
from trl_ext.models.tie_parameters import TIE_PARAMETERS_FILE


CLASSES = {
    "reward": [(RewardTrainer, RewardConfig), (RankingRewardTrainer, RankingRewardConfig)],
    "dpo": [(DPOTrainer, DPOConfig), (RankingDPOTrainer, RankingDPOConfig)],
}


def pairs(prompt="explicit"):
    columns = make_rankings(8, num_completions=[2], num_ranks=2, seed=3)
    chosen, rejected = zip(*columns["completions"], strict=True)
    if prompt == "implicit":
        chosen, rejected = ([p + c for p, c in zip(columns["prompt"], cs, strict=True)] for cs in (chosen, rejected))
        return Dataset.from_dict({"chosen": chosen, "rejected": rejected})
    return Dataset.from_dict({"prompt": columns["prompt"], "chosen": chosen, "rejected": rejected})


def chats(prompt="explicit"):
    def conversation(role, text):
        return [{"role": role, "content": text.strip()}]

    data = pairs().map(
        lambda row: {
            "prompt": conversation("user", row["prompt"]),
            "chosen": conversation("assistant", row["chosen"]),
            "rejected": conversation("assistant", row["rejected"]),
        }
    )
    if prompt == "explicit":
        return data
    data = data.map(lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")})
    return data.remove_columns("prompt")


def as_ranking(row):
    return {"completions": [row["chosen"], row["rejected"]], "ranks": [1, 2]}


def comparable(log_history):
    """Without what the clock says."""
    left_out = ("runtime", "per_second", "preparation_time")
    return [{k: v for k, v in logs.items() if not any(part in k for part in left_out)} for logs in log_history]


def run(task, index, model, tmp_path, dataset, kwargs=None, **overrides):
    """Train with TRL's class (index 0) or ours (index 1)."""
    trainer_class, config_class = CLASSES[task][index]
    args = config_class(**ranking_settings(tmp_path / str(index), **{"max_steps": 3, **overrides}))
    trainer = trainer_class(model, args=args, train_dataset=dataset, **kwargs or {})
    trainer.train()
    return trainer


def assert_the_same(task, tmp_path, tokenizer, dataset, kwargs=None, model=None, **overrides):
    """Bit for bit: all that is logged, and the weights."""
    trainers = []
    for index in (0, 1):
        its_model = model() if callable(model) else model
        if its_model is None:
            its_model = build_reward_model(tokenizer) if task == "reward" else build_policy(tokenizer)
        its_kwargs = kwargs() if callable(kwargs) else dict(kwargs or {})
        if not isinstance(its_model, str):
            its_kwargs.setdefault("processing_class", tokenizer)
            if task == "dpo" and "peft_config" not in its_kwargs and not hasattr(its_model, "peft_config"):
                its_kwargs.setdefault("ref_model", build_policy(tokenizer, seed=7))
        trainers.append(run(task, index, its_model, tmp_path, dataset, its_kwargs, **overrides))
    theirs, ours = trainers
    assert comparable(theirs.state.log_history) == comparable(ours.state.log_history)
    first, second = theirs.model.state_dict(), ours.model.state_dict()
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    assert ours.ties is None and "ranking_model" not in ours.model.config.to_dict()
    assert type(theirs.data_collator) is type(ours.data_collator)
    return theirs, ours


def lora(task):
    modules_to_save = ["score"] if task == "reward" else None
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=modules_to_save)


# --- Both ---


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("data", [pairs, chats])
@pytest.mark.parametrize("prompt", ["explicit", "implicit"])
def test_data(tokenizer, tmp_path, task, data, prompt):
    assert_the_same(task, tmp_path, tokenizer, data(prompt))


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"max_length": 7},
        {"pad_to_multiple_of": 8},
        {"remove_unused_columns": False},
        {"disable_dropout": False},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
)
def test_options_of_both(tokenizer, tmp_path, task, overrides):
    assert_the_same(task, tmp_path, tokenizer, pairs(), **overrides)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_model_by_its_path(policy_path, reward_model_path, tokenizer, tmp_path, task):
    path = reward_model_path if task == "reward" else policy_path
    overrides = {"model_init_kwargs": {"dtype": "bfloat16"}}
    theirs, ours = assert_the_same(task, tmp_path, tokenizer, pairs(), model=path, **overrides)
    assert ours.model.dtype == torch.bfloat16


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_lora(tokenizer, tmp_path, task):
    theirs, ours = assert_the_same(task, tmp_path, tokenizer, pairs(), lambda: {"peft_config": lora(task)})
    for trainer in (theirs, ours):
        trainer.save_model()
    theirs, ours = ({p.name for p in (tmp_path / index).iterdir()} for index in "01")
    # An adapter has its base's config, so what it was trained on is said beside it
    assert ours - theirs == ({TIE_PARAMETERS_FILE} if task == "reward" else set()) and theirs <= ours


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_evaluation(tokenizer, tmp_path, task):
    data = pairs()
    kwargs = {"eval_dataset": {"first": data.select(range(3)), "rest": data.select(range(3, 8))}}
    overrides = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "per_device_eval_batch_size": 2}
    theirs, ours = assert_the_same(task, tmp_path, tokenizer, data, kwargs, **overrides)
    first, second = (comparable([trainer.evaluate(data.select(range(5)))]) for trainer in (theirs, ours))
    assert first == second and any("eval_loss" in logs for logs in first)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_compute_metrics(tokenizer, tmp_path, task):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"mean": float(prediction.predictions.mean())}

    kwargs = {"eval_dataset": pairs(), "compute_metrics": compute_metrics}
    with deprecations.asked_for():  # TRL's own deprecation of this for DPO
        assert_the_same(task, tmp_path, tokenizer, pairs(), kwargs, eval_strategy="steps", eval_steps=3)
    assert len(seen) == 2 and (seen[0].predictions == seen[1].predictions).all()


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_streams(tokenizer, tmp_path, task):
    kwargs = {"eval_dataset": pairs().to_iterable_dataset()}
    stream = pairs().to_iterable_dataset()
    assert_the_same(task, tmp_path, tokenizer, stream, kwargs, eval_strategy="steps", eval_steps=3)


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize("column", ["ranks", "ranking", "pairs", "completions", "group_ids"])
def test_columns_that_are_about_something_else(tokenizer, tmp_path, task, column):
    """TRL ignores what it does not know, and pairs are no ranking for a name alone."""
    values = [[["a", "b"], ["c"]][row % 2] for row in range(8)]
    data = pairs().add_column(column, values)
    kwargs = {"eval_dataset": data.to_iterable_dataset()}
    assert_the_same(task, tmp_path, tokenizer, data, kwargs, eval_strategy="steps", eval_steps=3)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_the_loss_by_hand(tokenizer, tmp_path, task):
    results = []
    for trainer in assert_the_same(task, tmp_path, tokenizer, pairs(), max_steps=1):
        batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
        with deprecations.asked_for(), torch.no_grad():  # TRL's, of `return_outputs` for DPO
            results.append(trainer.compute_loss(trainer.model, batch, return_outputs=True))
    (their_loss, theirs), (our_loss, ours) = results
    assert their_loss == our_loss and type(theirs) is type(ours) and torch.equal(theirs.logits, ours.logits)


@pytest.mark.parametrize("task", ["reward", "dpo"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"train_dataset": None},
        {"train_dataset": list(pairs())},
        {"train_dataset": list(pairs()), "peft_config": LoraConfig()},
        {"train_dataset": pairs(), "tokenizer": None},
    ],
    ids=["nothing", "list", "list with adapter", "old name"],
)
def test_errors_are_trls(tokenizer, tmp_path, task, kwargs):
    errors = []
    for trainer_class, config_class in CLASSES[task]:
        model = build_reward_model(tokenizer) if task == "reward" else build_policy(tokenizer)
        with pytest.raises((TypeError, ValueError)) as error:
            trainer_class(model, args=config_class(**ranking_settings(tmp_path)), **kwargs)
        errors.append((error.type, str(error.value).replace("Ranking", "")))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_callbacks_and_optimizers(tokenizer, tmp_path, task):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    models = iter([build_reward_model(tokenizer) if task == "reward" else build_policy(tokenizer) for _ in "01"])
    current = []

    def model():
        current.append(next(models))
        return current[-1]

    def kwargs():
        optimizer = torch.optim.SGD(current[-1].parameters(), lr=0.1, momentum=0.9)
        return {
            "callbacks": [Count()],
            "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))),
        }

    assert_the_same(task, tmp_path, tokenizer, pairs(), kwargs, model)
    assert steps == [1, 2, 3] * 2


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_a_collator_of_ones_own(tokenizer, tmp_path, task):
    def collator(examples):
        """TRL's, padded on the left, of pairs without their last word."""
        rows = [
            (row.get("prompt_ids", []), row[f"{side}_ids"][:-1]) for side in ("chosen", "rejected") for row in examples
        ]
        length = max(len(p) + len(c) for p, c in rows)
        padding = [length - len(p) - len(c) for p, c in rows]
        batch = {
            "input_ids": [[0] * n + p + c for n, (p, c) in zip(padding, rows, strict=True)],
            "attention_mask": [[0] * n + [1] * (length - n) for n in padding],
            "completion_mask": [[0] * (n + len(p)) + [1] * len(c) for n, (p, c) in zip(padding, rows, strict=True)],
        }
        if task == "reward":
            del batch["completion_mask"]
        return {name: torch.tensor(values) for name, values in batch.items()}

    _, ours = assert_the_same(task, tmp_path, tokenizer, pairs(), {"data_collator": collator})
    assert ours.data_collator is collator


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_saving_and_resuming(tokenizer, tmp_path, task):
    overrides = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    kwargs = {"eval_dataset": pairs()}
    theirs, ours = assert_the_same(
        task, tmp_path, tokenizer, pairs(), kwargs, load_best_model_at_end=True, save_only_model=False, **overrides
    )
    for trainer in (theirs, ours):
        trainer.save_model()
        trainer.train(resume_from_checkpoint=str(trainer.args.output_dir) + "/checkpoint-2")
    assert comparable(theirs.state.log_history) == comparable(ours.state.log_history)
    configs = [json.loads((tmp_path / index / "config.json").read_text()) for index in "01"]
    if task == "reward":  # how it was trained, for who asks it
        how = {"kind": "text", "pad_token": "<pad>", "ending": "<eos>", "special_tokens": []}
        assert configs[1].pop("reward_input") == how
    assert configs[0] == configs[1]
    files = [sorted(p.name for p in (tmp_path / index / "checkpoint-2").iterdir()) for index in "01"]
    assert files[0] == files[1]
    card = (tmp_path / "1" / "README.md").read_text()
    assert "on 8 pairs" in card and "that of single pairs, as in TRL" in card and "None" not in card


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_arguments_on_the_command_line(tmp_path, task):
    _, config_class = CLASSES[task][1]
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--ranking_model", "davidson", "--log_tie"]
    words += ["-0.5", "--learn_ties", "false", "--shared_prefix", "never", "--overlong", "drop", "--max_length", "99"]
    (args,) = HfArgumentParser(config_class).parse_args_into_dataclasses(words)
    assert (args.ranking_model, args.log_tie, args.learn_ties) == ("davidson", [-0.5], False)
    assert (args.shared_prefix, args.overlong, args.max_length) == ("never", "drop", 99)


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_only_model_and_dataset(policy_path, tokenizer, rankings, tmp_path, monkeypatch, task):
    monkeypatch.chdir(tmp_path)
    build_policy(tokenizer).save_pretrained("model")
    tokenizer.save_pretrained("model")
    trainer_class, config_class = CLASSES[task][1]

    @dataclass
    class OnCPU(config_class):  # the defaults ask for bf16, which only this lets pass without a GPU
        use_cpu: bool = True

    monkeypatch.setattr(trainer_class, "config_class", OnCPU)
    trainer = trainer_class("model", train_dataset=rankings)
    assert trainer.args.output_dir == {"reward": "model-Ranking-Reward", "dpo": "model-Ranking-DPO"}[task]
    assert trainer.args.ranking_model == "davidson_luce" and trainer.ties is not None


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_rankings_in_bf16_with_checkpointing(tokenizer, rankings, tmp_path, task):
    """The defaults of TRL on a GPU. Tie parameters stay in fp32, and the first batch shows that packing is right."""
    for overrides in ({"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}):
        half = overrides.get("model_init_kwargs") is not None
        model = build_reward_model(tokenizer) if task == "reward" else build_policy(tokenizer)
        reference = build_policy(tokenizer, seed=7)
        kwargs = {"processing_class": tokenizer} | ({"ref_model": reference} if task == "dpo" else {})
        if half:
            model, reference = model.bfloat16(), reference.bfloat16()
            overrides = {}
        trainer = run(task, 1, model, tmp_path, rankings, kwargs, gradient_checkpointing=True, **overrides)
        assert trainer._packs and trainer.ties.raw.dtype == torch.float32
        losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
        exact = run(
            task,
            1,
            build_reward_model(tokenizer) if task == "reward" else build_policy(tokenizer),
            tmp_path,
            rankings,
            {"processing_class": tokenizer} | ({"ref_model": build_policy(tokenizer, 7)} if task == "dpo" else {}),
        )
        expected = [logs["loss"] for logs in exact.state.log_history if "loss" in logs]
        assert losses == pytest.approx(expected, abs=0.05)


# --- Reward modeling ---


@pytest.mark.parametrize("kind", ["margin", "margin and centered", "centered", "tokenized", "legacy"])
def test_reward_columns(tokenizer, tmp_path, kind):
    data, overrides = pairs(), {}
    if "margin" in kind:
        data = data.add_column("margin", [0.1 * i for i in range(8)])
    if "centered" in kind:
        overrides = {"center_rewards_coefficient": 0.1}
    if kind in ("tokenized", "legacy"):
        suffix = {"tokenized": "ids", "legacy": "input_ids"}[kind]
        columns = {side: [tokenizer(text)["input_ids"] for text in data[side]] for side in ("chosen", "rejected")}
        data = Dataset.from_dict({f"{side}_{suffix}": ids for side, ids in columns.items()})
    with deprecations.asked_for():  # TRL's, of the legacy columns
        assert_the_same("reward", tmp_path, tokenizer, data, **overrides)


def test_reward_from_a_causal_model(policy_path, tokenizer, tmp_path):
    _, ours = assert_the_same("reward", tmp_path, tokenizer, pairs(), model=policy_path)
    assert ours.model.config.num_labels == 1


@pytest.mark.parametrize(
    ("own", "trains_head"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["score"]}, True),
        ({"target_modules": "all-linear"}, True),  # without a task type PEFT takes the head for one of the layers
    ],
)
def test_reward_lora_says_whether_its_head_stays(tokenizer, tmp_path, caplog, own, trains_head):
    trainer = run(
        "reward",
        1,
        build_reward_model(tokenizer),
        tmp_path,
        pairs(),
        {"peft_config": LoraConfig(**own), "processing_class": tokenizer},
    )
    is_trained = any("score" in name for name, weight in trainer.model.named_parameters() if weight.requires_grad)
    assert is_trained == trains_head
    assert is_trained != ("the score head stays as it is" in caplog.text)


def test_reward_with_an_optimizer_class(tokenizer, tmp_path):
    kwargs = {
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}),
        "preprocess_logits_for_metrics": lambda logits, labels: logits * 2,
        "compute_metrics": lambda prediction: {"mean": float(prediction.predictions.mean())},
        "eval_dataset": pairs(),
    }
    assert_the_same("reward", tmp_path, tokenizer, pairs(), kwargs, eval_strategy="steps", eval_steps=3)


def test_reward_with_a_chat_template_from_a_file(policy_path, tmp_path):
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}")
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    assert_the_same("reward", tmp_path, tokenizer, chats(), chat_template_path=str(tmp_path / "template.jinja"))


# --- DPO ---


LOSS_TYPES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dpo_loss_types(tokenizer, tmp_path, loss_type):
    smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust", "aot") else {}
    assert_the_same("dpo", tmp_path, tokenizer, pairs(), loss_type=[loss_type], max_steps=2, **smoothing)


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"max_length": 7, "truncation_mode": "keep_end"},
        {"precompute_ref_log_probs": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        {"beta": 2.0},
    ],
    ids=str,
)
def test_dpo_options(tokenizer, tmp_path, overrides):
    with deprecations.asked_for():  # `keep_end` is
        assert_the_same("dpo", tmp_path, tokenizer, pairs(), **overrides)


def test_dpo_makes_its_reference(policy_path, tokenizer, tmp_path):
    for overrides in ({}, {"precompute_ref_log_probs": True}):
        theirs, ours = assert_the_same("dpo", tmp_path, tokenizer, pairs(), model=policy_path, **overrides)
        assert (theirs.ref_model is None) == (ours.ref_model is None)


def test_dpo_goes_on_with_an_adapter(policy_path, tokenizer, tmp_path):
    def model():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(policy_path)
        return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))

    _, ours = assert_the_same("dpo", tmp_path, tokenizer, pairs(), model=model)
    assert "ref" in ours.model.peft_config


def test_dpo_of_rankings_goes_on_with_an_adapter(policy_path, tokenizer, rankings, tmp_path):
    """The adapter's start is the reference: the first scores are 0."""
    base = AutoModelForCausalLM.from_pretrained(policy_path)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    trainer = run("dpo", 1, model, tmp_path, rankings, {"processing_class": tokenizer})
    logs = trainer.state.log_history
    assert abs(logs[0]["rewards/mean"]) < 1e-6 and abs(logs[0]["rewards/margins"]) < 1e-6
    assert logs[0]["log_likelihood"] == pytest.approx(logs[0]["baseline_log_likelihood"], rel=1e-5)
    assert abs(logs[2]["rewards/margins"]) > 1e-3


def test_dpo_of_rankings_follows_its_reference(tokenizer, rankings, tmp_path):
    """With `sync_ref_model` at a mixture of 1 the reference is the policy after each step, and no score is left."""
    for sync in (True, False):
        trainer = run(
            "dpo",
            1,
            build_policy(tokenizer),
            tmp_path,
            rankings,
            {"processing_class": tokenizer, "ref_model": build_policy(tokenizer, seed=7)},
            sync_ref_model=sync,
            ref_model_sync_steps=1,
            ref_model_mixup_alpha=1.0,
        )
        followed = [abs(logs["rewards/mean"]) < 1e-6 for logs in trainer.state.log_history[:-1]]
        assert followed == [False, sync, sync]
        pairs_of_weights = zip(
            trainer.ref_model.state_dict().items(), build_policy(tokenizer, 7).state_dict().items(), strict=True
        )
        assert all(torch.equal(first[1], second[1]) for first, second in pairs_of_weights) != sync
        assert not any("tie" in name for name in trainer.ref_model.state_dict())
        assert "tie_parameters.raw" in dict(trainer.model.named_parameters())


def test_dpo_of_experts(tokenizer, tmp_path):
    """With TRL's load-balancing loss, which rankings of two have as well."""

    def model(seed=0):
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        config = MixtralConfig(**sizes, **tokens, num_key_value_heads=1, num_local_experts=3, dtype="float32")
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)

    same = {"router_aux_loss_coef": 0.5, "optim": "sgd", "learning_rate": 0.1}
    theirs, _ = assert_the_same("dpo", tmp_path, tokenizer, pairs(), lambda: {"ref_model": model(7)}, model, **same)
    rankings = pairs().map(as_ranking, remove_columns=["chosen", "rejected"])
    kwargs = {"processing_class": tokenizer, "ref_model": model(7)}
    ours = run("dpo", 1, model(), tmp_path, rankings, kwargs, **same)
    for first, second in zip(theirs.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        for name in ("loss", "aux_loss", "rewards/margins"):
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name


IMAGE_TEMPLATE = """\
{% for m in messages %}{{ '<|' + m['role'] + '|> ' }}{% for part in m['content'] %}\
{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"""


@pytest.fixture(scope="module")
def vision_model_path(tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("vision_model"))
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=tiny_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        dtype="float32",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=IMAGE_TEMPLATE,
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def illustrated():
    pictures = [Image.new("RGB", (28, 28), (30 * i, 100, 255 - 30 * i)) for i in range(8)]
    images = Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    return datasets.concatenate_datasets([chats(), images], axis=1)


def test_dpo_of_pairs_with_images(vision_model_path, illustrated, tokenizer, tmp_path):
    overrides = {"max_length": None, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 3}
    kwargs = {"eval_dataset": illustrated.select(range(3))}
    theirs, ours = assert_the_same("dpo", tmp_path, tokenizer, illustrated, kwargs, vision_model_path, **overrides)
    assert comparable([theirs.evaluate(illustrated)]) == comparable([ours.evaluate(illustrated)])


@pytest.mark.parametrize("data", [pairs, chats])
def test_dpo_of_text_with_a_vision_model(vision_model_path, tokenizer, tmp_path, data):
    """Rankings of two are pairs, for its processor too."""
    theirs, _ = assert_the_same("dpo", tmp_path, tokenizer, data(), model=vision_model_path)
    ours = run("dpo", 1, vision_model_path, tmp_path, data().map(as_ranking, remove_columns=["chosen", "rejected"]))
    for first, second in zip(theirs.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        for name in ("loss", "entropy", "rewards/margins"):
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_rankings_with_images_are_refused(vision_model_path, illustrated, tmp_path, where):
    rankings = illustrated.map(as_ranking, remove_columns=["chosen", "rejected"])
    data = {"train_dataset": illustrated, "eval_dataset": illustrated} | {where: rankings}
    with pytest.raises(ValueError, match="Rankings with images are not supported"):
        RankingDPOTrainer(vision_model_path, args=RankingDPOConfig(**ranking_settings(tmp_path)), **data)


# --- Both kinds of data ---


def test_pairs_are_evaluated_as_trl_does_beside_rankings(tokenizer, rankings, tmp_path):
    """A benchmark of pairs for a model of rankings: the same figures as TRL's for the same weights."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    metrics = []
    kwargs = {"processing_class": tokenizer, "compute_metrics": compute_metrics}
    for index, dataset in ((0, pairs()), (1, rankings)):
        trainer_class, config_class = CLASSES["reward"][index]
        args = config_class(**ranking_settings(tmp_path, per_device_eval_batch_size=3))
        trainer = trainer_class(build_reward_model(tokenizer), args, train_dataset=dataset, **kwargs)
        metrics.append(comparable([trainer.evaluate(pairs())])[0])
    assert metrics[0] == metrics[1]
    assert (seen[0] == seen[1]).all()


@pytest.mark.parametrize("column", [None, "ranks"])
def test_rankings_are_evaluated_beside_pairs(tokenizer, rankings, tmp_path, column):
    """A trainer on pairs has likelihood and tie parameters of the rankings it was given at the start."""
    args = RankingRewardConfig(**ranking_settings(tmp_path, per_device_eval_batch_size=3))
    data = pairs() if column is None else pairs().add_column(column, [[1, 2]] * 8)
    kwargs = {"train_dataset": data, "eval_dataset": rankings, "processing_class": tokenizer}
    trainer = RankingRewardTrainer(build_reward_model(tokenizer), args, **kwargs)
    alone = RankingRewardTrainer(
        build_reward_model(tokenizer), args, train_dataset=rankings, processing_class=tokenizer
    )
    assert comparable([trainer.evaluate()]) == comparable([alone.evaluate(rankings)])
    trainer.train()  # by TRL's loss, which knows of no ties
    assert trainer.ties.raw.grad is None and trainer.state.log_history[0]["accuracy"] is not None


@pytest.mark.parametrize("task", ["reward", "dpo"])
def test_averaging_the_weights_of_a_model_of_rankings(
    policy_path, reward_model_path, tokenizer, rankings, tmp_path, task
):
    """By TRL's callback, whose average of the newest weights alone is the model itself, on disk a plain one."""
    newest = BEMACallback(update_freq=1, min_ema_multiplier=1.0, bias_power=1000.0)
    path = reward_model_path if task == "reward" else policy_path
    # After an evaluation nothing is logged of the training, in which its config is written, too
    kwargs, late = {"callbacks": [newest], "eval_dataset": rankings}, {"eval_strategy": "steps", "eval_steps": 3}
    trainer = run(task, 1, path, tmp_path, rankings, kwargs, logging_steps=100, **late)
    assert "on_train_begin" not in vars(newest)  # as it was
    averaged = type(trainer.model).from_pretrained(tmp_path / "1" / "bema").state_dict()
    trained = {name: weight for name, weight in trainer.model.state_dict().items() if "tie" not in name}
    assert averaged.keys() == trained.keys()
    assert all(torch.equal(averaged[name], weight) for name, weight in trained.items())
    assert torch.equal(tie_parameters(tmp_path / "1" / "bema")[1], trainer.ties().detach())


def test_a_model_of_rankings_is_a_plain_module(tokenizer, rankings, tmp_path):
    """Tuples instead of a dict, copies and pickles, as before training."""
    model = build_reward_model(tokenizer)
    args = RankingRewardConfig(**ranking_settings(tmp_path))
    trainer = RankingRewardTrainer(model, args, train_dataset=rankings, processing_class=tokenizer)
    trainer.train()
    ids = torch.tensor([[5, 6, 7]])
    score = model.eval()(ids).logits
    assert torch.equal(model(ids, return_dict=False)[0], score)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(ids).logits, score)
    assert torch.equal(copy.deepcopy(model)(ids).logits, score)
