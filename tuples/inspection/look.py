"""Looks at training data as a whole: what there is, how long it is, and which rules it breaks.

find      which datasets lie at a path: raw files, token stores, or what the published scripts tokenised
inspect   one of them, as numbers
together  all of them
"""

from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from data import cache, raw_files, raw_formats, token_store
from data.declarations import ALL_FILES, name_problems
from data.token_store import StoreError
from tuples.inspection.checks import (
    FIRST_ROWS,
    ROLES,
    Found,
    Lengths,
    false_negatives,
    found_in,
    lengths_of,
    occurrences,
    pairs_of,
    repeated,
    without_negatives,
)
from tuples.inspection.evaluation import Evaluation
from tuples.inspection.raw import Table, read_raw
from tuples.inspection.rules import RULES, Broken, broken_rules
from tuples.inspection.store import read_store
from tuples.inspection.training import Course, tokens_of_first_pass

MAX_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)  # at which the share of longer texts is said
USUAL_TASK = "retrieval"  # of a raw file whose task is not declared
RAW, STORE, PUBLISHED = "raw", "store", "published"


@dataclass(frozen=True)
class Source:
    """One dataset to inspect."""

    name: str
    path: Path
    kind: str  # RAW, STORE or PUBLISHED
    task: str | None  # None: not declared
    tokenised: cache.Source | None = None  # of a store, or of published Parquet


@dataclass(frozen=True)
class Options:
    """What is the same for all datasets of an inspection."""

    tokenizer_path: str | None
    tokenizer: object | None
    evaluation: Evaluation | None
    course: Course | None
    limits: dict[str, float]
    workers: int
    cache_dir: Path  # where published Parquet is converted


@dataclass(frozen=True)
class Inspection:
    """What was found in one dataset, or in all together."""

    name: str
    path: Path
    kind: str
    task: str | None
    file_rows: int  # rows that can be read
    tuples: int  # that can be trained on
    texts: int  # distinct ones; of several datasets, those of each
    negatives: int
    slots: int  # K, the most negatives a tuple has room for
    unit: str  # of all lengths
    lengths: dict[str, Lengths]  # of "texts", and of each of ROLES
    truncated: dict[int, dict[str, Found | None]]  # max length -> role -> texts that are longer; None: not known
    found: dict[str, Found]  # by the name of the rule; what is not known is not in it
    tokens: int | None = None  # of the first pass over the training tuples
    broken: list[Broken] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- find


def find(path: Path, tasks: dict[str, str]) -> tuple[list[Source], list[str]]:
    """The datasets at a path, sorted by name, and why they cannot be inspected.

    Args:
        path: a folder of raw files or of tokenised data, a file of either, or one token store.
        tasks: name -> task of raw files, ALL_FILES for every name; overrides what is declared beside them.
    """
    if not path.exists():
        return [], [f"{path}: no such file or folder"]
    if (path / "meta.json").exists() or (path.is_file() and is_tokenised(path)):
        return _one_tokenised(path)
    if path.is_file():
        if raw_formats.format_of(path) is None:
            return [], [f"{path}: neither a raw file, {raw_files.ENDINGS}, nor a token store"]
        return _raw_sources([path], tasks)
    tokenised = [entry.name for entry in sorted(path.iterdir()) if is_tokenised(entry)]
    raw = [file for file in raw_files.raw_files(path)[0] if file.name not in tokenised]
    if raw and tokenised:
        return [], [
            f"{path}: holds raw files ({raw[0].name}, ...) and tokenised data ({tokenised[0]}, ...), which would count "
            "twice: give one file or one store, or move one kind into a folder of its own"
        ]
    if raw:
        return _raw_sources(raw, tasks)
    if not tokenised:
        return [], [f"{path}: no dataset in it: neither raw files ({raw_files.ENDINGS}) nor token stores"]
    found, problems = cache.find_sources(path)
    return [_tokenised_source(source) for source in found], problems


def is_tokenised(path: Path) -> bool:
    """Whether a path is a token store, or Parquet of token ids as the published scripts write it."""
    if path.is_dir():
        return not path.name.startswith(".") and (path / "meta.json").exists() and (path / "tuples.npy").exists()
    if path.suffix != ".parquet":
        return False
    try:
        names = set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return False  # reading it as a raw file says what is wrong
    return "query_input_ids" in names or {"doc_id", "input_ids"} <= names


