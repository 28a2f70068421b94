"""The quickstart: its judge, its rankings with ties, what it says to bad input, and one very short run of it."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from helpers import RECIPES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl_ext import format_ranking


sys.path.insert(0, str(RECIPES))

import quickstart  # noqa: E402
from film_reviews.corpus import GRAMMAR, distinct_openings, expand, write_continuation  # noqa: E402
from film_reviews.files import read_reviews, shortened  # noqa: E402
from film_reviews.judges import lexicon_judge, score_by_lexicon  # noqa: E402
from film_reviews.tasks import reviews_task  # noqa: E402


# --- The judge ---


@pytest.mark.parametrize(
    "text",
    [
        "The music is warm.",
        "The pacing is never dull.",
        "Not one of the jokes is flat.",
        "It isn't boring.",
        "A mess at first, but the ending is moving and the cast is superb.",
        "I loved it.",
    ],
)
def test_judge_finds_praise(text):
    assert score_by_lexicon(text) > 0


@pytest.mark.parametrize(
    "text",
    [
        "The music is lifeless.",
        "The script is not funny.",
        "There is no charm in it.",
        "It isn't moving.",
        "Charming at first, but the ending is dull and the cast is wooden.",
        "A pretty film without wit or warmth.",
    ],
)
def test_judge_finds_blame(text):
    assert score_by_lexicon(text) < 0


def test_judge_weighs_emphasis_and_length():
    assert score_by_lexicon("It is very good.") > score_by_lexicon("It is good.") > score_by_lexicon("Rather good.")
    assert score_by_lexicon("It is set in the desert.") == score_by_lexicon("") == 0
    assert -1 < score_by_lexicon("dull " * 50) < -0.9


def test_negation_ends_with_its_clause():
    assert score_by_lexicon("It is not dull, the jokes are warm.") == score_by_lexicon("good. good.")
    assert score_by_lexicon("It is not dull but slow.") == 0


@pytest.fixture
def rng():
    return random.Random(0)


def test_judge_agrees_with_the_grammar(rng):
    for name, sign in (("praise", 1), ("blame", -1), ("neutral", 0)):
        for _ in range(300):
            sentence = expand(name, rng)
            score = score_by_lexicon(sentence)
            assert (score > 0) - (score < 0) == sign, sentence


# --- The corpus ---


def test_grammar_is_large_and_correct(rng):
    openings = distinct_openings(0, 1000, rng)
    assert len(set(openings)) == 1000
    reviews = [text + write_continuation(0, rng) for text in openings]
    assert not any("{" in text or " a a" in text or " a e" in text for text in reviews)
    assert all(text.endswith(".") and ".." not in text for text in reviews)
    assert len({word for phrases in GRAMMAR.values() for phrase in phrases for word in phrase.split()}) > 400


# --- Rankings with ties ---


def test_judge_ranks_with_ties():
    texts = [
        "It is dull and slow.",
        "It is warm, witty, very tender and truly superb.",
        "It is set here.",
        "A long story.",
    ]
    ranks = lexicon_judge().rank(texts)
    assert format_ranking(ranks) == "B > C = D > A"


# --- Reviews from a file ---


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "good .", "label": 1}, {"text": "bad ."}], r"line 2: no `label`.*this row has text"),
        ([{"review": "good .", "label": 1}], r"line 1: no `text`.*this row has review, label"),
        ([{"text": "good .", "label": "positive"}], r"line 1: `label` must be 1 \(positive\) or 0, got 'positive'"),
        ([{"text": 3, "label": 1}], r"line 1: `text` must be a text"),
        ([{"text": "good .", "label": 1}, "{"], r"line 2: not valid JSON"),
        (["[1]"], r"line 1: expected an object"),
        ([], r"no reviews in it"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_reviews(write(tmp_path / "reviews.jsonl", rows))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_reviews(str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        read_reviews(write(tmp_path / "reviews.txt", []))
    (tmp_path / "reviews.jsonl.gz").write_text("not gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_reviews(str(tmp_path / "reviews.jsonl.gz"))
    with pytest.raises(ValueError, match="needs reviews with label 0 and with label 1"):
        reviews_task(write(tmp_path / "one.jsonl", [{"text": "good .", "label": 1}]), None, None, seed=0)


def test_csv_and_gzip_read_alike(tmp_path):
    rows = [{"text": 'a "fine" film , really', "label": 1, "split": "test"}, {"text": "dull", "label": 0}]
    (tmp_path / "r.csv").write_text('text,label,split\n"a ""fine"" film , really",1,test\ndull,0,\n')
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    from_csv = read_reviews(str(tmp_path / "r.csv"))
    assert from_csv == read_reviews(str(tmp_path / "r.jsonl.gz"))
    assert [row["label"] for row in from_csv] == [1, 0]
    assert from_csv[0]["split"] == "test" and from_csv[1]["split"] in ("test", "judge", "models")


def test_long_reviews_end_with_a_sentence():
    assert shortened("one two three four five six seven . " + "word " * 60) == "one two three four five six seven ."
    assert shortened("too short .") == ""


# --- The script ---


def test_quickstart_leaves_models_that_load(tmp_path):
    command = [sys.executable, str(RECIPES / "quickstart.py"), "--output_dir", str(tmp_path), "--seed", "1"]
    command += ["--corpus_size", "280", "--rollouts", "1"]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "[6/6]" in run.stdout and "perplexity under the reference" in run.stdout
    assert "Warning" not in run.stderr, run.stderr
    for name in ("sft", "policy"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.decode(tokenizer(" The film")["input_ids"]).strip() == "The film"
    reward_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model")
    assert reward_model.config.num_labels == 1
    for path in ("sft/README.md", "reward_model/README.md", "policy/README.md", "policy/value_head.safetensors"):
        assert (tmp_path / path).is_file(), path
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_quickstart_says_what_is_wrong_with_a_file(tmp_path):
    path = write(tmp_path / "reviews.jsonl", [{"text": "good .", "label": 2}])
    args = quickstart.parse(["--reviews", path])
    with pytest.raises(
        SystemExit, match=r"error: .*reviews.jsonl, line 1: `label` must be 1 \(positive\) or 0, got 2\."
    ):
        quickstart.get_task(args.reviews, args.corpus_size, args.rollouts, args.seed)
