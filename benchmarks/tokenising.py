"""Tokenising: the door beside a loop over rows in a pool of processes, on the same raw file.

    python -m benchmarks.tokenising [--tokenizer FOLDER]        (pip install fastokens for its row)

Made-up tuples of 26 texts, each text three times in the file as passages are in real ones. The loop is the published
way: a tokenizer call a text, in two processes, rows as lists of ids in Parquet. CPU seconds are those of all processes;
the loop's peak is that of the parent and of one of the two.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tokenize_data_qwen
from token_store import open_store

ROWS, SLOTS, SOURCE = 2_000, 24, Path(__file__).parent.parent


def main() -> None:
    """Make the file, run each way in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder; by default one is trained on this repository, 8,192 entries")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = parser.parse_args().tokenizer or small_tokenizer(folder / "tokenizer")
        write_raw(folder / "raw" / "made.parquet")
        print(f"{'':34}{'tuples/s':>10}{'tokens/CPU s':>14}{'peak MiB':>10}{'disk MB':>9}")
        for label, way in (("a loop over rows, two processes", "loop"), ("tokenize_data_qwen.py", "tokenizers"),
                           ("tokenize_data_qwen.py, fastokens", "fastokens")):  # fmt: skip
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, way, folder, str(tokenizer)).result()
            if found:
                wall, cpu, peak, tokens, size = found
                print(f"{label:34}{ROWS / wall:10,.0f}{tokens / cpu:14,.0f}{peak:10,.0f}{size / 1e6:9.1f}")


def measure(way: str, folder: Path, tokenizer: str) -> tuple[float, float, float, int, int] | None:
    """Seconds, CPU seconds, peak MiB, tokens of the file's texts, bytes written; None where the engine is missing."""
    words = ["--input_dir", str(folder / "raw"), "--output_dir", str(folder / way), "--tokenizer_path", tokenizer]
    began = time.perf_counter(), cpu_seconds()
    if way == "loop":
        size = loop(folder, tokenizer)
    elif quietly([*words, "--task", "retrieval", "--skip_bad_rows", "true", "--engine", way]) != 0:
        return None
    wall, cpu = time.perf_counter() - began[0], cpu_seconds() - began[1]
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024
    if way == "loop":
        ids = pq.read_table(folder / "loop.parquet")
        (folder / "tokens").write_text(str(sum(len(column.combine_chunks().flatten()) for column in ids.columns)))
    else:
        size = open_store(folder / way / "made").nbytes
    return wall, cpu, peak, int((folder / "tokens").read_text()), size


def quietly(words: list[str]) -> int:
    """The door, without its report."""
    with contextlib.redirect_stdout(io.StringIO()):
        return tokenize_data_qwen.main(words)


def loop(folder: Path, tokenizer: str) -> int:
    """The published way; returns the bytes written."""
    table = pq.read_table(folder / "raw" / "made.parquet").to_pylist()
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


def write_raw(path: Path) -> None:
    """Tuples of pieces of this repository's source, each piece in three places."""
    random.seed(0)
    lines = [line for file in sorted(SOURCE.rglob("*.py")) if ".venv" not in file.parts
             for line in file.read_text(errors="ignore").splitlines() if len(line) > 30]  # fmt: skip
    texts = ["\n".join(random.choices(lines, k=random.randint(2, 24))) for _ in range(ROWS * (2 + SLOTS) // 3 + 1)]
    places = (texts * 3)[: ROWS * (2 + SLOTS)]
    random.shuffle(places)
    names = ["query", "passage", *(f"negative_{k + 1}" for k in range(SLOTS))]
    path.parent.mkdir()
    pq.write_table(pa.table({name: places[i::26] for i, name in enumerate(names)}), path)


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
