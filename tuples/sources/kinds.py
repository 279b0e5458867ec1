"""How the good rows of a source become tuples, kind by kind. Pure functions of numbers: no text is looked at.

A tuple is a line of text numbers (`rows.Rows`): its query, its positive, then its negatives, -1 where there
is none. Everything that is drawn comes from one generator in the order of the tuples, and numpy never changes what
RandomState gives for a seed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tuples.sources.description import ENTAILMENT, Source
from tuples.sources.report import Counted, Tally
from tuples.sources.rows import Rows
from utils import RunError

KEPT = 0
RULES = (
    None,  # KEPT
    "an id that came before",
    "texts that came before",
    "the same texts under two labels",
    "its premise has no entailed hypothesis",
    "its class has no other text",
)
_SAME_ID, _SAME_TEXTS, _TWO_LABELS, _NOT_ENTAILED, _ALONE = range(1, len(RULES))
_NAMED = 10  # rows that are named for a rule


@dataclass(frozen=True)
class Recipe:
    """The tuples that a source can give."""

    tuples: int
    negatives: int  # the most that one has
    draw: Callable[[np.ndarray, np.random.RandomState], np.ndarray]  # numbers [b] of tuples -> int64 [b, 2 + negatives]


# ------------------------------------------------------------------------------------ which pairs are left


def sift(rows: Rows, source: Source) -> np.ndarray:
    """The rule by which each pair is left out, numbers into RULES, int8 [n]; for what only all rows together show."""
    rules = np.zeros(len(rows), np.int8)
    own_ids = rows.keys("id")
    same = first_of_equal(own_ids)
    is_given = own_ids.any(axis=1)
    rules[is_given & (rows.source_rows[same] != rows.source_rows)] = _SAME_ID
    _leave_out_same_texts(rules, rows)
    if source.kind == "nli":
        kept = np.flatnonzero(rules == KEPT)
        premises = first_of_equal(rows.keys("first")[kept])  # the first of `kept` with the same premise
        has_entailed = np.zeros(len(kept), bool)
        has_entailed[premises[_is_entailed(rows)[kept]]] = True
        rules[kept[~has_entailed[premises]]] = _NOT_ENTAILED
    if source.kind == "clustering":
        kept = np.flatnonzero(rules == KEPT)
        sizes = np.bincount(rows.label[kept], minlength=1)
        rules[kept[sizes[rows.label[kept]] == 1]] = _ALONE
    return rules


def _leave_out_same_texts(rules: np.ndarray, rows: Rows) -> None:
    """Of pairs with equal texts the first stays; none of them where they have different labels."""
    kept = np.flatnonzero(rules == KEPT)
    first = first_of_equal(rows.keys("texts")[kept])
    labels = rows.label[kept]
    contradicted = np.zeros(len(kept), bool)
    contradicted[first[labels != labels[first]]] = True
    rules[kept[first != np.arange(len(kept))]] = _SAME_TEXTS
    rules[kept[contradicted[first]]] = _TWO_LABELS


def first_of_equal(keys: np.ndarray) -> np.ndarray:
    """For each of [n, 2] keys the number of the first that is equal to it, int64 [n].

    >>> first_of_equal(np.array([[7, 1], [5, 1], [7, 1], [7, 2]])).tolist()
    [0, 1, 0, 3]
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in their order
    ordered = keys[order]
    begins = np.ones(len(keys), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.cumsum(begins) - 1
    first = np.empty(len(keys), np.int64)
    first[order] = order[begins][group]
    return first


def count_left_out(rules: np.ndarray, rows: Rows, input_names: list[str], tally: Tally) -> None:
    """Add what `sift` left out to what happened to the source rows before.

    A row whose pairs are all left out is left out by the rule of its first; one that keeps some is used in part.
    """
    source_rows = rows.source_rows
    is_used = np.zeros(source_rows[-1] + 1 if len(rows) else 0, bool)
    is_used[source_rows[rules == KEPT]] = True
    first_pair = np.flatnonzero(np.diff(source_rows, prepend=-1))  # [source rows]
    for number, rule in enumerate(RULES):
        if rule is None:
            continue
        left_out = first_pair[~is_used & (rules[first_pair] == number)]
        in_part = np.unique(source_rows[(rules == number) & is_used[source_rows]])
        for found, counts in ((left_out, tally.left_out), (first_pair[in_part], tally.in_part)):
            if len(found):
                counted = Counted(len(found), _names(rows, found[:_NAMED], input_names))
                counts.setdefault(rule, Counted()).merge(counted)


def _names(rows: Rows, pairs: np.ndarray, input_names: list[str]) -> list[str]:
    """FILE:ROW of some pairs."""
    inputs = rows.column("input")[pairs].tolist()
    numbers = rows.column("row")[pairs].tolist()
    return [f"{input_names[number]}:{row}" for number, row in zip(inputs, numbers, strict=True)]


# ------------------------------------------------------------------------------------------- their tuples


def recipe(rows: Rows, rules: np.ndarray, source: Source) -> Recipe:
    """The tuples of a source whose rows were sifted.

    Raises:
        RunError: there are none, or all texts are of one class.
    """
    kept = np.flatnonzero(rules == KEPT)  # [kept] pairs
    if not len(kept):
        raise RunError("no row is left to make a tuple of")
    if source.kind == "nli":
        return _inferences(rows, kept, source.negatives)
    if source.kind in ("classification", "clustering"):
        classes = np.unique(rows.label[kept])
        if len(classes) < 2:
            raise RunError(f"all rows are of one class, {rows.labels[classes[0]]!r}: there are no negatives")
    if source.kind == "classification":
        return _two_way(rows, kept)
    if source.kind == "clustering":
        return _classes(rows, kept, source.negatives)
    return _pairs(kept, both_directions=source.turns_pairs)


def _pairs(kept: np.ndarray, both_directions: bool) -> Recipe:
    """Each pair a tuple, and where asked for a second one in the other direction."""
    directions = 2 if both_directions else 1

    def draw(chosen: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        first = 2 * kept[chosen // directions]
        turned = chosen % directions
        return np.stack([first + turned, first + 1 - turned], axis=1)  # [b, 2]

    return Recipe(directions * len(kept), 0, draw)


def _two_way(rows: Rows, kept: np.ndarray) -> Recipe:
    """Each text a tuple with the text of its label and that of the other."""
    texts = 2 * len(rows)  # the labels' follow them

    def draw(chosen: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        pairs = kept[chosen]
        labels = rows.label[pairs]
        return np.stack([2 * pairs, texts + labels, texts + 1 - labels], axis=1)  # [b, 3]

    return Recipe(len(kept), 1, draw)


def _classes(rows: Rows, kept: np.ndarray, most: int) -> Recipe:
    """Each text a tuple with another of its class, and with texts of all other classes, each as likely."""
    labels = rows.label[kept]
    order = np.argsort(labels, kind="stable")  # [kept] class by class
    place = np.empty(len(kept), np.int64)
    place[order] = np.arange(len(kept))
    sizes = np.bincount(labels)
    begins = np.cumsum(sizes) - sizes
    negatives = int(min(most, len(kept) - sizes[sizes > 0].min()))

    def draw(chosen: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        lines = np.full((len(chosen), 2 + negatives), -1, np.int64)
        for line, number in zip(lines, chosen.tolist(), strict=True):
            begin, size = int(begins[labels[number]]), int(sizes[labels[number]])
            partner = begin + rng.randint(size - 1)
            if partner >= place[number]:  # the text itself is passed over
                partner += 1
            others = draw_distinct(rng, len(kept) - size, negatives)
            others[others >= begin] += size  # and so is its class
            line[:2] = 2 * kept[number], 2 * kept[order[partner]]
            line[2 : 2 + len(others)] = 2 * kept[order[others]]
        return lines

    return Recipe(len(kept), negatives, draw)


def _inferences(rows: Rows, kept: np.ndarray, most: int) -> Recipe:
    """Each premise a tuple with an entailed hypothesis and all others that are not, `most` of them at most."""
    is_entailed = _is_entailed(rows)[kept]
    premises, group = np.unique(
        first_of_equal(rows.keys("first")[kept]), return_inverse=True
    )  # first of `kept`, [kept]
    entailed, entailed_begins = _by_group(kept, group, is_entailed, len(premises))
    others, others_begins = _by_group(kept, group, ~is_entailed, len(premises))
    negatives = int(min(most, np.diff(others_begins).max()))

    def draw(chosen: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
        lines = np.full((len(chosen), 2 + negatives), -1, np.int64)
        for line, number in zip(lines, chosen.tolist(), strict=True):
            begin, end = entailed_begins[number : number + 2]
            positive = entailed[begin + rng.randint(end - begin)]
            candidates = others[others_begins[number] : others_begins[number + 1]]
            if len(candidates) > negatives:
                candidates = candidates[np.sort(draw_distinct(rng, len(candidates), negatives))]
            line[:2] = 2 * positive, 2 * positive + 1
            line[2 : 2 + len(candidates)] = 2 * candidates + 1
        return lines

    return Recipe(len(premises), negatives, draw)


def _by_group(kept: np.ndarray, group: np.ndarray, wanted: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The wanted pairs group by group, and where each group begins, [groups + 1]."""
    order = np.argsort(group[wanted], kind="stable")
    counts = np.bincount(group[wanted], minlength=groups)
    return kept[wanted][order], np.concatenate([[0], np.cumsum(counts)])


def _is_entailed(rows: Rows) -> np.ndarray:
    """Which pairs are labelled as entailed, bool [n]."""
    if ENTAILMENT not in rows.labels:
        return np.zeros(len(rows), bool)
    return rows.label == rows.labels.index(ENTAILMENT)


def draw_distinct(rng: np.random.RandomState, count: int, wanted: int) -> np.ndarray:
    """`wanted` different numbers below `count` in random order, int64; all of them where there are no more."""
    if count <= 4 * wanted:
        return rng.permutation(count)[:wanted].astype(np.int64)
    drawn = dict.fromkeys(rng.randint(count, size=wanted).tolist())  # a dictionary, because it keeps the order
    while len(drawn) < wanted:
        drawn[int(rng.randint(count))] = None
    return np.array(list(drawn), np.int64)
