"""From `train_data_path` to opened, verified token stores: what the warm-up run builds.

The folder may hold token stores, used where they are, and the published scripts' tokenised Parquet, which is
converted into stores below `cache_dir` once. One process of a node works under a lock, the others wait and find
everything done. Each store's checksums are verified once; a mark under `cache_dir`/verified remembers it until the
files change.
"""

import resource
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from data import token_store
from data.store_report import DATASETS_SHOWN
from data.token_store import StoreError, TokenStore
from utils import hide_bar_unless, plural, refusal_of_file

_OTHER_FILES = 256  # that a training process may have open: connections, libraries, logs


@dataclass(frozen=True)
class Source:
    """One dataset as it lies in the data folder: a token store, or a published Parquet file of a known task."""

    name: str
    path: Path
    published: object | None = None  # a published_layouts.Published; None for a token store
    task: str = ""  # of a published dataset; a token store knows its own


def prepare(folder: Path, cache_dir: Path, say: Callable[[str], None] = print) -> tuple[list[TokenStore], list[str]]:
    """Open every dataset of `folder`, converting and verifying what was not yet.

    Args:
        say: called with a line about each thing built, by the process that built it; with one line about all of them
            where the datasets are many.

    Returns:
        (stores sorted by name, []) or ([], problems).
    """
    sources, problems = find_sources(folder)
    if problems:
        return [], problems
    _make_room_for_maps(len(sources))
    are_many = len(sources) > DATASETS_SHOWN
    stores = []
    news = []  # lines about what was built, where they are too many to be said
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # One process of a node builds; the others wait here, and find everything done.
        with FileLock(cache_dir / ".lock"):
            hidden = hide_bar_unless(are_many)
            for source in tqdm(sources, desc="preparing data", unit="dataset", disable=hidden, delay=1, leave=False):
                try:
                    stores.append(prepare_one(source, cache_dir, news.append if are_many else say))
                except StoreError as error:
                    problems += str(error).splitlines()
    except OSError as error:
        problems.append(f"cache_dir {cache_dir}: {refusal_of_file(error)}; the same command continues")
    if news:
        say(_summary(news, stores))
    if problems:
        return [], problems
    return stores, []


def _summary(news: list[str], stores: list[TokenStore]) -> str:
    """One line for many lines about what was converted and what was verified."""
    counts = Counter(line.partition(" ")[0] for line in news)
    done = " and ".join(f"{what} {plural(counts[what], 'dataset')}" for what in sorted(counts))
    return f"{done}; in all {plural(len(stores), 'dataset')}, {sum(store.nbytes for store in stores) / 1e6:,.1f} MB"


def open_unverified(folder: Path) -> tuple[list[TokenStore], list[str]]:
    """The token stores that lie in `folder`, opened and not verified, and what in it cannot be used. Builds nothing."""
    sources, problems = find_sources(folder)
    _make_room_for_maps(len(sources))
    stores = []
    for source in sources:
        if source.published:
            continue  # it would have to be converted first
        try:
            stores.append(token_store.open_store(source.path))
        except StoreError as error:
            problems += str(error).splitlines()
    return stores, problems


def _make_room_for_maps(stores: int) -> None:
    """Let this process have as many files open as the stores need: a memory map keeps its file open.

    502 stores are 1,506 files, and twice as many while they are opened anew to be verified; most systems begin with
    1,024. What the system does not grant is left: a store that cannot be opened for it says so.
    """
    needed = 2 * len(token_store.ARRAYS) * stores + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with suppress(ValueError, OSError):  # macOS has another limit behind an infinite one
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# -------------------------------------------------------------------------------- what lies in a folder


def find_sources(folder: Path) -> tuple[list[Source], list[str]]:
    """The datasets in a data folder, sorted by name, and what in it cannot be used. Builds nothing."""
    if (folder / "meta.json").exists() and (folder / "tuples.npy").exists():
        return [], [f"{folder}: is a token store itself: give the folder that contains it, {folder.absolute().parent}"]
    tasks, problems = token_store.known_tasks(folder)
    sources = []
    for path in sorted(folder.iterdir()):
        try:
            source = source_at(path, tasks)
        except StoreError as error:
            problems.append(str(error))
        else:
            if source is not None:
                sources.append(source)
    problems += _name_problems(folder, sources)
    if not sources and not problems:
        problems.append(f"{folder}: no dataset in it; tokenize_data_qwen.py --output_dir {folder} makes some")
    return sorted(sources, key=lambda source: source.name), problems


