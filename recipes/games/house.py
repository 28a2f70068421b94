"""The text game of `text_game.py`: a garden, a house, and gold in its darkest room. Six commands win it."""

import itertools
import random


OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east", "up": "down", "down": "up"}
VARIANTS = list(itertools.product(("north", "south", "east", "west"), ("up", "down"), ("shelf", "table", "hook")))


class HouseGame:
    """
    An environment for TRL's `environment_factory`. A variant says where the house stands, whether the gold is in the
    cellar or in the attic, and where the lamp is; the player reads it.

    What `get_reward` says grows by 0.1 for the open mailbox, 0.2 for the key, 0.2 for the lamp and 0.5 for the gold.
    """

    def reset(self, variant: int = 0, **row) -> str:
        self.house, self.stairs, self.place = VARIANTS[variant]
        self.dark_room = "attic" if self.stairs == "up" else "cellar"
        self.room, self.score = "garden", 0.0
        self.mailbox_is_open = self.has_key = self.has_lamp = self.has_won = False
        return self._look()

    def act(self, command: str) -> str:
        """
        Does something in the game.

        Args:
            command: What to do, in two words, such as 'open mailbox', 'take key' or 'go north'.

        Returns:
            What happens.
        """
        if self.has_won:
            return "The game is over."
        verb, _, thing = command.strip().lower().partition(" ")
        moves = {"garden": {self.house: "hall"}, "hall": {OPPOSITE[self.house]: "garden", self.stairs: "dark"}}
        if (verb, thing) == ("open", "mailbox") and self.room == "garden" and not self.mailbox_is_open:
            self.mailbox_is_open = True
            return self._earn(0.1, "There is a key in the mailbox.")
        if (verb, thing) == ("take", "key") and self.room == "garden" and self.mailbox_is_open and not self.has_key:
            self.has_key = True
            return self._earn(0.2, "You have the key.")
        if (verb, thing) == ("take", "lamp") and self.room == "hall" and not self.has_lamp:
            self.has_lamp = True
            return self._earn(0.2, "You have the lamp. It is lit.")
        if verb == "go" and thing in moves.get(self.room, {OPPOSITE[self.stairs]: "hall"}):
            room = moves.get(self.room, {OPPOSITE[self.stairs]: "hall"})[thing]
            if room == "dark" and not self.has_lamp:
                return f"It is too dark in the {self.dark_room}. You turn back."
            self.room = room
            return self._look()
        if (verb, thing) == ("open", "chest") and self.room == "dark":
            if not self.has_key:
                return "The chest is locked."
            self.has_won = True
            return self._earn(0.5, "The chest is full of gold. You have won.")
        return "Nothing happens."

    def get_reward(self) -> float:
        return self.score

    def _earn(self, points: float, text: str) -> str:
        self.score += points
        return text

    def _look(self) -> str:
        if self.room == "garden":
            mailbox = "An open mailbox" if self.mailbox_is_open else "A closed mailbox"
            return f"You are in the garden. {mailbox} is here. To the {self.house} stands a house."
        if self.room == "hall":
            lamp = "" if self.has_lamp else f" A lamp is on the {self.place}."
            return (
                f"You are in the hall.{lamp} Stairs lead {self.stairs}. The garden is to the {OPPOSITE[self.house]}."
            )
        return f"You are in the {self.dark_room}. A chest is here. Stairs lead {OPPOSITE[self.stairs]}."

    # Properties, which are no tools: for demonstrations

    @property
    def best_command(self) -> str:
        """Returns the next step of the shortest way."""
        if self.room == "garden":
            return "open mailbox" if not self.mailbox_is_open else f"go {self.house}" if self.has_key else "take key"
        if self.room == "hall":
            if not self.has_key:
                return f"go {OPPOSITE[self.house]}"
            return f"go {self.stairs}" if self.has_lamp else "take lamp"
        return "open chest" if self.has_key else f"go {OPPOSITE[self.stairs]}"

    @property
    def possible_commands(self) -> list[str]:
        return ["open mailbox", "take key", "take lamp", "open chest", *(f"go {way}" for way in OPPOSITE)]


def rows(seed: int) -> tuple[list[dict], list[dict]]:
    """Returns the variants to train on, and those held out."""
    order = random.Random(seed).sample(range(len(VARIANTS)), len(VARIANTS))
    return [{"variant": v} for v in order[6:]], [{"variant": v} for v in order[:6]]
