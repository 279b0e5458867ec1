"""From `train_data_path` to opened, verified token stores: what the warm-up run builds.

The folder may hold token stores (used where they are) and the published scripts' tokenised Parquet, which
is converted into stores below `cache_dir` once:

    v1   <name>.parquet         query_input_ids, passage_input_ids, negative_i_input_ids: the ids themselves
    v2   <name>_query.parquet   passage and negatives are document ids, found in corpus.parquet, or where that
                                is absent in <name>_corpus.parquet (doc_id, input_ids)

One process of a node works under a lock, the others wait and find everything done. Each store's checksums
are verified once; a mark under `cache_dir`/verified remembers it until the files change.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

import token_store
from token_store import StoreError, StoreWriter, TokenStore, text_key

BATCH_ROWS = 4096
COMMIT_ROWS = 262144  # rows between two points at which a killed conversion continues


@dataclass(frozen=True)
class Source:
    """One dataset as it lies in the data folder: a store, or published Parquet with its corpus file."""

    name: str
    kind: str  # "store", "v1" or "v2"
    path: Path
    corpus: Path | None = None


def prepare(folder: Path, cache_dir: Path) -> tuple[list[TokenStore], list[str], list[str]]:
    """Open every dataset of `folder`, converting and verifying what was not yet.

    Returns:
        (stores sorted by name, problems, news): news are lines about what this call built or verified.
        With problems, no stores.
    """
    sources, problems = find_sources(folder)
    if problems:
        return [], problems, []
    stores, news = [], []
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / ".lock"):
        for source in sources:
            try:
                stores.append(_prepare_one(source, folder, cache_dir, news))
            except StoreError as error:
                problems += str(error).splitlines()
    return ([], problems, news) if problems else (stores, [], news)


def find_sources(folder: Path) -> tuple[list[Source], list[str]]:
    """The datasets in a data folder, sorted by name, and what in it cannot be used."""
    import pyarrow as pa

    sources, problems = [], []
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".partial"):
            problems.append(f"{path}: half-written store: run tokenize_data_qwen.py again, it continues")
        elif path.is_dir() and any((path / name).exists() for name in ("meta.json", "tokens.npy")):
            sources.append(Source(path.name, "store", path))
        elif path.suffix == ".jsonl":
            problems.append(
                f"{path}: raw texts: run tokenize_data_qwen.py on them, and give train_data_path its output"
            )
        elif path.suffix == ".parquet" and path.stem != "corpus" and not path.stem.endswith("_corpus"):
            try:
                sources.append(_published_source(path))
            except (pa.ArrowInvalid, StoreError) as error:
                problems.append(f"{path}: {str(error).splitlines()[0]}")
    names = [source.name for source in sources]
    problems += [
        f"{folder}: two datasets are called {name!r}" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    problems += [f"{source.path}: {wrong}" for source in sources if (wrong := token_store.name_problem(source.name))]
    if not sources and not problems:
        problems.append(f"{folder}: no dataset in it; tokenize_data_qwen.py --output_dir {folder} makes some")
    return sorted(sources, key=lambda source: source.name), problems


def _published_source(path: Path) -> Source:
    """What a Parquet file of the data folder is. Raises StoreError for anything but v1 and v2."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    if not {"query_input_ids", "passage_input_ids"} <= set(schema.names):
        raise StoreError("no query_input_ids and passage_input_ids in it: if these are raw texts, tokenise them first")
    if not pa.types.is_string(schema.field("passage_input_ids").type):
        return Source(path.stem, "v1", path)
    name = path.stem.removesuffix("_query")
    corpora = [path.with_name("corpus.parquet"), path.with_name(f"{name}_corpus.parquet")]
    corpus = next((corpus for corpus in corpora if corpus.exists()), None)
    if corpus is None:
        raise StoreError(
            f"its documents are missing: neither corpus.parquet nor {name}_corpus.parquet stands beside it"
        )
    if not {"doc_id", "input_ids"} <= set(pq.read_schema(corpus).names):
        raise StoreError(f"its documents cannot be read: {corpus} has no columns doc_id and input_ids")
    return Source(name, "v2", path, corpus)


def _prepare_one(source: Source, folder: Path, cache_dir: Path, news: list[str]) -> TokenStore:
    """One dataset's store, converted and verified if need be. Raises StoreError with a line for each problem."""
    path = source.path
    if source.kind != "store":
        path = cache_dir / "stores" / f"{source.name}-{_fingerprint(source)}"
        if not path.exists():
            news.append(_convert(source, path, folder))
    store = token_store.open_store(path)
    mark = cache_dir / "verified" / token_store.identity(path)
    if not mark.exists():
        if problems := token_store.deep_check(store):
            raise StoreError("\n".join(problems))
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        news.append(f"verified {store.name}: {store.nbytes / 1e6:,.1f} MB")
    return store


