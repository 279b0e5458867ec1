"""The published scripts' tokenised Parquet, as it is, into token stores.

v1   <name>.parquet         query_input_ids, passage_input_ids, negative_i_input_ids: the ids themselves
v2   <name>_query.parquet   passage and negatives are document ids, found in corpus.parquet, or where that
                            is absent in <name>_corpus.parquet (doc_id, input_ids)
"""

import hashlib
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
        files = [path for path in (self.path, self.corpus) if path]
        facts = [token_store.FORMAT, task, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


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
        return Published(path.stem, path, None)
    name = path.stem.removesuffix("_query")
    corpora = [path.with_name("corpus.parquet"), path.with_name(f"{name}_corpus.parquet")]
    corpus = next((corpus for corpus in corpora if corpus.exists()), None)
    if corpus is None:
        raise StoreError(
            f"{path}: its documents are missing: neither corpus.parquet nor {name}_corpus.parquet is beside it"
        )
    if not {"doc_id", "input_ids"} <= set(_schema(corpus).names):
        raise StoreError(f"{path}: its documents cannot be read: {corpus} has no columns doc_id and input_ids")
    return Published(name, path, corpus)


def convert(source: Published, folder: Path, task: str) -> None:
    """Write the token store of a published dataset to `folder`; an interrupted conversion continues.

    Raises:
        StoreError: the data cannot be used; the message names file and row.
    """
    try:
        file = pq.ParquetFile(source.path)
        names = set(file.schema_arrow.names)
        negatives = [name for i in range(1, len(names)) if (name := f"negative_{i}_input_ids") in names]
        inputs = {"source": source.path.name, "fingerprint": source.fingerprint(task)}
        writer = StoreWriter(folder, len(negatives), inputs)
        columns = ["query_input_ids", "passage_input_ids", *negatives]
        if source.corpus and "documents" not in writer.stats:
            writer.stats["documents"] = _add_documents(writer, source.corpus, _wanted(file, columns[1:]))
            writer.commit(0)
        _add_tuples(writer, source, file, columns)
    except (OSError, pa.ArrowException) as error:  # a damaged page shows only when it is read
        raise StoreError(f"{source.path}: cannot be read ({str(error).splitlines()[0]})") from None
    endings = writer.stats.get("endings", [])
    if len(endings) != 1:
        raise StoreError(f"{source.path}: texts end in {len(endings)} different token ids; all must end in one EOS")
    meta = {"name": source.name, "task": task, "max_seq_length": None, "eos_token_id": endings[0], "tokenizer": None}
    writer.finish(meta)


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _add_tuples(writer: StoreWriter, source: Published, file: pq.ParquetFile, columns: list[str]) -> None:
    """Add every row of the Parquet file; rows that an interrupted conversion had committed are passed over."""
    position, total = 0, file.metadata.num_rows
    with tqdm(total=total, desc=f"converting {source.name}", unit="row", disable=None, leave=False) as bar:
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            if position >= writer.position:
                numbers = [_text_numbers(writer, batch.column(name), source, name) for name in columns]
                tuples = np.stack(numbers, axis=1)  # [rows, 2 + K]
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


def _text_numbers(writer: StoreWriter, column: pa.Array, source: Published, name: str) -> np.ndarray:
    """Text numbers of one column, -1 where null or empty; new texts are added on the way."""
    if source.corpus and name != "query_input_ids":
        documents = column.cast(pa.string()).to_pylist()
        keys = {document: text_key(document.encode()) for document in documents if document}
        if missing := [document for document, key in keys.items() if key not in writer.numbers]:
            raise StoreError(f"{source.path}: {name}: document {missing[0]!r} is not in {source.corpus}")
        return np.array([writer.numbers[keys[document]] if document else -1 for document in documents])
    texts = _ids(column, source.path)
    keys = [text_key(text.tobytes()) if len(text) else None for text in texts]
    _add_new(writer, {key: text for key, text in zip(keys, texts, strict=True) if key and key not in writer.numbers})
    return np.array([writer.numbers[key] if key else -1 for key in keys])


def _add_new(writer: StoreWriter, texts: dict[bytes, np.ndarray]) -> None:
    """Add texts by key, and note which token ids they end in."""
    if not texts:
        return
    endings = {int(text[-1]) for text in texts.values()} | set(writer.stats.get("endings", []))
    writer.stats["endings"] = sorted(endings)
    lengths = np.array([len(text) for text in texts.values()])
    writer.add_texts(list(texts), np.concatenate(list(texts.values())), lengths)


def _wanted(file: pq.ParquetFile, columns: list[str]) -> pa.Array:
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
    bounds = pc.min_max(wanted).as_py()
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(file.schema_arrow.names.index("doc_id")).statistics
        known = statistics and statistics.has_min_max and isinstance(statistics.min, str) and bounds["min"]
        if known and (statistics.max < bounds["min"] or statistics.min > bounds["max"]):
            continue
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["doc_id", "input_ids"]):
            chosen = batch.filter(pc.is_in(batch.column("doc_id").cast(pa.string()), value_set=wanted))
            names, texts = (
                chosen.column("doc_id").cast(pa.string()).to_pylist(),
                _ids(chosen.column("input_ids"), corpus),
            )
            new = {}
            for name, text in zip(names, texts, strict=True):
                key = text_key(name.encode())
                earlier = new.get(key) if key in new else writer.text(key)
                if earlier is not None and not np.array_equal(earlier, text):
                    raise StoreError(f"{corpus}: document {name!r} stands in it twice, with different ids")
                if earlier is None and len(text):
                    new[key] = text
            _add_new(writer, new)
    return len(writer.numbers)


def _ids(column: pa.Array, path: Path) -> list[np.ndarray]:
    """A column of lists of token ids as int32 arrays; null becomes an empty one."""
    if pa.types.is_null(column.type) or not len(column):
        return [np.zeros(0, np.int32)] * len(column)
    flat = column.flatten()
    if flat.null_count:
        raise StoreError(f"{path}: a null stands among the token ids of a text")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.split(flat.to_numpy(zero_copy_only=False).astype(np.int32), np.cumsum(lengths)[:-1])
