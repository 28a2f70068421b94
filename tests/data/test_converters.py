"""Converters to the ranking type: hand-made rows of each layout, round trips, and real judgements."""

import doctest
import json
import re
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict, List, Value
from helpers import read_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import data
from trl_ext.data.argilla import to_argilla
from trl_ext.data.convert import from_pairs, from_scores, to_pairs
from trl_ext.data.orders import weak_order
from trl_ext.data.rankings import is_ranking, prepare_rankings
from trl_ext.data.sources import (
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


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# --- Scores ---


@pytest.mark.parametrize(
    ("scores", "tie_threshold", "ranks"),
    [
        ([0.5, 2.0, -1.0], 0.0, [2, 1, 3]),
        ([3, 3, 5], 0.0, [2, 2, 1]),
        ([1.0, None, 2.0, float("nan")], 0.0, [2, None, 1, None]),
        ([None, None], 0.0, [None, None]),
        ([0.4, 0.3, 0.1], 0.1, [1, 1, 2]),  # 0.4 - 0.3 is not 0.1 in floating point
        ([1.0, 0.5, 0.75, 0.1], 0.25, [1, 1, 1, 2]),  # the ends of the tie are 0.5 apart
        ([1.0, 1.0 - 1e-12], 0.0, [1, 2]),
        ([9, 5, 1], 100, [1, 1, 1]),
    ],
)
def test_scores_to_ranks(scores, tie_threshold, ranks):
    row = {"prompt": "Count.", "completions": [str(i) for i in range(len(scores))], "scores": scores, "source": "mine"}
    converted = from_scores(Dataset.from_list([row]), tie_threshold)
    assert list(converted) == [{"prompt": row["prompt"], "completions": row["completions"], "ranks": ranks}]


def test_scores_of_conversations():
    row = {"prompt": [user("Count.")], "completions": [[assistant("1")], [assistant("2")]], "scores": [0.1, 0.2]}
    dataset = Dataset.from_list([row])
    converted = from_scores(dataset)
    assert converted[0] == {"prompt": row["prompt"], "completions": row["completions"], "ranks": [2, 1]}
    assert converted.features["completions"] == dataset.features["completions"]


def test_bad_scores_are_refused():
    def rows(scores):
        return Dataset.from_dict(
            {"prompt": ["a"] * 2, "completions": [["b", "c"]] * 2, "scores": [[1.0, 2.0], scores]}
        )

    for scores in (None, [1.0], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="^row 1, column `scores`: must be"):
            from_scores(rows(scores))
    with pytest.raises(ValueError, match="column `scores`: is missing"):
        from_scores(rows([1.0, 2.0]).remove_columns("scores"))
    for tie_threshold in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`tie_threshold` must be"):
            from_scores(rows([1.0, 2.0]), tie_threshold)


# --- Pairs ---


def judgements(dataset):
    """Returns what a dataset of rankings says, by text: how often which of two was better, or both tied."""
    said = Counter()
    for row in to_pairs(dataset, ties=True):
        texts = [json.dumps(row[name]) for name in ("prompt", "chosen", "rejected")]
        said[(texts[0], frozenset(texts[1:]) if row["tie"] else tuple(texts[1:]))] += 1
    return said


def test_to_pairs():
    row = {"prompt": "Count.", "completions": ["1", "2", "3", "4"]}
    dataset = Dataset.from_list(
        [
            row | {"ranks": [2, 1, None, 2], "pairs": None, "source": "mine"},
            row | {"ranks": None, "pairs": [[2, 1, 0], [3, 0, 2], [0, 3, 2], [3, 0, 1]], "source": "mine"},
        ]
    )
    pairs = [
        {"chosen": "2", "rejected": "1", "tie": False},
        {"chosen": "1", "rejected": "4", "tie": True},
        {"chosen": "2", "rejected": "4", "tie": False},
        {"chosen": "2", "rejected": "3", "tie": True},
        {"chosen": "1", "rejected": "4", "tie": False},
        {"chosen": "4", "rejected": "1", "tie": False},
        {"chosen": "4", "rejected": "1", "tie": False},
    ]
    assert list(to_pairs(dataset, ties=True)) == [{"prompt": "Count."} | pair for pair in pairs]
    strict = [{"prompt": "Count."} | pair for pair in pairs if not pair["tie"]]
    assert list(to_pairs(dataset)) == [{name: pair[name] for name in pair if name != "tie"} for pair in strict]


def test_to_pairs_of_nothing_but_ties_has_columns():
    tied = Dataset.from_list([{"prompt": "Count.", "completions": ["1", "2"], "ranking": "A = B"}])
    assert to_pairs(tied).column_names == ["prompt", "chosen", "rejected"]
    assert len(to_pairs(tied)) == 0
    with pytest.raises(ValueError, match="^dataset row 0, column `ranking`"):
        to_pairs(tied.map(lambda row: {"ranking": "A"}))


def test_from_pairs():
    rows = [
        {"prompt": "Count.", "chosen": "2", "rejected": "1", "tie": False},
        {"prompt": "Sing.", "chosen": "la", "rejected": "lo", "tie": None},
        {"prompt": "Count.", "chosen": "1", "rejected": "3", "tie": True},
        {"prompt": "Sing.", "chosen": "lo", "rejected": "la", "tie": False},
    ]
    converted = from_pairs(Dataset.from_list(rows))
    assert list(converted) == [
        {"prompt": "Count.", "completions": ["2", "1", "3"], "ranks": [1, 2, 2], "pairs": None},
        {"prompt": "Sing.", "completions": ["la", "lo"], "ranks": None, "pairs": [[0, 1, 1], [1, 0, 1]]},
    ]
    assert converted.features["ranks"] == List(Value("int64"))


@pytest.mark.parametrize("prompt", ["explicit", "implicit", "null", "text"])
def test_from_conversational_pairs(prompt):
    question = [user("Count."), assistant("How far?"), user("To three.")]
    answers = [[assistant("1")], [assistant("2")], [assistant("3")]]
    rows = []
    for chosen, rejected in [(0, 1), (1, 2)]:
        texts = {"chosen": answers[chosen], "rejected": answers[rejected]}
        if prompt == "explicit":
            rows.append({"prompt": question} | texts)
        else:
            column = {"implicit": {}, "null": {"prompt": None}, "text": {"prompt": "Count."}}[prompt]
            rows.append(column | {name: question + text for name, text in texts.items()})
    converted = from_pairs(Dataset.from_list(rows))
    assert list(converted) == [{"prompt": question, "completions": answers, "ranks": [1, 2, 3], "pairs": None}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": None}, "column `chosen`: must be text or messages"),
        ({"rejected": None}, "column `rejected`: must be text or messages"),
        ({"rejected": "blue"}, "columns `chosen` and `rejected`: are the same"),
        ({"prompt": None, "chosen": ""}, "column `chosen`: is empty"),
    ],
)
def test_bad_pairs_are_refused(change, message):
    good = {"prompt": "Name a colour.", "chosen": "blue", "rejected": "loud"}
    with pytest.raises(ValueError, match=f"^row 1, {message}"):
        from_pairs(Dataset.from_list([good, good | change]))


