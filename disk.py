"""Files that survive: made durable, replaced in one step, removed without following links, and JSON read strictly."""

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder that may not be there; of a link only the link, never what it points to."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value) -> None:
    """Replace `path` in one step: it holds the old value or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def seal(body: dict) -> dict:
    """`body` with a checksum of itself under "check"."""
    return body | {"check": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def is_sealed(body) -> bool:
    """Whether nothing has changed since `seal`."""
    return isinstance(body, dict) and seal({key: body[key] for key in body if key != "check"}) == body


def read_json(path: Path):
    """What a JSON file holds; later duplicates win, as in any reader. Raises ValueError when it is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_strictly(path: Path) -> tuple[object, list[str]]:
    """What a JSON file written by a person holds, and what in it is ambiguous: a key given twice, NaN, infinity.

    Raises:
        ValueError: it is no JSON.
        OSError: it cannot be read.
    """
    problems = []

    def pairs(items: list) -> dict:
        names = Counter(name for name, _ in items)
        problems.extend(f"{name}: given twice in {path}; keep one" for name in sorted(names) if names[name] > 1)
        return dict(items)

    def constant(name: str) -> int:
        problems.append(f"{path}: {name} is no number")
        return 0

    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant), problems
    except RecursionError:
        raise ValueError("nested too deeply") from None
