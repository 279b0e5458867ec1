"""The instructions of a dataset's queries: counted while it is tokenised, added where a query carries none.

A store's meta.json holds the counts as stats["instructions"]:

    counts    instruction -> queries that carry it, the most frequent first, at most MOST_FREQUENT
    other     queries with any other instruction, or with one that is not spelled as modeling/prompts.py spells it
    none      queries without an instruction
"""

import hashlib
from collections import Counter
from itertools import chain

import numpy as np

from modeling.prompts import bare_instruction, carries_instruction, query_prompt, split_prompt

MOST_FREQUENT = 10  # instructions that a store remembers as texts
NO_INSTRUCTION = 0  # numbers of queries
ANOTHER_SPELLING = 1
_COUNTED = 256  # distinct instructions counted at a time: the first of the file; memory must not grow with the file


def add_instructions(queries: list[str], own: list[str | None] | None, usual: str | None) -> list[str]:
    """The queries, with an instruction before each that carries none.

    Args:
        own: an instruction for each query, where its row gives one; None if the file has no such column.
        usual: the instruction of all other queries; None adds none.
    """
    if own is None:
        if usual is None:
            return queries
        own = [None] * len(queries)
    prompted = []
    for query, instruction in zip(queries, own, strict=True):
        if carries_instruction(query):
            prompted.append(query)
        else:
            prompted.append(query_prompt(bare_instruction(instruction or usual or "")) + query)
    return prompted


def count_instructions(stats: dict, queries: list[str]) -> None:
    """Add the instructions of some queries to stats["instructions"]; in the order of the file, however it is cut."""
    found = stats.setdefault("instructions", {"counts": {}, "other": 0, "none": 0})
    counts = found["counts"]
    for query in queries:
        if not carries_instruction(query):
            found["none"] += 1
            continue
        instruction, _ = split_prompt(query)
        if instruction in counts:
            counts[instruction] += 1
        elif instruction is not None and len(counts) < _COUNTED:
            counts[instruction] = 1
        else:
            found["other"] += 1


def instruction_numbers(queries: list[str]) -> np.ndarray:
    """A number for the instruction of each query, uint64 [n]: NO_INSTRUCTION, ANOTHER_SPELLING, or a hash of it."""
    numbers = np.zeros(len(queries), np.uint64)
    for place, query in enumerate(queries):
        if carries_instruction(query):
            instruction, _ = split_prompt(query)
            numbers[place] = ANOTHER_SPELLING if instruction is None else _number_of(instruction)
    return numbers


def _number_of(instruction: str) -> int:
    """64 bits that stand for an instruction, and are neither of the two numbers with a meaning."""
    digest = hashlib.blake2b(instruction.encode(), digest_size=8).digest()
    return max(int.from_bytes(digest, "little"), ANOTHER_SPELLING + 1)


def count_numbers(instructions: list[list[str]], numbers: list[np.ndarray]) -> dict:
    """What `count_instructions` would have counted in all queries of a file, from its parts.

    Args:
        instructions: of each part the first _COUNTED distinct ones, as texts.
        numbers: of each part the numbers of its queries, uint64 [n], from `instruction_numbers`.

    The first _COUNTED of the whole file are all among these, since no more instructions come before one in its part
    than in the whole file.
    """
    distinct = list(dict.fromkeys(chain.from_iterable(instructions)))  # in the order of the file
    totals = Counter()
    for part in numbers:
        found, times = np.unique(part, return_counts=True)
        totals.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    none = totals.pop(NO_INSTRUCTION, 0)
    counts = {text: totals.pop(_number_of(text)) for text in distinct[:_COUNTED]}
    return {"counts": counts, "other": sum(totals.values()), "none": none}


def keep_most_frequent(stats: dict) -> None:
    """Reduce stats["instructions"] to what a finished store remembers."""
    found = stats["instructions"]
    ranked = sorted(found["counts"].items(), key=lambda item: (-item[1], item[0]))
    found["counts"] = dict(ranked[:MOST_FREQUENT])
    found["other"] += sum(count for _, count in ranked[MOST_FREQUENT:])
