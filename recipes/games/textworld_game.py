"""TextWorld's games (Côté et al. 2018, https://huggingface.co/papers/1806.11532) for `text_game.py`."""

import functools
import re
from pathlib import Path

import textworld
from textworld.generator import compile_game, make_game


WANTED = textworld.EnvInfos(
    admissible_commands=True,
    policy_commands=True,
    intermediate_reward=True,
    max_score=True,
    won=True,
    lost=True,
)
PROGRESS = 0.1  # for a step towards the end, taken back for one away from it


class TextWorldGame:
    """
    An environment for TRL's `environment_factory`: a compiled game, and what can be done in it told with each text.

    What `get_reward` says is the score as a share of the greatest, with `PROGRESS` for each step towards it, which only
    games made by TextWorld tell.

    Args:
        file (`str`): The game, a .z8 file.
    """

    def __init__(self, file: str):
        self._game = textworld.start(file, WANTED)
        self._state = None

    def reset(self, **row) -> str:
        self._state = self._game.reset()
        self.progress = 0.0
        return self._observation(self._state.feedback.split("-= ", 1)[-1])

    def act(self, command: str) -> str:
        """
        Does something in the game.

        Args:
            command: What to do, one of those that the game says are possible.

        Returns:
            What happens.
        """
        if self._is_over:
            return "The game is over."
        self._state, _, _ = self._game.step(command)
        self.progress += self._state.intermediate_reward or 0
        return self._observation(self._state.feedback)

    def get_reward(self) -> float:
        return self._state.score / (self._state.max_score or 1) + PROGRESS * self.progress

    @property
    def has_won(self) -> bool:
        return bool(self._state.won)

    @property
    def _is_over(self) -> bool:
        return bool(self._state.won or self._state.lost)

    def _observation(self, feedback: str) -> str:
        text = " ".join(re.sub(r"[>=\-|]{1,}|\$\S*", " ", feedback).split())
        if self._is_over:
            return text.split(" *** ")[0] + " The game is over."
        return f"{text} You can: {', '.join(self._state.admissible_commands)}."

    @property
    def best_command(self) -> str:
        """Returns the next step of TextWorld's own solution."""
        return self._state.policy_commands[0]

    @property
    def possible_commands(self) -> list[str]:
        return self._state.admissible_commands


def make_textworld_game(folder: str, seed: int) -> str:
    """Writes a small game (3 rooms, a quest of 4 commands) and returns its file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    options = textworld.GameOptions()
    options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = seed, 3, 5, 4
    options.path = str(Path(folder) / f"game-{seed}.z8")
    options.force_recompile = True
    return compile_game(make_game(options), options)


def textworld_factory(file: str):
    return functools.partial(TextWorldGame, file)
