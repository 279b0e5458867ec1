"""Vectors that are needed again at fewer dimensions, on the disk; removed with the process, however it ends."""

import hashlib
import tempfile
from pathlib import Path

import numpy as np


class KeptVectors:
    """Vectors fp32 [n, width] by the texts that they are of.

    They lie in one temporary file without a name, which the system removes when it is closed, also after a kill.

    Args:
        folder: on the disk that has room for them.

    Raises:
        OSError: the disk refuses them.
    """

    def __init__(self, folder: Path, width: int):
        self.width = width
        self.file = tempfile.TemporaryFile(dir=folder)
        self.places: dict[str, tuple[int, int]] = {}  # digest of texts -> (first byte, how many) of their vectors
        self.end = 0

    def close(self) -> None:
        """Give the room back."""
        self.file.close()

    def find(self, texts: list[str]) -> np.ndarray | None:
        """The vectors of these texts; None if they were not kept."""
        place = self.places.get(digest(texts))
        if place is None:
            return None
        begin, count = place
        vectors = np.empty((count, self.width), np.float32)
        self.file.seek(begin)
        self.file.readinto(vectors)
        return vectors

    def keep(self, texts: list[str], vectors: np.ndarray) -> None:
        """Keep the vectors of these texts."""
        self.file.seek(self.end)
        self.file.write(np.ascontiguousarray(vectors, np.float32))
        self.file.flush()  # a disk that refuses says so here, not where they are read
        self.places[digest(texts)] = (self.end, len(vectors))
        self.end += vectors.nbytes


def digest(texts: list[str]) -> str:
    """Changes with any text or their order."""
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)} ".encode() + text.encode("utf-8", "surrogatepass"))
    return found.hexdigest()
