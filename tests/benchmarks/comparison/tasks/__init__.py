"""The tasks by name."""

from .film_reviews import film_reviews
from .smollm2 import REVIEW_LENGTH, SUM_LENGTH, USUAL_SUM_LENGTH, begin_reviews, begin_sums, prepare_reviews, smollm2
from .toys import COUNT_LENGTH, LONG_LENGTH, NOISE_LENGTH, chosen, counted, decided, four_symbols, level, toy


TASKS = {
    task.name: task
    for task in (
        toy("count-end", counted, COUNT_LENGTH, 150),
        toy("count-dense", counted, COUNT_LENGTH, 150, has_dense=True),
        toy("delayed", decided, 1 + NOISE_LENGTH, 90),
        toy("single", counted, COUNT_LENGTH, 150, prompts=four_symbols, offset=level, num_generations=1),
        toy("long", chosen, LONG_LENGTH, 20, rollout_size=32),
        film_reviews("reviews", counts_words=False),
        film_reviews("words", counts_words=True),
        smollm2(
            "smollm2-reviews",
            begin_reviews,
            REVIEW_LENGTH,
            usual_length=REVIEW_LENGTH,
            num_evaluations=4,
            needs=("smollm2", "data"),
            prepare=prepare_reviews,
        ),
        smollm2("smollm2-sums", begin_sums, SUM_LENGTH, usual_length=USUAL_SUM_LENGTH, needs=("smollm2",)),
    )
}
