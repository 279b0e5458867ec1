"""The published scripts' tokenised Parquet, as it is, into token stores.

v1   <name>.parquet         query_input_ids, passage_input_ids, negative_i_input_ids: the ids themselves
v2   <name>_query.parquet   passage and negatives are document ids, found in corpus.parquet, or where that
                            is absent in <name>_corpus.parquet (doc_id, input_ids)
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from data import token_store
from data.store_writer import StoreWriter, text_key
from data.token_store import StoreError
from utils import first_line, short_digest

BATCH_ROWS = 4096
COMMIT_ROWS = 262144  # rows between two points at which a killed conversion continues


@dataclass(frozen=True)
class Published:
    """One published dataset: a v1 file, or a v2 file with its corpus."""

    name: str
    path: Path
    corpus: Path | None  # None for v1

    def fingerprint(self, task: str) -> str:
        """Names what a conversion depends on: the files by name, size and time, the task, the store format."""
        files = []
        for path in (self.path, self.corpus):
            if path is not None:
                stat = path.stat()
                files.append((path.name, stat.st_size, stat.st_mtime_ns))
        facts = [token_store.FORMAT, task, files]
        return short_digest(repr(facts))


def is_published(path: Path) -> bool:
    """Whether a file in a data folder may be a dataset of the published layouts, rather than a corpus."""
    return path.suffix == ".parquet" and path.stem != "corpus" and not path.stem.endswith("_corpus")


def read_published(path: Path) -> Published:
    """What a Parquet file is, from its schema.

    Raises:
        StoreError: it is of neither layout, or its corpus is missing.
    """
    schema = _schema(path)
    if not {"query_input_ids", "passage_input_ids"} <= set(schema.names):
        raise StoreError(
            f"{path}: no query_input_ids and passage_input_ids in it: if these are raw texts, tokenise them first"
        )
    kind = schema.field("passage_input_ids").type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return Published(path.stem, path, None)  # v1
    name = path.stem.removesuffix("_query")
    return Published(name, path, _find_corpus(path, name))


def _find_corpus(path: Path, name: str) -> Path:
    """The documents of the v2 query file `path`. Raises StoreError if there are none."""
    of_all_datasets = path.with_name("corpus.parquet")
    of_its_own = path.with_name(f"{name}_corpus.parquet")
    if of_all_datasets.exists():
        corpus = of_all_datasets
    elif of_its_own.exists():
        corpus = of_its_own
    else:
        raise StoreError(
            f"{path}: its documents are missing: neither corpus.parquet nor {name}_corpus.parquet is beside it"
        )
    if not {"doc_id", "input_ids"} <= set(_schema(corpus).names):
        raise StoreError(f"{path}: its documents cannot be read: {corpus} has no columns doc_id and input_ids")
    return corpus


def convert(source: Published, folder: Path, task: str) -> None:
    """Write the token store of a published dataset to `folder`; an interrupted conversion continues.

    Raises:
        StoreError: the data cannot be used; the message names file and row.
    """
    try:
        writer = _add_everything(source, folder, task)
    except (OSError, pa.ArrowException) as error:  # a damaged page shows only when it is read
        raise StoreError(f"{source.path}: cannot be read ({first_line(error)})") from None
    endings = writer.stats.get("endings", [])
    if len(endings) != 1:
        raise StoreError(f"{source.path}: texts end in {len(endings)} different token ids; all must end in one EOS")
    meta = {"name": source.name, "task": task, "max_seq_length": None, "eos_token_id": endings[0], "tokenizer": None}
    writer.finish(meta)


def _add_everything(source: Published, folder: Path, task: str) -> StoreWriter:
    """A writer that holds all texts and tuples of a published dataset, from where an earlier one was interrupted."""
    file = pq.ParquetFile(source.path)
    passages = ["passage_input_ids", *_negative_columns(file)]
    inputs = {"source": source.path.name, "fingerprint": source.fingerprint(task)}
    writer = StoreWriter(folder, len(passages) - 1, inputs)
    if source.corpus and "documents" not in writer.stats:  # not yet added and committed by an earlier writer
        wanted = _wanted_documents(file, passages)
        writer.stats["documents"] = _add_documents(writer, source.corpus, wanted)
        writer.commit(0)
    _add_tuples(writer, source, file, ["query_input_ids", *passages])
    return writer


def _negative_columns(file: pq.ParquetFile) -> list[str]:
    """negative_1_input_ids, negative_2_input_ids, ... as far as the file has them."""
    present = set(file.schema_arrow.names)
    numbered = [f"negative_{number}_input_ids" for number in range(1, len(present))]
    return [name for name in numbered if name in present]


def _schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file. Raises StoreError if it is not one."""
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: not a Parquet file ({first_line(error)})") from None


def _add_tuples(writer: StoreWriter, source: Published, file: pq.ParquetFile, columns: list[str]) -> None:
    """Add every row of the Parquet file; rows that an interrupted conversion had committed are passed over."""
    position = 0
    total = file.metadata.num_rows
    with tqdm(total=total, desc=f"converting {source.name}", unit="row", disable=None, leave=False) as bar:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            if position >= writer.position:
                tuples = _tuples(writer, batch, source, columns)  # [rows, 2 + K]
                empty = (tuples[:, :2] < 0).any(axis=1)
                if empty.any():
                    row = position + int(np.argmax(empty))
                    raise StoreError(f"{source.path}: row {row}: an empty or null query or positive")
                writer.add_tuples(tuples)
            position += len(batch)
            bar.update(len(batch))
            if position - writer.position >= COMMIT_ROWS:
                writer.commit(position)
    if not total:
        raise StoreError(f"{source.path}: the file has no rows")


