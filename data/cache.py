"""From `train_data_path` to opened, verified token stores: what the warm-up run builds.

The folder may hold token stores, used where they are, and the published scripts' tokenised Parquet, which is
converted into stores below `cache_dir` once. One process of a node works under a lock, the others wait and find
everything done. Each store's checksums are verified once; a mark under `cache_dir`/verified remembers it until the
files change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from data import token_store
from data.token_store import StoreError, TokenStore


@dataclass(frozen=True)
class Source:
    """One dataset as it lies in the data folder: a token store, or a published Parquet file of a known task."""

    name: str
    path: Path
    published: object | None = None  # published.Published
    task: str = ""


def prepare(folder: Path, cache_dir: Path, say: Callable[[str], None] = print) -> tuple[list[TokenStore], list[str]]:
    """Open every dataset of `folder`, converting and verifying what was not yet.

    Args:
        say: called with a line about each thing built, by the process that built it.

    Returns:
        (stores sorted by name, []) or ([], problems).
    """
    sources, problems = find_sources(folder)
    if problems:
        return [], problems
    stores = []
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / ".lock"):
            for source in sources:
                try:
                    stores.append(_prepare_one(source, cache_dir, say))
                except StoreError as error:
                    problems += str(error).splitlines()
    except OSError as error:
        problems.append(f"cache_dir {cache_dir}: the disk refuses what is written: {error}; the same command continues")
    return ([], problems) if problems else (stores, [])


def open_unverified(folder: Path) -> tuple[list[TokenStore], list[str]]:
    """The token stores that lie in `folder`, opened and not verified, and what in it cannot be used. Builds nothing."""
    sources, problems = find_sources(folder)
    stores = []
    for source in sources:
        try:
            stores += [] if source.published else [token_store.open_store(source.path)]
        except StoreError as error:
            problems += str(error).splitlines()
    return stores, problems


def find_sources(folder: Path) -> tuple[list[Source], list[str]]:
    """The datasets in a data folder, sorted by name, and what in it cannot be used. Builds nothing."""
    tasks, problems = token_store.known_tasks(folder)
    sources = []
    if (folder / "meta.json").exists() and (folder / "tuples.npy").exists():
        return [], [f"{folder}: is a token store itself: give the folder that it lies in, {folder.absolute().parent}"]
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and path.name.endswith(".partial"):
            problems.append(f"{path}: half-written store: run tokenize_data_qwen.py again, it continues")
        elif path.name.startswith("."):
            continue
        elif path.is_dir() and any((path / name).exists() for name in ("meta.json", "tokens.npy")):
            sources.append(Source(path.name, path))
        elif path.suffix == ".jsonl":
            problems.append(f"{path}: raw texts: tokenise them, and give train_data_path what that writes")
        elif path.suffix == ".parquet":
            try:
                sources += _published_sources(path, tasks)
            except StoreError as error:
                problems.append(str(error))
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"{folder}: two datasets are called {name!r}" for name in twice]
    problems += [f"{source.path}: {wrong}" for source in sources if (wrong := token_store.name_problem(source.name))]
    if not sources and not problems:
        problems.append(f"{folder}: no dataset in it; tokenize_data_qwen.py --output_dir {folder} makes some")
    return sorted(sources, key=lambda source: source.name), problems


def _published_sources(path: Path, tasks: dict[str, str]) -> list[Source]:
    """The dataset in a Parquet file, none for a corpus. Raises StoreError for what cannot be used."""
    from data import published_layouts  # here, because it needs pyarrow, and training from token stores does not

    if not published_layouts.is_published(path):
        return []
    found = published_layouts.read_published(path)
    if not isinstance(tasks.get(found.name), str):
        raise StoreError(
            f'{path}: no task is known for {found.name!r}: put {{"{found.name}": "retrieval"}} '
            f"(or clustering, classification) into {path.with_name('tasks.json')}"
        )
    return [Source(found.name, path, found, tasks[found.name])]


def _prepare_one(source: Source, cache_dir: Path, say: Callable[[str], None]) -> TokenStore:
    """One dataset's store, converted and verified if need be. Raises StoreError with a line for each problem."""
    path = source.path
    if source.published:
        path = cache_dir / "stores" / f"{source.name}-{source.published.fingerprint(source.task)}"
        if not path.exists():
            from data import published_layouts

            published_layouts.convert(source.published, path, source.task)
            meta = token_store.open_store(path).meta
            left_out = f", {n:,} negatives were their positive, left out" if (n := meta["stats"].get("own", 0)) else ""
            size = ", ".join(f"{meta[what]:,} {what}" for what in ("rows", "texts", "tokens"))
            say(f"converted {source.name}: {size}{left_out}")
    store = token_store.open_store(path)
    mark = cache_dir / "verified" / token_store.identity(path)
    if not mark.exists():
        if problems := token_store.deep_check(store):
            raise StoreError("\n".join(problems))
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        say(f"verified {store.name}: {store.nbytes / 1e6:,.1f} MB")
    return store
