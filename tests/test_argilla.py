"""Argilla's records and back: nothing is changed on the way, ties included."""

import json
import uuid

import pytest
from datasets import Dataset

from trl_ext.argilla import from_argilla, to_argilla


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
    """What Argilla's client makes of an answer that it reads from its server."""
    record = {"id": "1", "fields": {"prompt": "a", "first": "x", "second": "y", "third": "z"}}
    response = {"value": ["third", "first"], "user_id": ANN, "status": "submitted"}
    rankings = from_argilla([record | {"responses": {"best": [response, response | {"status": "draft"}]}}], "best")
    assert rankings["ranks"][:] == [[2, None, 1]] and rankings["completions"][:] == [["x", "y", "z"]]


def test_what_cannot_be_taken_over_is_named(collected):
    with pytest.raises(ValueError, match="row 0.*conversation"):
        chat = [{"role": "user", "content": "a"}]
        replies = [[{"role": "assistant", "content": text}] for text in "xy"]
        to_argilla(Dataset.from_list([{"prompt": chat, "completions": replies, "ranks": [1, 2]}]))
    with pytest.raises(ValueError, match="row 0.*amount to none"):
        pairs = [[0, 1, 0], [1, 2, 0], [0, 2, 1]]
        to_argilla(Dataset.from_list([{"prompt": "a", "completions": ["x", "y", "z"], "pairs": pairs}]))
    records = to_argilla(collected)
    with pytest.raises(ValueError, match="no record has a submitted response"):
        from_argilla(records, "other")
    records[1]["responses"]["ranking"][0]["value"][0]["value"] = "completion-9"
    with pytest.raises(ValueError, match="row 1.*ranks 'completion-9'"):
        from_argilla(records)
    del records[0]["fields"]["prompt"]
    with pytest.raises(ValueError, match="row 0.*field `prompt`: is missing"):
        from_argilla(records)
