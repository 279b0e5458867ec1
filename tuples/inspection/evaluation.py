"""The texts of an evaluation set, as keys: what training must not have seen.

    raw tuples      a file or a folder that data/raw_files.py reads: its queries and positives
    BEIR folder     queries.jsonl and corpus.jsonl, with qrels/test.tsv, or all of qrels/*.tsv where that is absent

Of a BEIR folder with judgements only judged queries and relevant documents count: queries.jsonl holds the training
queries as well, and most corpora are shared by both sides. A document may stand in training with its title or without.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data import raw_files, raw_formats
from data.raw_rows import RawError, rows_of
from tuples.inspection.texts import MISSING, is_blank, keys_of, plain, without_instruction

BATCH_ROWS = 2048


class TextSet:
    """Texts that are looked for, by their keys; remembers which of them were found."""

    def __init__(self, keys: np.ndarray, groups: np.ndarray | None = None):
        """`keys` uint64 [n]; `groups` int [n] tells which keys are forms of one text, by default each its own."""
        if groups is None:
            keys = np.unique(keys)
            groups = np.arange(len(keys))
        order = np.argsort(keys, kind="stable")
        self.keys, self.groups = keys[order], groups[order]
        self.was_found = np.zeros(int(groups.max(initial=-1)) + 1, bool)

    def __len__(self) -> int:
        """Texts in the set, each once however many forms it has."""
        return len(self.was_found)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Which of these keys are in the set, bool [n]; they are remembered as found."""
        begin = np.searchsorted(self.keys, keys, side="left")
        end = np.searchsorted(self.keys, keys, side="right")
        hits = (end > begin) & (keys != MISSING)
        for first, last in set(zip(begin[hits].tolist(), end[hits].tolist(), strict=True)):
            self.was_found[self.groups[first:last]] = True
        return hits


class Evaluation:
    """The queries and the passages of an evaluation set."""

    def __init__(self, path: Path, queries: TextSet, passages: TextSet):
        self.path, self.queries, self.passages = path, queries, passages

    def has_query(self, columns: list[np.ndarray]) -> np.ndarray:
        """Which tuples have an evaluation query in any of these columns of keys, each uint64 [n]; bool [n]."""
        return np.logical_or.reduce([self.queries.has(keys) for keys in columns])

    def has_passage(self, columns: list[np.ndarray]) -> np.ndarray:
        """Which tuples have an evaluation passage in any of these columns of keys; bool [n]."""
        return np.logical_or.reduce([self.passages.has(keys) for keys in columns])


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation set at `path`.

    Raises:
        RawError: it cannot be read, or is not one; the message names the file.
    """
    if (path / "queries.jsonl").exists() or (path / "corpus.jsonl").exists():
        return _read_beir(path)
    if not path.exists():
        raise RawError(f"{path}: no such file or folder")
    files, _ = raw_files.raw_files(path)
    if not files:
        raise RawError(f"{path}: neither raw tuples ({raw_files.ENDINGS}) nor queries.jsonl and corpus.jsonl in it")
    queries = []
    passages = []
    for file in files:
        try:
            for query_keys, passage_keys in _keys_of_tuples(file):
                queries.append(query_keys)
                passages.append(passage_keys)
        except RawError as error:
            raise RawError("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from None
    return Evaluation(path, _text_set(queries), _text_set(passages))


def _keys_of_tuples(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys of the queries and of the positives of a raw file, piece by piece."""
    raw_formats.check_file(path)
    _, columns = raw_files.choose_columns(path)
    for table in raw_formats.read(path, columns.types, BATCH_ROWS):
        queries, positives = columns.to_tuples(table, slots=columns.count_negatives(table)).texts[:2]
        yield comparable_keys(without_instruction(queries)), comparable_keys(positives)


def comparable_keys(texts: pa.Array) -> np.ndarray:
    """Keys of texts in their plain form, uint64 [n]; MISSING where nothing is left of one."""
    keys = keys_of(plain(texts))
    keys[is_blank(texts)] = MISSING
    return keys


def _text_set(parts: list[np.ndarray]) -> TextSet:
    keys = np.concatenate([*parts, np.zeros(0, np.uint64)])
    return TextSet(keys[keys != MISSING])


# ------------------------------------------------------------------------------------------------- BEIR


def _read_beir(folder: Path) -> Evaluation:
    """Raises RawError as `read_evaluation` does."""
    for name in ("queries.jsonl", "corpus.jsonl"):
        if not (folder / name).exists():
            raise RawError(f"{folder}: a BEIR folder has queries.jsonl and corpus.jsonl; {name} is missing")
    judged = _judged(folder / "qrels")
    judged_queries, judged_documents = judged or (None, None)
    queries = []
    for texts, _ in _texts(folder / "queries.jsonl", judged_queries):
        queries.append(comparable_keys(without_instruction(texts)))
    plain_keys = []
    titled_keys = []
    for texts, with_title in _texts(folder / "corpus.jsonl", judged_documents):
        plain_keys.append(comparable_keys(texts))
        titled_keys.append(comparable_keys(with_title))
    keys = np.concatenate([*plain_keys, *titled_keys, np.zeros(0, np.uint64)])
    documents = np.tile(np.arange(len(keys) // 2), 2)
    present = keys != MISSING
    return Evaluation(folder, _text_set(queries), TextSet(keys[present], documents[present]))


def _judged(folder: Path) -> tuple[set[str], set[str]] | None:
    """The queries and the relevant documents of a folder of judgements; None if there is none."""
    test = folder / "test.tsv"
    files = [test] if test.exists() else sorted(folder.glob("*.tsv"))
    if not files:
        return None
    queries = set()
    documents = set()
    for path in files:
        for row, values in rows_of(path, ".tsv"):
            if isinstance(values, str) or not {"query-id", "corpus-id", "score"} <= set(values):
                why = values if isinstance(values, str) else "the first line must name query-id, corpus-id and score"
                raise RawError(f"{path}: row {row} (counted from 0): {why}")
            if values["score"].strip() not in ("0", "-1"):
                queries.add(values["query-id"])
                documents.add(values["corpus-id"])
    return queries, documents


def _texts(path: Path, wanted: set[str] | None) -> Iterator[tuple[pa.Array, pa.Array]]:
    """The texts of a BEIR file without and with their titles, piece by piece; `wanted` names those to read, or all."""
    texts = []
    titled = []
    for row, values in rows_of(path, ".jsonl"):
        if isinstance(values, str) or not isinstance(values.get("text"), str):
            why = values if isinstance(values, str) else "has no 'text'"
            raise RawError(f"{path}: row {row} (counted from 0) {why}")
        if wanted is not None and str(values.get("_id")) not in wanted:
            continue
        texts.append(values["text"])
        titled.append(f"{values.get('title') or ''} {values['text']}")
        if len(texts) == BATCH_ROWS:
            yield pa.array(texts, pa.large_string()), pa.array(titled, pa.large_string())
            texts, titled = [], []
    yield pa.array(texts, pa.large_string()), pa.array(titled, pa.large_string())
