"""The rows of a source that are good, kept on disk while its tuples are made.

A piece of a source is a folder:

    texts        the texts end to end, UTF-8
    rows         a record for each pair of texts, ROW
    piece.json   what it was made from and what was left out, written last

Texts stay on disk and are read when a tuple is written. Held in memory are 170 bytes a pair at most (measured on a
million pairs, and 190 for clustering), whatever the length of its texts.
"""

import mmap
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from data.raw_rows import Row
from data.store_writer import text_key
from tuples.sources.cleaning import Clean, LeftOut, clean
from tuples.sources.description import ENTAILMENT, NEUTRAL, Source
from tuples.sources.report import Tally, tally_of
from utils import aside_of, publish, read_json, remove, write_json

VERSION = 1  # of the files
ROW = np.dtype(
    [
        ("input", "<i4"),  # number of the file
        ("row", "<i8"),  # in that file
        ("begin", "<i8"),  # of the first text among the bytes of `texts`
        ("middle", "<i8"),  # where the second begins
        ("end", "<i8"),
        ("label", "<i4"),  # a number of the piece's labels; 0 where there are none
        ("id", "V16"),  # stands for the id; zeros where there is none
        ("texts", "V16"),  # stands for the pair of texts; of symmetric pairs, whichever is first
        ("first", "V16"),  # stands for the first text
    ]
)
_BLOCK = 4096  # source rows between two writes
_NO_ID = bytes(16)


def write_piece(
    folder: Path, rows: Iterable[Row], source: Source, input_number: int, input_name: str, identity: dict
) -> None:
    """Clean the rows of a piece and write what is left of them into a folder that is renamed when it is whole.

    Raises:
        RawError: from `rows`.
    """
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    tally = Tally()
    labels: dict[str, int] = {}  # in the order of first appearance
    position = 0  # bytes of texts written
    rows = iter(rows)
    with open(aside / "texts", "wb") as texts_file, open(aside / "rows", "wb") as rows_file:
        while True:
            block = list(islice(rows, _BLOCK))
            if not block:
                break
            texts = []
            records = []
            for number, found in _cleaned(block, source, input_name, tally):
                label = labels.setdefault(found.label, len(labels)) if found.label else 0
                for pair in found.pairs:
                    first = pair[0].encode()
                    second = pair[1].encode()
                    middle = position + len(first)
                    end = middle + len(second)
                    keys = _keys(first, second, found.id, source)
                    records.append((input_number, number, position, middle, end, label, *keys))
                    texts += [first, second]
                    position = end
            texts_file.write(b"".join(texts))
            rows_file.write(np.array(records, ROW).tobytes())
    facts = {"identity": identity, "labels": list(labels), "tally": tally.as_json()}
    write_json(aside / "piece.json", facts)
    publish(folder, aside)


def _cleaned(block: list[Row], source: Source, input_name: str, tally: Tally) -> Iterator[tuple[int, Clean]]:
    """(row number, what it gives) of the rows that can be used; all others are counted."""
    for number, values in block:
        tally.read += 1
        name = f"{input_name}:{number}"
        if isinstance(values, str):
            tally.leave_out(values, name)
            continue
        try:
            found = clean(values, source)
        except LeftOut as reason:
            tally.leave_out(reason.rule, name, reason.value)
            continue
        for note in dict.fromkeys(found.notes):
            tally.use_in_part(note, name)
        yield number, found


def _keys(first: bytes, second: bytes, own_id: str, source: Source) -> tuple[bytes, bytes, bytes]:
    """What stands for the id, for the pair and for the first text."""
    of_first = text_key(first)
    of_both = of_first
    if second:
        both = [of_first, text_key(second)]
        if source.kind in ("sts", "duplicates"):
            both.sort()
        of_both = text_key(b"".join(both))
    of_id = text_key(own_id.encode()) if own_id else _NO_ID
    return of_id, of_both, of_first