def test_empty_completion_is_a_completion():
    rows = [{"prompt": "Count.", "chosen": "1", "rejected": ""}]
    assert from_pairs(Dataset.from_list(rows))[0]["completions"] == ["1", ""]


ranked = st.lists(st.none() | st.integers(1, 4), min_size=2, max_size=5).filter(
    lambda ranks: len(ranks) - ranks.count(None) > 1
)
judged = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))
    .filter(lambda pair: pair[0] != pair[1])
    .map(list),
    min_size=1,
    max_size=6,
)


@settings(max_examples=10, deadline=None)
@given(st.lists(ranked | judged, min_size=1, max_size=8), st.booleans())
def test_pairs_and_back_lose_nothing(rows, conversational):
    def text(content):
        return [assistant(content)] if conversational else content

    examples = []
    for n, judgement in enumerate(rows):
        kind = "pairs" if isinstance(judgement[0], list) else "ranks"
        completions = [text(f"{n} {i}") for i in range(4 if kind == "pairs" else len(judgement))]
        examples.append(
            {"prompt": text(f"{n}"), "completions": completions, "ranks": None, "pairs": None} | {kind: judgement}
        )
    dataset = Dataset.from_list(examples)
    restored = from_pairs(to_pairs(dataset, ties=True))
    assert restored["prompt"][:] == dataset["prompt"][:]
    for before, after in zip(prepare_rankings(dataset), restored, strict=True):
        if before["ranks"] is None:
            assert judgements(Dataset.from_list([before])) == judgements(Dataset.from_list([after]))
        else:
            ranks = dict(zip(map(json.dumps, after["completions"]), after["ranks"], strict=True))
            assert [ranks.get(json.dumps(completion), -1) for completion in before["completions"]] == before["ranks"]


