"""Words of a command line that argparse has no type for: each function is given to it as `type`."""

import argparse
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

T = TypeVar("T")


def in_words(read: Callable[[str], T]) -> Callable[[str], T]:
    """The same reader for argparse, which shows the words of an ArgumentTypeError but not those of a ValueError."""

    @wraps(read)
    def type_of_flag(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return type_of_flag


@in_words
def boolean(text: str) -> bool:
    """A truth value, true or false in any case; ValueError for other words."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def number_of(things: str) -> Callable[[str], int]:
    """A reader of how many there are, one at least; `things` in the plural, for the message."""

    @in_words
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{text!r} is no number of {things}")
        return int(text)

    return read
