"""A raw file as an inspection sees it: a table of text numbers, each text's length, and what only texts can tell.

The file is read piece by piece. Of a text its key and its length stay, 13 bytes for each place in a tuple, and for a
moment some 50 while equal keys become one number.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from data import raw_files, raw_formats
from data.instructions import add_instructions
from data.raw_columns import Columns, Tuples
from data.raw_files import EMPTY_POSITIVE, EMPTY_QUERY, GOOD, NOTHING_LEFT
from data.raw_formats import UnreadableRows
from data.raw_rows import RawError
from tuples.inspection.checks import FIRST_ROWS, Found, found_in
from tuples.inspection.evaluation import Evaluation
from tuples.inspection.pairs import look_at_pairs
from tuples.inspection.texts import MISSING, keys_of

BATCH_ROWS = 2048


@dataclass(frozen=True)
class Table:
    """A dataset in numbers. Only tuples that can be trained on are in it; what is wrong with the others is in `found`.

    Attributes:
        numbers: int [n, 2 + K], text numbers of query, positive and negatives, -1 where there is none.
        rows: int64 [n], each tuple's row in its file or store, from 0.
        lengths: int64 [texts], in `unit`; of a store as its texts were cut.
        unit: "tokens", EOS included, or "characters".
        longest: lengths from here on may have been cut; None if nothing was.
        truncated: distinct texts that were cut to `longest`; None if nobody knows.
        found: what was found while it was read, by the name of its rule.
    """

    numbers: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    unit: str
    file_rows: int
    found: dict[str, Found]
    longest: int | None = None
    truncated: int | None = 0


@dataclass(frozen=True)
class _Part:
    """Some tuples of a file: [m] and [m, 2 + slots]."""

    rows: np.ndarray  # int64 [m]
    faults: np.ndarray  # int [m], numbers into raw_files.FAULTS
    keys: np.ndarray  # uint64 [m, 2 + slots]
    lengths: np.ndarray  # int32 [m, 2 + slots], characters
    own: np.ndarray  # bool [m, slots], negatives that equal their positive
    of_texts: dict[str, np.ndarray]  # rule -> bool [m]


def read_raw(path: Path, task: str | None, tokenizer, evaluation: Evaluation | None, workers: int) -> Table:
    """Look at every tuple of a raw file.

    Args:
        tokenizer: gives lengths in tokens; None gives them in characters.
        workers: threads.

    Raises:
        RawError: the file cannot be used, a line for each reason.
    """
    raw_formats.check_file(path)
    _, columns = raw_files.choose_columns(path)
    unreadable = UnreadableRows()
    tables = raw_formats.survey(path, columns.types, BATCH_ROWS, unreadable)
    look = partial(_look_at, columns=columns, task=task, evaluation=evaluation)
    rows_in_all = raw_formats.rows_of_schema(path)  # of a file without a schema nobody knows them before
    bar = tqdm(total=rows_in_all, desc=path.name, unit="row", disable=None, leave=False)
    parts = []
    file_rows = 0
    for part, rows in in_threads(look, tables, workers):
        parts.append(part)
        file_rows += rows
        bar.update(rows)
    bar.close()
    if not file_rows:
        raise RawError("\n".join([*unreadable.describe(), "the file has no row that can be read"]))
    whole = _joined(parts)
    parts.clear()
    found = _found(whole, unreadable, file_rows)
    good = whole.faults == GOOD
    whole.keys[:, 2:][whole.own] = MISSING  # as in a store: left out
    whole.keys[~good] = MISSING
    numbers, first = number_equal(whole.keys)
    unit = "characters"
    lengths = whole.lengths.reshape(-1)[first].astype(np.int64)
    if tokenizer is not None:
        unit = "tokens"
        lengths = _token_lengths(path, columns, tokenizer, first, whole.keys.shape)
    return Table(numbers[good], whole.rows[good], lengths, unit, file_rows, found)


def in_threads(function: Callable, items: Iterable, workers: int) -> Iterator:
    """function(item) of every item, in their order, by some threads; a few items ahead and no more are held."""
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _look_at(
    piece: tuple[np.ndarray, pa.Table], columns: Columns, task: str | None, evaluation: Evaluation | None
) -> tuple[_Part, int]:
    """Some rows of the file: what stays of their tuples, and how many rows they are."""
    row_numbers, table = piece
    tuples = with_instructions(columns.to_tuples(table, columns.count_negatives(table)))
    keys = np.stack([keys_of(column) for column in tuples.texts], axis=1)  # [m, 2 + slots]
    lengths = np.stack([_characters(column) for column in tuples.texts], axis=1)
    own = (keys[:, 2:] == keys[:, 1:2]) & (keys[:, 2:] != MISSING)
    faults = raw_files.find_faults(tuples, task)
    of_texts = look_at_pairs(tuples.texts[0], tuples.texts[1], task, evaluation)
    return _Part(row_numbers[tuples.rows], faults, keys, lengths, own, of_texts), len(table)


def with_instructions(tuples: Tuples) -> Tuples:
    """The tuples with the instructions of a column `prompt` before their queries, as tokenising puts them there."""
    if tuples.prompts is None:
        return tuples
    queries = tuples.texts[0].to_pylist()
    given = [query is not None for query in queries]
    prompts = tuples.prompts.to_pylist()
    for place in np.flatnonzero(given):
        queries[place] = add_instructions([queries[place]], [prompts[place]], None)[0]
    return replace(tuples, texts=[pa.array(queries, pa.large_string()), *tuples.texts[1:]])


def _characters(texts: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.utf8_length(texts), 0).to_numpy(zero_copy_only=False).astype(np.int32)


def _joined(parts: list[_Part]) -> _Part:
    """All parts as one, as wide as the widest."""
    slots = max(part.own.shape[1] for part in parts)
    of_texts = {}
    for name in parts[0].of_texts:
        of_texts[name] = np.concatenate([part.of_texts[name] for part in parts])
    return _Part(
        rows=np.concatenate([part.rows for part in parts]),
        faults=np.concatenate([part.faults for part in parts]),
        keys=np.concatenate([_widened(part.keys, 2 + slots) for part in parts]),
        lengths=np.concatenate([_widened(part.lengths, 2 + slots) for part in parts]),
        own=np.concatenate([_widened(part.own, slots) for part in parts]),
        of_texts=of_texts,
    )


def _widened(array: np.ndarray, columns: int) -> np.ndarray:
    """An array [m, k] with zeros behind each row, [m, columns]."""
    return np.pad(array, ((0, 0), (0, columns - array.shape[1])))


def number_equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Text numbers for keys: equal ones for equal keys, -1 for MISSING; int32, the shape of `keys`.

    Returns:
        (numbers, for each text its first place in the flattened keys, int64 [texts]).
    """
    # As numpy.unique does it, in a third of its memory.
    order = np.argsort(keys.reshape(-1), kind="stable")
    ordered = keys.reshape(-1)[order]
    begins_text = np.ones(len(order), bool)
    begins_text[1:] = ordered[1:] != ordered[:-1]
    begins_text[ordered == MISSING] = False  # the lowest key: these come first, and count as number -1
    numbers = np.empty(len(order), np.int32)
    numbers[order] = np.cumsum(begins_text, dtype=np.int32) - 1
    return numbers.reshape(keys.shape), order[begins_text]


