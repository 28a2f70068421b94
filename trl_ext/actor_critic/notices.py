"""Options that are on and cannot be used say so, once."""

from accelerate.logging import get_logger


logger = get_logger(__name__)


class Notices:
    """One for each trainer. Called with an option again, it says nothing more."""

    def __init__(self):
        self.options = set()

    def __call__(self, option: str, reason: str, cost: str, mend: str) -> None:
        """
        Args:
            option (`str`): As it is configured.
            reason (`str`): Why it is not in use, a clause.
            cost (`str`): What this costs, a clause.
            mend (`str`): What to do, a sentence.
        """
        if option not in self.options:
            self.options.add(option)
            logger.warning(f"`{option}` is on but not in use: {reason}. So {cost}. {mend}")
