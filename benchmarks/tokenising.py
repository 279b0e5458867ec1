"""Tokenising: the command beside a loop over rows in a pool of processes, on the same raw file.

    python -m benchmarks.tokenising          pip install fastokens; pip install --no-deps dashscope

The vocabulary is Qwen's, 151,646 entries, where the package that carries its ranks is installed, else a small one. The
tuples are made up, of 26 texts, each text three times in the file as passages are in real ones. The loop is the
published way: a tokenizer call per text, in two processes, rows as lists of ids in Parquet. CPU seconds are those of
all processes, memory is what they have for themselves together, at its peak. Loading the tokenizer is in every row.

Memory does not grow with the file but by what the store's writer knows of each distinct text: measured on the writer
alone, and extended to 60 million tuples.
"""

import argparse
import base64
import contextlib
import io
import multiprocessing
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

import tokenize_data_qwen
from benchmarks.common import in_fresh_process, own_memory
from data.store_writer import StoreWriter, text_key
from data.token_store import open_store
from modeling.qwen_bpe import tokenizer_from_ranks, train_tokenizer

ROWS = 6_000
MORE_ROWS = 24_000
NEGATIVES = 24
TEXTS = 2 + NEGATIVES  # of a tuple
COPIES = 3  # places in the file of each text
MAX_LENGTH = 1024  # tokens of a text at most, EOS included
WRITER_TEXTS = (500_000, 1_000_000, 2_000_000)  # distinct texts that a store's writer is given
SOURCE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """What one way of tokenising took."""

    seconds: float
    cpu_seconds: float  # of all processes
    size: int  # bytes written
    peak_mib: float = 0.0  # of all processes' own memory together


def main() -> None:
    """Make the files, run each way in a process of its own, print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"vocabulary of {save_tokenizer(folder / 'tokenizer'):,}")
        for rows in (ROWS, MORE_ROWS):
            write_raw(folder / str(rows) / "made.parquet", rows)
        peak = print_table(folder)
        per_text = bytes_per_text(folder)
    writer = f"{per_text:,.0f} bytes"
    print(f"\nthe store's writer holds {writer} a distinct text; 60 million tuples of two texts of their own:")
    total = peak / 1024 + 120e6 * per_text / 2**30
    print(f"{peak / 1024:.1f} GiB + 120 million x {writer} = {total:.0f} GiB")


def print_table(folder: Path) -> float:
    """Measure and print each way whose package is installed; gives the peak MiB of the last one."""
    fastest = "fastokens" if find_spec("fastokens") else "tokenizers"
    print(f"{'':34}{'tuples/s':>10}{'tokens/CPU s':>14}{'peak MiB':>10}{'disk MB':>9}")
    print_row("a loop over rows, two processes", measure("loop", folder, ROWS), ROWS, folder)
    print_row("tokenize_data_qwen.py", measure("tokenizers", folder, ROWS), ROWS, folder)
    if fastest == "fastokens":
        print_row("tokenize_data_qwen.py, fastokens", measure("fastokens", folder, ROWS), ROWS, folder)
    last = measure(fastest, folder, MORE_ROWS)
    print_row("the same, four times the tuples", last, MORE_ROWS, folder)
    return last.peak_mib


def print_row(label: str, run: Run, rows: int, folder: Path) -> None:
    """One line of the table; tokens are those of the file's texts, whatever the way made of them."""
    tokens = tokens_of_loop(folder) * rows // ROWS
    speeds = f"{rows / run.seconds:10,.0f}{tokens / run.cpu_seconds:14,.0f}"
    print(f"{label:34}{speeds}{run.peak_mib:10,.0f}{run.size / 1e6:9.1f}", flush=True)


@cache
def tokens_of_loop(folder: Path) -> int:
    """Tokens that the loop wrote, of ROWS tuples."""
    columns = pq.read_table(folder / "loop.parquet").columns
    return sum(len(column.combine_chunks().flatten()) for column in columns)


# ------------------------------------------------------------------------------------------ the ways


def measure(way: str, folder: Path, rows: int) -> Run:
    """Tokenise `rows` tuples in a fresh process, and watch the memory of it and its children."""
    with watched_children() as mib:
        run = in_fresh_process(tokenise, way, folder, rows)
    return Run(run.seconds, run.cpu_seconds, run.size, max(mib))


def tokenise(way: str, folder: Path, rows: int) -> Run:
    """The published loop, or the command with an engine."""
    began, cpu_began = time.perf_counter(), cpu_seconds()
    if way == "loop":
        size = tokenise_in_a_loop(folder)
    else:
        size = tokenise_by_the_door(way, folder, rows)
    return Run(time.perf_counter() - began, cpu_seconds() - cpu_began, size)


