"""Tokenising in parts: which rows of which files each of N commands takes, and what a part keeps for the join.

The raw files, in the order of their names, are laid end to end by their bytes and cut into N equal stretches; of a file
that a cut goes through each command takes the rows that lie on its side. Every command finds the same cuts, from the
sizes of the files alone. A part of a file is a token store of its own below OUTPUT_DIR/.parts, with three more files:

    keys      [texts] 16 bytes    the key of each text, by which it is found again in other parts
    cut       [texts] 1 byte      whether it was longer than was kept
    queries   [rows]  8 bytes     a number for the instruction of each query

data/joining.py makes of all parts of a file what one command would have written, byte for byte.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import raw_formats
from data.instructions import instruction_numbers
from data.store_writer import StoreWriter
from data.token_store import PARTS
from utils import file_digest

SIDE_FILES = ("keys", "cut", "queries")


@dataclass(frozen=True)
class Part:
    """One of N commands: its number counts from 1."""

    number: int
    of: int

    def __str__(self) -> str:  # noqa: D105
        return f"{self.number}/{self.of}"

    def folder(self, output_dir: Path) -> Path:
        """Where the command writes."""
        return output_dir / PARTS / f"{self.number}-of-{self.of}"


def read_part(text: str) -> Part:
    """I/N as a part. Raises ValueError if it is not one."""
    number, slash, of = text.partition("/")
    if not slash or not number.isdecimal() or not of.isdecimal() or not 1 <= int(number) <= int(of):
        raise ValueError(f"{text!r} is not I/N, with I from 1 to N, as in 1/8")
    return Part(int(number), int(of))


@dataclass(frozen=True)
class Share:
    """Which stretch of a file a part takes: from `begin` to `end` of `whole`, in bytes."""

    begin: int
    end: int
    whole: int

    def rows(self, count: int) -> range:
        """The same stretch of the file's `count` rows. Where one part's ends the next one's begins."""
        return range(count * self.begin // self.whole, count * self.end // self.whole)


def deal(sizes: list[int], part: Part) -> list[Share | None]:
    """What a part takes of each file, None for nothing.

    Args:
        sizes: of the files, in bytes.

    >>> deal([6, 2], Part(1, 2)), deal([6, 2], Part(2, 2))
    ([Share(begin=0, end=4, whole=6), None], [Share(begin=4, end=6, whole=6), Share(begin=0, end=2, whole=2)])
    """
    total = sum(sizes)
    first = total * (part.number - 1) // part.of
    last = total * part.number // part.of
    shares = []
    start = 0  # of the file, when all are laid end to end
    for size in sizes:
        begin = min(max(first - start, 0), size)
        end = min(max(last - start, 0), size)
        shares.append(Share(begin, end, size) if begin < end else None)
        start += size
    return shares


def holders(sizes: list[int], count: int) -> list[list[int]]:
    """Of each file the numbers of the parts to which some of it falls, of `count` parts."""
    found = [[] for _ in sizes]
    for number in range(1, count + 1):
        for place, share in enumerate(deal(sizes, Part(number, count))):
            if share is not None:
                found[place].append(number)
    return found


def size_to_deal(path: Path, max_rows: int) -> int:
    """The bytes that a file counts as: of a Parquet file with more rows than are sampled, that share of its bytes."""
    size = max(path.stat().st_size, 1)
    rows = raw_formats.rows_of_schema(path)
    if max_rows and rows is not None and rows > max_rows:
        return max(size * max_rows // rows, 1)
    return size


class PartWriter(StoreWriter):
    """Writes a part of a store, with the files that the join needs."""

    TEMPORARY = ("journal.json", "signatures")

    def add_texts(
        self, keys: list[bytes], tokens: np.ndarray, lengths: np.ndarray, is_cut: np.ndarray | None = None
    ) -> None:
        """What `StoreWriter.add_texts` does; `is_cut` must be given, and is kept."""
        super().add_texts(keys, tokens, lengths, is_cut)
        self.files["cut"].write(is_cut.astype(np.uint8))

    def note_queries(self, queries: list[str]) -> None:
        """Keep a number for the instruction of each query."""
        self.files["queries"].write(instruction_numbers(queries))

    def more_facts(self) -> dict:
        """The checksums of the files that a store does not have."""
        return {"part_sha256": {name: file_digest(self.partial / name) for name in SIDE_FILES}}

    def _sizes(self, journal: dict) -> dict[str, int]:
        return super()._sizes(journal) | {"cut": journal["texts"], "queries": 8 * journal["rows"]}
