"""Judges that say how positive a text is, and rank texts with ties."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .corpus import GRAMMAR


@dataclass
class Judge:
    """
    A judge of texts, to whom scores that round to the same multiple of `step` are the same: its rankings have ties.
    """

    description: str
    score: Callable[[list[str]], list[float]]
    step: float
    neutral: float  # the score of a text that is neither positive nor negative

    def rank(self, texts: list[str]) -> list[int]:
        """Returns 1 for the best text, the same number for equally good ones: `[3, 1, 2, 2]`."""
        levels = [round(score / self.step) for score in self.score(texts)]
        order = sorted(set(levels), reverse=True)
        return [1 + order.index(level) for level in levels]


# --- A judge by rule, for the reviews of the grammar ---

POSITIVE = {
    *GRAMMAR["good"],
    *GRAMMAR["virtue"],
    *"gem triumph treat delight masterpiece pleasure miracle treasure good great real beautifully brilliantly".split(),
    *"perfectly care skill idea rhythm love loved adored laughed smiling happy applauded recommend prize worth".split(),
    *"again works shines smiled delighted high award medal applause".split(),
}
NEGATIVE = {
    *GRAMMAR["bad"],
    *"clichés noise boredom confusion vanity holes bad empty cheap false mess disaster chore bore failure".split(),
    *"waste disappointment insult mistake clumsily badly carelessly hate hated loathed angry groaned asleep".split(),
    *"leave lost worst poor sad low groaning disappointed yawned".split(),
}
NEGATORS = {"not", "no", "never", "nothing", "without", "hardly", "nor", "cannot"}
EMPHASIS = dict.fromkeys("very truly really so too utterly deeply wonderfully painfully hopelessly".split(), 1.5)
EMPHASIS |= dict.fromkeys("rather quite slightly somewhat almost fairly".split(), 0.5)


def praise_and_blame(text: str) -> Iterator[tuple[int, int, float]]:
    """
    Yields `(start, end, value)` of each word of praise (positive) or blame (negative), in characters.

    A word of praise or blame counts one; after an emphasis ("very", "truly") one and a half, after a hedge
    ("rather") one half. A negator ("not", "never", "without") turns the words after it to their opposite, up to the
    end of its clause.
    """
    for clause in re.finditer(r"(?:(?! but | and | though )[^.,;:!?])+", text.lower()):
        sign, weight = 1, 1.0
        for match in re.finditer(r"[\w'-]+", clause[0]):
            word = match[0]
            if word in NEGATORS or word.endswith("n't"):
                sign = -1
            elif word in POSITIVE or word in NEGATIVE:
                value = sign * weight * (1 if word in POSITIVE else -1)
                yield clause.start() + match.start(), clause.start() + match.end(), value
            weight = EMPHASIS.get(word, 1.0)


def score_by_lexicon(text: str) -> float:
    """Returns praise less blame, over their sum plus one: from -1 to 1."""
    values = [value for _, _, value in praise_and_blame(text)]
    return sum(values) / (sum(map(abs, values)) + 1)


def lexicon_judge() -> Judge:
    return Judge(
        description="praise less blame by a word list with negation and emphasis, -1 to 1, ties within steps of 0.5",
        score=lambda texts: [score_by_lexicon(text) for text in texts],
        step=0.5,
        neutral=0.0,
    )


def praise(completions: list, **columns) -> list[float]:
    """
    Returns the word list as a reward function of texts or messages, whose scores are equal where the judge ranks a
    tie.
    """
    judge = lexicon_judge()
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [judge.step * round(score / judge.step) for score in judge.score(texts)]


# --- A learned judge, for reviews that somebody brings ---


def learned_judge(texts: list[str], labels: list[int], test_texts: list[str], test_labels: list[int]) -> Judge:
    """Returns a judge that scores P(positive), by logistic regression on the text's words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=4.0, max_iter=1000),
    ).fit(texts, labels)
    accuracy = model.score(test_texts, test_labels)
    return Judge(
        description=f"P(positive) by TF-IDF and logistic regression, trained on {len(texts)} reviews that no model "
        f"sees;\n       {accuracy:.1%} right on {len(test_texts)} held-out reviews; ties within steps of 0.2",
        score=lambda texts: model.predict_proba(texts)[:, 1].tolist(),
        step=0.2,
        neutral=0.5,
    )
