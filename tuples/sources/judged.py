"""Queries, documents and judgements in three tables, joined to rows as other sources have them.

    of the hub      the configurations queries, corpus and default, as the retrieval sets of mteb have them
    of a folder     queries.jsonl, corpus.jsonl and qrels/SPLIT.tsv, BEIR's layout

A row is a judgement with the columns of COLUMNS: its query and its document's title and text. Held in memory are the
texts that judgements name, and no others: of a corpus of millions these are few.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from data.raw_rows import Row
from tuples.sources.cleaning import label_word

COLUMNS = ("query", "title", "text")
TABLES = {  # configuration -> the columns that it needs
    "queries": ("_id", "text"),
    "corpus": ("_id", "text"),  # and title, where documents have one
    "default": ("query-id", "corpus-id", "score"),
}
NO_JUDGEMENT = "no judgement: it has not query-id, corpus-id and a number as score"
NO_ANSWER = "a judgement of 0 or less"
NO_QUERY, NO_DOCUMENT = "a judged query that is not there", "a judged document that is not there"


def joined(queries: Iterable[Row], corpus: Iterable[Row], judgements: Iterable[Row]) -> Iterator[Row]:
    """The rows of some judgements, in their order; a judgement that gives no pair comes with the reason."""
    judged = [(row, _ids_of(values)) for row, values in judgements]
    pairs = [ids for _, ids in judged if not isinstance(ids, str)]
    texts = _by_id(queries, {query for query, _ in pairs})
    documents = _by_id(corpus, {document for _, document in pairs})
    for row, ids in judged:
        if isinstance(ids, str):
            yield row, ids
            continue
        query, document = ids
        if query not in texts:
            yield row, NO_QUERY
        elif document not in documents:
            yield row, NO_DOCUMENT
        else:
            found = documents[document]
            yield row, {"query": texts[query].get("text"), "title": found.get("title"), "text": found.get("text")}


def _ids_of(values: dict | str) -> tuple[str, str] | str:
    """The query and the document of a judgement, or why it gives no pair."""
    if isinstance(values, str):
        return values
    query, document = label_word(values.get("query-id")), label_word(values.get("corpus-id"))
    try:
        score = float(values.get("score"))
    except (TypeError, ValueError):
        return NO_JUDGEMENT
    if not query or not document:
        return NO_JUDGEMENT
    return (query, document) if score > 0 else NO_ANSWER


def _by_id(rows: Iterable[Row], wanted: set[str]) -> dict[str, dict]:
    """The rows of these ids; of an id that stands twice the first. Where one cannot be read, its judgements say so."""
    found = {}
    for _, values in tqdm(rows, "looking up texts", unit="row", unit_scale=True, disable=None, leave=False):
        if isinstance(values, dict):
            name = label_word(values.get("_id"))
            if name in wanted:
                found.setdefault(name, values)
    return found


def table_problems(table: str, names: list[str]) -> list[str]:
    """Columns that one of TABLES needs and that are not among `names`."""
    there = ", ".join(names)
    return [f"no column {name!r}; the columns are {there}" for name in TABLES[table] if name not in names]


# --------------------------------------------------------------------------------------------- a folder


def files_of(folder: Path, splits: list[str]) -> list[tuple[str, Path]]:
    """(which of TABLES, its file) of all files of a folder that are read."""
    judgements = [("default", folder / "qrels" / f"{split}.tsv") for split in splits]
    return [("queries", folder / "queries.jsonl"), ("corpus", folder / "corpus.jsonl"), *judgements]


def folder_problems(folder: Path, splits: list[str]) -> list[str]:
    """Why a folder cannot be read."""
    if not folder.is_dir():
        return ["is not a folder with queries.jsonl, corpus.jsonl and qrels"]
    return [f"{path.relative_to(folder)} is missing" for _, path in files_of(folder, splits) if not path.is_file()]


def rows_of_folder(folder: Path, splits: list[str], read: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a folder; its judgements are numbered on from one split to the next.

    Args:
        read: gives the rows of a file.
    """
    queries, corpus, *judgements = [path for _, path in files_of(folder, splits)]
    values = chain.from_iterable(read(path) for path in judgements)
    numbered = ((number, value) for number, (_, value) in enumerate(values))
    return joined(read(queries), read(corpus), numbered)
