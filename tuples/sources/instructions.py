"""The instruction of a source, before its queries, and before a share of documents where both are of one sort."""

import numpy as np

from data.instructions import add_instructions
from modeling.prompts import carries_instruction, query_prompt


def instruct(
    columns: list[list[str | None]], instruction: str, document_rate: float, rng: np.random.RandomState
) -> tuple[list[list[str | None]], int]:
    """Tuples with their instruction.

    Args:
        columns: queries, passages, and each slot of negatives, [n] texts each; None if there is none.
        document_rate: share of passages and negatives that carry it too (F2LLM-v2: 0.3 of symmetric tasks).
        rng: drawn from for every slot, tuple by tuple.

    Returns:
        (the columns, how many documents carry the instruction). A text that carries one already stays as it is.
    """
    queries, *documents = columns
    queries = add_instructions(queries, None, instruction or None)
    if not document_rate:
        return [queries, *documents], 0
    prompt = query_prompt(instruction)
    is_drawn = rng.random_sample((len(queries), len(documents))) < document_rate  # [n, slots]
    prompted = 0
    changed = []
    for slot, texts in enumerate(documents):
        column = []
        for text, drawn in zip(texts, is_drawn[:, slot].tolist(), strict=True):
            if drawn and text is not None and not carries_instruction(text):
                text = prompt + text
                prompted += 1
            column.append(text)
        changed.append(column)
    return [queries, *changed], prompted
