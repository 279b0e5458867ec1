"""The ground floor, which imports no package: files that survive a power cut, and what messages are made of."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}
_BROKEN = {errno.EIO}

# ------------------------------------------------------------------------------------------ files


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder that may not be there; of a link only the link, never what it points to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one step: it holds the old text or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value, indent: int = 2) -> None:
    """Replace `path` in one step: it holds the old value or the new one, never a part."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def unwritable(folder: str | Path) -> str | None:
    """Why nothing can be written below a folder that may not exist yet, or None."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"{nearest} is a file"
    if not os.access(nearest, os.W_OK):
        return f"{nearest} may not be written to"
    return None


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_digest(data: str | bytes) -> str:
    """16 hex digits that name some data: the first of its sha256."""
    if isinstance(data, str):
        data = data.encode()
    return hashlib.sha256(data).hexdigest()[:16]


def aside_of(folder: Path) -> Path:
    """Where a folder is written until it is whole: .NAME.partial beside it."""
    return folder.with_name(f".{folder.name}.partial")


def let_others_read(folder: Path) -> None:
    """Give the weights the permissions that any new file would have: safetensors writes files for their owner alone."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def publish(folder: Path, aside: Path | None = None) -> None:
    """Flush a finished folder to the disk, then rename it to `folder`, in place of one that is there.

    The old folder is renamed to `.NAME.old` first and removed last. So a kill at any moment leaves the old folder or
    the new one, whole, under `folder` or under `.NAME.old`.

    Args:
        aside: where it was written; None = `aside_of(folder)`.
    """
    aside = aside or aside_of(folder)
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    retired = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        remove(retired)  # left by a kill after the folder's own rename
        os.replace(folder, retired)
    os.replace(aside, folder)
    flush(folder.parent)
    remove(retired)


def put_back(folder: Path) -> None:
    """Rename `.NAME.old` back where a kill came between the two renames of `publish`."""
    retired = folder.with_name(f".{folder.name}.old")
    if retired.exists() and not folder.exists():
        os.replace(retired, folder)


def retire(folder: Path) -> None:
    """Remove a folder, but rename it first: so a kill never leaves half of it under its name."""
    retired = folder.with_name(f".{folder.name}.old")
    remove(retired)
    os.replace(folder, retired)
    remove(retired)


def seal(body: dict) -> dict:
    """`body` with a checksum of itself under "check"."""
    return body | {"check": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def is_sealed(body) -> bool:
    """Whether nothing has changed since `seal`."""
    return isinstance(body, dict) and seal({key: body[key] for key in body if key != "check"}) == body


def read_json(path: Path):
    """What a JSON file holds; of a key given twice the last value counts. Raises ValueError if it is not JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_strictly(path: Path) -> tuple[object, list[str]]:
    """What a JSON file written by a person holds, and what in it is ambiguous: a key given twice, NaN, infinity.

    Raises:
        ValueError: it is not JSON.
        OSError: it cannot be read.
    """
    problems = []

    def pairs(items: list) -> dict:
        names = Counter(name for name, _ in items)
        problems.extend(f"{name}: given twice in {path}; keep one" for name in sorted(names) if names[name] > 1)
        return dict(items)

    def constant(name: str) -> int:
        problems.append(f"{path}: {name} is not a number")
        return 0

    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant), problems
    except RecursionError:
        raise ValueError("nested too deeply") from None


# ------------------------------------------------------------------------------------------ words


class RunError(Exception):
    """A run cannot start or continue, for a reason that a person can act on: the message is all they need to read."""


def is_disk_error(error: BaseException) -> bool:
    """Whether a file is refused for want of room or of permission, or by a broken disk: no fault of the code."""
    if type(error).__name__ == "SafetensorError":
        words = str(error)  # it has no number, only Rust's words for one, of which 0.5 has others
        return "os error" in words or "IoError(Os" in words
    return isinstance(error, OSError) and error.errno in _NO_ROOM | _NOT_ALLOWED | _BROKEN


def refusal_of_file(error: BaseException) -> str:
    """Why a file was refused, and what helps; of an error that is not the disk's, only what it says itself."""
    if not is_disk_error(error):
        return str(error)
    number = getattr(error, "errno", None)
    if number in _NOT_ALLOWED:
        return f"{error}: change its permissions, or take another folder"
    if number in _BROKEN:
        return f"the disk fails: {error}: take another one"
    return f"the disk refuses what is written: {error}: make room"


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a command, and say in a sentence why it was not done.

    Returns:
        0; 2 where it raises RunError, for refused input; 1 where the disk is full, forbids a file, or is broken.
    """
    try:
        work()
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    except Exception as error:
        if not is_disk_error(error):
            raise
        print(f"{refusal_of_file(error)}, and give the same command again", file=sys.stderr)
        return 1
    return 0


def hide_bar_unless(shown: bool) -> bool | None:
    """tqdm's `disable`: True, or None, which shows a bar on a terminal and not in a file."""
    return None if shown else True


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "step"), plural(2000, "step")
    ('1 step', '2,000 steps')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
