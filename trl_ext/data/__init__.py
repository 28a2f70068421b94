"""Rankings: their notation and formats, and converters of the datasets that they come from."""

from .argilla import from_argilla, to_argilla
from .convert import from_pairs, from_scores, to_pairs
from .sources import (
    from_arena_55k,
    from_chatbot_arena,
    from_helpsteer2,
    from_helpsteer2_preference,
    from_helpsteer3,
    from_nectar,
    from_oasst1,
    from_qa_feedback,
    from_ultrafeedback,
    from_webgpt,
)


__all__ = [
    "from_argilla",
    "from_arena_55k",
    "from_chatbot_arena",
    "from_helpsteer2",
    "from_helpsteer2_preference",
    "from_helpsteer3",
    "from_nectar",
    "from_oasst1",
    "from_pairs",
    "from_qa_feedback",
    "from_scores",
    "from_ultrafeedback",
    "from_webgpt",
    "to_argilla",
    "to_pairs",
]