def is_written(folder: Path, identity: dict) -> bool:
    """Whether a piece of this identity is there, whole."""
    try:
        return read_json(folder / "piece.json")["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        return False


def in_one_order(labels_of_pieces: list[list[str]]) -> list[str]:
    """All labels once: those of NLI in their own order, then the others by name."""
    names = set()
    for labels in labels_of_pieces:
        names.update(labels)
    usual = [name for name in (ENTAILMENT, NEUTRAL) if name in names]
    return usual + sorted(names - set(usual))


class Rows:
    """The good rows of a source, of all its pieces in order.

    Texts are numbered: of pair i the first is 2i, the second 2i + 1. The texts of the labels follow.
    """

    def __init__(self, folders: list[Path]):
        self.pieces = [_records(folder) for folder in folders]
        self.maps = [_mapped(folder / "texts") for folder in folders]
        self.tally = Tally()
        labels_of_pieces = []
        for folder in folders:
            facts = read_json(folder / "piece.json")
            self.tally.merge(tally_of(facts["tally"]))
            labels_of_pieces.append(facts["labels"])
        self.labels = in_one_order(labels_of_pieces)
        number_of = {label: number for number, label in enumerate(self.labels)}
        self._label_numbers = []  # of each piece: its own labels' numbers among all, int64 [its labels]
        for labels in labels_of_pieces:
            numbers = [number_of[label] for label in labels]
            self._label_numbers.append(np.array(numbers or [0], np.int64))  # without labels all records have 0

    def __len__(self) -> int:
        """How many pairs there are."""
        return sum(len(records) for records in self.pieces)

    def column(self, name: str) -> np.ndarray:
        """A field of all records, [n]."""
        return np.concatenate([records[name] for records in self.pieces])

    @cached_property
    def label(self) -> np.ndarray:
        """The number of each pair's label among `labels`, int64 [n]; 0 where there are none."""
        found = []
        for records, numbers in zip(self.pieces, self._label_numbers, strict=True):
            found.append(numbers[records["label"]])
        return np.concatenate(found)

    def keys(self, name: str) -> np.ndarray:
        """A field of keys as two numbers for each pair, uint64 [n, 2]."""
        return np.frombuffer(self.column(name).tobytes(), np.uint64).reshape(-1, 2)

    @cached_property
    def source_rows(self) -> np.ndarray:
        """A number for the source row of each pair, int64 [n]: the pairs of one row have the same; they ascend."""
        places = np.stack([self.column("input").astype(np.int64), self.column("row")])  # [2, n]
        begins = np.ones(len(self), bool)
        begins[1:] = (places[:, 1:] != places[:, :-1]).any(axis=0)
        return np.cumsum(begins) - 1

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each text of the pairs begins and ends, in bytes of its piece: two int64 [2n]."""
        middle = self.column("middle")
        begins = np.stack([self.column("begin"), middle], axis=1).ravel()
        ends = np.stack([middle, self.column("end")], axis=1).ravel()
        return begins, ends

    def texts(self, numbers: np.ndarray) -> list[str | None]:
        """The texts of these numbers, int [m]; None for -1."""
        begins, ends = self._places
        first_pairs = np.cumsum([0] + [len(records) for records in self.pieces])
        in_pairs = np.clip(numbers, 0, max(len(begins) - 1, 0))
        pieces = np.searchsorted(first_pairs, in_pairs // 2, side="right") - 1
        found = []
        places = zip(numbers.tolist(), pieces.tolist(), begins[in_pairs].tolist(), ends[in_pairs].tolist(), strict=True)
        for number, piece, begin, end in places:
            if number < 0:
                found.append(None)
            elif number < len(begins):
                found.append(self.maps[piece][begin:end].decode())
            else:
                found.append(self.labels[number - len(begins)])
        return found


def _records(folder: Path) -> np.ndarray:
    """The records of a piece, mapped."""
    path = folder / "rows"
    if not path.stat().st_size:
        return np.zeros(0, ROW)
    return np.memmap(path, ROW, mode="r")


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, mapped."""
    if not path.stat().st_size:
        return b""  # an empty file cannot be mapped
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
