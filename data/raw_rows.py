"""The rows of raw files that are written row by row: JSON lines, a JSON array, CSV and TSV; each also as .gz.

Every reader gives (row, object) for a row of column names and values, and (row, text) for a row that cannot be used:
the text says why. Rows are counted from 0. Files are read piece by piece, so that memory does not grow with them.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from utils import first_line

Row = tuple[int, dict | str]
_CHUNK = 2**16  # characters of a JSON array read at a time; larger ones are slower, since every value moves the rest
_FIELD_LIMIT = 2**30  # characters of a CSV field; the csv module's own limit, 131,072, is less than a long document
NOT_UTF8 = "is not UTF-8: save the file as UTF-8"
NOT_OBJECT = "is not an object of column names and values"
NOTHING_AFTER = "nothing after it is read"


class RawError(ValueError):
    """A raw file that cannot be read; the message names the row, not the file."""


def rows_of(path: Path, suffix: str) -> Iterator[Row]:
    """The rows of a file.

    Args:
        suffix: .jsonl, .json, .csv or .tsv: what the file is, compressed or not.

    Raises:
        RawError: nothing can be read from some row on.
    """
    rows = 0
    try:
        with _open(path) as file:
            for number, value in _reader(file, suffix):
                rows = number + 1
                yield number, value
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RawError(f"damaged after row {rows} ({first_line(error)}): fetch or write it again") from None
    except OSError as error:
        raise RawError(f"cannot be read ({error.strerror or first_line(error)})") from None


def is_table(path: Path) -> bool:
    """Whether a .json file holds rows, an array or at least two lines of objects, rather than settings."""
    try:
        with _open(path) as file:
            begin = file.read(_CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")
    except (OSError, EOFError, zlib.error):
        return True  # the survey says what is wrong with it
    if not begin.startswith(b"{"):
        return begin.startswith(b"[") or not begin
    first, newline, rest = begin.partition(b"\n")
    if not newline:
        return len(begin) > _CHUNK // 2  # one long line: of several, surely
    return first.rstrip().endswith(b"}") and rest.lstrip().startswith(b"{")


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return open(path, "rb")


def _reader(file: BinaryIO, suffix: str) -> Iterator[Row]:
    """The reader that fits what the file is."""
    if suffix == ".csv":
        return _separated(file, ",")
    if suffix == ".tsv":
        return _separated(file, "\t")
    if suffix == ".json" and _begins_an_array(file):
        return _array(file)
    return _lines(file)


# ----------------------------------------------------------------------------------------------- JSON


def _lines(file: BinaryIO) -> Iterator[Row]:
    """One object per line that is not blank."""
    row = 0
    for line in file:
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except UnicodeDecodeError:
            value = NOT_UTF8
        except (ValueError, RecursionError) as error:
            value = _not_json(error)
        else:
            if not isinstance(value, dict):
                value = NOT_OBJECT
        yield row, value
        row += 1


def _not_json(error: Exception) -> str:
    reason = first_line(error).partition(": line")[0]
    return f"is not JSON ({reason}): fix it, and check again"


def _begins_an_array(file: BinaryIO) -> bool:
    """Whether the first character is an opening bracket; the file is read from its beginning afterwards."""
    begin = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    file.seek(0)
    return begin.startswith(b"[")


def _array(file: BinaryIO) -> Iterator[Row]:
    """The objects of one array. Nothing after a value that is not JSON can be read: it is the last row."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    decode = json.JSONDecoder().raw_decode
    row = 0
    try:
        buffer = text.read(_CHUNK).lstrip().removeprefix("[")
        while True:
            buffer, value, problem = _next_value(buffer, text, decode)
            if problem is None and value is None:
                return
            if problem is None and not isinstance(value, dict):
                problem = NOT_OBJECT
            yield row, value if problem is None else problem
            row += 1
            if problem not in (None, NOT_OBJECT):
                return
    except UnicodeDecodeError:
        yield row, NOT_UTF8


def _next_value(buffer: str, text: io.TextIOWrapper, decode) -> tuple[str, object, str | None]:
    """Take the next value of an array off the buffer, which is filled from `text` as far as it takes.

    Returns:
        (the rest of the buffer, the value, None), or in their place (buffer, None, what is wrong); (buffer, None, None)
        where the array ends.
    """
    wanted = _CHUNK
    while True:
        buffer = buffer.lstrip()
        try:
            if not buffer:
                raise ValueError("the array is not closed")
            if buffer.startswith("]"):
                after = (buffer[1:] + text.read(wanted)).strip()
                return buffer, None, _not_json(ValueError("more follows the end of the array")) if after else None
            value, end = decode(buffer)
            rest = buffer[end:].lstrip()
            if not rest:
                raise ValueError("the array is not closed")  # perhaps the value itself is cut
            if rest[0] not in ",]":
                return buffer, None, _not_json(ValueError("a comma is missing"))
            return rest.removeprefix(","), NOT_OBJECT if value is None else value, None
        except (ValueError, RecursionError) as error:
            more = text.read(wanted)
            if not more or isinstance(error, RecursionError):
                return buffer, None, _not_json(error)
            buffer += more
            wanted *= 2  # a value of n characters is decoded log(n) times, not n


# ---------------------------------------------------------------------------------------- CSV and TSV


def _separated(file: BinaryIO, separator: str) -> Iterator[Row]:
    """A line of names, then a row for each record; fields may be quoted, as spreadsheets write them."""
    csv.field_size_limit(_FIELD_LIMIT)
    # Bytes that are not UTF-8 become lone surrogates, so that the rows after them can be read.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(text, delimiter=separator, strict=True)
    row = 0
    try:
        names = next(records, [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if not all(map(_is_utf8, names)):
            raise RawError(f"its first line {NOT_UTF8}")
        if twice:
            raise RawError(f"column {twice[0]!r} occurs twice in the first line: rename one")
        for fields in records:
            if not fields:
                continue
            if len(fields) != len(names):
                yield row, f"has {len(fields)} fields, but the first line names {len(names)} columns: fix it"
            elif not all(map(_is_utf8, fields)):
                yield row, NOT_UTF8
            else:
                yield row, dict(zip(names, fields, strict=True))
            row += 1
    except csv.Error as error:
        yield row, f"cannot be read ({first_line(error)}): quote its fields as spreadsheets do; {NOTHING_AFTER}"


def _is_utf8(text: str) -> bool:
    """Whether a text that was read with surrogates in place of foreign bytes has none of them."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
