"""Words of a command line become values, or a sentence.

python -m pytest tests/configuration/test_words.py
"""

import argparse

import pytest

from configuration.words import boolean, in_words, number_of


def read(reader, word: str):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--flag", type=reader)
    return parser.parse_args(["--flag", word]).flag


def test_words_become_values():
    assert [read(boolean, word) for word in ("true", "False", "TRUE")] == [True, False, True]
    assert read(number_of("jobs"), "12") == 12
    assert read(in_words(float), "1e-3") == 1e-3


@pytest.mark.parametrize(("reader", "word", "said"), [
    (boolean, "yes", "'yes' is neither true nor false"),
    (number_of("jobs"), "0", "'0' is no number of jobs"),
    (number_of("parts"), "-1", "'-1' is no number of parts"),
    (in_words(float), "a", "could not convert string to float: 'a'"),
])  # fmt: skip
def test_others_are_refused_in_words(reader, word, said):
    with pytest.raises(argparse.ArgumentError, match=said):
        read(reader, word)
