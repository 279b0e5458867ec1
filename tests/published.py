"""Token stores as the published scripts would have written them, for tests."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.token_store import TokenStore


def write_published(folder: Path, store: TokenStore) -> None:
    """A store's tuples as folder/v1/NAME.parquet, and as folder/v2/NAME_query.parquet with NAME_corpus.parquet."""
    ids = [store.tokens[begin:end] for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
    columns = ["query", "passage", *[f"negative_{k + 1}" for k in range(store.tuples.shape[1] - 2)]]
    as_ids = {}
    as_names = {}
    for name, numbers in zip(columns, store.tuples.T, strict=True):
        as_ids[f"{name}_input_ids"] = [ids[number] if number >= 0 else None for number in numbers]
        as_names[f"{name}_input_ids"] = [f"{number}" if number >= 0 else None for number in numbers]
    as_names["query_input_ids"] = as_ids["query_input_ids"]
    documents = {"doc_id": [f"{number}" for number in range(len(ids))], "input_ids": ids}
    for layout in ("v1", "v2"):
        (folder / layout).mkdir(exist_ok=True)
    pq.write_table(pa.table(as_ids), folder / "v1" / f"{store.name}.parquet")
    pq.write_table(pa.table(as_names), folder / "v2" / f"{store.name}_query.parquet")
    pq.write_table(pa.table(documents), folder / "v2" / f"{store.name}_corpus.parquet")
