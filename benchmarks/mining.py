"""What mining costs: texts encoded a second, queries searched a second, memory at its peak, recall of indexes.

    python -m benchmarks.mining                              up to a million passages: an hour on two cores
    python -m benchmarks.mining --passages 10000 --encode 0  a few minutes
    python -m benchmarks.mining --model output/0.6b/epoch_2  a decoder's texts a second as well

Searched are made-up vectors of 384 dimensions, as many as all-MiniLM-L6-v2 has: around random centres, 64 to each, with
queries near passages. What an index recalls of real texts may be more or less; a mining prints its own. Encoded are the
functions of the standard library. Each row has a process of its own; memory is what this process has for itself,
without the mapped files, which others can share.
"""

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import in_fresh_process, own_memory
from examples.code_search import corpus
from examples.models import minilm
from retrieval.encoders import open_encoder
from retrieval.faiss_index import FaissIndex, build, recall
from retrieval.rescore import Cosines
from retrieval.search import search
from retrieval.vectors import VectorFolder, Vectors
from tuples.mining.rules import best_first

PASSAGES = (10_000, 100_000, 1_000_000)
QUERIES = 1_000
WIDTH = 384
FOUND = 101  # passages per query, as the published numbers ask for
TEXTS = 1_000  # that are encoded
_TO_A_CENTRE = 64
_SPREAD = 0.8  # of passages around their centre, whose length is 1


@dataclass(frozen=True)
class Row:
    """One way of searching."""

    way: str
    passages: int
    build_seconds: float
    queries_per_second: float
    peak_mib: float
    recall: float


def main() -> None:
    """Measure row by row, and print each when it is there."""
    flags = parse()
    torch.set_num_threads(flags.threads)
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        if flags.encode:
            models = [minilm.unpack(folder / "all-MiniLM-L6-v2"), *flags.model]
            for model in models:
                rate, peak = in_fresh_process(encode_rate, model, flags.encode, flags.threads)
                print(f"{model.name}: {rate:,.0f} texts/s encoded, {peak:,.0f} MiB", flush=True)
        print(f"\n{'':14}{'passages':>10}{'build s':>9}{'queries/s':>11}{'MiB':>8}{'recall':>8}", flush=True)
        for passages in flags.passages:
            write_vectors(folder, passages)
            ways = ["exact fp32", "exact fp16", "flat", "IVF", "IVF-PQ"]
            for way in ways if passages >= 10_000 else ways[:-1]:  # fewer do not train codes
                row = in_fresh_process(measure, folder, passages, way, flags.threads)
                print(
                    f"{row.way:14}{row.passages:10,}{row.build_seconds:9.1f}{row.queries_per_second:11,.0f}"
                    f"{row.peak_mib:8,.0f}{row.recall:8.3f}",
                    flush=True,
                )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--passages", type=int, nargs="+", default=PASSAGES, help="sizes of the corpus (default %(default)s)")
    add("--encode", type=int, default=TEXTS, help="texts that are encoded; 0 = none (default %(default)s)")
    add("--model", type=Path, nargs="*", default=[], help="further model folders to encode with")
    add("--threads", type=int, default=torch.get_num_threads(), help="(default %(default)s)")
    add("--folder", type=Path, help="for the vectors, 2.3 GB for a million (default the system's)")
    return parser.parse_args()


class PeakMemory:
    """MiB that this process had for itself at most while it was measured, looked at 100 times a second."""

    def __enter__(self) -> "PeakMemory":
        """Begin to look."""
        self.mib = own_memory()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.ended.wait(0.01):
            self.mib = max(self.mib, own_memory())

    def __exit__(self, *_) -> None:
        """Look no more."""
        self.ended.set()
        self.thread.join()


def encode_rate(model: Path, texts: int, threads: int) -> tuple[float, float]:
    """(texts encoded a second, peak MiB), without the time to load the model."""
    torch.set_num_threads(threads)
    functions = corpus.distinct(corpus.standard_library_functions())
    passages = [function.passage for function in functions if function.passage][:texts]
    with PeakMemory() as memory:
        encoder = open_encoder(model)
        encoder.encode(passages[:16])  # what is done once is done now
        begin = time.perf_counter()
        encoder.encode(passages)
        seconds = time.perf_counter() - begin
    return len(passages) / seconds, memory.mib


def write_vectors(folder: Path, passages: int) -> None:
    """Vectors of passages in fp32 and in fp16, and of queries, once."""
    near = np.random.default_rng(1).choice(passages, min(QUERIES, passages), replace=False)
    queries = np.zeros((len(near), WIDTH), np.float32)
    for dtype in ("float32", "float16"):
        vectors = vector_folder(folder, passages, dtype)
        for shard in range(vectors.shards):
            begin, end = vectors.bounds(shard)
            rows = made_up(begin, end)
            vectors.write(shard, rows, cut=0)
            here = (near >= begin) & (near < end)
            queries[here] = unit(rows[near[here] - begin] + noise(here.sum(), begin + 1))
    np.save(folder / f"queries-{passages}.npy", queries)


def made_up(begin: int, end: int) -> np.ndarray:
    """Unit vectors of the passages from `begin` to before `end`; their centres depend on their numbers alone."""
    numbers = np.arange(begin, end) // _TO_A_CENTRE
    centres = {number: unit(noise(1, number + 10**9)) for number in np.unique(numbers)}
    rows = np.concatenate([centres[number] for number in numbers])  # [end - begin, WIDTH]
    return unit(rows + _SPREAD * noise(end - begin, begin))


def noise(count: int, seed: int) -> np.ndarray:
    """Rows of length about 1: [count, WIDTH]."""
    random = np.random.default_rng(int(seed)).standard_normal((count, WIDTH), np.float32)
    return random / np.float32(np.sqrt(WIDTH))


def unit(rows: np.ndarray) -> np.ndarray:
    """Each row divided by its length."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def vector_folder(folder: Path, passages: int, dtype: str) -> VectorFolder:
    """Where the vectors of a size and a type are."""
    return VectorFolder(folder / f"{passages}-{dtype}", passages, dtype)


def measure(folder: Path, passages: int, way: str, threads: int) -> Row:
    """Search by one way; of an index build it first."""
    torch.set_num_threads(threads)
    queries = np.load(folder / f"queries-{passages}.npy")
    vectors = vector_folder(folder, passages, "float32").open()
    exact = folder / f"exact-{passages}.npy"
    build_seconds = 0.0
    with PeakMemory() as memory:
        if way.startswith("exact"):
            searched = vectors if way == "exact fp32" else vector_folder(folder, passages, "float16").open()
            begin = time.perf_counter()
            found = search(queries, searched, FOUND).passages
            if way == "exact fp32":
                np.save(exact, found)
        else:
            begin = time.perf_counter()
            build(folder / "index", vectors, way)
            build_seconds = time.perf_counter() - begin
            begin = time.perf_counter()
            found = search_index(FaissIndex(folder / "index"), queries, vectors)
        seconds = time.perf_counter() - begin
    share = recall(found, np.load(exact))
    return Row(way, passages, build_seconds, len(queries) / seconds, memory.mib, share)


def search_index(index: FaissIndex, queries: np.ndarray, vectors: Vectors) -> np.ndarray:
    """What an index finds, scored anew as mining does: int64 [n, FOUND]."""
    found = index.search(queries, FOUND)
    rows, columns = np.nonzero(found >= 0)
    scores = np.full(found.shape, -np.inf, np.float32)
    scores[rows, columns] = Cosines(Vectors([queries], len(queries)), vectors).score(rows, found[rows, columns])
    return best_first(found, scores)[0]


if __name__ == "__main__":
    main()
