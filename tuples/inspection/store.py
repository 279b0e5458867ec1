"""A token store as an inspection sees it: arrays as they lie on disk; texts only where a tokenizer is given.

Equal texts have one number in a store, so what is counted by numbers is exact, and no text is looked at.
"""

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data.token_store import TokenStore
from tuples.inspection.checks import Found, found_in
from tuples.inspection.evaluation import Evaluation
from tuples.inspection.pairs import look_at_pairs
from tuples.inspection.raw import Table, number_equal
from tuples.inspection.texts import keys_of_bytes

BATCH_ROWS = 4096
BATCH_TEXTS = 2**14


def read_store(store: TokenStore, tokenizer, evaluation: Evaluation | None, by_ids: bool = False) -> Table:
    """Look at every tuple of a token store.

    Args:
        tokenizer: the one that wrote the store; None leaves out the checks that need texts.
        by_ids: count texts with equal token ids as one, whatever their numbers: F2LLM-v2's files name documents, and
            two of them may be equal, or equal to a query.
    """
    rows = np.arange(len(store.tuples))
    numbers, lengths = store.tuples, np.diff(store.offsets)
    if by_ids:
        numbers, lengths = number_by_ids(store)
    stats = store.meta["stats"]
    own = stats.get("own", 0)
    negatives = int((store.tuples[:, 2:] >= 0).sum())
    found = {
        "empty_queries": found_in(lengths[numbers[:, 0]] == 1, rows),  # nothing but EOS
        "empty_positives": found_in(lengths[numbers[:, 1]] == 1, rows),
        "positive_is_negative": Found(own, negatives + own),  # left out by who wrote the store, rows unknown
    }
    if tokenizer is not None:
        found |= _look_at_texts(store, tokenizer, evaluation, rows)
    longest, truncated = _cut(store, lengths)
    return Table(numbers, rows, lengths, "tokens", len(rows), found, longest, truncated)


def number_by_ids(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """(tuples int32 [n, 2 + K], lengths [texts]) of a store, numbered anew: texts with equal ids have one number."""
    keys = np.zeros(store.meta["texts"], np.uint64)
    for begin in range(0, len(keys), BATCH_TEXTS):
        offsets = store.offsets[begin : begin + BATCH_TEXTS + 1]
        ids = store.tokens[offsets[0] : offsets[-1]]
        data = np.concatenate([ids.view(np.uint8), np.zeros(8, np.uint8)])
        starts = (offsets[:-1] - offsets[0]) * ids.itemsize
        keys[begin : begin + BATCH_TEXTS] = keys_of_bytes(data, starts, np.diff(offsets) * ids.itemsize)
    new_numbers, first = number_equal(keys)
    numbers = np.append(new_numbers, -1)[store.tuples]  # -1 looks up the last
    return numbers.astype(np.int32), np.diff(store.offsets)[first]


def _cut(store: TokenStore, lengths: np.ndarray) -> tuple[int | None, int | None]:
    """(the length that texts were cut to, how many were), as far as the store knows; (None, 0) where none was."""
    truncated = store.meta["stats"].get("truncated")
    if truncated == 0:
        return None, 0
    longest = store.meta["max_seq_length"]
    if longest is None:  # the published scripts' files do not say
        longest = int(lengths.max(initial=0))
    return longest, truncated


def _look_at_texts(store: TokenStore, tokenizer, evaluation: Evaluation | None, rows: np.ndarray) -> dict[str, Found]:
    """What the texts of queries and positives tell, by the name of the rule."""
    parts = []
    bar = tqdm(total=len(rows), desc=f"texts of {store.name}", unit="tuple", disable=None, leave=False)
    for begin in range(0, len(rows), BATCH_ROWS):
        pairs = store.tuples[begin : begin + BATCH_ROWS, :2]  # [m, 2]
        numbers, places = np.unique(pairs, return_inverse=True)
        texts = decoded(store, tokenizer, numbers)
        places = places.reshape(pairs.shape)
        queries, positives = (texts.take(pa.array(places[:, column])) for column in (0, 1))
        parts.append(look_at_pairs(queries, positives, store.task, evaluation))
        bar.update(len(pairs))
    bar.close()
    return {name: found_in(np.concatenate([part[name] for part in parts]), rows) for name in parts[0]}


def decoded(store: TokenStore, tokenizer, numbers: np.ndarray) -> pa.Array:
    """The texts of these numbers, [n], without their EOS; of a text that was cut, what is left of it."""
    ids = [store.tokens[store.offsets[number] : store.offsets[number + 1] - 1].tolist() for number in numbers]
    texts = tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return pa.array(texts, pa.large_string())