def test_pairs_of_real_rankings():
    rows = [{name: row[name] for name in ("prompt", "completions", "ranks")} for row in read_shared("wmt12_ranked")]
    pairs = to_pairs(Dataset.from_list(rows), ties=True)
    assert len(pairs) == 52020
    assert sum(pairs["tie"]) == 7676
    same = next(i for i, pair in enumerate(pairs) if pair["chosen"] == pair["rejected"])
    with pytest.raises(ValueError, match=f"^row {same}, columns `chosen` and `rejected`: are the same"):
        from_pairs(pairs)


# --- Public datasets ---


def arena(winner, *answers):
    conversations = [[user("Count."), assistant(answer)] for answer in answers]
    return {"model_a": "x", "conversation_a": conversations[0], "conversation_b": conversations[1], "winner": winner}


def arena_55k(a, b, tie, prompt='["Count."]', response_a='["1"]', response_b='["2"]'):
    winner = {"winner_model_a": a, "winner_model_b": b, "winner_tie": tie}
    return {"id": 1, "prompt": prompt, "response_a": response_a, "response_b": response_b} | winner


def oasst1(message_id, parent_id, role, text, rank=None):
    return {"message_id": message_id, "parent_id": parent_id, "text": text, "role": role, "rank": rank, "lang": "en"}


def ultrafeedback(*scores):
    answers = [{"model": "x", "response": f"{i}", "fine-grained_score": score} for i, score in enumerate(scores)]
    return {"source": "mine", "instruction": "Count.", "models": ["x"], "completions": answers}


def nectar(prompt, *ranks):
    answers = [{"answer": f"{i}", "model": "x", "rank": rank} for i, rank in enumerate(ranks)]
    return {"prompt": prompt, "answers": answers, "turns": 1, "good_natured": True}


def helpsteer2(prompt, response, helpfulness):
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": 4 - helpfulness}


def helpsteer2_preference(strength):
    return {
        "split": "train",
        "prompt": "Count.",
        "response_1": "1",
        "response_2": "2",
        "preference_strength": strength,
    }


def helpsteer3(strength):
    context = [user("Hi"), assistant("Hello"), user("Count.")]
    return {"domain": "x", "context": context, "response1": "1", "response2": "2", "overall_preference": strength}


def webgpt(score):
    answers = {"answer_0": "1", "answer_1": "2", "score_0": score, "score_1": -score}
    return {"question": {"dataset": "x", "id": "1", "full_text": "Count."}, "quotes_0": {"title": ["x"]}} | answers


def qa_feedback(*preference):
    texts = {f"prediction {k}": f"{k}" for k in range(1, 5)}
    return {"question": "Count.", "passages": [["x", "y"]], "gold": "1"} | texts | {"preference": list(preference)}


def text_ranking(ranks, prompt="Count."):
    completions = ["1", "2"] if len(ranks) == 2 else [f"{i}" for i in range(len(ranks))]
    return {"prompt": prompt, "completions": completions, "ranks": ranks}


def chat_ranking(ranks, prompt=None, first=1):
    completions = [[assistant(f"{i + first}")] for i in range(len(ranks))]
    return {"prompt": prompt or [user("Count.")], "completions": completions, "ranks": ranks}