def _fingerprint(source: Source) -> str:
    """Names what a conversion depends on: the files by name, size and time, and the store format."""
    files = [path for path in (source.path, source.corpus) if path]
    facts = [source.kind, token_store.FORMAT, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _convert(source: Source, path: Path, folder: Path) -> str:
    """Convert published Parquet into a store at `path`; returns a line about it."""
    import pyarrow.parquet as pq

    task = token_store.task_of(source.name, folder)
    if task not in token_store.TASKS:
        raise StoreError(
            f'{source.path}: no task is known for {source.name!r}: put {{"{source.name}": "retrieval"}} '
            f"(or clustering, classification) into {folder}/tasks.json"
        )
    file = pq.ParquetFile(source.path)
    names = set(file.schema_arrow.names)
    negatives = [name for i in range(1, len(names)) if (name := f"negative_{i}_input_ids") in names]
    columns = ["query_input_ids", "passage_input_ids", *negatives]
    writer = StoreWriter(path, len(negatives), {"source": source.path.name, "fingerprint": _fingerprint(source)})
    if source.kind == "v2":
        _add_documents(writer, source, _document_ids(file, columns[1:]))
    _add_tuples(writer, source, file, columns)
    endings = writer.stats.get("endings", [])
    if len(endings) != 1:
        raise StoreError(
            f"{source.path}: texts end in {len(endings)} different token ids; each must end in the same EOS"
        )
    writer.finish(
        {"name": source.name, "task": task, "max_seq_length": None, "eos_token_id": endings[0], "tokenizer": None}
    )
    meta = token_store.open_store(path).meta
    size = ", ".join(f"{meta[what]:,} {what}" for what in ("rows", "texts", "tokens"))
    return f"converted {source.name} ({source.kind}): {size}"


def _add_tuples(writer: StoreWriter, source: Source, file, columns: list[str]) -> None:
    """Add every row of the Parquet file; rows that an interrupted conversion had committed are passed over."""
    position = 0
    with tqdm(
        total=file.metadata.num_rows, desc=f"converting {source.name}", unit="row", disable=None, leave=False
    ) as bar:
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


def _text_numbers(writer: StoreWriter, column, source: Source, name: str) -> np.ndarray:
    """Text numbers of one column, -1 where null or empty; new texts are added on the way."""
    if source.kind == "v2" and name != "query_input_ids":
        keys = {doc: text_key(doc.encode()) for doc in column.to_pylist() if doc}
        if missing := [doc for doc, key in keys.items() if key not in writer.numbers]:
            raise StoreError(f"{source.path}: {name}: document {missing[0]!r} is not in {source.corpus}")
        return np.array([writer.numbers[keys[doc]] if doc else -1 for doc in column.to_pylist()])
    texts = _ids(column)
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


def _document_ids(file, columns: list[str]):
    """The distinct document ids in a v2 query file, as an Arrow array."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = [pc.unique(column) for batch in file.iter_batches(BATCH_ROWS, columns=columns) for column in batch.columns]
    return pc.drop_null(pc.unique(pa.concat_arrays(found)))


def _add_documents(writer: StoreWriter, source: Source, wanted) -> None:
    """Add the wanted documents of a v2 corpus file. Row groups that cannot hold any are not read.

    A corpus of all datasets may hold 60 million documents; put together dataset by dataset its row groups
    cover narrow ranges of ids, and Parquet keeps each group's smallest and largest.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if writer.position:
        return  # an interrupted conversion had them all before its first commit
    file = pq.ParquetFile(source.corpus)
    bounds = pc.min_max(wanted).as_py()
    for group in range(file.num_row_groups):
        statistics = file.metadata.row_group(group).column(file.schema_arrow.names.index("doc_id")).statistics
        if statistics and statistics.has_min_max and (statistics.max < bounds["min"] or statistics.min > bounds["max"]):
            continue
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["doc_id", "input_ids"]):
            batch = batch.filter(pc.is_in(batch.column("doc_id"), value_set=wanted))
            names = batch.column("doc_id").to_pylist()
            keys = [text_key(name.encode()) for name in names]
            _add_new(
                writer, {k: text for k, text in zip(keys, _ids(batch.column("input_ids")), strict=True) if len(text)}
            )


def _ids(column) -> list[np.ndarray]:
    """A column of lists of token ids as int32 arrays; null becomes an empty one."""
    if not len(column):
        return []  # np.split would make one empty text of it
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.split(flat, np.cumsum(lengths)[:-1])
