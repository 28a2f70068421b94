"""The ranking dataset type: against brute force, hand-made rows and real judgements."""

import functools
import itertools
import logging

import pytest
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from helpers import read_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.data.notation import format_ranking, parse_ranking
from trl_ext.data.orders import weak_order
from trl_ext.data.rankings import is_ranking, normalize_ranking, prepare_rankings


INTRANSITIVE = [[0, 1, 0], [1, 2, 0], [0, 2, 1]]


def row(**columns):
    return {"prompt": "Name a colour.", "completions": ["red", "blue", "loud"]} | columns


def dense(ranks):
    order = sorted({rank for rank in ranks if rank is not None})
    return [None if rank is None else order.index(rank) + 1 for rank in ranks]


def chat(text, role="assistant"):
    return [{"role": role, "content": text}]


# --- Rankings as text ---


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("B > C = D > A", [3, 1, 2, 2]),
        ("A < D = C < B", [3, 1, 2, 2]),
        ("b>c~d>a", [3, 1, 2, 2]),
        ("2 > 3 = 4 > 1", [3, 1, 2, 2]),
        ("B ≻ C ∼ D ≻ A", [3, 1, 2, 2]),
        ("A ≺ D ≈ C ≺ B", [3, 1, 2, 2]),
        ("Ｂ＞Ｃ＝Ｄ＞Ａ", [3, 1, 2, 2]),
        ("B > C ～ D > A\n", [3, 1, 2, 2]),
        ("Ａ＜Ｄ〜Ｃ＜Ｂ", [3, 1, 2, 2]),
        ("D > A", [2, None, None, 1]),
        ("A = B = C = D", [1, 1, 1, 1]),
        ("C", [None, None, 1, None]),
        (" ", [None, None, None, None]),
    ],
)
def test_parses(text, ranks):
    assert parse_ranking(text, 4) == ranks


def test_numbers_name_more_than_26_completions():
    assert parse_ranking("30 > 7", 30) == [2 if i == 6 else 1 if i == 29 else None for i in range(30)]
    assert format_ranking([2, *[None] * 28, 1]) == "30 > 1"
    assert format_ranking([1] * 26).endswith("= Z")
    with pytest.raises(ValueError, match="labels from 1 to 30 .* got 'A'"):
        parse_ranking("A > B", 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A > E", "labels from A to D or 1 to 4 .* got 'E' in 'A > E'"),
        ("0 > 1", "got '0'"),
        ("A >> B", "got ''"),
        ("A >= B", "got ''"),
        ("A > ", "got ''"),
        ("A ≥ B", "got 'A ≥ B'"),
        ("A, B > C", "got 'A, B'"),
        ("A > B > A", "once at most, got 'A' again"),
        ("A > 1", "once at most"),
        ("A > B < C", "one way"),
    ],
)
def test_refuses_other_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse_ranking(text, 4)


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(0, 40), min_size=1, max_size=40))
def test_text_loses_nothing(ranks):
    text = format_ranking(ranks)
    assert parse_ranking(text, len(ranks)) == dense(ranks)
    assert format_ranking(parse_ranking(text, len(ranks))) == text
    assert format_ranking([-1 if rank is None else rank for rank in ranks]) == text


# --- Judgements of pairs ---


@functools.cache
def weak_orders(num_items):
    ranks = itertools.product(range(num_items), repeat=num_items)
    return [row for row in ranks if set(row) == set(range(len(set(row))))]


def orders_consistent_with(pairs):
    """All weak orders of the judged items that every judgement agrees with."""
    items = sorted({i for pair in pairs for i in pair[:2]})
    for ranks in weak_orders(len(items)):
        rank = dict(zip(items, ranks, strict=True))
        if all((0 if rank[i] == rank[j] else 1 if rank[i] < rank[j] else 2) == v for i, j, v in pairs):
            yield rank


def test_weak_order_is_the_only_one_that_agrees_with_all_judgements():
    assert len(weak_orders(4)) == 75
    pairs_of_4 = list(itertools.combinations(range(4), 2))
    found = 0
    for judgements in itertools.product([None, 0, 1, 2], repeat=6):
        pairs = [[i, j, v] for (i, j), v in zip(pairs_of_4, judgements, strict=True) if v is not None]
        orders = list(itertools.islice(orders_consistent_with(pairs), 2))
        expected = [orders[0][i] + 1 if i in orders[0] else None for i in range(4)] if len(orders) == 1 else None
        assert weak_order(pairs, 4) == expected, pairs
        found += expected is not None
    assert 75 < found < 4**6


