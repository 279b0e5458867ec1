"""What reading the data costs a training step: a token store beside the published tokenised Parquet read by `datasets`.

    python -m benchmarks.data_path

Both hold the same made-up tuples (200,000 texts, 8,000 tuples of 26). A batch is the ids of 16 tuples with 7 negatives,
end to end here, padded by their collate function there. Each side runs in a process of its own. "of a step" relates the
time of a batch to a training step of the model in benchmarks/step.py.

Three more rows are of the token store alone: opening one of six million tuples, in files of the real size that are
empty; opening 502 small stores, as many as F2LLM-v2 has, verified before; and making one of 64 processes' share of a
batch, during which Python runs nothing else.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import in_fresh_process, own_memory
from benchmarks.step import CONFIG, our_step
from data import cache
from data.batch import make_batch
from data.feed import Feed
from data.plan import Plan, choose_negatives, split_sizes
from data.store_writer import StoreWriter
from data.token_store import ARRAYS, FORMAT, array_shapes, open_store
from utils import seal, write_json

TEXTS = 200_000
ROWS = 8_000
NEGATIVES = 24  # of a tuple in the files
BATCH = 16  # tuples
DRAWN = 7  # negatives of a tuple in a batch
BATCHES = 200  # whose median is taken
MANY = 502  # stores
PROCESSES = 64
TUPLES_OF_EACH = (32, 256)  # of those processes
MAX_LENGTH = 512


@dataclass(frozen=True)
class Opened:
    """The cost of opening the data."""

    seconds: float
    mib: float  # of the process's own memory


@dataclass(frozen=True)
class Reading:
    """The cost of opening the data and of reading batches, on one side."""

    opened: Opened
    batch_seconds: float  # the median
    mib: float  # own memory after the batches, above that before opening
    size: int  # bytes on disk


def main() -> None:
    """Build both, measure each, print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder)
        build_large(folder / "large")
        step_seconds = in_fresh_process(one_step, folder)
        print(f"{'':26}{'open s':>8}{'open MiB':>10}{'batch us':>10}{'of a step':>11}{'+ MiB':>8}{'disk MB':>9}")
        for label, read in (("token store", ours), ("Parquet through datasets", theirs)):
            reading = in_fresh_process(read, folder)
            share = reading.batch_seconds / step_seconds
            print(
                f"{label:26}{reading.opened.seconds:8.3f}{reading.opened.mib:10.1f}{1e6 * reading.batch_seconds:10.0f}"
                f"{share:11.2%}{reading.mib:8.1f}{reading.size / 1e6:9.0f}"
            )
        opened = in_fresh_process(large, folder)
        print(f"{'six million tuples':26}{opened.seconds:8.3f}{opened.mib:10.1f}")
        build_many(folder / "many")
        opened = in_fresh_process(many, folder)
        print(f"{f'{MANY} stores':26}{opened.seconds:8.3f}{opened.mib:10.1f}")
        for count in TUPLES_OF_EACH:
            seconds = in_fresh_process(one_of_many_processes, folder, count)
            print(f"{f'1 of {PROCESSES}, {count} tuples each':26}{'':18}{1e6 * seconds:10.0f}")


def build(folder: Path) -> None:
    """The same tuples as a store and as v1's tokenised Parquet: a column of ids for each text of a tuple."""
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(4.3, 0.8, TEXTS)), 4, MAX_LENGTH).astype(np.int64)
    tokens = random.integers(1, 60_000, lengths.sum(), dtype=np.int32)
    ends = np.cumsum(lengths)
    tokens[ends - 1] = 0  # EOS
    texts = np.arange(ROWS * (2 + NEGATIVES)) % TEXTS
    tuples = random.permuted(texts).reshape(ROWS, 2 + NEGATIVES)
    write_store(folder / "toy", tokens, lengths, tuples)
    write_parquet(folder / "toy.parquet", tokens, ends, tuples)


def write_store(folder: Path, tokens: np.ndarray, lengths: np.ndarray, tuples: np.ndarray) -> None:
    """A token store of texts that lie end to end in `tokens`, and of tuples of their numbers."""
    writer = StoreWriter(folder, NEGATIVES, {})
    keys = [number.to_bytes(16, "big") for number in range(TEXTS)]
    writer.add_texts(keys, tokens, lengths)
    writer.add_tuples(tuples)
    facts = {"name": "toy", "task": "retrieval", "max_seq_length": MAX_LENGTH, "eos_token_id": 0, "tokenizer": ""}
    writer.finish(facts)


def write_parquet(path: Path, tokens: np.ndarray, ends: np.ndarray, tuples: np.ndarray) -> None:
    """The same in the published layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = np.concatenate([[0], ends])
    ids = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
    columns = {}
    for number, name in enumerate(text_names(NEGATIVES)):
        columns[f"{name}_input_ids"] = ids.take(pa.array(tuples[:, number]))
    pq.write_table(pa.table(columns), path)


def text_names(negatives: int) -> list[str]:
    """The published names of a tuple's texts."""
    return ["query", "passage", *(f"negative_{number}" for number in range(1, negatives + 1))]


