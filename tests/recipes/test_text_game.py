"""The text game and its recipe: the game itself, what is imitated beside what is played, and whole runs."""

import itertools
import random
import re
from collections import deque
from pathlib import Path

import pytest
import torch
from agents import script_generation
from helpers import RECIPES, recorded, run_program, settings
from transformers.utils import get_json_schema

from trl_ext import A2CConfig, A2CTrainer


@pytest.fixture
def house(recipe):
    return recipe("games.house")


def state(game):
    return game.room, game.mailbox_is_open, game.has_key, game.has_lamp, game.has_won


def play(house, variant, commands):
    game = house.HouseGame()
    game.reset(variant)
    for command in commands:
        game.act(command)
    return game


@pytest.mark.parametrize("variant", [0, 7, 23])
def test_the_best_command_begins_a_shortest_way(house, variant):
    """By breadth-first search over all states: six commands from the start, and never a step too many."""
    start = play(house, variant, [])
    ways, queue = {state(start): []}, deque([[]])
    while queue:
        way = queue.popleft()
        for command in start.possible_commands:
            game = play(house, variant, [*way, command])
            if state(game) not in ways:
                ways[state(game)] = [*way, command]
                queue.append(ways[state(game)])
    assert len(ways) > 15
    distances = {}
    for way in ways.values():
        game, steps = play(house, variant, way), 0
        while not game.has_won:
            game.act(game.best_command)
            steps += 1
            assert steps < 12
        distances[state(play(house, variant, way))] = steps
    assert distances[state(start)] == 6
    for here, way in ways.items():
        if here[-1]:
            continue
        after = [distances[state(play(house, variant, [*way, command]))] for command in start.possible_commands]
        assert distances[here] == 1 + min(after)


def test_its_rewards_and_its_end(house):
    game = house.HouseGame()
    assert "garden" in game.reset(variant=3)
    rewards = [game.get_reward()]
    while not game.has_won:
        game.act(game.best_command)
        rewards.append(game.get_reward())
    rises = [round(after - before, 10) for before, after in itertools.pairwise(rewards)]
    assert rises == [0.1, 0.2, 0, 0.2, 0, 0.5]
    assert game.act("go north") == "The game is over."


def test_what_is_needed_is_told(house):
    """Two variants differ in what the player has read by the time it matters."""
    texts = set()
    for variant in range(len(house.VARIANTS)):
        game = house.HouseGame()
        text = game.reset(variant)
        texts.add(text + game.act("open mailbox") + game.act("take key") + game.act(game.best_command))
    assert len(texts) == len(house.VARIANTS)


def test_a_dark_room_and_a_locked_chest(house):
    house_at, stairs, _ = house.VARIANTS[0]
    game = play(house, 0, [f"go {house_at}"])
    assert "too dark" in game.act(f"go {stairs}") and game.room == "hall"
    game.act("take lamp")
    game.act(f"go {stairs}")
    assert game.act("open chest") == "The chest is locked."
    assert game.act("dance wildly") == game.act("") == "Nothing happens."


def test_test_variants_are_held_out(house):
    train, test = house.rows(0)
    assert len(train) + len(test) == 24 and not {r["variant"] for r in train} & {r["variant"] for r in test}


def test_what_is_imitated_is_what_is_played(recipe, house, tmp_path):
    """Token by token: the text of a demonstration, and of an episode in which the same commands are given."""
    imitation = recipe("games.imitation")
    game = house.HouseGame()
    episode = imitation.demonstrate(game, {"variant": 5}, 0.0, 10, random.Random(0))
    assert game.has_won and len(episode) == 1 + 2 * 6 + 1
    tools = [get_json_schema(game.act)]
    template = imitation.qwen3_instruct_2507_chat_template
    tokenizer = imitation.train_tokenizer(["Find the gold. You are in the garden. act command open take go"])
    tokenizer.chat_template = template
    whole = tokenizer.apply_chat_template(episode, tools=tools, tokenize=False)
    turns = [part.split("<|im_end|>")[0] + "<|im_end|>" for part in whole.split("<|im_start|>assistant\n")[1:]]
    model = imitation.tiny_model(tokenizer, 4096)
    script_generation(model, tokenizer, turns)
    args = A2CConfig(**settings(tmp_path, max_completion_length=3000, max_steps=1, turn_rewards=True))
    trainer = recorded(A2CTrainer)(
        model,
        None,
        args,
        recipe("games.episodes").prompts([{"variant": 5}], 4),
        processing_class=tokenizer,
        environment_factory=house.HouseGame,
    )
    trainer.train()
    batch = trainer.updates[0]
    ids = torch.cat([batch["prompt_ids"][0][batch["prompt_mask"][0].bool()], batch["completion_ids"][0]])
    assert tokenizer.decode(ids[: batch["prompt_mask"][0].sum() + batch["completion_mask"][0].sum()]) == whole.strip()
    assert trainer.state.log_history[0]["reward"] == pytest.approx(1)


SMALL = (
    "--num_demonstrations 12 --imitation_epochs 1 --max_steps 2 --logging_steps 1 --per_device_train_batch_size 2"
    " --num_iterations 1 --max_tool_calling_iterations 2 --max_completion_length 300"
).split()


@pytest.mark.slow
def test_the_recipe_runs(tmp_path, run_recipe):
    printed = run_recipe("text_game.py", "--output_dir", "out", *SMALL, cwd=tmp_path)
    assert "[3/3] Before and after, on games that were held out" in printed
    assert re.search(r"share of games won +\d\.\d+ +\d\.\d+", printed)
    for file in (
        "curves.png",
        "model.safetensors",
        "value_head.safetensors",
        "README.md",
        "imitation/model.safetensors",
    ):
        assert (tmp_path / "out" / file).is_file(), file


def test_what_makes_no_sense_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        recipe("games.episodes").choose_game("zork.z8", str(tmp_path), 0)


# --- TextWorld, if it is installed ---


def test_a_textworld_game_is_won_by_its_own_solution(recipe, tmp_path):
    pytest.importorskip("textworld", reason="TextWorld is not installed: pip install -e '.[textworld]'")
    factory, rows, _ = recipe("games.episodes").choose_game("textworld", str(tmp_path), 0)
    first, second = factory(), factory()
    messages = recipe("games.imitation").demonstrate(first, rows[0], 0.0, 20, random.Random(0))
    assert first.has_won and first.get_reward() > 0.9
    assert "You can: " in messages[0]["content"] and messages[-2]["content"].endswith("The game is over.")
    # Games of their own, though of one file
    assert second.reset() and second.get_reward() == 0 and not second.has_won
    assert [*Path(tmp_path).glob("*.z8")]


def test_textworld_runs_through_the_same_recipe(tmp_path):
    pytest.importorskip("textworld", reason="TextWorld is not installed: pip install -e '.[textworld]'")
    printed = run_program(
        RECIPES / "text_game.py", "--game", "textworld", "--output_dir", "out", *SMALL, "--max_completion_length", 600,
        cwd=tmp_path,
    )  # fmt: skip
    assert "[3/3] Before and after" in printed and (tmp_path / "out" / "curves.png").is_file()