@pytest.mark.parametrize(
    ("pairs", "ranks"),
    [
        ([[2, 0, 1], [0, 2, 2]], [2, None, 1]),  # the same judgement twice
        ([[0, 1, 1], [0, 1, 1]], [1, 2, None]),
        ([[0, 1, 1], [1, 0, 1]], None),
        ([[0, 1, 1], [0, 1, 0]], None),
        ([[0, 1, 1], [1, 2, 1], [2, 0, 1]], None),
        ([], [None, None, None]),
    ],
)
def test_weak_order_of_repeated_judgements(pairs, ranks):
    assert weak_order(pairs, 3) == ranks


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.randoms())
def test_weak_order_finds_the_order_that_pairs_came_from(ranks, random):
    pairs = [
        [i, j, 0 if ranks[i] == ranks[j] else 1 if ranks[i] < ranks[j] else 2]
        for i, j in itertools.permutations(range(len(ranks)), 2)
    ]
    random.shuffle(pairs)
    assert weak_order(pairs, len(ranks) + 1) == [*dense(ranks), None]


def test_weak_order_of_real_judgements():
    rows = read_shared("qa_feedback_ranked")
    consistent = [row for row in rows if row["consistent"]]
    assert [weak_order(row["pairs"], 4) for row in consistent] == [row["ranks"] for row in consistent]
    others = [row for row in rows if not row["consistent"]]
    assert [weak_order(row["pairs"], 4) for row in others] == [None] * len(others)
    assert (len(consistent), len(others)) == (478, 22)
    assert {row["kind"] for row in others} == {"intransitive_tie"}


# --- Rows ---


def test_is_ranking():
    assert is_ranking(["prompt", "completions", "pairs", "source"])
    assert is_ranking(row(ranking="A > B"))
    assert not is_ranking(row(ranks=None, ranking=None, pairs=None))
    assert not is_ranking({"prompt": None, "completions": ["a", "b"], "ranks": [1, 2]})
    assert not is_ranking(["prompt", "completions", "labels"])  # TRL's stepwise supervision
    assert not is_ranking(["prompt", "chosen", "rejected", "ranks"])


@pytest.mark.parametrize(
    ("judgement", "normalized"),
    [
        ({"ranks": [2, 1, 1]}, {"ranks": [2, 1, 1]}),
        ({"ranks": [7, 0, 3]}, {"ranks": [3, 1, 2]}),
        ({"ranks": [2.0, float("nan"), 1.0]}, {"ranks": [2, -1, 1]}),
        ({"ranks": [None, 0, 5]}, {"ranks": [-1, 1, 2]}),
        ({"ranks": [-1, 1, 2], "ranking": None, "pairs": None}, {"ranks": [-1, 1, 2]}),
        ({"ranking": "C > A"}, {"ranks": [2, -1, 1]}),
        ({"pairs": [[0, 2, 2]]}, {"ranks": [2, -1, 1], "pairs": [[0, 2, 2]]}),
        ({"pairs": [[0.0, 2.0, 0.0]]}, {"ranks": [1, -1, 1], "pairs": [[0, 2, 0]]}),
        ({"pairs": INTRANSITIVE}, {"ranks": None, "pairs": INTRANSITIVE}),
        ({"ranks": None, "ranking": None, "pairs": INTRANSITIVE}, {"ranks": None, "pairs": INTRANSITIVE}),
        ({"ranks": [2, None, 1], "pairs": [[0, 2, 2]]}, {"ranks": [2, -1, 1], "pairs": [[0, 2, 2]]}),
    ],
)
def test_normalizes(judgement, normalized):
    result = normalize_ranking(row(**judgement, source="mine"))
    assert result == row(**normalized)
    assert normalize_ranking(result) == result
    assert all(type(rank) is int for rank in result["ranks"] or [])


def test_normalizes_conversations():
    conversations = {
        "prompt": chat("Name a colour.", "user"),
        "completions": [chat("red"), [*chat("blue"), *chat("!")]],
    }
    assert normalize_ranking(conversations | {"ranking": "A = B"}) == conversations | {"ranks": [1, 1]}


