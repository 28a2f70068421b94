"""The work of one annotator, without the page."""

import time
from pathlib import Path

from trl_ext import format_ranking, parse_ranking
from trl_ext.data.collection import agreement
from trl_ext.data.items import COMPLETIONS_FILE, Item, read_items
from trl_ext.data.judgements import Judgements

from .text import as_text


def items_to_rank(folder: str) -> list[Item]:
    """Returns the items of a folder. Raises a ValueError if there are none."""
    items = read_items(folder)
    if not items:
        raise ValueError(f"{Path(folder) / COMPLETIONS_FILE} is empty: there is nothing to rank.")
    return items


class Session:
    """The items that one annotator judges, one after the other."""

    def __init__(self, folder: str, annotator: str):
        self.folder = folder
        self.items = {item.id: item for item in read_items(folder)}
        self.judgements = Judgements(folder, annotator)
        self.next()

    def next(self) -> Item | None:
        """Goes to the first item that is not judged yet, and returns that; None if all are judged."""
        self.judgements.reload()
        self.item = next((item for item in self.items.values() if item not in self.judgements), None)
        self.started = time.monotonic()
        return self.item

    @property
    def key(self) -> str:
        """A name of the present item and its texts, by which an answer is known to be of them; empty without an item."""
        return "" if self.item is None else f"{self.item.id}/{self.item.texts}"

    @property
    def shown(self) -> list[str]:
        """The present completions, in the order in which they are shown."""
        return [as_text(self.item.completions[i]) for i in self.item.order_for(self.judgements.annotator)]

    def submit(self, text: str) -> None:
        """Keeps a ranking of what is shown. Raises a ValueError for one that cannot be read."""
        try:
            shown_ranks = parse_ranking(text, len(self.item.completions))
        except ValueError as error:
            raise ValueError(f"The ranking {error}") from None
        if len(shown_ranks) - shown_ranks.count(None) < 2:
            raise ValueError("The ranking must rank two completions at least; Alt+S skips.")
        ranks = [None] * len(shown_ranks)
        for position, original in enumerate(self.item.order_for(self.judgements.annotator)):
            ranks[original] = shown_ranks[position]
        self._record(ranks)

    def skip(self, flag: str = "") -> None:
        self._record(None, flag)

    def _record(self, ranks: list[int | None] | None, flag: str = "") -> None:
        self.judgements.reload()
        if self.item not in self.judgements:  # else it was judged in another window
            self.judgements.record(self.item, ranks, time.monotonic() - self.started, flag)
        self.next()

    def undo(self) -> str:
        """Goes back to the last judged item, and returns the ranking that was given as text."""
        self.judgements.reload()
        last = self.judgements.last(self.items)
        if last is None:
            return ""
        ranks = self.judgements[last]["ranks"]
        self.judgements.undo(self.items)
        self.item, self.started = self.items[last], time.monotonic()
        if ranks is None:
            return ""
        return format_ranking([ranks[i] for i in self.item.order_for(self.judgements.annotator)])

    @property
    def status(self) -> str:
        parts = [f"{sum(item in self.judgements for item in self.items.values())} of {len(self.items)} done"]
        if self.judgements.seconds_per_item is not None:
            parts.append(f"{self.judgements.seconds_per_item:.0f} s each")
        try:
            between = agreement(self.folder)
        except ValueError as error:  # in another annotator's file, which is no reason to keep this one waiting
            between = None
            parts.append(f"agreement unknown: {error}")
        if between is not None:
            parts.append(
                f"annotators agree on {between['agreement']:.0%} of {between['num_pairs']} pairs (alpha {between['alpha']:.2f})"
            )
        return " · ".join(parts)
