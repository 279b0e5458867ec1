"""A teacher's embeddings of a token store's texts, computed once: a folder for each dataset, opened by memory map.

    embeddings.npy   float32 or float16 [texts, D]   row i is text i of the token store, not normalised
    meta.json        written last: of which texts and how long, by which teacher; checksums

A run that trains from it loads no teacher: the rows of a batch's texts come with the batch. They must be what the
teacher would give for these very tokens, so a folder made from other texts, or from texts cut elsewhere, is refused.
data/embedding_writer.py writes one.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from data.token_store import HEADER, StoreError, TokenStore, npy_header
from utils import aside_of, file_digest, is_sealed, read_json, short_digest

FORMAT = 1
DTYPES = {"float32": np.float32, "float16": np.float16}
ARRAY = "embeddings.npy"
_TOKENS = "tokens.npy"  # an array that a token store has and embeddings have not
_ANEW = "delete the folder and run tools.embed_store again"  # said only of what are surely embeddings
_ELSEWHERE = "name the right folder, or run tools.embed_store into another one"


@dataclass(frozen=True)
class EmbeddingStore:
    """Open embeddings of one dataset's texts."""

    folder: Path
    meta: dict
    rows: np.ndarray  # [texts, d], a read-only memory map: the columns that a student needs

    def of(self, texts: np.ndarray) -> np.ndarray:
        """The rows of these text numbers [u], float32 [u, d]. Of the file only these columns of these rows are read."""
        return self.rows[texts].astype(np.float32, copy=False)


def texts_of(store: TokenStore) -> dict[str, str]:
    """What identifies the texts of a token store, and not its tuples or task: checksums of tokens and offsets."""
    return {name: store.meta["sha256"][name] for name in ("tokens", "offsets")}


def open_embeddings(folder: Path, width: int) -> EmbeddingStore:
    """Open a folder in which `find_problems` found nothing.

    Args:
        folder: of one dataset.
        width: d, how many columns are wanted, from the first.

    Raises:
        StoreError: the folder holds no finished embeddings, or other sizes than its meta.json says.
    """
    meta = read_meta(folder)
    problem = size_problem(folder, meta)
    if problem:
        raise StoreError(problem)
    rows = np.memmap(folder / ARRAY, DTYPES[meta["dtype"]], "r", HEADER, (meta["texts"], meta["width"]))
    return EmbeddingStore(folder, meta, rows.view(np.ndarray)[:, :width])


def open_all(folder: str | Path | None, stores: list[TokenStore], width: int) -> list[EmbeddingStore]:
    """The embeddings of each token store, in their order; [] if there is no folder. Raises as `open_embeddings`."""
    if folder is None:
        return []
    return [open_embeddings(Path(folder) / store.name, width) for store in stores]


