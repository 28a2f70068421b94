"""Argilla's records and back: nothing is changed on the way, ties included."""

import json
import uuid

import pytest
from datasets import Dataset

from trl_ext.data.argilla import from_argilla, to_argilla
from trl_ext.data.rankings import prepare_rankings


ANN, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))


@pytest.fixture
def collected():
    texts = [f"text {i}" for i in range(12)]
    return Dataset.from_list(
        [
            {
                "prompt": "a",
                "completions": texts,
                "ranks": [2, 1, 1, None, *range(3, 11)],
                "id": "1",
                "annotator": ANN,
            },
            {"prompt": "a", "completions": texts, "ranks": [1] * 12, "id": "1", "annotator": BOB},
            {"prompt": "b", "completions": ["x", "y"], "ranks": [2, 1], "id": "2", "annotator": ANN},
        ]
    )


def test_there_and_back(collected):
    records = to_argilla(collected)
    assert [len(record["responses"]["ranking"]) for record in records] == [2, 1]
    records = json.loads(json.dumps(records))
    assert from_argilla(records).to_list() == collected.to_list()


def test_argillas_own_classes_read_and_write_it(collected):
    rg = pytest.importorskip("argilla", reason="Argilla is not installed")
    records = [rg.Record.from_dict(record).to_dict() for record in to_argilla(collected)]
    assert from_argilla(records).to_list() == collected.to_list()


def test_an_order_without_ranks_has_no_ties():
    """Argilla's client makes this of an answer that it reads from its server."""
    record = {"id": "1", "fields": {"prompt": "a", "first": "x", "second": "y", "third": "z"}}
    response = {"value": ["third", "first"], "user_id": ANN, "status": "submitted"}
    answered = record | {"responses": {"best": [response, response | {"status": "draft"}]}}
    other = record | {"id": "2", "responses": {"best": [response | {"value": ["second", "first"]}]}}
    rankings = from_argilla([answered, other], "best")
    assert rankings["ranks"][:] == [[2, None, 1], [2, 1, None]] and rankings["completions"][0] == ["x", "y", "z"]


def record_of(fields, *ranks, question="ranking"):
    responses = [{"value": [{"value": n, "rank": r} for n, r in given.items()], "user_id": ANN} for given in ranks]
    return {"id": "1", "fields": fields, "responses": {question: responses}}


def test_only_what_is_ranked_is_a_completion():
    """Fields beside it are for the annotator to read, whatever they hold."""
    fields = {"prompt": "a", "response-1": "x", "response-2": "y", "Golden Answer": "z", "context": "", "meta": None}
    first = record_of(fields, {"response-2": 1, "response-1": 2}, {"response-1": 1, "response-2": 1})
    rankings = from_argilla([first, record_of(fields | {"context": "some", "meta": 3})])
    assert rankings["completions"][:] == [["x", "y"]] * 2 and rankings["ranks"][:] == [[2, 1], [1, 1]]


def test_a_record_has_as_many_completions_as_are_filled():
    """Argilla asks to rank optional fields that are empty, too; what training is given has no nulls."""
    three = {"prompt": "a", "answer-1": "x", "answer-2": "y", "answer-3": "z"}
    ranks = {"answer-3": 1, "answer-1": 2, "answer-2": 2}
    records = [record_of(fields, ranks) for fields in (three, three | {"answer-3": None})]
    two = {name: text for name, text in three.items() if name != "answer-3"}
    records.append(record_of(two, {"answer-1": 1, "answer-2": 1}))
    unranked = record_of(three | {"answer-3": ""}, {"answer-2": 1, "answer-1": 2})
    empty = record_of(three | {"answer-2": ""}, ranks)  # somebody said nothing, and was ranked for it
    rankings = from_argilla([*records, unranked, empty])
    assert rankings["completions"][:] == [["x", "y", "z"], ["x", "y"], ["x", "y"], ["x", "y"], ["x", "", "z"]]
    prepared = prepare_rankings(rankings)
    assert prepared["ranks"][:] == [[2, 2, 1], [1, 1], [1, 1], [2, 1], [2, 2, 1]]


def test_what_nobody_ranked_comes_back(collected):
    alone = collected.select([0]).map(lambda row: {"ranks": [1, 2, *[None] * 10]})
    assert from_argilla(to_argilla(alone)).to_list() == alone.to_list()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "row 0, record: must be a dict"),
        (record_of({"prompt": None, "x": "a", "y": "b"}, {"x": 1, "y": 2}), "field `prompt`: must be text, got None"),
        (record_of({"prompt": "a", "x": "a", "y": ["b"]}, {"x": 1, "y": 2}), "field `y`: must be text"),
        (record_of({"prompt": "a", "x": "a"}, {"x": 1, "prompt": 2}), "ranks 'prompt'"),
        (record_of({"prompt": "a", "x": "a"}, {}), "question `ranking`: must rank fields"),
        (
            record_of({"prompt": "a", "x": "a", "y": "b"}, {"x": 1, "y": "2"}),
            "whole numbers for ranks, got '2' for 'y'",
        ),
        (record_of(["a"], {"x": 1, "y": 2}), "fields: must be a dict"),
        (record_of({"prompt": "a"}) | {"responses": [{"value": []}]}, "responses: must be a dict"),
        (record_of({"prompt": "a"}) | {"responses": {"ranking": {"value": []}}}, "must have responses, got 'value'"),
    ],
)
def test_a_record_that_cannot_be_read_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        from_argilla([record])


def test_what_cannot_be_taken_over_is_named(collected):
    with pytest.raises(ValueError, match="row 0.*conversation"):
        chat = [{"role": "user", "content": "a"}]
        replies = [[{"role": "assistant", "content": text}] for text in "xy"]
        to_argilla(Dataset.from_list([{"prompt": chat, "completions": replies, "ranks": [1, 2]}]))
    with pytest.raises(ValueError, match="row 0.*amount to none"):
        pairs = [[0, 1, 0], [1, 2, 0], [0, 2, 1]]
        to_argilla(Dataset.from_list([{"prompt": "a", "completions": ["x", "y", "z"], "pairs": pairs}]))
    numbered = [row | {"id": 0} for row in collected]
    with pytest.raises(ValueError, match="row 2, column `id`: must be one for each prompt.*got 0 again"):
        to_argilla(Dataset.from_list(numbered))
    assert [len(record["responses"]["ranking"]) for record in to_argilla(Dataset.from_list(numbered[:2]))] == [2]
    with pytest.raises(ValueError, match=r"`id` of the same type as the others, got \['int', 'str'\]"):
        from_argilla(to_argilla(Dataset.from_list(numbered[:1])) + to_argilla(collected.select([2])))
    records = to_argilla(collected)
    with pytest.raises(ValueError, match="no record has a submitted response"):
        from_argilla(records, "other")
    records[1]["responses"]["ranking"][0]["value"][0]["value"] = "completion-9"
    with pytest.raises(ValueError, match="row 1.*ranks 'completion-9'"):
        from_argilla(records)
    del records[0]["fields"]["prompt"]
    with pytest.raises(ValueError, match="row 0.*field `prompt`: is missing"):
        from_argilla(records)