def _tuples(writer: StoreWriter, batch: pa.RecordBatch, source: Published, columns: list[str]) -> np.ndarray:
    """Text numbers of some rows, [rows, 2 + K], -1 where null or empty; new texts are added on the way."""
    numbers = []
    for name in columns:
        if source.corpus and name != "query_input_ids":
            numbers.append(_document_numbers(writer, batch.column(name), source, name))
        else:
            numbers.append(_text_numbers(writer, batch.column(name), source.path))
    return np.stack(numbers, axis=1)


def _document_numbers(writer: StoreWriter, column: pa.Array, source: Published, name: str) -> np.ndarray:
    """Text numbers [rows] of a column of document ids, all of them added before; -1 where null or empty."""
    numbers = []
    for document in column.cast(pa.string()).to_pylist():
        if not document:
            numbers.append(-1)
            continue
        key = text_key(document.encode())
        if key not in writer.numbers:
            raise StoreError(f"{source.path}: {name}: document {document!r} is not in {source.corpus}")
        numbers.append(writer.numbers[key])
    return np.array(numbers)


def _text_numbers(writer: StoreWriter, column: pa.Array, path: Path) -> np.ndarray:
    """Text numbers [rows] of a column of token ids, -1 where null or empty; new texts are added on the way."""
    keys = []  # of each row, None if there is no text
    new_texts = {}
    for text in _ids(column, path):
        key = None
        if len(text):
            key = text_key(text.tobytes())
            if key not in writer.numbers:
                new_texts[key] = text
        keys.append(key)
    _add_new(writer, new_texts)
    return np.array([-1 if key is None else writer.numbers[key] for key in keys])


def _add_new(writer: StoreWriter, texts: dict[bytes, np.ndarray]) -> None:
    """Add texts by key, and note which token ids they end in."""
    if not texts:
        return
    endings = set(writer.stats.get("endings", []))
    endings.update(int(text[-1]) for text in texts.values())
    writer.stats["endings"] = sorted(endings)
    lengths = np.array([len(text) for text in texts.values()])
    writer.add_texts(list(texts), np.concatenate(list(texts.values())), lengths)


def _wanted_documents(file: pq.ParquetFile, columns: list[str]) -> pa.Array:
    """The distinct document ids in a v2 query file."""
    found = [pa.array([], pa.string())]
    for batch in file.iter_batches(BATCH_ROWS, columns=columns):
        found += [pc.unique(column.cast(pa.string())) for column in batch.columns]
    return pc.drop_null(pc.unique(pa.concat_arrays(found)))


def _add_documents(writer: StoreWriter, corpus: Path, wanted: pa.Array) -> int:
    """Add the wanted documents of a corpus; returns how many. Row groups that cannot hold any are not read.

    A corpus of all datasets may hold 60 million documents. Put together dataset by dataset its row groups
    cover narrow ranges of ids, and Parquet keeps each group's smallest and largest.
    """
    file = pq.ParquetFile(corpus)
    wanted_range = pc.min_max(wanted).as_py()
    for group in range(file.num_row_groups):
        if not _may_hold(file, group, wanted_range):
            continue
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["doc_id", "input_ids"]):
            chosen = batch.filter(pc.is_in(batch.column("doc_id").cast(pa.string()), value_set=wanted))
            names = chosen.column("doc_id").cast(pa.string()).to_pylist()
            texts = _ids(chosen.column("input_ids"), corpus)
            _add_new(writer, _new_documents(writer, corpus, names, texts))
    return len(writer.numbers)


def _may_hold(file: pq.ParquetFile, group: int, wanted: dict[str, str | None]) -> bool:
    """Whether a row group may hold a document id between wanted["min"] and wanted["max"]."""
    column = file.schema_arrow.names.index("doc_id")
    statistics = file.metadata.row_group(group).column(column).statistics
    if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, str):
        return True  # the file does not tell
    if not wanted["min"]:
        return True  # no id to compare with, or an empty one
    return wanted["min"] <= statistics.max and statistics.min <= wanted["max"]


def _new_documents(writer: StoreWriter, corpus: Path, names: list, texts: list) -> dict[bytes, np.ndarray]:
    """Those of these documents that the writer does not hold, by key. Raises StoreError for one with two texts."""
    new = {}
    for name, text in zip(names, texts, strict=True):
        key = text_key(name.encode())
        earlier = new[key] if key in new else writer.text(key)
        if earlier is None:
            if len(text):
                new[key] = text
        elif not np.array_equal(earlier, text):
            raise StoreError(f"{corpus}: document {name!r} occurs twice in it, with different ids")
    return new


def _ids(column: pa.Array, path: Path) -> list[np.ndarray]:
    """A column of lists of token ids as int32 arrays; null becomes an empty one."""
    if pa.types.is_null(column.type) or not len(column):
        return [np.zeros(0, np.int32)] * len(column)
    flat = column.flatten()
    if flat.null_count:
        raise StoreError(f"{path}: there is a null among the token ids of a text")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.split(flat.to_numpy(zero_copy_only=False).astype(np.int32), np.cumsum(lengths)[:-1])