def read_meta(folder: Path) -> dict:
    """The meta.json of one dataset's embeddings. Raises StoreError if it is missing or not as it was written."""
    path = folder / "meta.json"
    if is_token_store(folder):
        raise StoreError(f"{folder}: a token store, not embeddings: keep it, and name another folder")
    if not path.exists():
        if aside_of(folder).exists():
            raise StoreError(f"{folder}: half-written: run tools.embed_store again, it continues")
        raise StoreError(f"{folder}: no embeddings: python -m tools.embed_store writes them")
    try:
        meta = read_json(path)
    except ValueError as error:
        raise StoreError(f"{path}: not JSON ({error}): {_ELSEWHERE}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise StoreError(f"{path}: not of embeddings format {FORMAT}: {_ELSEWHERE}")
    if not is_sealed(meta):
        raise StoreError(f"{path}: checksum differs, it was damaged or edited: {_ANEW}")
    return meta


def is_token_store(folder: Path) -> bool:
    """Whether a folder, or what is half-written beside it, holds a dataset's tokens, which nobody should lose."""
    return (folder / _TOKENS).exists() or (aside_of(folder) / _TOKENS).exists()


def size_problem(folder: Path, meta: dict) -> str | None:
    """Why the array cannot be what meta.json says, as far as header and size tell; None if it can."""
    path = folder / ARRAY
    shape = (meta["texts"], meta["width"])
    dtype = np.dtype(DTYPES[meta["dtype"]])
    header = npy_header(dtype, shape)
    try:
        with open(path, "rb") as file:
            is_as_written = file.read(len(header)) == header
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        return f"{path}: cannot be read ({error}): {_ANEW}"
    if not is_as_written or size != HEADER + dtype.itemsize * shape[0] * shape[1]:
        return f"{path}: not {dtype} {list(shape)} as meta.json says, it was damaged or cut short: {_ANEW}"
    return None


# ------------------------------------------------------------------------------- whether they fit a run


def find_problems(folder: Path, store: TokenStore, max_length: int, width: int) -> list[str]:
    """Why the embeddings in a folder cannot stand for a teacher of this dataset, one line each. Reads no array.

    Args:
        folder: of all datasets' embeddings.
        max_length: tokens of a text at most, as the run cuts it; 0 = not known.
        width: of the student; 0 = not known.
    """
    own = folder / store.name
    try:
        meta = read_meta(own)
    except StoreError as error:
        return [str(error)]
    size = size_problem(own, meta)
    problems = [size] if size else []
    if meta["store"] != texts_of(store):
        problems.append(f"{own}: of other texts than {store.folder} holds now: {_ELSEWHERE}")
    elif max_length and not are_cut_alike(meta["max_seq_length"], max_length, meta["longest_text"]):
        shorter = min(meta["max_seq_length"], max_length)
        problems.append(
            f"{own}: its texts were cut to {meta['max_seq_length']} tokens, and this run cuts them to {max_length}: "
            f"those of more than {shorter} (up to {meta['longest_text']}) would be other texts to the teacher than to "
            f"the student: run tools.embed_store with --max_seq_length {max_length} into another folder, or set "
            f"max_seq_length to {meta['max_seq_length']}"
        )
    if meta["width"] < width:
        problems.append(
            f"{own}: {meta['width']} dimensions, but the student has {width}: it learns the first dimensions of its "
            "teacher, so take a teacher at least as wide"
        )
    return problems


def are_cut_alike(one: int, other: int, longest: int) -> bool:
    """Whether texts of up to `longest` tokens are the same, cut to `one` and cut to `other`.

    A teacher whose texts were cut later read words that the student does not see; cut earlier, it missed some. So the
    two cuts must be equal, or both lie beyond the longest text.

    >>> are_cut_alike(512, 512, 9000), are_cut_alike(512, 1024, 9000), are_cut_alike(512, 1024, 300)
    (True, False, True)
    """
    return min(one, longest) == min(other, longest)


def other_teachers(folder: Path, names: list[str]) -> list[str]:
    """One line where datasets have embeddings of different teachers, or of one in different precisions.

    The teachers' configs are compared where all datasets say something of them: older folders do not.
    """
    metas = {name: read_meta(folder / name) for name in names}
    with_config = all("teacher_config" in meta for meta in metas.values())
    datasets: dict[str, list[str]] = {}
    for name, meta in metas.items():
        words = [f"weights {meta['teacher']['weights']}", f"precision {meta['precision']}"]
        if with_config:
            words.insert(1, f"config {meta['teacher_config']}")
        datasets.setdefault(f"{meta['model']} ({', '.join(words)})", []).append(name)
    if len(datasets) < 2:
        return []
    found = []
    for teacher, taught in datasets.items():
        more = " ..." if len(taught) > 3 else ""
        found.append(f"{teacher} for {', '.join(taught[:3])}{more}")
    return [f"{folder}: of different teachers: {'; '.join(found)}: take one for all datasets"]


# -------------------------------------------------------------------------------------- verifying


def verify(folder: Path, names: list[str], cache_dir: Path, say: Callable[[str], None] = print) -> list[str]:
    """Compare each array with its checksum, once: a mark below `cache_dir` remembers it until a file changes.

    One process of a machine reads, the others wait and find the marks.

    Args:
        folder: of all datasets' embeddings, in which `find_problems` found nothing.
        names: of the datasets.
        say: called with a line about what was read, by the process that read it.

    Returns:
        What is damaged, one line each.
    """
    problems = []
    marks = cache_dir / "verified"
    try:
        marks.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / ".lock"):
            for name in names:
                own = folder / name
                mark = marks / _identity(own)
                if mark.exists():
                    continue
                if file_digest(own / ARRAY) != read_meta(own)["sha256"]:
                    problems.append(f"{own / ARRAY}: checksum differs from meta.json, it was damaged: {_ANEW}")
                    continue
                mark.touch()
                say(f"verified the teacher's embeddings of {name}: {(own / ARRAY).stat().st_size / 1e6:,.1f} MB")
    except OSError as error:
        problems.append(f"{folder}: cannot be verified: {error}; the same command continues")
    return problems


def _identity(folder: Path) -> str:
    """Names embeddings by their meta.json and by size and time of their array: 16 hex digits."""
    stat = (folder / ARRAY).stat()
    facts = [(folder / "meta.json").read_text(encoding="utf-8"), stat.st_size, stat.st_mtime_ns]
    return short_digest(repr(facts))


def teacher_identity(folder: str | Path | None, stores: list[TokenStore]) -> dict[str, str]:
    """What a resume must find unchanged of a teacher's embeddings: a digest of them, wherever they lie; {} for none."""
    if folder is None:
        return {}
    metas = [read_meta(Path(folder) / store.name) for store in stores]
    checksums = sorted((meta["name"], meta["sha256"]) for meta in metas)
    return {"teacher embeddings": short_digest(repr(checksums))}


def with_checksums(folder: Path, checksums: dict[str, dict]) -> dict[str, dict]:
    """Dataset -> checksums of its arrays, with that of its embeddings in `folder`."""
    return {name: own | {"teacher_embeddings": read_meta(folder / name)["sha256"]} for name, own in checksums.items()}
