r"""
Teach a language model to play a text game by PPO, with credit for each command: the environment says after each of them
what it was worth, and that reward falls to the last token of the command.

A tiny model, from random weights, on a game of this project, offline on a CPU in about half an hour:

    accelerate launch recipes/text_game.py

It first imitates demonstrations of a careless player (who often does any of the things that can be done), then plays by
itself. Variants of the game that are in no demonstration and no rollout say how good it is before and after.

A game of TextWorld, made for you, or one of yours (`pip install -e ".[textworld]"`):

    accelerate launch recipes/text_game.py --game textworld
    accelerate launch recipes/text_game.py --game zork1.z8 --num_demonstrations 0 --model_name_or_path ...

A model of yours that calls tools, without demonstrations. Every option of `PPOConfig` and `ModelConfig` is an argument:

    accelerate launch recipes/text_game.py --model_name_or_path Qwen/Qwen3-4B-Instruct-2507 --num_demonstrations 0 \
        --use_peft --learning_rate 1e-5 --max_tool_calling_iterations 12 --max_completion_length 1024 \
        --output_dir qwen-plays --turn_rewards True --per_device_train_batch_size 16

Without a model of yours, what is not given here is as in `text_game.yaml`.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from quickstart import StageBar, finish, quiet
from sft import parse_arguments, prepare_model_args
from text_game_house import HouseGame, rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import get_json_schema
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config
from trl.chat_template_utils import qwen3_instruct_2507_chat_template

from trl_ext import PPOConfig, PPOTrainer, SFTTrainer


INSTRUCTION = "Find the gold. "
FAREWELL = "I am done."
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]


@dataclass
class GameArguments:
    """Arguments of this script."""

    game: str = field(
        default="house", metadata={"help": "'house', 'textworld' (a game is made), or a game's .z8 file."}
    )
    num_demonstrations: int = field(default=200, metadata={"help": "Episodes to imitate first; 0 for none."})
    carelessness: float = field(
        default=0.4, metadata={"help": "How often the demonstrations do any thing instead of the right one."}
    )
    imitation_learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of the imitation."})
    imitation_epochs: int = field(default=8, metadata={"help": "Epochs of the imitation."})


def parse(args: list[str]) -> tuple:
    """The arguments of this script, of PPO and of the model."""
    if not any(name in args for name in ("--model_name_or_path", "--config")):
        args = [*args, "--config", str(Path(__file__).with_name("text_game.yaml"))]
    return parse_arguments(__doc__, (GameArguments, PPOConfig, ModelConfig), args)


def choose_game(name: str, output_dir: str, seed: int) -> tuple[Callable, list[dict], list[dict]]:
    """What makes an environment, and the rows of training and test."""
    if name == "house":
        return HouseGame, *rows(seed)
    if name != "textworld" and not Path(name).is_file():
        raise ValueError(
            f"--game {name}: expected 'house', 'textworld' or the file of a game, and there is no such file."
        )
    try:
        from text_game_textworld import make_textworld_game, textworld_factory
    except ImportError:
        raise ImportError("--game textworld needs TextWorld: pip install -e '.[textworld]'.") from None
    file = make_textworld_game(output_dir, seed) if name == "textworld" else name
    return textworld_factory(file), [{}], [{}]


def prompt_of(observation: str = "") -> list[dict]:
    return [{"role": "user", "content": INSTRUCTION + observation}]


def prompts(game_rows: list[dict], count: int) -> Dataset:
    return Dataset.from_list([{"prompt": prompt_of(), **game_rows[i % len(game_rows)]} for i in range(count)])


# --- Imitation ---


def demonstrate(game, row: dict, carelessness: float, max_commands: int, rng: random.Random) -> list[dict]:
    """An episode as messages."""
    messages = prompt_of(game.reset(**row))
    for _ in range(max_commands):
        is_careless = rng.random() < carelessness
        command = rng.choice(game.possible_commands) if is_careless else game.best_command
        call = {"type": "function", "function": {"name": "act", "arguments": {"command": command}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "act", "content": game.act(command)})
        if game.has_won:
            break
    return [*messages, {"role": "assistant", "content": FAREWELL}]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of what is said in the demonstrations, with the chat template of a Qwen3 that calls tools."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL[:3], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.add_tokens(SPECIAL[3:])  # which the parser of calls must see
    tokenizer.chat_template = qwen3_instruct_2507_chat_template
    return tokenizer


def tiny_model(tokenizer, max_length: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def imitate(script_args: GameArguments, args: PPOConfig, model_args: ModelConfig, factory, game_rows) -> str:
    """Fine-tune on demonstrations, and return the folder of the result."""
    rng, game = random.Random(args.seed), factory()
    max_commands = args.max_tool_calling_iterations
    tools = json.dumps([get_json_schema(game.act)])
    episodes = [
        demonstrate(game, rng.choice(game_rows), script_args.carelessness, max_commands, rng)
        for _ in range(script_args.num_demonstrations)
    ]
    print(
        f"      {sum(len(episode) for episode in episodes) // 2} commands in {len(episodes)} demonstrations. The first:"
    )
    show([episodes[0]])
    path = f"{args.output_dir}/imitation"
    if model_args.model_name_or_path is None:
        set_seed(args.seed)
        template = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), chat_template=qwen3_instruct_2507_chat_template
        )
        texts = [template.apply_chat_template(e, tools=json.loads(tools), tokenize=False) for e in episodes]
        tokenizer = train_tokenizer(texts)
        model = tiny_model(tokenizer, args.max_completion_length + 512)
        kwargs = {}
    else:
        model, tokenizer = model_args.model_name_or_path, AutoTokenizer.from_pretrained(model_args.model_name_or_path)
        kwargs = {
            "quantization_config": get_quantization_config(model_args),
            "peft_config": get_peft_config(model_args),
        }
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            path,
            num_train_epochs=script_args.imitation_epochs,
            per_device_train_batch_size=8,
            learning_rate=script_args.imitation_learning_rate,
            lr_scheduler_type="cosine",
            assistant_only_loss=True,
            max_length=None,
            model_init_kwargs=args.model_init_kwargs if isinstance(model, str) else None,
            seed=args.seed,
            use_cpu=args.use_cpu,
            bf16=args.bf16,
            dataloader_pin_memory=args.dataloader_pin_memory,
            activation_checkpointing=args.activation_checkpointing,
            save_strategy="no",
            report_to="none",
            logging_steps=5,
        ),
        train_dataset=Dataset.from_list([{"messages": episode, "tools": tools} for episode in episodes]),
        processing_class=tokenizer,
        **kwargs,
    )
    finish(trainer, StageBar("Imitation", loss="loss"), "A player by imitation")
    return path


# --- Play ---


class Winner:
    """A reward of weight 0, which is logged: whether the game was won. Keeps the last episodes to show them."""

    __name__ = "won"

    def __init__(self):
        self.episodes = []

    def __call__(self, prompts, completions, environments, **kwargs):
        self.episodes = [p + c for p, c in zip(prompts, completions, strict=True)]
        return [float(environment.has_won) for environment in environments]


def show(episodes: list[list[dict]]) -> None:
    for episode in episodes:
        print()
        for message in episode:
            for call in message.get("tool_calls") or []:
                print(f"      > {call['function']['arguments'].get('command')}")
            if message["role"] != "assistant":
                print(f"        {message['content'].removeprefix(INSTRUCTION)}")
            elif not message.get("tool_calls"):
                print(f"      {message['content']}")


def plot(log_history: list[dict], title: str, path: str) -> None:
    """Score and share of games won over rollouts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [
        ("Reward of an episode", "reward"),
        ("Share of games won", "rewards/won/mean"),
        ("Tokens of an episode's commands", "completions/mean_length"),
        ("Explained variance of the critic", "explained_variance"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    figure.suptitle(title)
    for axis, (name, key) in zip(axes, curves, strict=True):
        points = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
        axis.plot(*zip(*points, strict=True), linewidth=1, alpha=0.4, color="tab:blue")
        width = max(1, len(points) // 10)
        means = [
            sum(y for _, y in points[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(points))
        ]
        axis.plot([x for x, _ in points], means, color="tab:blue")
        axis.set_title(name)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    script_args, args, model_args = parse(sys.argv[1:])
    quiet()
    factory, train_rows, test_rows = choose_game(script_args.game, args.output_dir, args.seed)
    path = model_args.model_name_or_path
    if path is None and script_args.num_demonstrations == 0:
        raise ValueError(
            "A model from random weights knows nothing. Set --num_demonstrations, or --model_name_or_path."
        )
    if path is not None:
        prepare_model_args(model_args, args)
    kwargs = {"quantization_config": get_quantization_config(model_args), "peft_config": get_peft_config(model_args)}
    if script_args.num_demonstrations > 0:
        print("[1/3] Imitation: demonstrations of a careless player")
        path = imitate(script_args, args, model_args, factory, train_rows)
        kwargs["peft_config"] = None  # what imitation trained is trained on
        args.model_init_kwargs = None if model_args.model_name_or_path is None else args.model_init_kwargs

    winner = Winner()
    args.reward_weights = [0.0]
    trainer = PPOTrainer(
        model=path,
        reward_funcs=[winner],
        args=args,
        train_dataset=prompts(train_rows, max(1000, args.generation_batch_size)),
        eval_dataset=prompts(test_rows, 60),
        environment_factory=factory,
        **kwargs,
    )
    print("[2/3] PPO: it plays by itself")
    before = trainer.evaluate()
    episodes_before = winner.episodes[:1]
    finish(trainer, StageBar("PPO", reward="reward", won="rewards/won/mean"), "A player")
    after = trainer.evaluate()
    if not trainer.accelerator.is_main_process:
        return
    print("[3/3] Before and after, on games that were held out" if len(test_rows) > 1 else "[3/3] Before and after")
    for name, episodes in (("before", episodes_before), ("after", winner.episodes[:1])):
        print(f"\n      {name}:")
        show(episodes)
    print(f"\n      {'':36}{'before':>10}{'after':>10}")
    for name, key in (("reward", "eval_reward"), ("share of games won", "eval_rewards/won/mean")):
        print(f"      {name:36}{before[key]:10.3f}{after[key]:10.3f}")
    plot(trainer.state.log_history, f"PPO plays {script_args.game}", f"{args.output_dir}/curves.png")
    print(f"\n      The player with its critic and card, and curves.png, lie in {args.output_dir}")


if __name__ == "__main__":
    main()