def source_at(path: Path, tasks: dict[str, str]) -> Source | None:
    """The dataset at a path in a data folder, or None if there is none.

    Raises:
        StoreError: it was meant to be a dataset, and cannot be used.
    """
    if path.name == token_store.PARTS:
        raise StoreError(
            f"{path}: parts of stores: tokenize_data_qwen.py --join N makes stores of them; or delete the folder"
        )
    if path.name.startswith("."):
        if path.name.endswith(".partial"):
            raise StoreError(f"{path}: half-written store: run tokenize_data_qwen.py again, it continues")
        return None
    if path.is_dir() and ((path / "meta.json").exists() or (path / "tokens.npy").exists()):
        return Source(path.name, path)
    if path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        raise StoreError(f"{path}: raw texts: tokenise them, and give train_data_path what that writes")
    if path.suffix == ".parquet":
        return _published_source(path, tasks)
    return None


def _published_source(path: Path, tasks: dict[str, str]) -> Source | None:
    """The dataset in a Parquet file, None for a corpus. Raises StoreError for what cannot be used."""
    from data import published_layouts  # here, because it needs pyarrow, and training from token stores does not

    if not published_layouts.is_published(path):
        return None
    found = published_layouts.read_published(path)
    task = tasks.get(found.name)
    if not isinstance(task, str):
        raise StoreError(
            f'{path}: no task is known for {found.name!r}: put {{"{found.name}": "retrieval"}} '
            f"(or clustering, classification) into {path.with_name('tasks.json')}"
        )
    return Source(found.name, path, found, task)


def _name_problems(folder: Path, sources: list[Source]) -> list[str]:
    """Names that two datasets have, and names that cannot name one."""
    problems = []
    counts = Counter(source.name for source in sources)
    for name in sorted(counts):
        if counts[name] > 1:
            problems.append(f"{folder}: two datasets are called {name!r}")
    for source in sources:
        wrong = token_store.name_problem(source.name)
        if wrong:
            problems.append(f"{source.path}: {wrong}")
    return problems


# ------------------------------------------------------------------------------- converting, verifying


def prepare_one(source: Source, cache_dir: Path, say: Callable[[str], None]) -> TokenStore:
    """One dataset's store, converted and verified if need be. Raises StoreError with a line for each problem."""
    path = source.path
    if source.published:
        # The fingerprint is part of the name: other files, or another task, become another store.
        path = cache_dir / "stores" / f"{source.name}-{source.published.fingerprint(source.task)}"
        if not path.exists():
            _convert(source, path, say)
    store = token_store.open_store(path)
    mark = cache_dir / "verified" / token_store.identity(path)  # another name as soon as a file changes
    if not mark.exists():
        _verify(store, mark, say)
    return store


def _convert(source: Source, path: Path, say: Callable[[str], None]) -> None:
    """Write the token store of a published dataset to `path`."""
    from data import published_layouts  # here, as above

    published_layouts.convert(source.published, path, source.task)
    meta = token_store.open_store(path).meta
    line = f"converted {source.name}: {meta['rows']:,} rows, {meta['texts']:,} texts, {meta['tokens']:,} tokens"
    left_out = meta["stats"].get("own", 0)
    if left_out:
        line += f", {left_out:,} negatives were their positive, left out"
    say(line)


def _verify(store: TokenStore, mark: Path, say: Callable[[str], None]) -> None:
    """Read all of a store once, and leave a mark that it is sound. Raises StoreError if it is not."""
    problems = token_store.deep_check(store)
    if problems:
        raise StoreError("\n".join(problems))
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    say(f"verified {store.name}: {store.nbytes / 1e6:,.1f} MB")
