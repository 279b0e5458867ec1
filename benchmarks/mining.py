"""What mining costs: texts encoded a second, queries searched a second, memory at its peak, recall of indexes.

    python -m benchmarks.mining                     all rows that are not there yet; --minutes 12 ends after so many
    python -m benchmarks.mining --passages 10000    of one size
    python -m benchmarks.mining --model output/0.6b/epoch_2                      a decoder's texts a second as well
    python -m benchmarks.mining --show              the table of what was measured so far

Rows stand in benchmarks/measured/mining.jsonl, each as soon as it was measured. What stands there is not measured
again, so that a command can be interrupted and repeated. Rows of another machine, of other versions or of another
number of threads are rows of their own.

Searched are made-up vectors of 384 dimensions, as many as all-MiniLM-L6-v2 has: around random centres, 64 to each, with
queries near passages: 1,000 of them, and 300 for a million passages. What an index recalls of real texts may be more or
less; a mining prints its own. Encoded are the functions of the standard library. Each row has a process of its own;
memory is what this process has for itself, without the mapped files, which others can share. Seconds are the clock's,
and beside them the processor's of all threads together: where somebody else uses the cores, these hardly change.
"""

import argparse
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Budget, in_fresh_process, own_memory
from benchmarks.measured_rows import RowFile, processor, versions
from examples.code_search import corpus
from examples.models import minilm
from retrieval.encoders import open_encoder
from retrieval.faiss_index import FaissIndex, build, recall
from retrieval.rescore import Cosines
from retrieval.search import search
from retrieval.vectors import VectorFolder, Vectors
from tuples.mining.rules import best_first

MEASURED = Path(__file__).parent / "measured" / "mining.jsonl"
PASSAGES = (10_000, 100_000, 1_000_000)
WAYS = ("exact fp32", "exact fp16", "flat", "IVF", "IVF-PQ")
FEWEST_FOR_CODES = 10_000  # passages, below which IVF-PQ is not measured
QUERIES = 1_000
PRODUCTS = 3 * 10**8  # queries times passages, above which there are fewer queries
FEWEST_QUERIES = 300
WIDTH = 384
FOUND = 101  # passages per query, as the published numbers ask for
TEXTS = 1_000  # that are encoded
SEED = 1
_TO_A_CENTRE = 64
_SPREAD = 0.8  # of passages around their centre, whose length is 1


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, row by row, and show the table of this machine."""
    flags = parse(argv)
    rows = RowFile(flags.rows)
    if not flags.show:
        torch.set_num_threads(flags.threads)
        with tempfile.TemporaryDirectory(dir=flags.folder) as name:
            measure_missing(flags, rows, Path(name))
    print("\n".join(table(rows, settings_here(flags.threads))))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--passages", type=int, nargs="+", default=PASSAGES, help="sizes of the corpus (default %(default)s)")
    add("--encode", type=int, default=TEXTS, help="texts that are encoded; 0 = none (default %(default)s)")
    add("--model", type=Path, nargs="*", default=[], help="further model folders to encode with")
    add("--threads", type=int, default=torch.get_num_threads(), help="(default %(default)s)")
    add("--minutes", type=float, default=60, help="no row is begun after so many (default %(default)s)")
    add("--folder", type=Path, help="for vectors and indexes, 4 GB for a million (default the system's)")
    add("--rows", type=Path, default=MEASURED, help="file of rows (default %(default)s)")
    add("--show", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------- rows


def settings_here(threads: int) -> dict:
    """What a row depends on, beside what it measures."""
    packages = f"{versions()}, numpy {np.__version__}, faiss-cpu {metadata.version('faiss-cpu')}"
    return {"threads": threads, "machine": processor(), "versions": packages}


def identity(kind: str, data: int, system: str, settings: dict) -> dict:
    """What was measured: `data` texts "encoded" by a model, or passages "searched" in one of WAYS."""
    return {"kind": kind, "data": data, "system": system, "seed": SEED, "settings": settings}


def measure_missing(flags: argparse.Namespace, rows: RowFile, folder: Path) -> None:
    """Append each row that is not there, until the minutes are over; what was left out is printed."""
    budget = Budget(flags.minutes)
    settings = settings_here(flags.threads)
    if flags.encode:
        for model in [minilm.unpack(folder / "all-MiniLM-L6-v2"), *flags.model]:
            wanted = identity("encoded", flags.encode, model.name, settings)
            if rows.find(wanted) is None and budget.allows(f"{model.name} encodes", 1):
                rows.append(wanted | in_fresh_process(measure_encoding, model, flags.encode, flags.threads))
                print(row_line(rows.find(wanted)), flush=True)
    for passages in flags.passages:
        measure_searches(passages, rows, settings, folder, budget)
    for left in budget.left_out:
        print(f"left out: {left['what']} ({left['reason']})")


def measure_searches(passages: int, rows: RowFile, settings: dict, folder: Path, budget: Budget) -> None:
    """The same of all ways of searching one number of passages; its vectors are made where a row is missing."""
    ways = WAYS if passages >= FEWEST_FOR_CODES else WAYS[:-1]
    missing = [way for way in ways if rows.find(identity("searched", passages, way, settings)) is None]
    is_written = False
    for way in missing:
        if not budget.allows(f"{way}, {passages:,} passages", 1):
            continue
        if not is_written:
            write_vectors(folder, passages)
            is_written = True
            if way != WAYS[0]:  # its own row is there: only what it finds is needed, to be compared with
                in_fresh_process(measure_search, folder, passages, WAYS[0], settings["threads"])
        wanted = identity("searched", passages, way, settings)
        rows.append(wanted | in_fresh_process(measure_search, folder, passages, way, settings["threads"]))
        print(row_line(rows.find(wanted)), flush=True)


def row_line(row: dict) -> str:
    """A row of the table."""
    if row["kind"] == "encoded":
        return (
            f"{row['system']}: {row['data'] / row['seconds']:,.0f} texts/s encoded "
            f"({row['data'] / row['cpu_seconds']:,.0f} a second of the processor), {row['peak_mib']:,.0f} MiB"
        )
    return (
        f"{row['system']:12}{row['data']:10,}{row['build_seconds']:9.1f}{row['build_cpu_seconds']:9.1f}"
        f"{row['queries']:9,}{row['queries'] / row['seconds']:11,.0f}{row['queries'] / row['cpu_seconds']:13,.0f}"
        f"{row['peak_mib']:8,.0f}{row['recall']:8.3f}"
    )


def table(rows: RowFile, settings: dict) -> list[str]:
    """All rows of these settings, sorted by size and way."""
    found = rows.rows(settings=settings)
    searched = [row for row in found if row["kind"] == "searched"]
    searched.sort(key=lambda row: (row["data"], WAYS.index(row["system"])))
    titles = f"{'':12}{'passages':>10}{'build s':>9}{'of CPU':>9}{'queries':>9}"
    titles += f"{'queries/s':>11}{'a s of CPU':>13}{'MiB':>8}{'recall':>8}"
    return [
        "",
        "# " + "; ".join(f"{key} {value}" for key, value in settings.items()),
        *[row_line(row) for row in found if row["kind"] == "encoded"],
        titles,
        *[row_line(row) for row in searched],
    ]


# ---------------------------------------------------------------------------------------------- measuring


class Cost:
    """What a block of code took: `seconds` of the clock, and `cpu_seconds` of all threads of this process."""

    def __enter__(self) -> "Cost":
        """Begin."""
        self.begin = time.perf_counter()
        self.cpu_begin = time.process_time()
        return self

    def __exit__(self, *_) -> None:
        """End."""
        self.seconds = time.perf_counter() - self.begin
        self.cpu_seconds = time.process_time() - self.cpu_begin


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


def measure_encoding(model: Path, texts: int, threads: int) -> dict[str, float]:
    """A model's row: without the time to load it."""
    torch.set_num_threads(threads)
    functions = corpus.distinct(corpus.standard_library_functions())
    passages = [function.passage for function in functions if function.passage][:texts]
    if len(passages) < texts:
        raise ValueError(f"--encode {texts}: the standard library has {len(passages):,} functions")
    with PeakMemory() as memory:
        encoder = open_encoder(model)
        encoder.encode(passages[:16])  # what is done once is done now
        with Cost() as cost:
            encoder.encode(passages)
    return {"seconds": cost.seconds, "cpu_seconds": cost.cpu_seconds, "peak_mib": memory.mib}