TREE = [
    oasst1("a", None, "prompter", "Count."),
    oasst1("b", "a", "assistant", "1", 1.0),
    oasst1("c", "a", "assistant", "2", 0.0),
    oasst1("d", "a", "assistant", "?"),
    oasst1("e", "b", "prompter", "On.", 0.0),
    oasst1("f", "b", "prompter", "Up.", 1.0),
    oasst1("g", "e", "assistant", "1", 0.0),
    oasst1("h", "e", "assistant", "2", 2.0),
    oasst1("i", "f", "assistant", "alone", 0.0),
]
TWO_TURNS = [user("Count."), assistant("1"), user("On.")]
LONG = {
    "conversation_a": [*TWO_TURNS, assistant("1")],
    "conversation_b": [*TWO_TURNS, assistant("2")],
}
APART = {
    "conversation_a": [user("Count."), assistant("1"), user("On."), assistant("2")],
    "conversation_b": [user("Count."), assistant("one"), user("On."), assistant("2")],
}
QA_PAIRS = [[0, 1, 1], [0, 2, 0], [0, 3, 2], [1, 2, 2], [1, 3, 0], [2, 3, 1]]

CONVERTED = [
    (
        from_qa_feedback,
        [qa_feedback(1, 0, 2, 2, 0, 1)],
        [{"prompt": "Count.", "completions": ["1", "2", "3", "4"], "pairs": QA_PAIRS}],
    ),
    (
        from_ultrafeedback,
        [ultrafeedback(4.5, 2.0, None, 4.5), ultrafeedback(1.0, 2.0)],
        [text_ranking([1, 2, None, 1]), {**text_ranking([2, 1]), "completions": ["0", "1"]}],
    ),
    (from_ultrafeedback, [ultrafeedback("N/A")], [text_ranking([None])]),
    (
        from_oasst1,
        TREE,
        [chat_ranking([2, 1]), chat_ranking([1, 2], prompt=TWO_TURNS)],
    ),
    (
        from_nectar,
        [
            nectar("\n\nHuman: Count.\n\nAssistant: ", 2.0, 1.0, 3.0),
            nectar("\n\nHuman: Count.\n\nAssistant: 1\n\nHuman: On.\n\nAssistant: ", 1.0, 1.0, 2.0),
        ],
        [chat_ranking([2, 1, 3], first=0), chat_ranking([1, 1, 2], prompt=TWO_TURNS, first=0)],
    ),
    (
        from_helpsteer2,
        [
            helpsteer2("Count.", "1", 0),
            helpsteer2("Count.", "2", 3),
            helpsteer2("Sing.", "1", 2),
            helpsteer2("Sing.", "2", 2),
        ],
        [text_ranking([2, 1]), text_ranking([1, 1], prompt="Sing.")],
    ),
    (
        from_helpsteer2_preference,
        [helpsteer2_preference(strength) for strength in (-3, -1, 0, 1, 3)],
        [text_ranking(ranks) for ranks in ([1, 2], [1, 2], [1, 1], [2, 1], [2, 1])],
    ),
    (
        from_helpsteer3,
        [helpsteer3(strength) for strength in (-2, 0, 2)],
        [
            chat_ranking(ranks, prompt=[user("Hi"), assistant("Hello"), user("Count.")])
            for ranks in ([1, 2], [1, 1], [2, 1])
        ],
    ),
    (
        from_chatbot_arena,
        [arena(winner, "1", "2") for winner in ("model_a", "model_b", "tie", "tie (bothbad)")],
        [
            chat_ranking(ranks) | {"both_bad": bad}
            for ranks, bad in [([1, 2], False), ([2, 1], False), ([1, 1], False), ([1, 1], True)]
        ],
    ),
    (
        from_chatbot_arena,
        [arena("model_a", "1", "2") | LONG, arena("model_b", "1", "2") | APART, arena("tie", "1", "1")],
        [
            chat_ranking([1, 2], prompt=TWO_TURNS) | {"both_bad": False},
            {
                "prompt": [user("Count.")],
                "completions": [APART["conversation_a"][1:], APART["conversation_b"][1:]],
                "ranks": [2, 1],
                "both_bad": False,
            },
            chat_ranking([1, 1]) | {"completions": [[assistant("1")]] * 2, "both_bad": False},
        ],
    ),
    (
        from_arena_55k,
        [
            arena_55k(1, 0, 0),
            arena_55k(0, 1, 0),
            arena_55k(0, 0, 1, response_a="[null]"),
            arena_55k(0, 0, 1, '["Count.", "On."]', '["1", "2"]', '["one", "2"]'),
        ],
        [
            chat_ranking([1, 2]),
            chat_ranking([2, 1]),
            chat_ranking([1, 1]) | {"completions": [[assistant("")], [assistant("2")]]},
            chat_ranking([1, 1]) | {"completions": [APART["conversation_a"][1:], APART["conversation_b"][1:]]},
        ],
    ),
    (
        from_webgpt,
        [webgpt(score) for score in (0.5, 0.0, -1.0)],
        [text_ranking(ranks) for ranks in ([1, 2], [1, 1], [2, 1])],
    ),
]


