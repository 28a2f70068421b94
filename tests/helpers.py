"""Helpers of several test modules: tiny models and data, settings, trainers that keep their batches, and programs."""

import gzip
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from trl_ext import token_values


TESTS = Path(__file__).parent
ROOT = TESTS.parent
RECIPES = ROOT / "recipes"
SHARED = ROOT.parent / "shared"  # real judgements and reference values, where there are any
FSDP2 = RECIPES / "accelerate_configs" / "fsdp2.yaml"

WORDS = "the a film movie was is dull slow bad good great warm bright it and but sad plot ending actor user assistant"
SPECIAL = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)

PROMPTS = [
    "the film was",
    "a dull plot but",
    "the ending is",
    "it was a slow",
    "the actor",
    "a sad movie and",
    "it",
    "but",
]

# Ties, an unranked completion, one in which another begins, prompts of different lengths
RANKINGS = {
    "prompt": ["the film was", "a", "it was a slow plot but the ending is", "the actor"],
    "completions": [
        [" good", " good but slow", " bad and dull and sad", " great"],
        [" good", " bad"],
        [" great great great", " great bad", " great great", " warm bright it and but"],
        [" warm", " dull", " sad", " slow"],
    ],
    "ranks": [[1, 1, 2, None], [1, 2], [2, 1, 2, 3], [1, 2, 2, 2]],
}

# Few updates, but large: what was trained differs from the start
FAST = (
    "--use_cpu --bf16 false --max_steps 2 --per_device_train_batch_size 4 --learning_rate 0.1 --no_gradient_checkpointing"
    " --logging_steps 1 --save_strategy no --report_to none --disable_tqdm true"
).split()


# --- Models ---


def build_tokenizer():
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_settings(tokenizer):
    """Returns arguments for the config of any small decoder."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def tiny_config(tokenizer, **overrides):
    return LlamaConfig(**tiny_settings(tokenizer) | overrides)


def build_encoder(tokenizer):
    """A reward model that is no decoder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForSequenceClassification(config)


def build_policy(tokenizer, seed=0, **overrides):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(tokenizer, **overrides))
    with torch.no_grad():  # far enough from uniform that values, ratios and gradients are of ordinary size
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def build_reward_model(tokenizer, seed=0, **overrides):
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


QUANTIZATION = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8bit": {"load_in_8bit": True},
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 5, 6, 7]])


def quantization_config(method):
    return BitsAndBytesConfig(**QUANTIZATION[method]) if method in QUANTIZATION else None


@torch.no_grad()
def outputs_of(model, critic=None):
    """Returns what a model says of two sequences, and the critic of each of their tokens."""
    outputs = {"logits": model.eval()(input_ids=IDS).logits}
    if critic is not None:
        outputs["values"] = token_values(model, critic.eval(), IDS, torch.ones_like(IDS))
    return outputs


# --- Trainers ---


def settings(tmp_path, **overrides):
    """Fast, silent, exact on CPU."""
    return {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 1,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    } | overrides


def ranking_settings(tmp_path, **overrides):
    """[`settings`] of the trainers that do not generate."""
    own = {"num_generations", "max_completion_length", "critic_learning_rate"}
    return {name: value for name, value in settings(tmp_path).items() if name not in own} | overrides


def make_rankings(num_rows, seed=0, num_ranks=3, num_completions=(2, 3, 4)):
    """Columns of `num_rows` rankings of different lengths, with ties if there are fewer ranks than completions."""
    rng = random.Random(seed)
    columns = {"prompt": [], "completions": [], "ranks": []}
    for row in range(num_rows):
        k = rng.choice(num_completions)
        completions = set()
        while len(completions) < k:
            completions.add("".join(f" {word}" for word in rng.choices(WORDS.split()[:18], k=rng.randint(1, 4))))
        columns["prompt"].append(PROMPTS[row % len(PROMPTS)])
        columns["completions"].append(sorted(completions))
        columns["ranks"].append(rng.sample(range(k), k) if num_ranks >= k else rng.choices(range(num_ranks), k=k))
    return columns