def tokenise_by_the_door(engine: str, folder: Path, rows: int) -> int:
    """tokenize_data_qwen.py without its report; gives the bytes of the store."""
    output = folder / f"{engine}{rows}"
    words = ["--input_dir", str(folder / str(rows)), "--output_dir", str(output)]
    words += ["--tokenizer_path", str(folder / "tokenizer"), "--task", "retrieval"]
    words += ["--skip_bad_rows", "true", "--engine", engine]
    with contextlib.redirect_stdout(io.StringIO()):
        status = tokenize_data_qwen.main(words)
    assert status == 0
    return open_store(output / "made").nbytes


def tokenise_in_a_loop(folder: Path) -> int:
    """The published way; gives the bytes written."""
    rows = pq.read_table(folder / str(ROWS) / "made.parquet").to_pylist()
    tokenise_row = partial(_tokenise_row, str(folder / "tokenizer"))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        tokenised = pool.map(tokenise_row, rows, chunksize=100)
    path = folder / "loop.parquet"
    pq.write_table(pa.Table.from_pylist(tokenised), path)
    return path.stat().st_size


def _tokenise_row(tokenizer_folder: str, row: dict[str, str]) -> dict[str, list[int]]:
    tokenizer = _load_once(tokenizer_folder)
    return {
        name: tokenizer(text, truncation=True, max_length=MAX_LENGTH - 1)["input_ids"] for name, text in row.items()
    }


@cache
def _load_once(tokenizer_folder: str):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return AutoTokenizer.from_pretrained(tokenizer_folder)


# ---------------------------------------------------------------------------------- time and memory


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    total = 0.0
    for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(whose)
        total += usage.ru_utime + usage.ru_stime
    return total


@contextlib.contextmanager
def watched_children() -> Iterator[list[float]]:
    """The MiB that this process's descendants have for themselves together, looked at 20 times a second."""
    seen = [0.0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(sum(own_memory(child) for child in descendants(os.getpid())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def descendants(process: int) -> list[int]:
    """Process numbers of all children, and theirs."""
    children = []
    try:
        for path in Path(f"/proc/{process}/task").glob("*/children"):
            children += [int(word) for word in path.read_text().split()]
    except OSError:  # it has ended
        return []
    grandchildren = [number for child in children for number in descendants(child)]
    return children + grandchildren


def bytes_per_text(folder: Path) -> float:
    """Memory that a store's writer takes for one more distinct text: the slope over several sizes."""
    taken = [in_fresh_process(memory_of_writer, folder, texts) for texts in WRITER_TEXTS]
    slope, _ = np.polyfit(WRITER_TEXTS, taken, 1)
    return float(slope)


def memory_of_writer(folder: Path, texts: int) -> float:
    """Bytes of this process's own memory when a store's writer has so many distinct texts of one token."""
    writer = StoreWriter(folder / str(texts), 0, {})
    for first in range(0, texts, 4096):
        numbers = range(first, min(first + 4096, texts))
        keys = [text_key(number.to_bytes(8)) for number in numbers]
        writer.add_texts(keys, np.zeros(len(keys), np.int32), np.ones(len(keys), np.int64))
    return own_memory() * 2**20


# -------------------------------------------------------------------------------- texts and tokenizer


def write_raw(path: Path, rows: int) -> None:
    """Tuples of pieces of this repository's source, each piece in three places."""
    random.seed(0)
    lines = source_lines()
    distinct = rows * TEXTS // COPIES + 1
    texts = ["\n".join(random.choices(lines, k=random.randint(2, 24))) for _ in range(distinct)]
    places = (texts * COPIES)[: rows * TEXTS]
    random.shuffle(places)
    names = ["query", "passage", *(f"negative_{number}" for number in range(1, NEGATIVES + 1))]
    columns = {name: places[number::TEXTS] for number, name in enumerate(names)}
    path.parent.mkdir()
    pq.write_table(pa.table(columns), path)


def source_lines() -> list[str]:
    """The longer lines of this repository's Python files."""
    lines = []
    for path in sorted(SOURCE.rglob("*.py")):
        if ".venv" not in path.parts:
            lines += [line for line in path.read_text(errors="ignore").splitlines() if len(line) > 30]
    return lines


def save_tokenizer(folder: Path) -> int:
    """Write Qwen's tokenizer where its vocabulary is installed, else a small one of the same kind; gives its size."""
    ranks = qwen_ranks()
    if ranks:
        tokenizer = tokenizer_from_ranks(ranks)
    else:
        texts = [path.read_text() for path in sorted(SOURCE.glob("*.py"))]
        tokenizer = train_tokenizer(texts, 8192)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def qwen_ranks() -> dict[bytes, int]:
    """Qwen's vocabulary without its special tokens, token -> id, from the package dashscope; empty without it."""
    package = find_spec("dashscope")
    if package is None:
        return {}
    path = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    ranks = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return ranks


if __name__ == "__main__":
    main()
