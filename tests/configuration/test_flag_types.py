"""Words of a command line become values, or a sentence.

python -m pytest tests/configuration/test_flag_types.py
"""

import argparse

import pytest

from configuration.flag_types import argument_type, boolean, long_dtype, number_of, short_dtype


def read(reader, word: str):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--flag", type=reader)
    return parser.parse_args(["--flag", word]).flag


def test_flag_types_become_values():
    assert [read(boolean, word) for word in ("true", "False", "TRUE")] == [True, False, True]
    assert read(number_of("jobs"), "12") == 12
    assert read(argument_type(float), "1e-3") == 1e-3


@pytest.mark.parametrize(("word", "short", "long"), [
    ("bf16", "bf16", "bfloat16"),
    ("bfloat16", "bf16", "bfloat16"),
    ("fp16", "fp16", "float16"),
    ("float32", "fp32", "float32"),
    ("int8", "int8", "int8"),  # refused by the flag's choices
])  # fmt: skip
def test_types_of_numbers_have_two_names(word, short, long):
    assert (read(short_dtype, word), read(long_dtype, word)) == (short, long)


@pytest.mark.parametrize(("reader", "word", "said"), [
    (boolean, "yes", "'yes' is neither true nor false"),
    (number_of("jobs"), "0", "'0' is not a number of jobs"),
    (number_of("parts"), "-1", "'-1' is not a number of parts"),
    (argument_type(float), "a", "could not convert string to float: 'a'"),
])  # fmt: skip
def test_others_are_refused_argument_type(reader, word, said):
    with pytest.raises(argparse.ArgumentError, match=said):
        read(reader, word)
