"""Where values come from: --key value on the command line, and a JSON file."""

from dataclasses import Field
from pathlib import Path
from typing import Any

from configuration.keys import value_from_text
from utils import read_strictly


def read_command_line(argv: list[str], keys: dict[str, Field]) -> tuple[dict[str, Any], str | None, list[str]]:
    """--key value and --key=value pairs as (values, config path, problems)."""
    words = _split_at_equals(argv)
    values: dict[str, Any] = {}
    config = None
    problems = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word}: expected --key value")
        elif not words or words[0].startswith("--"):
            problems.append(f"{word}: a value must follow")
        elif word == "--config":
            config = words.pop(0)
        else:
            name = word[2:]
            kind = keys[name].type if name in keys else None
            values[name] = value_from_text(kind, words.pop(0))
    return values, config, problems


def _split_at_equals(argv: list[str]) -> list[str]:
    words = []
    for word in argv:
        if word.startswith("--") and "=" in word:
            words.extend(word.split("=", 1))
        else:
            words.append(word)
    return words


def read_config(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """A config file as (values, problems): one flat object, no key twice, no NaN. None if it is not one at all."""
    try:
        values, problems = read_strictly(Path(path))
    except OSError as error:
        return None, [f"--config {path}: {error.strerror}"]
    except ValueError as error:
        return None, [f"--config {path}: not JSON ({error})"]
    if not isinstance(values, dict):
        return None, [f"--config {path}: must be one object of keys and values"]
    return values, problems


def missing_problems(missing: list[str], config: str | None) -> list[str]:
    """What is said of required keys without a value: a line of each, or one of all if no config file was given.

    Args:
        config: the file's path, None if there is none.
    """
    if missing and config is None:
        return [f"no --config, and these keys are missing: {', '.join(missing)}; try --config configs/config.json"]
    return [f"{name}: missing; give it in the config file or as --{name}" for name in missing]
