"""Warnings of options that are on and cannot be used, one for each."""

from accelerate.logging import get_logger


logger = get_logger(__name__)


class Notices:
    """Warns once of each option that is on and cannot be used. Every trainer has an object of its own."""

    def __init__(self):
        self.options = set()

    def __call__(self, option: str, reason: str, cost: str, mend: str) -> None:
        """
        Warns of an option, unless that was done before.

        Args:
            option (`str`): Its name in the configuration.
            reason (`str`): A clause that says why it is not in use.
            cost (`str`): A clause that says what this costs.
            mend (`str`): A sentence that says what to do.
        """
        if option not in self.options:
            self.options.add(option)
            logger.warning(f"`{option}` is on but not in use: {reason}. So {cost}. {mend}")