def _found(whole: _Part, unreadable: UnreadableRows, file_rows: int) -> dict[str, Found]:
    """What is wrong with rows and with pairs of texts, by the name of the rule."""
    rows = whole.rows
    good = whole.faults == GOOD
    with_both = good | (whole.faults == NOTHING_LEFT)
    own = whole.own & with_both[:, None]
    given = (whole.keys[:, 2:] != MISSING) & with_both[:, None]
    first_unreadable = tuple(row for row, _ in sorted(unreadable.first)[:FIRST_ROWS])
    found = {
        "unreadable_rows": Found(unreadable.count, file_rows + unreadable.count, first_unreadable),
        "empty_queries": found_in(whole.faults == EMPTY_QUERY, rows),
        "empty_positives": found_in(whole.faults == EMPTY_POSITIVE, rows),
        "positive_is_negative": replace(found_in(own, rows), of=int(given.sum())),
        "nothing_left": found_in(whole.faults == NOTHING_LEFT, rows),
    }
    for name, mask in whole.of_texts.items():
        found[name] = found_in(mask[good], rows[good])
    return found


# ---------------------------------------------------------------------------------------------- tokens


def _token_lengths(path: Path, columns: Columns, tokenizer, first: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Tokens of each text with its EOS, int64 [texts]; each is tokenised where it stands first.

    Args:
        first: [texts], places in the flattened table of this `shape`.
    """
    from modeling.tokenizer import make_encoder  # here, because it needs transformers, and counting letters does not

    encode = make_encoder(tokenizer, np.iinfo(np.int64).max)
    lengths = np.zeros(shape, np.int64)
    is_first = np.zeros(shape, bool)
    is_first.reshape(-1)[first] = True
    begin = 0
    bar = tqdm(total=len(first), desc=f"tokenising {path.name}", unit="text", disable=None, leave=False)
    for _, table in raw_formats.survey(path, columns.types, BATCH_ROWS, UnreadableRows()):
        tuples = with_instructions(columns.to_tuples(table, columns.count_negatives(table)))
        end = begin + len(tuples.rows)
        for place, column in enumerate(tuples.texts):
            chosen = is_first[begin:end, place]
            _, counted, _ = encode(column.filter(pa.array(chosen)).to_pylist())
            lengths[begin:end, place][chosen] = counted
            bar.update(len(counted))
        begin = end
    bar.close()
    return lengths.reshape(-1)[first]
