"""What the data cost a step: a token store against the published tokenised Parquet through `datasets`.

    python -m benchmarks.data_path

Both hold the same made-up tuples (200,000 texts, 8,000 tuples of 26) and give the ids of 16 tuples with 7 negatives,
ours end to end, theirs padded as their collate function does. Each side is measured in a process of its own; its share
is of a step of benchmarks/step.py's model on our batches. Then a store of six million tuples is opened: its files are
as large as real ones would be, and empty.
"""

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks import step
from data.feed import Feed
from data.plan import Plan, split_sizes
from data.store_writer import StoreWriter
from data.token_store import ARRAYS, FORMAT, array_shapes, open_store
from utils import seal, write_json

TEXTS, ROWS, SLOTS, BATCH, DRAWN, BATCHES = 200_000, 8_000, 24, 16, 7, 200


def main() -> None:
    """Build both, measure each, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        build_large(folder / "large")
        seconds = alone(one_step, folder)
        print(f"{'':26}{'open s':>8}{'open MiB':>10}{'batch us':>10}{'of a step':>11}{'+ MiB':>8}{'disk MB':>9}")
        for label, function in (("token store", ours), ("Parquet through datasets", theirs)):
            opened, memory, batch, more, size = alone(function, folder)
            print(f"{label:26}{opened:8.3f}{memory:10.1f}{1e6 * batch:10.0f}{batch / seconds:11.2%}{more:8.1f}"
                  f"{size / 1e6:9.0f}")  # fmt: skip
        opened, memory = alone(large, folder)
        print(f"{'six million tuples':26}{opened:8.3f}{memory:10.1f}")


def alone(function, folder: Path):
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, folder).result()


def build(folder: Path) -> None:
    """The same tuples as a store and as v1's tokenised Parquet: a column of ids for each text of a tuple."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(4.3, 0.8, TEXTS)), 4, 512).astype(np.int64)
    tokens = random.integers(1, 60_000, lengths.sum(), dtype=np.int32)
    ends = np.cumsum(lengths)
    tokens[ends - 1] = 0
    writer = StoreWriter(folder / "toy", SLOTS, {})
    writer.add_texts([number.to_bytes(16, "big") for number in range(TEXTS)], tokens, lengths)
    tuples = random.permuted(np.arange(ROWS * (2 + SLOTS)) % TEXTS).reshape(ROWS, 2 + SLOTS)
    writer.add_tuples(tuples)
    writer.finish({"name": "toy", "task": "retrieval", "max_seq_length": 512, "eos_token_id": 0, "tokenizer": ""})
    offsets = np.concatenate([[0], ends])
    ids = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
    names = ["query_input_ids", "passage_input_ids", *(f"negative_{k + 1}_input_ids" for k in range(SLOTS))]
    table = pa.table({name: ids.take(pa.array(tuples[:, column])) for column, name in enumerate(names)})
    pq.write_table(table, folder / "toy.parquet")


def build_large(folder: Path) -> None:
    """Six million tuples of 26 texts, sixty million texts, nine billion tokens: files with nothing in them."""
    counts = {"rows": 6_000_000, "texts": 60_000_000, "tokens": 9_000_000_000, "negatives": SLOTS}
    folder.mkdir()
    for name, shape in array_shapes(counts).items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", ARRAYS[name], shape)
    write_json(folder / "meta.json", seal({"format": FORMAT, "name": "large", **counts}))


def one_step(folder: Path) -> float:
    """Seconds of a training step on such a batch, the faster of two."""
    store = open_store(folder / "toy")
    batch = Feed([store], [DRAWN], Plan((split_sizes(ROWS)[0],), BATCH, 0), 512).training(1)[1]
    batch = replace(batch, tokens=batch.tokens % step.CONFIG.vocab_size)
    return min(step.ours(batch, "segments", False) for _ in range(2))


def ours(folder: Path) -> tuple[float, float, float, float, int]:
    """Seconds and MiB to open, seconds a batch, MiB after many, bytes on disk."""
    before, began = resident(), time.perf_counter()
    store = open_store(folder / "toy")
    opened, memory = time.perf_counter() - began, resident() - before
    feed = Feed([store], [DRAWN], Plan((split_sizes(ROWS)[0],), BATCH, 0), 512)
    return opened, memory, timed(lambda step: feed.training(step)), resident() - before, store.nbytes


def theirs(folder: Path) -> tuple[float, float, float, float, int]:
    """The same for Parquet through datasets, a DataLoader's fetch and padding included."""
    import datasets

    datasets.disable_progress_bars()
    before, began = resident(), time.perf_counter()
    path = folder / "toy.parquet"
    table = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(folder / "cache"), split="train")
    opened, memory = time.perf_counter() - began, resident() - before
    loader = torch.utils.data.DataLoader(table, BATCH, shuffle=True, collate_fn=collate)
    rows = iter(loader)
    return opened, memory, timed(lambda _: next(rows)), resident() - before, path.stat().st_size


def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a batch, padded to its longest text."""
    names = ["query", "passage", *(f"negative_{k + 1}" for k in range(DRAWN))]
    texts = [torch.tensor(row[f"{name}_input_ids"]) for name in names for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return ids, ids.ne(0)


def large(folder: Path) -> tuple[float, float]:
    """Seconds and MiB to open a store of six million tuples and to lay out its plan."""
    before, began = resident(), time.perf_counter()
    store = open_store(folder / "large")
    Plan((split_sizes(len(store.tuples))[0],), 512, 0).step(1)
    return time.perf_counter() - began, resident() - before


def timed(batch) -> float:
    """Seconds a batch, the median."""
    spent = []
    for number in range(1, BATCHES + 1):
        began = time.perf_counter()
        batch(number)
        spent.append(time.perf_counter() - began)
    return sorted(spent)[BATCHES // 2]


def resident() -> float:
    """MiB of this process's own memory: mapped files that others can share are not counted."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


if __name__ == "__main__":
    main()
