"""The mined tuples as a Parquet file of the published layout, in the order of the input."""

import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.instructions import add_instructions
from tuples.mining.blocks import BLOCK, BlockFolder, Positives
from tuples.mining.rules import row_negatives
from tuples.mining.texts import Inputs, MiningTexts, read_tuples


def write_output(
    path: Path, inputs: Inputs, texts: MiningTexts, blocks: BlockFolder, too_few: str, width: int
) -> dict[str, int]:
    """Write query, passage, negative_1 .. negative_K, whole or not at all; nothing if no row is left.

    Args:
        too_few: what becomes of a row with fewer than `width` negatives: "fewer" keeps it, null stands for what is
            missing; else it is dropped.
        width: K.

    Returns:
        counts of rows for the report.
    """
    block_of = lru_cache(maxsize=8)(blocks.read)  # rows come in the order in which queries were numbered
    positives = Positives(texts)
    names = ["query", "passage", *[f"negative_{slot + 1}" for slot in range(width)]]
    schema = pa.schema([(name, pa.string()) for name in names])
    counts = Counter(dict.fromkeys(("rows_written", "rows_dropped", "rows_with_fewer"), 0))
    begin = 0
    for left_by_a_kill in path.parent.glob(f".{path.name}.*"):
        left_by_a_kill.unlink()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
        for tuples, good, _ in tqdm(read_tuples(inputs), desc="writing", unit="part", disable=None, leave=False):
            columns = tuples.texts_of(good)
            queries = add_instructions(columns[0], tuples.prompts_of(good), inputs.instruction)
            written = []
            for row, query, passage in zip(begin + np.flatnonzero(good), queries, columns[1], strict=True):
                numbers = texts.rows[row]  # [2 + S]
                of_query = block_of(int(numbers[0]) // BLOCK)["numbers"][numbers[0] % BLOCK]
                answers = set(positives.of(numbers[0]).tolist())
                negatives = row_negatives(of_query, numbers[2:], answers, width)
                if _is_kept(counts, len(negatives), width, too_few):
                    missing = [None] * (width - len(negatives))
                    written.append([query, passage, *map(texts.passage, negatives), *missing])
            begin += len(good)
            if written:
                arrays = [pa.array(column, pa.string()) for column in zip(*written, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    if counts["rows_written"]:
        os.replace(aside, path)
    else:
        aside.unlink()
    return dict(counts)


def _is_kept(counts: Counter, negatives: int, width: int, too_few: str) -> bool:
    """Whether a row with so many negatives is written; counted."""
    if negatives < width:
        counts["rows_with_fewer"] += 1
        if too_few != "fewer":
            counts["rows_dropped"] += 1
            return False
    counts["rows_written"] += 1
    return True