def build_large(folder: Path) -> None:
    """Six million tuples of 26 texts, sixty million texts, nine billion tokens: files with nothing in them."""
    counts = {"rows": 6_000_000, "texts": 60_000_000, "tokens": 9_000_000_000, "negatives": NEGATIVES}
    folder.mkdir()
    for name, shape in array_shapes(counts).items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", ARRAYS[name], shape)
    write_json(folder / "meta.json", seal({"format": FORMAT, "name": "large", **counts}))


def build_many(folder: Path) -> None:
    """Many stores of one tuple, verified."""
    one = write_store_of_one_tuple(folder.with_name("one"))
    for number in range(MANY):
        shutil.copytree(one, folder / f"set_{number:03}")
    _, problems = cache.prepare(folder, folder.with_name("many_cache"), lambda line: None)
    assert not problems, problems


def write_store_of_one_tuple(folder: Path) -> Path:
    """A token store of a query, its positive and a negative."""
    writer = StoreWriter(folder, 1, {})
    writer.add_texts([bytes([number] * 16) for number in range(3)], np.array([5, 0, 6, 0, 7, 0]), np.full(3, 2))
    writer.add_tuples(np.array([[0, 1, 2]]))
    return writer.finish({"name": "one", "task": "retrieval", "max_seq_length": 8, "eos_token_id": 0, "tokenizer": ""})


def feed_of(folder: Path) -> Feed:
    """Batches of the small store."""
    trained, _ = split_sizes(ROWS)
    return Feed([open_store(folder / "toy")], [DRAWN], Plan((trained,), BATCH, 0), [MAX_LENGTH])


def one_step(folder: Path) -> float:
    """Seconds of a training step on such a batch, the faster of two."""
    _, batch = feed_of(folder).training(1)
    batch = replace(batch, tokens=batch.tokens % CONFIG.vocab_size)
    return min(our_step(batch, "segments"), our_step(batch, "segments"))


def ours(folder: Path) -> Reading:
    """A token store, through a Feed."""
    memory = own_memory()
    began = time.perf_counter()
    store = open_store(folder / "toy")
    opened = Opened(time.perf_counter() - began, own_memory() - memory)
    feed = feed_of(folder)
    seconds = median_seconds(feed.training)
    return Reading(opened, seconds, own_memory() - memory, store.nbytes)


def theirs(folder: Path) -> Reading:
    """Parquet through datasets, a DataLoader's fetch and padding included."""
    import datasets

    datasets.disable_progress_bars()
    memory = own_memory()
    began = time.perf_counter()
    path = folder / "toy.parquet"
    table = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(folder / "cache"), split="train")
    opened = Opened(time.perf_counter() - began, own_memory() - memory)
    batches = iter(torch.utils.data.DataLoader(table, BATCH, shuffle=True, collate_fn=collate))
    seconds = median_seconds(lambda _: next(batches))
    return Reading(opened, seconds, own_memory() - memory, path.stat().st_size)


def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a batch, padded to its longest text."""
    texts = [torch.tensor(row[f"{name}_input_ids"]) for name in text_names(DRAWN) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return ids, ids.ne(0)


def large(folder: Path) -> Opened:
    """Opening a store of six million tuples, and laying out its plan."""
    memory = own_memory()
    began = time.perf_counter()
    store = open_store(folder / "large")
    trained, _ = split_sizes(len(store.tuples))
    Plan((trained,), 512, 0).step(1)
    return Opened(time.perf_counter() - began, own_memory() - memory)


def many(folder: Path) -> Opened:
    """Opening many small stores twice, as a run does: to see what is in them, and to see that they are verified."""
    memory = own_memory()
    began = time.perf_counter()
    early, _ = cache.open_unverified(folder / "many")
    stores, _ = cache.prepare(folder / "many", folder / "many_cache")
    assert len(early) == len(stores) == MANY
    return Opened(time.perf_counter() - began, own_memory() - memory)


def one_of_many_processes(folder: Path, tuples: int) -> float:
    """Seconds in which process 5 of many makes its part of a batch, `tuples` tuples each."""
    store = open_store(folder / "toy")
    random = np.random.default_rng(0)

    def read_batch(number: int) -> None:
        rows = random.integers(0, ROWS, PROCESSES * tuples)
        negatives = choose_negatives(store.tuples[rows, 2:], DRAWN, 0, number, rows)
        make_batch(store, rows, negatives, MAX_LENGTH, 5, PROCESSES, max_tokens_per_forward=8192)

    return median_seconds(read_batch)


def median_seconds(read_batch: Callable[[int], object]) -> float:
    """Seconds of a batch; they are numbered from 1."""
    spent = []
    for number in range(1, BATCHES + 1):
        began = time.perf_counter()
        read_batch(number)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
