"""The tasks by name."""

from .film_reviews import film_reviews
from .toys import COUNT_LENGTH, LONG_LENGTH, NOISE_LENGTH, chosen, counted, decided, four_symbols, level, toy


TASKS = {
    task.name: task
    for task in (
        toy("count-end", counted, COUNT_LENGTH, 150),
        toy("count-dense", counted, COUNT_LENGTH, 150, has_dense=True),
        toy("delayed", decided, 1 + NOISE_LENGTH, 90),
        toy("single", counted, COUNT_LENGTH, 150, prompts=four_symbols, offset=level, num_generations=1),
        toy("long", chosen, LONG_LENGTH, 24, rollout_size=32),
        film_reviews("reviews", counts_words=False),
        film_reviews("words", counts_words=True),
    )
}
