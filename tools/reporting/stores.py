"""The token stores that a run was trained on, where they still lie there, and the lengths of their texts."""

from dataclasses import dataclass

import numpy as np

from data.plan import split_sizes
from data.token_store import StoreError, TokenStore, open_store
from tools.reporting.charts import Chart, Section, tasks_of
from tools.reporting.read import RunLog, started_in
from tools.reporting.series import Series
from utils import plural

ROWS = 20_000  # tuples of a dataset whose texts are measured, evenly over it; all where there are fewer
MOST_CHARTS = 8  # datasets; of more, the lengths are shown by task
ROLES = ("queries", "passages")
# Two bins an octave, as 1, 2, 3, 4, 6, 8, 12, 16, ...: lengths spread over orders of magnitude.
EDGES = np.array(sorted({1} | {2**k for k in range(1, 16)} | {3 * 2**k for k in range(14)}))


@dataclass(frozen=True)
class Dataset:
    """One dataset of one run."""

    run: int
    name: str
    task: str
    limit: int | None  # tokens at which this run cut its texts
    store: TokenStore | None = None  # None if it is not there any more
    reason: str = ""  # why it is not

    @property
    def digest(self) -> str:
        """Names what the store holds."""
        return self.store.meta["sha256"]["tuples"] + self.store.meta["sha256"]["tokens"]

    def lengths(self, role: str) -> np.ndarray:
        """Tokens of the queries or the positives, EOS included, int64 [n], of at most ROWS tuples."""
        rows = len(self.store.tuples)
        chosen = np.linspace(0, rows - 1, min(rows, ROWS)).astype(np.int64)
        texts = self.store.tuples[chosen, ROLES.index(role)]  # [n]
        return self.store.offsets[texts + 1] - self.store.offsets[texts]


def datasets_of(runs: list[RunLog]) -> list[Dataset]:
    """Every dataset of every run, with its store where it is the one that was trained on."""
    found = []
    for index, run in enumerate(runs):
        for name, task in tasks_of(run).items():
            store, reason = _open(run, name)
            found.append(Dataset(index, name, task, _limit(run, name), store, reason))
    return found


def _limit(run: RunLog, name: str) -> int | None:
    """Tokens at which a dataset's texts are cut: its own setting, or the run's."""
    limit = run.configuration.get("max_seq_length")
    settings = run.manifest.get("settings")
    own = settings.get(name) if isinstance(settings, dict) else None
    if isinstance(own, dict) and isinstance(own.get("max_length"), int):
        limit = own["max_length"]
    return limit if isinstance(limit, int) else None


def _open(run: RunLog, name: str) -> tuple[TokenStore | None, str]:
    """The store of a dataset, or why there is none: it is compared with the checksums of the manifest."""
    folder = started_in(run) / str(run.configuration.get("train_data_path", "")) / name
    known = run.manifest.get("data")
    known = known.get(name) if isinstance(known, dict) else None
    if not isinstance(known, dict):
        return None, "the manifest does not say what it was trained on"
    if not (folder / "meta.json").is_file():
        return None, "its token store is not there"
    try:
        store = open_store(folder)
    except StoreError:
        return None, "its token store is damaged"
    if any(known.get(array) != digest for array, digest in store.meta["sha256"].items()):
        return None, "its token store holds other data now"
    if not len(store.tuples):
        return None, "its token store is empty"
    return store, ""


def length_section(runs: list[RunLog], datasets: list[Dataset]) -> Section:
    """How long queries and positives are, by dataset, or by task where the datasets are many."""
    there = [dataset for dataset in datasets if dataset.store is not None]
    by_task = len({dataset.name for dataset in there}) > MOST_CHARTS
    members_of: dict[str, list[Dataset]] = {}
    for dataset in there:
        name = dataset.task if by_task else dataset.name
        members_of.setdefault(name, []).append(dataset)
    charts = []
    for name, members in members_of.items():
        for role in ROLES:
            charts.append(_chart(name, role, members, len(runs)))
    return Section("Lengths of the texts", charts, _left_out(runs, datasets))


def _chart(name: str, role: str, members: list[Dataset], runs: int) -> Chart:
    """Shares of texts by their length; runs that were trained on the same data share a series."""
    series = []
    for sharing in _runs_of_same_data(members):
        lengths = [dataset.lengths(role) for dataset in members if dataset.run == sharing[0]]
        shares = histogram(np.concatenate(lengths))
        if runs > 1 and len(sharing) == runs:
            series.append(Series(-1, shares, label="all runs"))
        else:
            series.append(Series(sharing[0], shares))
    limits = {dataset.limit for dataset in members}
    limit = limits.pop() if len(limits) == 1 else None
    return Chart(f"{name} · {role}", series, "share by tokens", "%", "length", from_zero=True, bars=True, limit=limit)


def _runs_of_same_data(members: list[Dataset]) -> list[list[int]]:
    """The runs of these datasets, ascending; those that were trained on the same data together."""
    runs_of: dict[tuple[str, ...], list[int]] = {}
    for run in sorted({dataset.run for dataset in members}):
        digests = tuple(dataset.digest for dataset in members if dataset.run == run)
        runs_of.setdefault(digests, []).append(run)
    return list(runs_of.values())


def histogram(lengths: np.ndarray) -> list[tuple[int, float]]:
    """(the bin's first length, share of the lengths in it) from the first bin that has any to the last; three at least.

    Args:
        lengths: int64 [n], each at least 1; from 2^15 on they are in the last bin.
    """
    bins = np.searchsorted(EDGES, lengths, side="right") - 1  # [n]
    counts = np.bincount(bins, minlength=len(EDGES))
    first, last = int(bins.min()), int(bins.max())
    while last - first < 2:
        first = max(first - 1, 0)
        last = min(last + 1, len(EDGES) - 1)
    return [(int(EDGES[bin]), int(counts[bin]) / len(lengths)) for bin in range(first, last + 1)]


def _left_out(runs: list[RunLog], datasets: list[Dataset]) -> str:
    """A sentence for each reason why lengths are missing."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for dataset in datasets:
        if dataset.reason:
            by_reason.setdefault((runs[dataset.run].name, dataset.reason), []).append(dataset.name)
    sentences = []
    for (run, reason), names in by_reason.items():
        shown = names[0] if len(names) == 1 else plural(len(names), "dataset")
        sentences.append(f"Left out of {run}, {shown}: {reason}.")
    return " ".join(sentences)


def dataset_rows(runs: list[RunLog], datasets: list[Dataset]) -> list[list[str]]:
    """A row of words for each dataset: run, name, task, and of its store counts, median lengths, share that is cut."""
    rows = []
    for dataset in datasets:
        row = [runs[dataset.run].name, dataset.name, dataset.task]
        if dataset.store is None:
            rows.append([*row, "", "", "", "", "", "", dataset.reason])
            continue
        trained, held_out = split_sizes(len(dataset.store.tuples))
        lengths = [dataset.lengths(role) for role in ROLES]
        row += [f"{trained:,}", f"{held_out:,}", f"{dataset.store.meta['negatives']:,}"]
        row += [f"{np.median(one):,.0f}" for one in lengths]
        cut = np.concatenate(lengths) > (dataset.limit or np.inf)
        rows.append([*row, f"{cut.mean():.1%}", dataset.store.meta["sha256"]["tuples"][:12]])
    return rows
