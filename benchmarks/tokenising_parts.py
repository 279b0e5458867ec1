"""What tokenising in parts costs beside the tokenizer: checking, reading, joining; and the sum for 60 million tuples.

    python -m benchmarks.tokenising_parts          a minute of a CPU; 1 GB of disk

CPU seconds, not wall time: slopes over three sizes each, so that imports and the like do not count. Reading is all of
tokenising but the tokenizer: Parquet to text, the key of each text, the look-up, the bytes to disk; one thread does it.
The texts are those of benchmarks/tokenising.py, which also measures the tokenizer. Joined are two parts of made-up
texts, of which the second holds half of the first's.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from benchmarks.common import in_fresh_process
from benchmarks.tokenising import TEXTS, cpu_seconds, write_raw
from data import tokenising
from data.jobs import Job
from data.joining import join, plan_join
from data.parts import Part, PartWriter
from data.raw_files import survey
from data.store_writer import text_key
from data.token_store import open_store
from utils import file_digest

ROWS = (2_000, 4_000, 8_000)  # tuples that are checked and read
JOINED = (100_000, 200_000, 400_000)  # texts that two parts hold together
TOKENS = 165  # of a text, as real ones have on average
EOS = 0  # of made-up tokens
INPUTS = {"task": "retrieval"}
TUPLES = 59_575_739  # of F2LLM-v2's published sources with 24 negatives; the other half million have one
TOKENS_PER_SECOND = 467_000  # of a CPU: 1,402,058 in benchmarks/RESULTS.md, of a file that has each text three times
TEXTS_OF_THEIR_OWN = 2  # of a tuple: its query and positive; negatives are mined from other tuples' texts


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rows in ROWS:
            write_raw(folder / str(rows) / "made.parquet", rows)
        checking = slope(ROWS, seconds_to_check, folder) / TEXTS
        reading = slope(ROWS, seconds_to_read, folder) / TEXTS
        joining = slope(JOINED, seconds_to_join, folder)
    for what, seconds in (("checking", checking), ("reading", reading), ("joining", joining)):
        print(f"{what:10}{seconds * 1e6:6.1f} us of a CPU a text")
    print("\n".join(arithmetic(checking, reading, joining)))


def arithmetic(checking: float, reading: float, joining: float) -> list[str]:
    """CPU hours of the whole job: of one thread, of all, and of the join.

    Args:
        checking, reading, joining: CPU seconds a text.
    """
    texts = TUPLES * TEXTS
    own_texts = TUPLES * TEXTS_OF_THEIR_OWN
    tokens = own_texts * TOKENS
    size = 4 * (tokens + texts) + 8 * own_texts  # bytes of tokens, tuples and offsets
    return [
        f"{TUPLES / 1e6:.1f} million tuples: {texts / 1e9:.2f} billion texts, {own_texts / 1e6:.0f} million distinct,",
        f"of {tokens / 1e9:.1f} billion tokens; the stores have {size / 1e9:.0f} GB",
        f"checking  {checking * texts / 3600:5.1f} hours of one thread, divided by the parts",
        f"reading   {reading * texts / 3600:5.1f} hours of one thread, divided by the parts",
        f"tokenizer {tokens / TOKENS_PER_SECOND / 3600:5.1f} hours, divided by all cores of all parts",
        f"joining   {joining * own_texts / 3600:5.1f} hours of one thread at the end, where no text is in two parts",
    ]


def slope(sizes: Sequence[int], measure: Callable[[Path, int], float], folder: Path) -> float:
    """What one more of a size adds to what a function measures, each time in a process of its own."""
    values = [in_fresh_process(measure, folder, size) for size in sizes]
    return float(np.polyfit(sizes, values, 1)[0])


def seconds_to_check(folder: Path, rows: int) -> float:
    """CPU seconds of looking through a raw file before it is tokenised."""
    path = folder / str(rows) / "made.parquet"
    began = cpu_seconds()
    file_digest(path)
    assert survey(path, "retrieval").rows == rows
    return cpu_seconds() - began


def seconds_to_read(folder: Path, rows: int) -> float:
    """CPU seconds of making a store of a raw file with a tokenizer that gives every text an EOS and nothing else."""
    path = folder / str(rows) / "made.parquet"
    tokenising.make_encoder = lambda *_: only_eos
    inputs = {"max_seq_length": 1024, "max_rows": 0, "task": "retrieval", "tokenizer": ""}
    job = Job(path, folder / f"read{rows}", inputs, survey(path, "retrieval"))
    began = cpu_seconds()
    tokenising.tokenize_file(job, SimpleNamespace(eos_token_id=EOS))
    return cpu_seconds() - began


def only_eos(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts as an encoder gives them, of one token each."""
    return np.full(len(texts), EOS, np.int32), np.ones(len(texts), np.int64), np.zeros(len(texts), bool)


def seconds_to_join(folder: Path, texts: int) -> float:
    """CPU seconds of joining two parts that hold so many texts together."""
    output_dir = folder / f"joined{texts}"
    half = texts // 2
    for number, first in ((1, 0), (2, half // 2)):
        write_part(Part(number, 2), output_dir, range(first, first + half))
    planned, problems = plan_join(output_dir, [1, 2], 2, "made", INPUTS, overwrite=False)
    assert not problems
    began = cpu_seconds()
    join(planned)
    taken = cpu_seconds() - began
    assert open_store(output_dir / "made").meta["texts"] == half + half // 2
    return taken


def write_part(part: Part, output_dir: Path, numbers: range) -> None:
    """A part of made-up texts, two of them a tuple."""
    rows = len(numbers) // 2
    place = {"part": str(part), "rows": [rows * (part.number - 1), rows * part.number], "rows_of_file": 2 * rows}
    writer = PartWriter(part.folder(output_dir) / "made", 0, INPUTS | {"source_sha256": ""} | place)
    writer.stats.update({"skipped": 0, "instructions": {"counts": {}, "other": 0, "none": rows}})
    for first in range(0, len(numbers), 4096):
        some = numbers[first : first + 4096]
        tokens = np.repeat(np.array(some, np.int32), TOKENS)
        tokens[TOKENS - 1 :: TOKENS] = EOS
        keys = [text_key(number.to_bytes(8)) for number in some]
        writer.add_texts(keys, tokens, np.full(len(some), TOKENS), np.zeros(len(some), bool))
        writer.note_queries([""] * (len(some) // 2))
        writer.add_tuples(np.arange(first, first + len(some)).reshape(-1, 2))
    writer.finish({"name": "made", "task": "retrieval", "max_seq_length": None, "eos_token_id": EOS, "tokenizer": ""})


if __name__ == "__main__":
    main()