def _one_tokenised(path: Path) -> tuple[list[Source], list[str]]:
    """A token store, or one published file."""
    tasks, problems = token_store.known_tasks(path.absolute().parent)
    try:
        source = cache.source_at(path, tasks)
    except StoreError as error:
        return [], [*problems, *str(error).splitlines()]
    if source is None:
        return [], [*problems, f"{path}: holds documents and no queries: give the file of its queries"]
    return [_tokenised_source(source)], problems


def _tokenised_source(source: cache.Source) -> Source:
    kind = PUBLISHED if source.published else STORE
    return Source(source.name, source.path, kind, source.task, source)


def _raw_sources(files: list[Path], tasks: dict[str, str]) -> tuple[list[Source], list[str]]:
    folder = files[0].absolute().parent
    names = [raw_formats.dataset_name(file) for file in files]
    known, problems = token_store.known_tasks(folder)
    problems += name_problems(folder, names, tasks)
    sources = []
    for file, name in zip(files, names, strict=True):
        task = tasks.get(name) or tasks.get(ALL_FILES) or known.get(name)
        sources.append(Source(name, file, RAW, task))
    return sorted(sources, key=lambda source: source.name), problems


# ---------------------------------------------------------------------------------------------- inspect


def inspect(source: Source, options: Options) -> Inspection:
    """Look at one dataset.

    Raises:
        RawError, StoreError: it cannot be used; the message has a line for each reason.
    """
    if source.kind == RAW:
        table = read_raw(source.path, source.task, options.tokenizer, options.evaluation, options.workers)
        return inspect_table(table, source, source.task, options)
    with FileLock(options.cache_dir / ".lock"):  # a training may be converting the same files
        store = cache.prepare_one(source.tokenised, options.cache_dir, say=lambda line: None)
    if options.tokenizer is not None:
        check_tokenizer(store, options.tokenizer_path)
    names_documents = source.kind == PUBLISHED and source.tokenised.published.corpus is not None
    table = read_store(store, options.tokenizer, options.evaluation, by_ids=names_documents)
    return inspect_table(table, source, store.task, options)


def check_tokenizer(store: token_store.TokenStore, path: str) -> None:
    """Raise StoreError if another tokenizer than that at `path` wrote the store."""
    from modeling.tokenizer import fitting_tokenizer  # here, because it needs transformers, and numbers do not

    _, problems = fitting_tokenizer(path, [store], remedy="give the one that wrote it")
    if problems:
        raise StoreError("\n".join(f"--tokenizer_path: {problem}" for problem in problems))


def inspect_table(table: Table, source: Source, task: str | None, options: Options) -> Inspection:
    """Everything that is counted in a table, together with what was found while it was read."""
    applied = task or USUAL_TASK
    times = occurrences(table.numbers, len(table.lengths))
    lengths = {"texts": lengths_of(table.lengths, np.ones(len(table.lengths)))}
    lengths |= {role: lengths_of(table.lengths, times[role]) for role in ROLES}
    found = table.found | _found_by_numbers(table, lengths["negatives"].count)
    tokens = None
    if options.course is not None and table.unit == "tokens":
        use = options.course.uses[source.name]
        tokens = tokens_of_first_pass(table.numbers, table.lengths, use, options.course.seed)
        cut = texts_longer_than(table, lengths, use.max_length)
        if None not in cut.values():
            found["truncated"] = Found(sum(cut[role].count for role in ROLES), sum(cut[role].of for role in ROLES))
    found = {rule.name: found[rule.name] for rule in RULES if rule.name in found and applied in rule.tasks}
    return Inspection(
        name=source.name,
        path=source.path,
        kind=source.kind,
        task=task,
        file_rows=table.file_rows,
        tuples=len(table.numbers),
        texts=len(table.lengths),
        negatives=lengths["negatives"].count,
        slots=table.numbers.shape[1] - 2,
        unit=table.unit,
        lengths=lengths,
        truncated={limit: texts_longer_than(table, lengths, limit) for limit in MAX_LENGTHS},
        found=found,
        tokens=tokens,
        broken=broken_rules(found, applied, options.limits),
    )


