"""One value of a configuration: from text, of the right kind, within its bounds.

Pure functions of a dataclass field, whose metadata hold unit, bounds and choices (arguments.py), and of a value.
"""

import difflib
import json
import os
from pathlib import Path
from typing import Any, get_args


def from_text(kind: Any, text: str) -> Any:
    """A word of the command line as the JSON value it stands for; texts stay texts."""
    if kind is str:
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none", "null") else text)
    except ValueError:
        return None if text.lower() == "none" else text


def value_problem(f, value: Any) -> str | None:
    """Why `value` cannot be the value of field `f`, or None."""
    shown, kinds = json.dumps(value), get_args(f.type) or (f.type,)
    if not any(_is_a(kind, value) for kind in kinds):
        names = " or ".join(
            {
                str: "a text",
                int: "a whole number",
                float: "a number",
                bool: "true or false",
                list: "a list of texts",
                type(None): "null",
            }[kind]
            for kind in kinds
        )
        hint = "; leave out the quotes" if isinstance(value, str) and _is_a(kinds[0], from_text(None, value)) else ""
        return f"{shown} is not {names}{hint}"
    low, above, choices = f.metadata["low"], f.metadata["above"], f.metadata["choices"]
    if value is None:
        return None
    if low is not None and value < low:
        return f"{shown} is below {low}"
    if above is not None and value <= above:
        return f"{shown} must be above {above}"
    if choices and value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        return f"{shown} is none of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")
    return "must not be empty" if value == "" and f.metadata["unit"] != "text" else None


def coerced(f, value: Any) -> Any:
    """1 as 1.0 and ~ as the home folder, so that args.json does not depend on how it was written."""
    if f.metadata["unit"].startswith("folder") and isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    return float(value) if f.type is float else value


def unwritable(folder: str) -> str | None:
    """Why nothing can be written below a folder that may not exist yet, or None."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK) else f"{nearest} may not be written to"


def _is_a(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) < 1e300  # also not NaN
    if kind is list:
        return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
