"""The instructions of a dataset's queries: counted while it is tokenised, added where a query carries none.

A store's meta.json holds the counts as stats["instructions"]:

    counts    instruction -> queries that carry it, the most frequent first, at most MOST_FREQUENT
    other     queries with any other instruction, or with one that is spelled otherwise than modeling/prompts.py has it
    none      queries without an instruction
"""

from modeling.prompts import bare_instruction, carries_instruction, query_prompt, split_prompt

MOST_FREQUENT = 10  # instructions that a store remembers by their words
_COUNTED = 256  # distinct instructions counted at a time: the first of the file; memory must not grow with the file


def add_instructions(queries: list[str], own: list[str | None] | None, usual: str | None) -> list[str]:
    """The queries, with an instruction before each that carries none.

    Args:
        own: an instruction for each query, where its row gives one; None where the file has no such column.
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


def keep_most_frequent(stats: dict) -> None:
    """Reduce stats["instructions"] to what a finished store remembers."""
    found = stats["instructions"]
    ranked = sorted(found["counts"].items(), key=lambda item: (-item[1], item[0]))
    found["counts"] = dict(ranked[:MOST_FREQUENT])
    found["other"] += sum(count for _, count in ranked[MOST_FREQUENT:])