def _found_by_numbers(table: Table, negatives: int) -> dict[str, Found]:
    """Repeated texts and missing negatives, by the name of the rule; equal numbers are equal texts."""
    numbers, rows, count = table.numbers, table.rows, len(table.lengths)
    queries = np.asarray(numbers[:, 0])
    tuples, is_false = false_negatives(numbers, count)
    of_false = found_in(is_false, rows[tuples])
    lacking = found_in(without_negatives(numbers), rows)
    nothing_left = table.found.get("nothing_left")
    if nothing_left is not None:  # tuples that are not in the table, because their only negatives were their positive
        first = sorted(lacking.rows + nothing_left.rows)[:FIRST_ROWS]
        lacking = Found(lacking.count + nothing_left.count, lacking.of + nothing_left.count, tuple(first))
    return {
        "duplicate_queries": found_in(repeated(queries), rows),
        "duplicate_tuples": found_in(repeated(pairs_of(queries, numbers[:, 1], count)), rows),
        "false_negatives": Found(of_false.count, negatives, of_false.rows),
        "without_negatives": lacking,
    }


def texts_longer_than(table: Table, lengths: dict[str, Lengths], limit: int) -> dict[str, Found | None]:
    """Texts that are longer than `limit` tokens, distinct ones and by role; None if that is not known.

    A store holds its texts as they were cut. So it does not know which were longer than a limit above that length, but
    it may know how many were cut.
    """
    is_known = table.unit == "tokens" and (table.longest is None or limit < table.longest)
    longer = dict.fromkeys(lengths)
    if is_known:
        for role, distribution in lengths.items():
            longer[role] = Found(distribution.longer_than(limit), distribution.count)
    elif table.unit == "tokens" and limit == table.longest and table.truncated is not None:
        longer["texts"] = Found(table.truncated, len(table.lengths))
    return longer


# --------------------------------------------------------------------------------------------- together


def together(inspections: list[Inspection], path: Path) -> Inspection:
    """The sums of all datasets. Rules are broken by datasets, not by their sum."""
    kinds = sorted({inspection.kind for inspection in inspections})
    return Inspection(
        name="all",
        path=path,
        kind=" and ".join(kinds),
        task=None,
        **sums_of_counts(inspections),
        slots=max(inspection.slots for inspection in inspections),
        unit=inspections[0].unit,
        lengths=sums_of_lengths(inspections),
        truncated=sums_of_truncated(inspections),
        found=sums_of_found(inspections),
        tokens=sum_of_tokens(inspections),
    )


def sums_of_counts(inspections: list[Inspection]) -> dict[str, int]:
    """Name of a count -> its sum over all datasets."""
    names = ("file_rows", "tuples", "texts", "negatives")
    return {name: sum(getattr(inspection, name) for inspection in inspections) for name in names}


def sum_of_tokens(inspections: list[Inspection]) -> int | None:
    """Tokens of the first pass over all datasets; None if one of them does not know."""
    tokens = [inspection.tokens for inspection in inspections]
    return None if None in tokens else sum(tokens)


def sums_of_lengths(inspections: list[Inspection]) -> dict[str, Lengths]:
    """Role -> how long its texts are, in all datasets."""
    sums = {}
    for role in inspections[0].lengths:
        sums[role] = reduce(Lengths.plus, [inspection.lengths[role] for inspection in inspections])
    return sums


def sums_of_found(inspections: list[Inspection]) -> dict[str, Found]:
    """Rule -> what was found in all datasets to which it applies, in the order of the rules."""
    sums = {}
    for rule in RULES:
        of_rule = [inspection.found[rule.name] for inspection in inspections if rule.name in inspection.found]
        if of_rule:
            sums[rule.name] = reduce(Found.plus, of_rule)
    return sums


def sums_of_truncated(inspections: list[Inspection]) -> dict[int, dict[str, Found | None]]:
    """Max length -> role -> texts that are longer, in all datasets; None if one of them does not know."""
    sums = {}
    for limit in MAX_LENGTHS:
        sums[limit] = {}
        for role in inspections[0].truncated[limit]:
            found = [inspection.truncated[limit][role] for inspection in inspections]
            sums[limit][role] = None
            if None not in found:
                sums[limit][role] = reduce(Found.plus, found)
    return sums