BAD_ROWS = [
    ({"prompt": None}, "column `prompt`: is missing or null"),
    ({"prompt": 3}, "column `prompt`: must be text or a list of messages, got 3"),
    ({"prompt": []}, "column `prompt`: must be text or a list of messages"),
    ({"completions": None}, "column `completions`: is missing or null"),
    ({"completions": "red"}, "column `completions`: must be a list of two or more, got 'red'"),
    ({"completions": ["red"]}, "column `completions`: must be a list of two or more"),
    ({"completions": ["red", chat("blue"), "loud"]}, "column `completions`: must all be of the kind of `prompt`"),
    ({"completions": ["red", None, "loud"]}, "column `completions`: must all be of the kind of `prompt`"),
    ({"completions": [chat("red"), chat("blue"), []]}, "column `completions`: must all be of the kind of `prompt`"),
    ({"prompt": chat("Hi", "user")}, "column `completions`: must all be .* got 'red' to a conversation"),
    ({"ranks": None}, "column `ranks`: is missing or null, as are `ranking` and `pairs`"),
    ({"ranks": [1, 2]}, r"column `ranks`: must be a list with one rank .* got \[1, 2\] for 3 completions"),
    ({"ranks": 1}, "column `ranks`: must be a list"),
    ({"ranks": [1, 2.5, 2]}, "column `ranks`: must be whole numbers .* got .*2.5.* `from_scores`"),
    ({"ranks": [1, True, 2]}, "column `ranks`: must be whole numbers"),
    ({"ranks": [1, "2", 2]}, "column `ranks`: must be whole numbers"),
    ({"ranks": [1, float("inf"), 2]}, "column `ranks`: must be whole numbers"),
    ({"ranks": [1, -2, 2]}, "column `ranks`: must be whole numbers"),
    ({"ranks": [None, None, None]}, "column `ranks`: must rank two or more, got 0"),
    ({"ranks": [None, 1, -1]}, "column `ranks`: must rank two or more, got 1"),
    ({"ranks": None, "ranking": ""}, "column `ranking`: must rank two or more, got 0"),
    ({"ranks": None, "ranking": "B"}, "column `ranking`: must rank two or more, got 1"),
    ({"ranks": None, "ranking": "A > D"}, "column `ranking`: must have labels from A to C"),
    ({"ranks": None, "ranking": [1, 2, 3]}, "column `ranking`: must be text"),
    ({"ranking": "A > B"}, "column `ranking`: must be the only judgement"),
    ({"ranks": None, "ranking": "A > B", "pairs": [[0, 1, 1]]}, "column `ranking`: must be the only judgement"),
    ({"pairs": [[0, 1, 1]]}, "columns `ranks` and `pairs`: must say the same"),
    ({"pairs": INTRANSITIVE}, "columns `ranks` and `pairs`: must say the same"),
    ({"ranks": None, "pairs": []}, "column `pairs`: must be a list of one or more"),
    ({"ranks": None, "pairs": [[0, 1]]}, r"column `pairs`: must hold \[i, j, v\]"),
    ({"ranks": None, "pairs": [None]}, r"column `pairs`: must hold \[i, j, v\]"),
    ({"ranks": None, "pairs": [[1, 1, 0]]}, "column `pairs`: must hold .* two different completions"),
    ({"ranks": None, "pairs": [[0, 1, 1], [1, 3, 0]]}, r"column `pairs`: .* got \[1, 3, 0\] for 3 completions"),
    ({"ranks": None, "pairs": [[-1, 1, 0]]}, "column `pairs`: must hold"),
    ({"ranks": None, "pairs": [[0, 1, 3]]}, "column `pairs`: must hold"),
    ({"ranks": None, "pairs": [[0, 1, -1]]}, "column `pairs`: must hold"),
    ({"ranks": None, "pairs": [[0, 1, None]]}, "column `pairs`: must hold"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_ROWS)
def test_refuses_rows(columns, message):
    bad = row(ranks=[1, 2, 3]) | columns
    for absent_or_null in (bad, {name: value for name, value in bad.items() if value is not None}):
        with pytest.raises(ValueError, match=message):
            normalize_ranking(absent_or_null)


# --- Datasets ---


def mixed_kinds():
    """One dataset of each kind, the last one with a column of its own."""
    kinds = [{"ranks": [3, 1, None]}, {"ranking": "C > A = B"}, {"pairs": INTRANSITIVE, "source": "mine"}]
    return concatenate_datasets([Dataset.from_list([row(**kind)]) for kind in kinds])


PREPARED = [
    row(ranks=[2, 1, -1], pairs=None, source=None),
    row(ranks=[2, 2, 1], pairs=None, source=None),
    row(ranks=None, pairs=INTRANSITIVE, source="mine"),
]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_prepares_concatenated_kinds(num_proc):
    prepared = prepare_rankings(mixed_kinds(), num_proc=num_proc)
    assert list(prepared) == PREPARED
    assert prepared.features["ranks"] == List(Value("int64"))
    assert prepared.features["pairs"] == List(List(Value("int64")))


def test_prepares_streams():
    streams = [
        mixed_kinds().to_iterable_dataset(),
        IterableDataset.from_generator(lambda: iter(mixed_kinds().to_list())),
    ]
    for stream in streams:
        prepared = prepare_rankings(stream)
        assert list(prepared) == PREPARED
        assert list(prepare_rankings(prepared)) == PREPARED


def test_preparing_twice_changes_nothing():
    prepared = prepare_rankings(mixed_kinds())
    again = prepare_rankings(prepared)
    assert list(again) == list(prepared)
    assert again.features == prepared.features


def test_prepares_columns_of_nulls_and_floats():
    floats = Dataset.from_dict(
        {"prompt": ["a", "b"], "completions": [["c", "d"]] * 2, "ranks": [[1.0, float("nan")], [0.0, 0.0]]}
    )
    assert list(prepare_rankings(floats, on_error="drop")["ranks"]) == [[1, 1]]
    nulls = Dataset.from_list([row(ranks=None, ranking=None, pairs=INTRANSITIVE)] * 2)
    prepared = prepare_rankings(nulls)
    assert list(prepared["ranks"]) == [None, None]
    assert prepared.features["ranks"] == List(Value("int64"))
    assert "ranking" not in prepared.features


def test_empty_dataset_stays_as_it_is():
    features = Features(
        {"prompt": Value("string"), "completions": List(Value("string")), "ranks": List(Value("int64"))}
    )
    empty = Dataset.from_dict({"prompt": [], "completions": [], "ranks": []}, features=features)
    for on_error in ("raise", "drop"):
        assert prepare_rankings(empty, on_error).features == features


def bad_rows():
    texts = ["A > B", "A > D", "B", "A = C", "C > D", "A > B > A"]
    return Dataset.from_list([row(ranking=text, number=n) for n, text in enumerate(texts)])


def test_errors_name_row_and_column():
    with pytest.raises(ValueError, match="^eval row 1, column `ranking`: must have labels from A to C"):
        prepare_rankings(bad_rows(), dataset_name="eval")
    stream = prepare_rankings(bad_rows().to_iterable_dataset(), dataset_name="eval")  # raises when it comes to it
    with pytest.raises(ValueError, match="^eval row 1, column `ranking`: must have labels from A to C"):
        list(stream)


def test_dropped_rows_are_counted_by_reason(caplog):
    with caplog.at_level(logging.WARNING, "trl_ext.data.rankings"):
        prepared = prepare_rankings(bad_rows(), on_error="drop", dataset_name="eval")
    assert list(prepared) == [row(number=0, ranks=[1, 2, -1]), row(number=3, ranks=[1, -1, 1])]
    (record,) = caplog.records
    assert record.message.splitlines()[0].endswith("Dropped 4 of the 6 rows of the eval dataset:")
    assert record.message.splitlines()[1:] == [
        "- 2, the first of them row 1: column `ranking`: must have labels from A to C or 1 to 3 between its symbols",
        "- 1, the first of them row 2: column `ranking`: must rank two or more",
        "- 1, the first of them row 5: column `ranking`: must name each completion once at most",
    ]


def test_dropping_nothing_says_nothing(caplog):
    prepared = prepare_rankings(mixed_kinds(), on_error="drop")
    assert list(prepared) == PREPARED
    assert not caplog.records


def test_streams_drop_too():
    prepared = prepare_rankings(bad_rows().to_iterable_dataset(), on_error="drop")
    assert [example["number"] for example in prepared] == [0, 3]


def test_dataset_of_another_type_is_refused():
    pairs = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    for on_error in ("raise", "drop"):
        with pytest.raises(ValueError, match="The eval dataset must have columns .*`ranks`.* got .*'chosen'"):
            prepare_rankings(pairs, on_error, dataset_name="eval")
    with pytest.raises(ValueError, match="`on_error` must be 'raise' or 'drop', got 'skip'"):
        prepare_rankings(mixed_kinds(), on_error="skip")


@pytest.mark.parametrize("name", ["qa_feedback", "wmt12", "summeval", "pandalm"])
def test_real_rankings_stay_as_they_are(name):
    columns = ["prompt", "completions", "ranks", *(["pairs"] if name == "qa_feedback" else [])]
    rows = [{column: row[column] for column in columns} for row in read_shared(f"{name}_ranked")[:1000]]
    assert list(prepare_rankings(Dataset.from_list(rows))) == rows
