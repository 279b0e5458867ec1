"""Checks that need the texts of a query and its positive: does one contain the other, is one in an evaluation set?"""

import numpy as np
import pyarrow as pa

from tuples.inspection.evaluation import Evaluation
from tuples.inspection.texts import holds, is_blank, keys_of, plain, without_instruction


def look_at_pairs(
    queries: pa.Array, positives: pa.Array, task: str | None, evaluation: Evaluation | None
) -> dict[str, np.ndarray]:
    """Which tuples have what, by the name of the rule, bool [n] each.

    Args:
        queries: [n] texts, with their instruction where they carry one; null where a tuple has none.
        positives: [n] texts.
        task: of classification the positive is a label's text.
        evaluation: texts that should not be trained on.
    """
    bare = without_instruction(queries)
    query_texts, positive_texts = plain(bare), plain(positives)
    query_list, positive_list = query_texts.to_pylist(), positive_texts.to_pylist()
    found = {"instruction_only": is_blank(bare) & ~is_blank(queries)}
    positive_in_query = holds(query_list, positive_list)
    if task == "classification":
        found["label_in_query"] = positive_in_query
    else:
        found["query_in_passage"] = holds(positive_list, query_list)
        found["passage_in_query"] = positive_in_query
    if evaluation is not None:
        keys = [keys_of(query_texts)]
        if task != "classification":  # its positives are label texts, which any other set of the task has too
            keys.append(keys_of(positive_texts))
        found["evaluation_queries"] = evaluation.has_query(keys)
        found["evaluation_passages"] = evaluation.has_passage(keys)
    return found
