"""What an inspection finds in a table of text numbers: repeated queries, false negatives, how long the texts are.

Pure functions of arrays, the same for raw files and for token stores. A table is int [n, 2 + K]: the text numbers of
query, positive and negatives, -1 where there is none, as in a token store. Equal numbers are equal texts.
"""

from dataclasses import dataclass

import numpy as np

ROLES = ("queries", "positives", "negatives")
FIRST_ROWS = 5  # rows that are named where something was found
_BLOCK = 2**18  # rows looked at together


@dataclass(frozen=True)
class Found:
    """How often something was found: `count` of `of`, and the rows that have it first."""

    count: int
    of: int
    rows: tuple[int, ...] = ()  # from 0; of the file, or of the store

    @property
    def share(self) -> float:
        """The count as a share; 0 of nothing is 0."""
        return self.count / self.of if self.of else 0.0

    def plus(self, other: "Found") -> "Found":
        """Of two datasets together; rows of both would say nothing."""
        return Found(self.count + other.count, self.of + other.of)


def found_in(mask: np.ndarray, rows: np.ndarray) -> Found:
    """What a mask of tuples, bool [n], or of negatives, bool [n, K], marks; `rows` [n] are the tuples' rows."""
    in_row = mask if mask.ndim == 1 else mask.any(axis=1)
    first = rows[np.flatnonzero(in_row)[:FIRST_ROWS]]
    return Found(int(mask.sum()), mask.size, tuple(first.tolist()))


def repeated(values: np.ndarray) -> np.ndarray:
    """Which values stood before, bool [n]: all but the first of equal ones."""
    _, first = np.unique(values, return_index=True)
    stood_before = np.ones(len(values), bool)
    stood_before[first] = False
    return stood_before


def pairs_of(queries: np.ndarray, texts: np.ndarray, count: int) -> np.ndarray:
    """One number for each pair of text numbers below `count`, int64 [n]; count^2 must fit, as for 2^31 texts."""
    return queries.astype(np.int64) * count + texts


def false_negatives(table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Negatives that are the positive of another tuple with the same query.

    Only tuples whose query stands in several can have one, and mostly these are few.

    Args:
        count: texts; all numbers of the table are below it.

    Returns:
        (tuples [m] that were looked at, numbers into the table; which of their negatives are such, bool [m, K]).
    """
    queries = np.asarray(table[:, 0])
    times = np.bincount(queries, minlength=count)  # [texts]
    tuples = np.flatnonzero(times[queries] > 1)
    chosen = np.asarray(table[tuples])  # [m, 2 + K]
    positives = np.unique(pairs_of(chosen[:, 0], chosen[:, 1], count))
    is_false = np.zeros((len(tuples), table.shape[1] - 2), bool)
    for slot in range(is_false.shape[1]):
        negatives = chosen[:, 2 + slot]
        is_other = (negatives >= 0) & (negatives != chosen[:, 1])
        is_false[:, slot] = is_other & is_among(pairs_of(chosen[:, 0], negatives, count), positives)
    return tuples, is_false


def is_among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are in an array that is in rising order, bool, the shape of `values`."""
    if not len(ordered):
        return np.zeros(values.shape, bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[places] == values


def without_negatives(table: np.ndarray) -> np.ndarray:
    """Which tuples have no negative at all, bool [n]."""
    return blockwise(table, lambda block: (block[:, 2:] < 0).all(axis=1), bool)


def blockwise(table: np.ndarray, function, dtype: type) -> np.ndarray:
    """A function of rows [m, 2 + K] -> [m], of all rows of a table that may be a memory map; [n]."""
    result = np.zeros(len(table), dtype)
    for begin in range(0, len(table), _BLOCK):
        result[begin : begin + _BLOCK] = function(np.asarray(table[begin : begin + _BLOCK]))
    return result


# ----------------------------------------------------------------------------------------------- lengths


def occurrences(table: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """How often each text stands in each of ROLES, int64 [texts]."""
    times = {role: np.zeros(count, np.int64) for role in ROLES}
    for begin in range(0, len(table), _BLOCK):
        block = np.asarray(table[begin : begin + _BLOCK])
        negatives = block[:, 2:]
        times["queries"] += np.bincount(block[:, 0], minlength=count)
        times["positives"] += np.bincount(block[:, 1], minlength=count)
        times["negatives"] += np.bincount(negatives[negatives >= 0], minlength=count)
    return times


@dataclass(frozen=True)
class Lengths:
    """How long some texts are: `counts` [v] of them have the length in `values` [v], which rise. All exact."""

    values: np.ndarray  # int64
    counts: np.ndarray  # int64, none of them 0

    @property
    def count(self) -> int:
        """How many texts there are."""
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        """Their lengths together."""
        return int((self.values * self.counts).sum())

    def plus(self, other: "Lengths") -> "Lengths":
        """Of both together."""
        return lengths_of(np.concatenate([self.values, other.values]), np.concatenate([self.counts, other.counts]))

    def longer_than(self, limit: int) -> int:
        """How many are longer than `limit`."""
        return int(self.counts[self.values > limit].sum())

    def quantile(self, share: float) -> int | None:
        """The length that at least this share of the texts does not exceed; None if there is no text."""
        if not len(self.values):
            return None
        upto = np.cumsum(self.counts)
        place = np.searchsorted(upto, share * upto[-1])
        return int(self.values[min(place, len(self.values) - 1)])


def lengths_of(lengths: np.ndarray, times: np.ndarray) -> Lengths:
    """Text i has length lengths[i] and stands times[i] times; both [n]."""
    values, places = np.unique(lengths, return_inverse=True)
    counts = np.bincount(places, weights=times, minlength=len(values)).astype(np.int64)  # exact up to 2^53
    return Lengths(values.astype(np.int64)[counts > 0], counts[counts > 0])
