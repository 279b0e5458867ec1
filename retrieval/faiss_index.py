"""Search in large corpora by FAISS: exactly (flat), in the nearest of many lists (IVF), or by codes in them (IVF-PQ).

What it finds is scored anew by the vectors themselves: an index decides which passages are looked at, never their
scores.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch

from retrieval.vectors import Vectors
from utils import RunError, plural

KINDS = ("flat", "IVF", "IVF-PQ")
ADDED_AT_ONCE = 65536  # vectors
_TRAINED_ON = 64  # vectors for each list; FAISS warns below 39
_CODES = 256  # of each part of a vector in IVF-PQ
_FEWEST_FOR_CODES = 39 * _CODES  # vectors, below which FAISS warns


def check_index(kind: str, passages: int) -> None:
    """Raise RunError if FAISS is not installed, or cannot train an index of this kind on so few passages."""
    _faiss()
    needed = {"flat": 1, "IVF": _TRAINED_ON, "IVF-PQ": _FEWEST_FOR_CODES}[kind]
    if passages < needed:
        raise RunError(f"--faiss_index {kind} needs {needed} passages to be trained on, not {passages}: take flat")


def number_of_lists(passages: int) -> int:
    """How many lists an IVF index has where nobody says: 4 times the square root, if there are vectors for so many."""
    return max(1, min(4 * math.isqrt(passages), passages // _TRAINED_ON))


def bytes_of_code(width: int) -> int:
    """Bytes of a vector in IVF-PQ where nobody says: a part of 4 to 8 dimensions for each, as the width can be cut."""
    return next((width // part for part in (8, 7, 6, 5, 4, 3, 2) if width % part == 0), width)


def build(path: Path, vectors: Vectors, kind: str, lists: int = 0, code_bytes: int = 0) -> None:
    """Write an index of all vectors, whole or not at all.

    Args:
        lists: of IVF; 0 = `number_of_lists`.
        code_bytes: of a vector in IVF-PQ; 0 = `bytes_of_code`.

    Raises:
        RunError: FAISS is not installed, or cannot cut the vectors into so many parts.
    """
    faiss = _faiss()
    count, width = vectors.shape
    lists = lists or number_of_lists(count)
    code_bytes = code_bytes or bytes_of_code(width)
    if kind == "IVF-PQ" and width % code_bytes:
        raise RunError(f"--faiss_code_bytes {code_bytes}: vectors of {width} cannot be cut into so many parts")
    # np: codes are not sorted for a search by Hamming distance, which took 1.6 s of training for each byte of a code.
    layout = {"flat": "Flat", "IVF": f"IVF{lists},Flat", "IVF-PQ": f"IVF{lists},PQ{code_bytes}np"}[kind]
    index = faiss.index_factory(width, layout, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        wanted = min(count, max(_TRAINED_ON * lists, _TRAINED_ON * _CODES))
        sample = np.unique(np.linspace(0, count - 1, wanted).astype(np.int64))
        index.train(vectors.take(sample))
    for begin in range(0, count, ADDED_AT_ONCE):
        index.add(vectors[begin : begin + ADDED_AT_ONCE].astype(np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    faiss.write_index(index, str(aside))
    os.replace(aside, path)


class FaissIndex:
    """An index that `build` wrote, mapped into memory as far as FAISS can.

    Args:
        probes: lists that a query looks into; 0 = an eighth of them.
    """

    def __init__(self, path: Path, probes: int = 0):
        faiss = _faiss()
        self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        if hasattr(self.index, "nprobe"):
            self.index.nprobe = min(self.index.nlist, probes or max(1, self.index.nlist // 8))

    @property
    def description(self) -> str:
        """What it is, for people."""
        if hasattr(self.index, "nprobe"):
            return f"{plural(self.index.nlist, 'list')}, of which {self.index.nprobe} are looked into"
        return "every vector is looked at"

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """The passages that it holds for the nearest to each query, int64 [n, k], -1 where it found fewer."""
        _, numbers = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        return numbers


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """The share of the exact best passages, int [n, k], that is among those that an index found, int [n, k']."""
    shared = [np.isin(truth, guess).mean() for truth, guess in zip(exact, found, strict=True)]
    return float(np.mean(shared))


def _faiss():
    try:
        import faiss
    except ImportError:
        raise RunError("--backend faiss needs the package: pip install faiss-cpu (or faiss-gpu)") from None
    faiss.omp_set_num_threads(torch.get_num_threads())  # its share of the cores is not known to it
    return faiss
