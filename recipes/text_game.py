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

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, get_peft_config, get_quantization_config

from games.episodes import Winner, choose_game, plot, prompts, show
from games.imitation import demonstrate, imitate
from shared.arguments import parse_arguments, prepare_model_args
from shared.progress import StageBar, finish, quiet
from trl_ext import PPOConfig, PPOTrainer


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
    """Returns the arguments of this script, of PPO and of the model."""
    if not any(name in args for name in ("--model_name_or_path", "--config")):
        args = [*args, "--config", str(Path(__file__).with_name("text_game.yaml"))]
    return parse_arguments(__doc__, (GameArguments, PPOConfig, ModelConfig), args)


def learn_from_demonstrations(script_args: GameArguments, args: PPOConfig, model_args: ModelConfig, game, rows) -> str:
    """Lets a careless player play, and a model imitate that player; returns the model's folder."""
    rng = random.Random(args.seed)
    episodes = [
        demonstrate(game, rng.choice(rows), script_args.carelessness, args.max_tool_calling_iterations, rng)
        for _ in range(script_args.num_demonstrations)
    ]
    commands = sum(len(episode) for episode in episodes) // 2
    print(f"      {commands} commands in {len(episodes)} demonstrations. The first:")
    show(episodes[:1])
    epochs, learning_rate = script_args.imitation_epochs, script_args.imitation_learning_rate
    return imitate(episodes, game.act, args, model_args, epochs, learning_rate)


def report(script_args: GameArguments, trainer: PPOTrainer, num_games: int, before: tuple, after: tuple) -> None:
    """Prints an episode and the measures of each, before and after, and draws curves."""
    print("[3/3] Before and after, on games that were held out" if num_games > 1 else "[3/3] Before and after")
    for name, (episodes, _) in (("before", before), ("after", after)):
        print(f"\n      {name}:")
        show(episodes)
    print(f"\n      {'':36}{'before':>10}{'after':>10}")
    for name, key in (("reward", "eval_reward"), ("share of games won", "eval_rewards/won/mean")):
        print(f"      {name:36}{before[1][key]:10.3f}{after[1][key]:10.3f}")
    folder = trainer.args.output_dir
    plot(trainer.state.log_history, f"PPO plays {script_args.game}", f"{folder}/curves.png")
    print(f"\n      The player with its critic and card, and curves.png, lie in {folder}")


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
        path = learn_from_demonstrations(script_args, args, model_args, factory(), train_rows)
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
    measures = trainer.evaluate()
    before = winner.episodes[:1], measures
    finish(trainer, StageBar("PPO", reward="reward", won="rewards/won/mean"), "A player")
    measures = trainer.evaluate()
    if trainer.accelerator.is_main_process:
        report(script_args, trainer, len(test_rows), before, (winner.episodes[:1], measures))


if __name__ == "__main__":
    main()