PAIRS_OF_TWO = [{"prompt": "a", "chosen": "x", "rejected": "y", "tie": True}]
SCORES_OF_TWO = [{"prompt": "a", "completions": ["x", "y"], "scores": [1.0, 0.5], "ranks": [1, 2]}]


@pytest.mark.parametrize(("convert", "source", "expected"), CONVERTED)
def test_converts(convert, source, expected):
    converted = convert(Dataset.from_list(source))
    assert list(converted) == expected
    assert is_ranking(converted.column_names)
    usable = [row for row in expected if "pairs" in row or len(row["ranks"]) > 1]
    assert len(prepare_rankings(converted, on_error="drop")) == len(usable)


def test_a_format_changes_nothing(form="torch"):
    for convert, source, expected in [
        *CONVERTED,
        (from_pairs, PAIRS_OF_TWO, None),
        (from_scores, SCORES_OF_TWO, None),
    ]:
        dataset = Dataset.from_list(source)
        converted = convert(dataset.with_format(form))
        assert converted.to_list() == convert(dataset).to_list()
        assert expected is None or converted.to_list() == expected
    prepared = [prepare_rankings(data) for data in (converted.with_format("numpy"), converted)]
    assert prepared[0].to_list() == prepared[1].to_list()
    assert to_pairs(converted.with_format(form)).to_list() == to_pairs(converted).to_list()


def test_a_stream_is_named_with_what_to_do():
    converters = [
        *dict.fromkeys(convert for convert, _, _ in CONVERTED),
        from_pairs,
        from_scores,
        to_pairs,
        to_argilla,
    ]
    dataset = Dataset.from_list(SCORES_OF_TWO)
    for convert in converters:
        with pytest.raises(ValueError, match=r"got a stream.*`Dataset.from_list\(list\(stream\)\)`"):
            convert(dataset.to_iterable_dataset())
        with pytest.raises(ValueError, match="got splits. Pass one of them: train"):
            convert(DatasetDict(train=dataset))
        with pytest.raises(ValueError, match="got list. `Dataset.from_list`"):
            convert(SCORES_OF_TWO)


def test_a_transform_is_refused():
    dataset = Dataset.from_list(SCORES_OF_TWO).with_transform(lambda batch: batch)
    for convert in (from_scores, to_pairs, prepare_rankings):
        with pytest.raises(ValueError, match=r"has a transform.*by `map`, and drop it, by `with_format\(None\)`"):
            convert(dataset)


def test_other_ratings():
    answers = [{"response": f"{i}", "overall_score": score} for i, score in enumerate([7.0, 9.0])]
    rows = Dataset.from_list([{"instruction": "Count.", "completions": answers}])
    assert from_ultrafeedback(rows, by="overall_score")["ranks"][:] == [[2, 1]]
    with pytest.raises(ValueError, match="`by` must be one of .* got 'helpfulness'"):
        from_ultrafeedback(rows, by="helpfulness")
    rows = Dataset.from_list([helpsteer2("Count.", "1", 4), helpsteer2("Count.", "2", 0)])
    assert from_helpsteer2(rows, by="correctness")["ranks"][:] == [[2, 1]]