def count_good(completions, **kwargs):
    """Reward: share of the completion's words that are 'good'."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [text.split().count("good") / max(1, len(text.split())) for text in texts]


def by_length(completion_ids, **kwargs):
    """Reward: the number of tokens."""
    return [float(len(ids)) for ids in completion_ids]


def variety(completion_ids, **kwargs):
    """Reward: differs from completion to completion."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def scripted_rollout(prompts, trainer):
    """`rollout_func` whose completions depend on nothing but the prompt: equal on every process and in every run."""
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    completion_ids = []
    for ids in prompt_ids:
        words = [5 + (7 * sum(ids) + 3 * k * k) % 16 for k in range(2 + sum(ids) % 4)]
        completion_ids.append(words if sum(ids) % 3 == 0 else [*words, tokenizer.eos_token_id])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


class Rollouts:
    """Mixin that keeps the batches of a trainer for a test to look at: as rolled out, and as trained on."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.rollouts = [*getattr(self, "rollouts", []), batch]
        return batch

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.updates = [*getattr(self, "updates", []), inputs]
        return loss


def first_gradients(trainer):
    """Trains up to the first update and returns its gradients by parameter; the weights are those of the start again."""
    gradients = {}

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
            control.should_training_stop = True

    start = {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}
    trainer.add_callback(KeepGradients())
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    trainer.model.load_state_dict(start)
    trainer.model.zero_grad()
    return gradients


def recorded(trainer_class):
    """`trainer_class` with [`Rollouts`] mixed in."""
    return type(f"Recorded{trainer_class.__name__}", (Rollouts, trainer_class), {})


def rows_of(batch):
    """The unpadded (prompt_ids, completion_ids) of a batch."""
    for i in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        yield prompt, batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()


def read_shared(name):
    """Returns real judgements, which are no part of the package: without them the test is skipped."""
    path = SHARED / "data" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- Programs ---


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_program(*command, cwd):
    """Runs a program in `cwd` and returns what it printed."""
    environment = os.environ | {"HF_DATASETS_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # unlike `kill`, lets a launcher end its processes
        raise
    assert process.returncode == 0, errors[-4000:]
    return printed


def script_environment():
    """The environment of a script in the folder `processes`, which imports from this one."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_script(script, *arguments):
    """Runs a script of the folder `processes` as a process of its own."""
    command = [sys.executable, str(TESTS / "processes" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=script_environment())


def launch(num_processes, script, *arguments, config_file=None, **environment):
    """Runs a script of the folder `processes` on the CPU as `accelerate launch` does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    if config_file is not None:
        command += ["--config_file", str(config_file)]
    else:
        # `--cpu --num_processes 2` starts one process (accelerate 1.15 without mpirun); the scripts set `use_cpu`
        command += ["--multi_gpu"] if num_processes > 1 else ["--cpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(TESTS / "processes" / script), *map(str, arguments)]

    def run():
        return subprocess.run(command, capture_output=True, text=True, env=script_environment() | environment)

    done = run()
    # Seen once in some 30 runs, while gloo waited; a fault of ours would come again
    if "(SIGABRT)" in done.stderr:
        warnings.warn(f"A process of {script} was aborted; it is run again.\n{done.stderr[-40000:]}", stacklevel=2)
        done = run()
    assert done.returncode == 0, done.stderr[-40000:]  # whole: the process that fell first wrote before the others


def run_snippets(folder):
    """Runs the python blocks of a card, each for itself; returns the names they leave, and what they `printed`."""
    scope = {"printed": []}
    for snippet in (Path(folder) / "README.md").read_text().split("```python\n")[1:]:
        own = {"print": scope["printed"].append}
        exec(snippet.split("```")[0], own)
        scope |= {name: value for name, value in own.items() if name != "print"}
    return scope
