"""One raw file becomes one token store, or some of its rows a part of one (data/parts.py): read, tokenised, written.

Each distinct text is tokenised once. An interrupted file continues where it was committed last, to the same bytes.
"""

import math
from collections.abc import Callable
from itertools import chain

import numpy as np
from tqdm import tqdm

from data import raw_files, raw_formats
from data.instructions import add_instructions, count_instructions, keep_most_frequent
from data.jobs import Job
from data.parts import PartWriter
from data.store_writer import StoreWriter, text_key
from modeling.tokenizer import EngineDiffers, make_encoder
from utils import aside_of, remove

BATCH_TEXTS = 1024  # tokenised together: enough for all threads; more take memory and are no faster
COMMIT_ROWS = 65536  # rows between two points at which a killed run continues
COLUMNS_NAMED = 20  # columns that were not read, in meta.json


def tokenize_with_fallback(job: Job, tokenizer, engine: str, say: Callable[[str], None]) -> None:
    """`tokenize_file`; where a faster engine differs, that is said and the reference tokenizer begins the file anew."""
    try:
        tokenize_file(job, tokenizer, engine)
    except EngineDiffers as error:
        say(f"{job.path}: {error}: tokenised again by the reference")
        remove(aside_of(job.folder))
        tokenize_file(job, tokenizer)


def tokenize_file(job: Job, tokenizer, engine: str = "tokenizers") -> None:
    """Write the store of one raw file, or a part, from where an earlier run of the same job was interrupted."""
    inputs, survey = job.inputs, job.survey
    rows = range(survey.rows) if job.rows is None else job.rows
    kind = StoreWriter if job.rows is None else PartWriter
    writer = kind(job.folder, survey.slots, inputs)
    encode = make_encoder(tokenizer, inputs["max_seq_length"], engine)
    is_sampled = raw_files.sample_rows(survey.rows, inputs["max_rows"])  # [rows of the file]
    if survey.not_read:
        writer.stats["columns_not_read"] = list(survey.not_read)[:COLUMNS_NAMED]
    position = max(writer.position, rows.start)
    batch_rows = math.ceil(BATCH_TEXTS / (2 + survey.slots))
    done = position - rows.start
    with tqdm(total=len(rows), initial=done, desc=job.folder.name, unit="row", disable=None, leave=False) as bar:
        for table in raw_formats.read(job.path, survey.columns.types, batch_rows, skip=position):
            table = table.slice(0, rows.stop - position)
            tuples = survey.columns.to_tuples(table, survey.slots)
            wanted = is_sampled[position + tuples.rows]  # [tuples of the table]
            good = wanted & (raw_files.find_faults(tuples, inputs["task"]) == raw_files.GOOD)
            writer.stats["skipped"] = writer.stats.get("skipped", 0) + int(wanted.sum() - good.sum())
            columns = tuples.texts_of(good)
            columns[0] = add_instructions(columns[0], tuples.prompts_of(good), inputs.get("instruction"))
            count_instructions(writer.stats, columns[0])
            writer.note_queries(columns[0])
            add_tuples(writer, columns, encode)
            position += len(table)
            bar.update(len(table))
            if position == rows.stop:
                break
            if position // COMMIT_ROWS > writer.position // COMMIT_ROWS:  # a multiple of COMMIT_ROWS was passed
                writer.commit(position)
    if job.rows is None:  # a part keeps all: which ones are the most frequent is known when all are joined
        keep_most_frequent(writer.stats)
    meta = {
        "name": job.folder.name,
        "task": inputs["task"],
        "max_seq_length": inputs["max_seq_length"],
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer": inputs["tokenizer"],
    }
    writer.finish(meta)


def add_tuples(writer: StoreWriter, columns: list[list[str | None]], encode: Callable) -> None:
    """Tokenise the texts that the store does not hold yet, then add the tuples as text numbers.

    Args:
        columns: queries, positives, and a list for each slot of negatives; all of one length.
    """
    keys = [keys_of(column) for column in columns]  # 2 + K lists of [rows]
    texts = new_texts(columns, keys, writer.numbers)
    tokens, lengths, is_cut = encode(list(texts.values()))
    writer.add_texts(list(texts), tokens, lengths, is_cut)
    numbers = [numbers_of(column, writer.numbers) for column in keys]  # 2 + K lists of [rows]
    writer.add_tuples(np.array(numbers, np.int32).T)  # [rows, 2 + K]


def keys_of(column: list[str | None]) -> list[bytes | None]:
    """The key of each text; None if there is none."""
    return [text_key(text.encode()) if text else None for text in column]


def numbers_of(keys: list[bytes | None], known: dict[bytes, int]) -> list[int]:
    """The text number of each key; -1 where there is no text."""
    return [known[key] if key else -1 for key in keys]


def new_texts(columns: list[list[str | None]], keys: list[list[bytes | None]], known: dict) -> dict[bytes, str]:
    """The texts by key whose keys are not `known`, in the order of first appearance, row by row.

    Row by row, so that the texts' numbers do not depend on where batches begin.
    """
    texts_by_row = chain.from_iterable(zip(*columns, strict=True))
    keys_by_row = chain.from_iterable(zip(*keys, strict=True))
    texts = {}
    for text, key in zip(texts_by_row, keys_by_row, strict=True):
        if key and key not in known:
            texts[key] = text
    return texts
