"""Search in the Python functions below a folder by what they do, with a model that was trained here.

    python -m examples.code_search.search "copy a file with its permissions" PATH
    python -m examples.code_search.search "parse a date" src --model foundation/output/code_search/step_600 --top 10

PATH is a folder or a file. The model is loaded through Sentence Transformers, as any program would that uses it. The
vectors of functions are kept beside the model folder, so a second search embeds only what has changed.
"""

from runtime import launcher

if __name__ == "__main__":
    launcher.use_expandable_segments()

import argparse
import hashlib
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from utils import RunError, plural

from . import corpus
from .corpus import Function

OTHERS_CODE = {"site-packages", "node_modules", "__pycache__", "venv"}
RUNS = ("foundation/output/code_search", "quickstart/output/code_search")  # where a model may stand


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit status: 0, or 2 when there is nothing to search with or in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", help="what the function does, in words")
    parser.add_argument("path", type=Path, help="a folder of Python files, or one file")
    parser.add_argument(
        "--model", type=Path, help="a model folder (default the newest of make foundation, or quickstart)"
    )
    parser.add_argument("--top", type=int, default=5, help="how many to show (default %(default)s)")
    flags = parser.parse_args(argv)
    try:
        model = flags.model or newest_model()
        functions = functions_in(flags.path)
        print(f"{plural(len(functions), 'function')} in {flags.path}, searched with {model}", file=sys.stderr)
        print("\n".join(answers(flags.query, functions, model, flags.top)))
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def newest_model() -> Path:
    """The model folder that `make foundation` or `make quickstart` saved last.

    Raises:
        RunError: neither has saved one.
    """
    folders = [path.parent for run in RUNS for path in Path(run).glob("*/modules.json")]
    if not folders:
        raise RunError("no trained model here: make quickstart trains one in minutes; or give --model FOLDER")
    return max(folders, key=lambda folder: folder.stat().st_mtime)


def functions_in(path: Path) -> list[tuple[Path, Function]]:
    """All functions below a folder, or in a file, with and without docstrings; and the files that hold them.

    Raises:
        RunError: there are none.
    """
    if not path.exists():
        raise RunError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.py") if is_own_code(file.relative_to(path)))
    found = []
    for file in files:
        try:
            functions = corpus.all_functions_of_source(file.read_text(encoding="utf-8"), file.stem)
        except (OSError, UnicodeDecodeError, RecursionError):  # a broken link, another encoding, code by a machine
            continue
        found += [(file, function) for function in functions]
    if not found:
        raise RunError(f"{path}: no Python function there")
    return found


def is_own_code(file: Path) -> bool:
    """Whether a file lies in no hidden folder, such as .venv, and in no folder of other people's packages."""
    folders = set(file.parts[:-1])
    return OTHERS_CODE.isdisjoint(folders) and not any(part.startswith(".") for part in file.parts)


def answers(query: str, functions: list[tuple[Path, Function]], folder: Path, top: int) -> list[str]:
    """The best functions for a query, one line each: cosine, file and line, name, what it says of itself.

    Raises:
        RunError: the folder holds no model.
    """
    if not (folder / "modules.json").exists():
        raise RunError(f"{folder}: no model folder that Sentence Transformers can load")
    from sentence_transformers import SentenceTransformer  # seconds; a wrong path is named before

    model = SentenceTransformer(str(folder))
    passages = embed_passages(model, folder, [function.passage for _, function in functions])  # [m, d]
    cosines = passages @ model.encode_query(query, normalize_embeddings=True)  # [m]
    lines = []
    for number in np.argsort(-cosines, kind="stable")[:top]:
        file, function = functions[number]
        lines.append(f"{cosines[number]:.3f}  {file}:{function.line}  {function.name}  {function.query[:70]}".rstrip())
    return lines


def embed_passages(model, folder: Path, passages: list[str]) -> np.ndarray:
    """Unit vectors of passages, fp32 [m, d]; those of an earlier search come from a file beside the model."""
    kept = folder.parent / f"{folder.name}.vectors.npz"
    state = state_of(folder)
    known = read_vectors(kept, state)
    keys = [hashlib.sha256(passage.encode("utf-8", "surrogatepass")).hexdigest() for passage in passages]
    new = {key: passage for key, passage in zip(keys, passages, strict=True) if key not in known}
    if new:
        vectors = model.encode_document(list(new.values()), normalize_embeddings=True, show_progress_bar=True)
        known |= dict(zip(new, vectors, strict=True))
        try:
            write_vectors(kept, state, known)
        except OSError as error:
            print(f"{kept}: not written ({error.strerror}); the next search embeds all again", file=sys.stderr)
    return np.stack([known[key] for key in keys])


def state_of(folder: Path) -> str:
    """Changes with any file of a model folder: names, sizes and times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def read_vectors(path: Path, state: str) -> dict[str, np.ndarray]:
    """Digest of a passage -> its vector, as an earlier search wrote them with this model; empty where none has."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["state"]) == state:
                return dict(zip(file["keys"].tolist(), file["vectors"], strict=True))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    return {}


def write_vectors(path: Path, state: str, vectors: dict[str, np.ndarray]) -> None:
    """Replace the file in one step."""
    aside = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    np.savez(aside, keys=list(vectors), vectors=np.stack(list(vectors.values())), state=state)
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit(main())
