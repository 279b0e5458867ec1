"""One key: how it is declared, and whether a value is of the right kind and within its bounds.

A key is a field of a dataclass, whose metadata hold what is known of it. Pure functions of the field and of a value.
"""

import difflib
import json
import os
from dataclasses import MISSING, Field, field
from typing import Any, get_args, get_origin

_KINDS_IN_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    dict: "an object",
    type(None): "null",
}


def key(
    group: str,
    unit: str,
    effect: str,
    default: Any = MISSING,
    low=None,
    above=None,
    high=None,
    choices=None,
    may_change=False,
) -> Any:
    """Declare a key.

    Args:
        group: under which `--help` shows it.
        unit: of its value; "" for none. A unit that begins with "folder" or "file" is a path.
        effect: what it does, and what turns it off.
        low, above: the smallest value, or the value that it must exceed.
        high: the largest value.
        choices: all values that there are.
        may_change: a resumed run may have another value, because it alters nothing that is trained.
    """
    facts = {
        "group": group,
        "unit": unit,
        "effect": effect,
        "low": low,
        "above": above,
        "high": high,
        "choices": choices,
        "may_change": may_change,
    }
    return field(default=default, metadata=facts)


def free_key(*words, **named) -> Any:
    """Declare a key that a resumed run may change."""
    return key(*words, **named, may_change=True)


def show_default(f: Field) -> str:
    """A key's default as JSON."""
    return "*required*" if f.default is MISSING else json.dumps(f.default)


def value_problem(f: Field, value: Any) -> str | None:
    """Why `value` cannot be the value of key `f`, or None."""
    kinds = get_args(f.type) or (f.type,)
    if not any(_is_a(kind, value) for kind in kinds):
        return _wrong_kind(kinds, value)
    if value is None:
        return None
    shown = json.dumps(value)
    low, above, high = f.metadata["low"], f.metadata["above"], f.metadata["high"]
    choices = f.metadata["choices"]
    if low is not None and value < low:
        return f"{shown} is below {low}"
    if above is not None and value <= above:
        return f"{shown} must be above {above}"
    if high is not None and value > high:
        return f"{shown} is above {high}"
    if choices and value not in choices:
        return f"{shown} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
    if value == "" and f.metadata["unit"] != "text":
        return "must not be empty"
    return None


def _wrong_kind(kinds: tuple, value: Any) -> str:
    problem = f"{json.dumps(value)} is not {' or '.join(_KINDS_IN_WORDS[kind] for kind in kinds)}"
    if isinstance(value, str) and _is_a(kinds[0], value_from_text(None, value)):
        problem += "; leave out the quotes"
    return problem


def _is_a(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):  # True is an int to Python, and no number to a person
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e300  # also not NaN
    if get_origin(kind) is list:
        (of,) = get_args(kind)
        return isinstance(value, list) and bool(value) and all(_is_a(of, item) for item in value)
    return isinstance(value, kind)


def value_from_text(kind: Any, text: str) -> Any:
    """A word of the command line as the JSON value it stands for; a text stays one, even if it looks like a number."""
    if kind is str:
        return text
    lowered = text.lower()
    if lowered == "none":
        return None
    try:
        value = json.loads(lowered if lowered in ("true", "false", "null") else text)
    except ValueError:
        return text
    if str in get_args(kind) and isinstance(value, int | float):  # a tag such as 1.0, a commit such as 1234567
        return text
    return value


def normalised(f: Field, value: Any) -> Any:
    """1 as 1.0 and ~ as the home folder, so that args.json does not depend on how it was written."""
    if f.metadata["unit"].startswith(("folder", "file")) and isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    return float(value) if f.type is float else value


def did_you_mean(word: str, known) -> str:
    """; did you mean ...? where a known word is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
