"""Retrieval sets as folders in BEIR's layout: queries, documents, and how well which document answers which query.

    queries.jsonl      {"_id": "q1", "text": "..."}                   a line each
    corpus.jsonl       {"_id": "d1", "title": "...", "text": "..."}   title may be missing
    qrels/test.tsv     query-id, corpus-id, score, separated by tabs; the first line may be a header

Of a corpus only ids and the places of its lines are kept; its texts are read when they are asked for.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import RunError, hide_bar_unless

QUERIES, CORPUS, JUDGEMENTS = "queries.jsonl", "corpus.jsonl", "qrels/test.tsv"
_FILES = (QUERIES, CORPUS, JUDGEMENTS)


@dataclass(frozen=True)
class RetrievalSet:
    """n queries, those that are judged, and m documents to find for them."""

    name: str  # of the folder
    query_ids: list[str]  # [n]
    queries: list[str]  # [n], without instruction
    document_ids: list[str]  # [m], descending: of equal scores trec_eval and mteb put the higher id first
    documents: "Documents"  # [m], title and text as one text
    relevance: list[dict[int, int]]  # [n]: document number -> score; above 0 = it answers the query


class Documents:
    """The texts of a corpus, of which slices are read from the disk.

    Args:
        path: of the corpus.
        places: int64 [m], where the line of each document begins, in bytes.
    """

    def __init__(self, path: Path, places: np.ndarray):
        self.path = path
        self.places = places

    def __len__(self) -> int:
        """m."""
        return len(self.places)

    def __getitem__(self, numbers: slice) -> list[str]:
        """The texts of a slice: "title text", or the text alone, as BEIR and mteb join them."""
        texts = []
        with open(self.path, "rb") as file:
            for place in self.places[numbers].tolist():
                file.seek(place)
                texts.append(_joined(json.loads(file.readline())))
        return texts


def read_sets(paths: str, quiet: bool = False) -> tuple[list[RetrievalSet], list[str]]:
    """The sets of some folders, and everything that is wrong with them, one line each.

    Args:
        paths: the folder of a set, or a folder of such folders; several are separated by commas.
        quiet: without progress bars.
    """
    sets: list[RetrievalSet] = []
    problems = []
    for path in filter(None, map(str.strip, paths.split(","))):
        folders, found = find_folders(Path(path).expanduser())
        problems += found
        for folder in folders:
            name = _name(folder)
            if name in [other.name for other in sets]:
                problems.append(f"{folder}: a second set of the name {name}: rename one of the folders")
                continue
            retrieval_set, found = _read(folder, quiet)
            problems += found
            if retrieval_set is not None:
                sets.append(retrieval_set)
    return sets, problems


def read_set(folder: Path) -> RetrievalSet:
    """The set of one folder.

    Raises:
        RunError: with all that is wrong with it, one line each.
    """
    retrieval_set, problems = _read(Path(folder), quiet=False)
    if retrieval_set is None:
        raise RunError("\n".join(problems))
    return retrieval_set


def find_folders(path: Path) -> tuple[list[Path], list[str]]:
    """The folders of the sets at `path`, by name, and why there are none."""
    if not path.is_dir():
        return [], [f"{path}: no such folder"]
    if _holds_part_of_a_set(path):
        return [path], []
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and _holds_part_of_a_set(folder))
    if folders:
        return folders, []
    return [], [f"{path}: neither a retrieval set nor a folder of some: a set has {', '.join(_FILES)}"]


def _name(folder: Path) -> str:
    return folder.absolute().name  # also of "."


def _holds_part_of_a_set(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES)


def _read(folder: Path, quiet: bool) -> tuple[RetrievalSet | None, list[str]]:
    """The set of a folder, or None and what is wrong with it."""
    missing = []
    for name in _FILES:
        if not (folder / name).is_file():
            missing.append(f"{folder / name}: missing; a set has {', '.join(_FILES)}")
    if missing:
        return None, missing
    try:
        return _read_files(folder, quiet)
    except OSError as error:
        return None, [f"{error.filename or folder}: cannot be read: {error.strerror}"]


def _read_files(folder: Path, quiet: bool) -> tuple[RetrievalSet | None, list[str]]:
    """What `_read` gives, for a folder that has all files."""
    problems = Problems()
    queries = _by_id(folder / QUERIES, problems, quiet, lambda _, row: row["text"])
    places = _by_id(folder / CORPUS, problems, quiet, lambda place, _: place)
    judgements = _read_judgements(folder / JUDGEMENTS, queries, places, problems)
    if not places:
        problems.add("no document", folder / CORPUS)
    if not any(score > 0 for scores in judgements.values() for score in scores.values()):
        problems.add("no query has a document of a score above 0", folder / JUDGEMENTS)
    for query in judgements:
        if not queries.get(query, "-").strip():
            problems.add("an empty query", folder / QUERIES, repr(query))
    if problems:
        return None, problems.lines()
    query_ids = [query for query in queries if query in judgements]
    document_ids = sorted(places, reverse=True)
    number_of = {document: number for number, document in enumerate(document_ids)}
    relevance = []
    for query in query_ids:
        relevance.append({number_of[document]: score for document, score in judgements[query].items()})
    documents = Documents(folder / CORPUS, np.array([places[document] for document in document_ids], np.int64))
    texts = [queries[query] for query in query_ids]
    return RetrievalSet(_name(folder), query_ids, texts, document_ids, documents, relevance), []


class Problems:
    """What is wrong, by rule: the first place is named, the others are counted."""

    def __init__(self):
        self.places: dict[tuple[str, Path], list[str]] = {}

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.places)

    def add(self, rule: str, path: Path, place: str = "") -> None:
        """Note that `rule` is broken at a place of a file."""
        self.places.setdefault((rule, path), []).append(place)

    def lines(self) -> list[str]:
        """One for each rule that is broken in a file."""
        lines = []
        for (rule, path), places in self.places.items():
            more = f"; and {len(places) - 1:,} more like it" if len(places) > 1 else ""
            where = f", {places[0]}" if places[0] else ""
            lines.append(f"{path}{where}: {rule}{more}")
        return lines


def _by_id(path: Path, problems: Problems, quiet: bool, value_of: Callable) -> dict:
    """Id -> what `value_of` makes of (where its line begins, what the line says)."""
    found = {}
    for line, place, row in _rows(path, problems, quiet):
        if row["_id"] in found:
            problems.add("an id that an earlier line has", path, f"{line}: {row['_id']!r}")
        found[row["_id"]] = value_of(place, row)
    return found


def _rows(path: Path, problems: Problems, quiet: bool) -> Iterator[tuple[str, int, dict]]:
    """(which line, where it begins, what it says) of the lines that are whole; the others are noted."""
    place = 0
    hidden = hide_bar_unless(not quiet)
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc=str(path), unit="B", unit_scale=True, disable=hidden, leave=False) as bar,
    ):
        for number, text in enumerate(file, start=1):
            row, problem = _row(text)
            if problem:
                problems.add(problem, path, f"line {number}")
            elif row is not None:
                yield f"line {number}", place, row
            place += len(text)
            bar.update(len(text))


def _row(line: bytes) -> tuple[dict | None, str | None]:
    """What a line says, with "_id" a text; or what is wrong with it. Of an empty line neither."""
    if not line.strip():
        return None, None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None, "not JSON"
    if not isinstance(row, dict):
        return None, "not an object with _id and text"
    if isinstance(row.get("_id"), int) and not isinstance(row["_id"], bool):
        row["_id"] = str(row["_id"])
    for name in ("_id", "text"):
        if not isinstance(row.get(name), str):
            return None, f"{name} is missing, or not a text"
    if not isinstance(row.get("title") or "", str):
        return None, "title is not a text"
    try:
        _joined(row).encode()
    except UnicodeEncodeError:
        return None, "half of a surrogate pair, which no tokenizer reads"
    return row, None


def _joined(row: dict) -> str:
    """A document as one text."""
    if row.get("title"):
        return f"{row['title']} {row['text']}".strip()
    return row["text"].strip()


def _read_judgements(
    path: Path, queries: dict[str, str], documents: dict[str, int], problems: Problems
) -> dict[str, dict[str, int]]:
    """Query -> document -> score."""
    judgements: dict[str, dict[str, int]] = {}
    for place, fields in _fields(path, problems):
        if len(fields) != 3:
            problems.add("not a query, a document and a score, separated by tabs", path, place)
            continue
        query, document, score = fields
        if query not in queries:
            problems.add(f"a query that is not in {QUERIES}", path, f"{place}: {query!r}")
        if document not in documents:
            problems.add(f"a document that is not in {CORPUS}", path, f"{place}: {document!r}")
        if not _is(int, score):
            problems.add("a score that is not a whole number", path, f"{place}: {score!r}")
            continue
        earlier = judgements.setdefault(query, {}).setdefault(document, int(score))
        if earlier != int(score):
            problems.add("a different score than before for the same query and document", path, place)
    return judgements


def _fields(path: Path, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """(which line, its fields) of a file of judgements, without its header and empty lines."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                fields = line.rstrip("\n").split("\t")
                if line.strip() and not (number == 1 and _is_header(fields)):
                    yield f"line {number}", fields
        except UnicodeDecodeError:
            problems.add("no UTF-8", path)


def _is_header(fields: list[str]) -> bool:
    return len(fields) == 3 and not _is(float, fields[2])


def _is(kind: Callable, text: str) -> bool:
    """Whether a text is a number of this kind."""
    try:
        kind(text)
    except ValueError:
        return False
    return True