def queries_for(passages: int) -> int:
    """How many queries search so many passages.

    >>> queries_for(100_000), queries_for(1_000_000)
    (1000, 300)
    """
    return min(QUERIES, passages, max(FEWEST_QUERIES, PRODUCTS // passages))


def write_vectors(folder: Path, passages: int) -> None:
    """Vectors of passages in fp32 and in fp16, and of queries, once."""
    near = np.random.default_rng(SEED).choice(passages, queries_for(passages), replace=False)
    queries = np.zeros((len(near), WIDTH), np.float32)
    single = vector_folder(folder, passages, "float32")
    half = vector_folder(folder, passages, "float16")
    for shard in range(single.shards):
        begin, end = single.bounds(shard)
        rows = made_up(begin, end)
        single.write(shard, rows, cut=0)
        half.write(shard, rows, cut=0)
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


def measure_search(folder: Path, passages: int, way: str, threads: int) -> dict[str, float]:
    """A row of one way of searching; an index is built first."""
    torch.set_num_threads(threads)
    queries = np.load(folder / f"queries-{passages}.npy")
    vectors = vector_folder(folder, passages, "float32").open()
    exact = folder / f"exact-{passages}.npy"
    with PeakMemory() as memory:
        with Cost() as building:
            index = None if way.startswith("exact") else build_index(folder / "index", vectors, way)
        with Cost() as searching:
            if index is not None:
                found = search_index(index, queries, vectors)
            elif way == "exact fp32":
                found = search(queries, vectors, FOUND).passages
            else:
                found = search(queries, vector_folder(folder, passages, "float16").open(), FOUND).passages
    if way == "exact fp32":
        np.save(exact, found)
    return {
        "build_seconds": building.seconds,
        "build_cpu_seconds": building.cpu_seconds,
        "queries": len(queries),
        "seconds": searching.seconds,
        "cpu_seconds": searching.cpu_seconds,
        "peak_mib": memory.mib,
        "recall": recall(found, np.load(exact)),
    }


def build_index(path: Path, vectors: Vectors, way: str) -> FaissIndex:
    """An index that was written, and opened again as mining opens it."""
    build(path, vectors, way)
    return FaissIndex(path)


def search_index(index: FaissIndex, queries: np.ndarray, vectors: Vectors) -> np.ndarray:
    """What an index finds, scored anew as mining does: int64 [n, FOUND]."""
    found = index.search(queries, FOUND)
    rows, columns = np.nonzero(found >= 0)
    scores = np.full(found.shape, -np.inf, np.float32)
    scores[rows, columns] = Cosines(Vectors([queries], len(queries)), vectors).score(rows, found[rows, columns])
    return best_first(found, scores)[0]


if __name__ == "__main__":
    sys.exit(main())