GOOD = {convert: source[0] for convert, source, _ in reversed(CONVERTED)} | {from_oasst1: None}
BAD = [
    (from_qa_feedback, {"question": None}, "column `question`: must be text, got None"),
    (from_qa_feedback, {"prediction 3": None}, "column `prediction 3`: must be text"),
    (from_qa_feedback, {"preference": None}, "column `preference`: must be a list"),
    (from_qa_feedback, {"preference": [1, 0, 2, 2, 0]}, "column `preference`: must be six times"),
    (from_qa_feedback, {"preference": [1, 0, 2, 2, 0, 3]}, "column `preference`: must be six times"),
    (from_qa_feedback, {"preference": [1, 0, 2, 2, 0, None]}, "column `preference`: must be six times"),
    (from_ultrafeedback, {"instruction": None}, "column `instruction`: must be text"),
    (from_ultrafeedback, {"completions": None}, "column `completions`: must be a list"),
    (from_ultrafeedback, {"completions": [None]}, "column `completions.response`: must be text"),
    (from_nectar, {"prompt": "Count."}, r"column `prompt`: must begin with .* got 'Count.'"),
    (from_nectar, {"prompt": "\n\nHuman: Count."}, "column `prompt`: must begin with"),
    (from_nectar, {"prompt": "x\n\nHuman: Count.\n\nAssistant: "}, "column `prompt`: must begin with"),
    (from_nectar, {"prompt": "\n\nHuman: Count.\n\nAssistant: 1"}, "column `prompt`: must begin with"),
    (from_nectar, {"answers": None}, "column `answers`: must be a list"),
    (from_nectar, {"answers": [{"answer": "1", "rank": None}]}, "column `answers.rank`: must be a number"),
    (from_nectar, {"answers": [{"answer": None, "rank": 1.0}]}, "column `answers.answer`: must be text"),
    (from_helpsteer2, {"response": None}, "column `response`: must be text"),
    (from_helpsteer2, {"helpfulness": None}, "column `helpfulness`: must be a number"),
    (from_helpsteer2_preference, {"response_2": None}, "column `response_2`: must be text"),
    (from_helpsteer2_preference, {"preference_strength": -100}, "column `preference_strength`: must be from -3 to 3"),
    (from_helpsteer2_preference, {"preference_strength": None}, "column `preference_strength`: must be a number"),
    (from_helpsteer3, {"context": None}, "column `context`: must be a list"),
    (from_helpsteer3, {"context": [{"role": "user", "content": None}]}, "column `context.content`: must be text"),
    (from_helpsteer3, {"response1": None}, "column `response1`: must be text"),
    (from_helpsteer3, {"overall_preference": 4}, "column `overall_preference`: must be from -3 to 3"),
    (from_chatbot_arena, {"winner": "model_c"}, "column `winner`: must be one of .* got 'model_c'"),
    (from_chatbot_arena, {"winner": None}, "column `winner`: must be text"),
    (from_chatbot_arena, {"conversation_b": None}, "column `conversation_b`: must be a list"),
    (from_chatbot_arena, {"conversation_b": []}, "columns `conversation_a` and `conversation_b`: must share"),
    (
        from_chatbot_arena,
        {"conversation_b": TWO_TURNS[:1]},
        "columns `conversation_a` and `conversation_b`: must share",
    ),
    (from_chatbot_arena, {"conversation_b": LONG["conversation_b"]}, "columns `conversation_a` and `conversation_b`"),
    (from_arena_55k, {"prompt": "Count."}, "column `prompt`: must be a list of texts in JSON, got 'Count.'"),
    (from_arena_55k, {"prompt": "[]"}, "column `prompt`: must be a list of texts in JSON"),
    (from_arena_55k, {"response_a": "[1]"}, "column `response_a`: must be a list of texts in JSON"),
    (from_arena_55k, {"response_b": '["1", "2"]'}, "column `response_b`: must have 1 turns, got 2"),
    (from_arena_55k, {"winner_tie": 1}, "column `winner_tie`: must be 1, or one of"),
    (from_arena_55k, {"winner_model_a": 0}, r"column `winner_tie`: must be 1, or one of .* got \[\] at 1"),
    (from_arena_55k, {"winner_model_a": None}, "column `winner_model_a`: must be a number"),
    (from_webgpt, {"question": None}, "column `question`: must be a dict"),
    (from_webgpt, {"question": {"full_text": None}}, "column `question.full_text`: must be text"),
    (from_webgpt, {"answer_1": None}, "column `answer_1`: must be text"),
    (from_webgpt, {"score_0": None}, "column `score_0`: must be a number"),
]


