"""The study of methods: its rewards by hand."""

import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from comparison.tasks.toys import chosen, counted, decided, level, symbol_tokenizer  # noqa: E402


def ids_of(text):
    return symbol_tokenizer()(text)["input_ids"]


def test_a_count_goes_round():
    assert counted("i", ids_of("j a b c")) == [1 / 8] * 4
    assert counted("a d i", ids_of("j j a <eos>")) == [1 / 8, 0, 1 / 8, 0]
    assert counted("a", ids_of("c d")) == [0, 1 / 8]  # what follows a wrong symbol may be right
    assert counted("j", ids_of("<pad> a")) == [0, 0]


def test_the_first_symbol_decides_if_all_are_there():
    noise = " b" * 32
    assert decided("i", ids_of("b" + noise)) == [0] * 32 + [1]
    assert sum(decided("i", ids_of("c" + noise))) == sum(decided("i", ids_of("b b <eos>"))) == 0


def test_symbols_of_a_kind_and_the_level_of_a_prompt():
    assert sum(chosen("a", ids_of("a c d <eos>"))) == pytest.approx(2 / 256)
    assert level("a j j j") == 0 and level("j a a a") == 2
