"""Tokenising: the door beside a loop over rows in a pool of processes, on the same raw file.

    python -m benchmarks.tokenising          pip install fastokens; pip install --no-deps dashscope

The vocabulary is Qwen's, 151,646 entries, where the package that carries its ranks is installed, else a small one. The
tuples are made up, of 26 texts, each text three times in the file as passages are in real ones. The loop is the
published way: a tokenizer call a text, in two processes, rows as lists of ids in Parquet. CPU seconds are those of all
processes, memory is what they have for themselves together, at its peak. Loading the tokenizer is in every row.

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
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

import tokenize_data_qwen
from data.store_writer import StoreWriter, text_key
from data.token_store import open_store

ROWS, MORE, SLOTS, SOURCE = 6_000, 24_000, 24, Path(__file__).parent.parent
HELD = (500_000, 1_000_000, 2_000_000)  # distinct texts
# Qwen's split of a text into words, and its special tokens.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def main() -> None:
    """Make the files, run each way in a process of its own, print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = qwen_tokenizer(folder / "tokenizer") or small_tokenizer(folder / "tokenizer")
        print(f"vocabulary of {len(AutoTokenizer.from_pretrained(tokenizer)):,}")
        for rows in (ROWS, MORE):
            write_raw(folder / str(rows) / "made.parquet", rows)
        print(f"{'':34}{'tuples/s':>10}{'tokens/CPU s':>14}{'peak MiB':>10}{'disk MB':>9}")
        for label, way, rows in (
            ("a loop over rows, two processes", "loop", ROWS),
            ("tokenize_data_qwen.py", "tokenizers", ROWS),
            ("tokenize_data_qwen.py, fastokens", "fastokens", ROWS),
            ("the same, four times the tuples", "fastokens" if find_spec("fastokens") else "tokenizers", MORE),
        ):
            if way != "loop" and not find_spec(way):
                continue
            wall, cpu, peak, tokens, size = measure(way, folder, str(tokenizer), rows)
            print(f"{label:34}{rows / wall:10,.0f}{tokens / cpu:14,.0f}{peak:10,.0f}{size / 1e6:9.1f}", flush=True)
        slope = float(np.polyfit(*zip(*(alone(held, folder, count) for count in HELD), strict=True), 1)[0])
    print(
        f"\nthe store's writer holds {slope:,.0f} bytes a distinct text; 60 million tuples of two texts of their own:"
    )
    print(f"{peak / 1024:.1f} GiB + 120 million x {slope:,.0f} bytes = {peak / 1024 + 120e6 * slope / 2**30:.0f} GiB")


def measure(way: str, folder: Path, tokenizer: str, rows: int) -> tuple[float, float, float, int, int]:
    """Seconds, CPU seconds, peak MiB, tokens of the file's texts, bytes written."""
    with watched() as seen:
        wall, cpu, size = alone(tokenise, way, folder, tokenizer, rows)
    if way == "loop":
        ids = pq.read_table(folder / "loop.parquet")
        (folder / "tokens").write_text(str(sum(len(column.combine_chunks().flatten()) for column in ids.columns)))
    return wall, cpu, max(seen), int((folder / "tokens").read_text()) * rows // ROWS, size


def alone(function, *args):
    """What the function returns in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def held(folder: Path, texts: int) -> tuple[int, float]:
    """(texts, bytes of this process's own memory) when a store's writer has so many distinct texts of one token."""
    writer = StoreWriter(folder / str(texts), 0, {})
    for first in range(0, texts, 4096):
        keys = [text_key(number.to_bytes(8)) for number in range(first, min(first + 4096, texts))]
        writer.add_texts(keys, np.zeros(len(keys), np.int32), np.ones(len(keys), np.int64))
    return texts, own_mib(os.getpid()) * 2**20


def tokenise(way: str, folder: Path, tokenizer: str, rows: int) -> tuple[float, float, int]:
    """Seconds, CPU seconds of this process and its children, bytes written."""
    out = folder / f"{way}{rows}"
    words = ["--input_dir", str(folder / str(rows)), "--output_dir", str(out), "--tokenizer_path", tokenizer]
    began = time.perf_counter(), cpu_seconds()
    if way == "loop":
        size = loop(folder, tokenizer)
    else:
        assert quietly([*words, "--task", "retrieval", "--skip_bad_rows", "true", "--engine", way]) == 0
        size = open_store(out / "made").nbytes
    return time.perf_counter() - began[0], cpu_seconds() - began[1], size


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """The MiB that this process's descendants have for themselves together, looked at 20 times a second."""
    seen, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            seen.append(sum(map(own_mib, descendants(os.getpid()))))

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    over.set()
    thread.join()


def descendants(pid: int) -> list[int]:
    """Process numbers of all children, and theirs."""
    try:
        own = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    except OSError:
        return []
    return own + [number for child in own for number in descendants(child)]


def own_mib(pid: int) -> float:
    """MiB that no other process shares."""
    with contextlib.suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields.get("RssAnon", "0").split()[0]) / 1024  # one that has ended says nothing
    return 0.0


def quietly(words: list[str]) -> int:
    """The door, without its report."""
    with contextlib.redirect_stdout(io.StringIO()):
        return tokenize_data_qwen.main(words)


def loop(folder: Path, tokenizer: str) -> int:
    """The published way; returns the bytes written."""
    table = pq.read_table(folder / str(ROWS) / "made.parquet").to_pylist()
    with multiprocessing.get_context("spawn").Pool(2, initializer=_start, initargs=(tokenizer,)) as pool:
        rows = pool.map(_row, table, chunksize=100)
    pq.write_table(pa.Table.from_pylist(rows), folder / "loop.parquet")
    return (folder / "loop.parquet").stat().st_size


def _start(tokenizer: str) -> None:
    global TOKENIZER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    TOKENIZER = AutoTokenizer.from_pretrained(tokenizer)


def _row(row: dict) -> dict:
    return {name: TOKENIZER(text, truncation=True, max_length=1023)["input_ids"] for name, text in row.items()}


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def distinct(rows: int) -> int:
    """Texts in a made-up file."""
    return rows * (2 + SLOTS) // 3 + 1


def write_raw(path: Path, rows: int) -> None:
    """Tuples of pieces of this repository's source, each piece in three places."""
    random.seed(0)
    lines = [line for file in sorted(SOURCE.rglob("*.py")) if ".venv" not in file.parts
             for line in file.read_text(errors="ignore").splitlines() if len(line) > 30]  # fmt: skip
    texts = ["\n".join(random.choices(lines, k=random.randint(2, 24))) for _ in range(distinct(rows))]
    places = (texts * 3)[: rows * (2 + SLOTS)]
    random.shuffle(places)
    names = ["query", "passage", *(f"negative_{k + 1}" for k in range(SLOTS))]
    path.parent.mkdir()
    pq.write_table(pa.table({name: places[i::26] for i, name in enumerate(names)}), path)


def qwen_tokenizer(folder: Path) -> Path | None:
    """Qwen's vocabulary from the ranks that the package dashscope carries; None without it."""
    found = find_spec("dashscope")
    if not found:
        return None
    lines = (Path(found.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    converter = TikTokenConverter(vocab_file="ranks", pattern=PATTERN, extra_special_tokens=SPECIAL)
    converter.load_tiktoken_bpe = lambda _: ranks
    tokenizer = converter.converted()
    tokenizer.normalizer = normalizers.NFC()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


def small_tokenizer(folder: Path) -> Path:
    """A byte-level BPE trained on this repository."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(SOURCE.glob("*.py"))], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