@pytest.mark.parametrize(("convert", "change", "message"), BAD)
def test_bad_rows_are_named(convert, change, message):
    good = GOOD[convert]
    with pytest.raises(ValueError, match=f"^row 1, {message}"):
        convert(Dataset.from_list([good, good | change]))


@pytest.mark.parametrize("convert", sorted({convert for convert, _, _ in BAD}, key=lambda convert: convert.__name__))
def test_missing_columns_are_named(convert):
    needed = next(iter(next(change for bad, change, _ in BAD if bad is convert)))
    with pytest.raises(ValueError, match=f"column `{needed}`: must be .* got None"):
        convert(Dataset.from_list([GOOD[convert]]).remove_columns(needed))


def test_helpsteer2_rows_must_stand_together():
    rows = [helpsteer2(prompt, "1", 1) for prompt in ("Count.", "Count.", "Sing.", "Count.")]
    with pytest.raises(ValueError, match="^row 2, column `prompt`: is in no neighbouring row"):
        from_helpsteer2(Dataset.from_list(rows))


def test_bad_trees_are_named():
    with pytest.raises(ValueError, match="^row 5, column `parent_id`: 'b' is in no row. Convert whole trees"):
        from_oasst1(Dataset.from_list([row for row in TREE if row["message_id"] != "b"]))
    with pytest.raises(ValueError, match="^row 1, column `role`: must be one of .* got 'system'"):
        from_oasst1(Dataset.from_list([TREE[0] | {"role": "system"}, *TREE[1:]]))
    with pytest.raises(ValueError, match="^row 2, column `text`: must be text"):
        from_oasst1(Dataset.from_list([*TREE[:2], TREE[2] | {"text": None}]))
    with pytest.raises(ValueError, match="rank"):
        from_oasst1(Dataset.from_list(TREE).remove_columns("rank"))


def test_real_qa_feedback():
    rows = read_shared("qa_feedback_ranked")
    source = [
        {"question": row["prompt"], "preference": [v for _, _, v in row["pairs"]]}
        | {f"prediction {k}": text for k, text in enumerate(row["completions"], start=1)}
        for row in rows
    ]
    converted = from_qa_feedback(Dataset.from_list(source))
    assert converted["pairs"][:] == [row["pairs"] for row in rows]
    prepared = prepare_rankings(converted)
    assert prepared["ranks"][:] == [row["ranks"] for row in rows]
    counts = Counter(v for pairs in prepared["pairs"] for _, _, v in pairs)
    assert counts == {1: 1577, 2: 1039, 0: 384}
    restored = from_pairs(to_pairs(prepared, ties=True))
    assert sum(pairs is not None for pairs in restored["pairs"]) == 22
    assert judgements(restored) == judgements(prepared)


def test_real_scores():
    rows = read_shared("summeval_ranked")
    source = [{"prompt": row["prompt"], "completions": row["completions"], "scores": row["overall"]} for row in rows]
    assert from_scores(Dataset.from_list(source))["ranks"][:] == [row["ranks"] for row in rows]
    pairs = to_pairs(from_scores(Dataset.from_list(source)), ties=True)
    assert (len(pairs), sum(pairs["tie"])) == (12000, 658)


def test_real_votes_of_three():
    """PandaLM's majority votes, between named systems: the order they form is the one in the file."""
    for row in read_shared("pandalm_ranked"):
        at = {system: i for i, system in enumerate(row["systems"])}
        pairs = [[at[a], at[b], vote] for a, b, vote, _ in row["pairs"] if a in at and b in at]
        assert weak_order(pairs, len(at)) == row["ranks"]


# --- Examples ---


def public_functions(module):
    functions = [value for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    return [function for function in functions if function.__module__ == module.__name__]


@pytest.mark.parametrize(
    "function",
    [
        weak_order,
        *(
            f
            for module in (data.notation, data.rankings, data.convert, data.sources)
            for f in public_functions(module)
        ),
    ],
    ids=lambda function: function.__name__,
)
def test_examples_in_the_documentation(function):
    (example,) = re.findall(r"```python\n(.*?)```", function.__doc__, re.DOTALL)
    test = doctest.DocTestParser().get_doctest(example, dict(function.__globals__), function.__name__, None, 0)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted > 0 and results.failed == 0
