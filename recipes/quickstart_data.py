"""Where the quickstart's texts, prompts, judge and sizes come from: the grammar, or somebody's own reviews."""

import csv
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quickstart_corpus import distinct_openings, write_continuation
from quickstart_judges import Judge, learned_judge, lexicon_judge
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast


NEGATIVE_SHARE = 0.8  # of the prompts that are ranked and trained on; those of the evaluation are all negative
MIN_PROMPTS = 128  # one rollout


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Byte-level BPE, of the bytes that occur. A word and the space before it are one piece, so that a prompt and its
    completion give the same tokens together as they do one by one.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def small_llama(tokenizer, hidden_size: int, num_layers: int, **settings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


@dataclass
class Task:
    """What the quickstart works on, and how large it makes things."""

    source: str
    judge: Judge
    texts: list[str]  # for the tokenizer and the language model
    train_prompts: list[str]  # openings of `texts`, mostly negative
    test_prompts: list[str]  # negative openings that no model has seen

    vocab_size: int
    hidden_size: int
    num_layers: int
    sft_epochs: int
    max_completion_length: int
    temperature: float  # of all sampling; what it samples from is what is trained and measured
    ranked_prompts: int
    rollouts: int
    kl_in_reward: float  # what a nat away from the language model costs, in units of the reward model's scores

    def __post_init__(self):
        if len(self.train_prompts) < MIN_PROMPTS:
            raise ValueError(
                f"{self.source} give {len(self.train_prompts)} different openings to train on, and PPO samples "
                f"{MIN_PROMPTS} at a time. Use more reviews."
            )


def mixed(negative: list[str], positive: list[str], rng: random.Random) -> list[str]:
    """All of the negative prompts and as many positive ones as `NEGATIVE_SHARE` leaves room for, shuffled."""
    prompts = negative + positive[: round(len(negative) * (1 / NEGATIVE_SHARE - 1))]
    rng.shuffle(prompts)
    return prompts


# --- From the grammar ---


def grammar_task(corpus_size: int | None, rollouts: int | None, seed: int) -> Task:
    """Reviews written by `quickstart_corpus`, judged by its rule."""
    corpus_size = corpus_size or 5000
    rng = random.Random(seed)
    num_test = min(200, corpus_size // 4)
    negative = distinct_openings(0, corpus_size // 2 + num_test, rng)
    positive = distinct_openings(1, corpus_size // 2, rng)
    test_prompts, negative = negative[:num_test], negative[num_test:]
    texts = [opening + write_continuation(0, rng) for opening in negative]
    texts += [opening + write_continuation(1, rng) for opening in positive]
    return Task(
        source=f"{len(texts)} film reviews written by the grammar in quickstart_corpus.py",
        judge=lexicon_judge(),
        texts=texts,
        train_prompts=mixed(negative, positive, rng),
        test_prompts=test_prompts,
        vocab_size=1400,
        hidden_size=96,
        num_layers=2,
        sft_epochs=4,
        max_completion_length=48,
        temperature=1.0,
        ranked_prompts=min(1000, corpus_size // 4),
        rollouts=rollouts or 24,
        kl_in_reward=0.2,
    )


# --- From a file of reviews ---


def reviews_task(path: str, corpus_size: int | None, rollouts: int | None, seed: int) -> Task:
    """
    Reviews from a file, with a judge learned on a part of them that is used for nothing else.

    Rows held out by `split` (or, without one, a tenth of the rows) check the judge and give the test prompts.
    """
    rng = random.Random(seed)
    rows = read_reviews(path)
    rng.shuffle(rows)
    held_out = [row for row in rows if row["split"] == "test"]
    of_judge = [row for row in rows if row["split"] == "judge"]
    of_models = [row for row in rows if row["split"] == "models"][:corpus_size]
    for name, part in (("held-out", held_out), ("judge's", of_judge), ("models'", of_models)):
        if len({row["label"] for row in part}) < 2:
            raise ValueError(
                f"{path}: the {name} part ({len(part)} of {len(rows)} rows) needs reviews with label 0 and with "
                "label 1. Give more reviews, or set the `split` column so that each part has both."
            )
    judge = learned_judge(*columns(of_judge), *columns(held_out))
    texts = [text for row in of_models if (text := shortened(row["text"]))]
    if not texts:
        raise ValueError(f"{path}: no review has a sentence end ('.', '!' or '?') in its first {MAX_WORDS} words.")
    negative, positive = ([opening(row["text"]) for row in of_models if row["label"] == label] for label in (0, 1))
    test_prompts = list(dict.fromkeys(opening(row["text"]) for row in held_out if row["label"] == 0))
    return Task(
        source=f"{len(texts)} of the {len(rows)} reviews in {path}",
        judge=judge,
        texts=texts,
        train_prompts=mixed(list(dict.fromkeys(negative)), list(dict.fromkeys(positive)), rng),
        test_prompts=test_prompts[:400],
        vocab_size=4000,
        hidden_size=192,
        num_layers=3,
        sft_epochs=3,
        max_completion_length=40,
        temperature=0.7,  # so small a model of so few texts makes up many words otherwise
        ranked_prompts=min(4000, len(texts) // 4),
        rollouts=rollouts or 40,
        kl_in_reward=0.1,
    )


MAX_WORDS = 30
OPENING_WORDS = 6


def columns(rows: list[dict]) -> tuple[list[str], list[int]]:
    return [row["text"] for row in rows], [row["label"] for row in rows]


def opening(text: str) -> str:
    return " ".join(text.split()[:OPENING_WORDS])


def shortened(text: str) -> str:
    """The text's first sentences, `MAX_WORDS` words at most: so that a small model sees reviews end."""
    words = text.split()
    if len(words) > MAX_WORDS:
        words = words[:MAX_WORDS]
        while words and not re.search(r"[.!?]\W*$", words[-1]):
            words.pop()
    return " ".join(words) if len(words) > OPENING_WORDS else ""


def read_reviews(path: str) -> list[dict]:
    """Rows with `text`, `label` and `split`: "test", "judge" or "models"."""
    rows = []
    for line, row in numbered_rows(path):
        for column in ("text", "label"):
            if row.get(column) in (None, ""):
                raise ValueError(
                    f"{path}, line {line}: no `{column}`. Each review needs `text` and `label` (1 positive, "
                    f"0 negative); this row has {', '.join(map(str, row)) or 'nothing'}."
                )
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError(f"{path}, line {line}: `text` must be a text with words in it, got {row['text']!r}.")
        if str(row["label"]) not in ("0", "1"):
            raise ValueError(f"{path}, line {line}: `label` must be 1 (positive) or 0, got {row['label']!r}.")
        rows.append({"text": " ".join(row["text"].split()), "label": int(row["label"]), "split": part_of(row)})
    if not rows:
        raise ValueError(f"{path}: no reviews in it.")
    return rows


def part_of(row: dict) -> str:
    """By hash, so that a text always falls into the same part; texts of one `doc`, if that is known, together."""
    number = int(hashlib.sha1(str(row.get("doc") or row["text"]).encode()).hexdigest(), 16) % 100
    is_test = row["split"] == "test" if row.get("split") else number < 10
    return "test" if is_test else "judge" if number < 45 else "models"


def numbered_rows(path: str) -> Iterator[tuple[int, dict]]:
    """`(line, row)` of a file of JSON lines or CSV, gzipped or not."""
    suffixes = Path(path).suffixes
    is_csv = ".csv" in suffixes
    if not Path(path).is_file():
        raise ValueError(f"--reviews: there is no file {path!r}.")
    if not is_csv and not {".jsonl", ".json"} & set(suffixes):
        raise ValueError(f"--reviews: {path!r} must end in .jsonl, .jsonl.gz, .csv or .csv.gz.")
    try:
        with (gzip.open if suffixes[-1] == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            yield from csv_rows(file) if is_csv else json_rows(file, path)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read ({error}).") from None


def csv_rows(file) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(file)
    yield from ((reader.line_num, row) for row in reader)


def json_rows(file, path: str) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(file, start=1):
        if content.strip():
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line}: not valid JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {line}: expected an object with `text` and `label`, got {row!r:.60}.")
            yield line, row
