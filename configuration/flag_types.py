"""Readers of flags whose values argparse has no type for; each is given to it as `type`."""

import argparse
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

T = TypeVar("T")
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # as torch calls them -> as launchers do
LONG_DTYPES = {short: long for long, short in SHORT_DTYPES.items()}


def argument_type(read: Callable[[str], T]) -> Callable[[str], T]:
    """A reader for argparse's `type`: argparse shows the message of an ArgumentTypeError, not that of a ValueError."""

    @wraps(read)
    def type_of_flag(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return type_of_flag


@argument_type
def boolean(text: str) -> bool:
    """A truth value, written true or false in any case."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def number_of(things: str) -> Callable[[str], int]:
    """A reader of a number from 1 on; `things` is what it counts, in the plural, for the message."""

    @argument_type
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{text!r} is not a number of {things}")
        return int(text)

    return read


def short_dtype(text: str) -> str:
    """A type of numbers as launchers call it, bf16, whichever name was given; other words as they are."""
    return SHORT_DTYPES.get(text, text)


def long_dtype(text: str) -> str:
    """A type of numbers as torch calls it, bfloat16, whichever name was given; other words as they are."""
    return LONG_DTYPES.get(text, text)
