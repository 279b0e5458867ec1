"""Tokenise raw training tuples: a folder of Parquet or JSONL files becomes a folder of token stores.

    python tokenize_data_qwen.py                                  the published paths
    python tokenize_data_qwen.py --tokenizer_path Qwen/Qwen3-0.6B --input_dir training_data \\
        --output_dir training_data/data_tokenized_qwen --max_seq_length 1024

Each distinct text is tokenised once, cut to max_seq_length - 1 tokens and ended by one EOS. A file that is
done is skipped, an interrupted one continues, and the same input always gives the same bytes.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data import raw_files, token_store
from data.raw_files import Survey
from data.store_writer import StoreWriter, is_done, text_key
from modeling.tokenizer import ENGINES, EngineDiffers, fingerprint, load_tokenizer, make_encoder
from utils import aside_of, file_digest, plural, remove

BATCH_TEXTS = 1024  # tokenised together: enough for all threads; more take memory and are no faster
COMMIT_ROWS = 65536  # rows between two points at which a killed run continues
ALL_FILES = "*"  # stands for a file's name where --task gives none

DONE, DISK_FULL, REFUSED = 0, 1, 2  # exit status


@dataclass(frozen=True)
class Job:
    """One raw file to tokenise: where it goes, and everything that the bytes of its store depend on."""

    path: Path
    folder: Path
    inputs: dict
    survey: Survey | None  # None when the store is done already


def main(argv: list[str] | None = None) -> int:
    """Check everything, then tokenise file by file. Returns the exit status: 0; 2 refused input; 1 a full disk."""
    flags = parse(argv)
    if flags.workers:
        os.environ["RAYON_NUM_THREADS"] = str(flags.workers)  # read when the first batch is tokenised
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer, tokenizer_problems = load_tokenizer(flags.tokenizer_path)
    problems = [f"--tokenizer_path {problem}" for problem in tokenizer_problems]
    tokenizer_print = "" if tokenizer is None else fingerprint(tokenizer)
    jobs, job_problems = plan_jobs(flags, tokenizer_print)
    problems += job_problems
    if problems:
        complain(f"{plural(len(problems), 'problem')}, nothing was written")
        print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        return REFUSED
    return tokenize_jobs(jobs, tokenizer, flags.engine)


def complain(line: str) -> None:
    """Print a line to standard error, under this script's name."""
    print(f"tokenize_data_qwen.py: {line}", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Defaults are the published paths and lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokenizer_path", default="models/qwen3-0.6b", help="folder or hub id (default %(default)s)")
    add(
        "--input_dir",
        type=_folder,
        default=Path("training_data"),
        help="raw .parquet and .jsonl files (default %(default)s)",
    )
    add(
        "--output_dir",
        type=_folder,
        default=Path("training_data/data_tokenized_qwen"),
        help="where the stores go (default %(default)s)",
    )
    add(
        "--max_seq_length",
        type=int,
        default=1024,
        help="tokens of a text, EOS included (default %(default)s; v2: 2048)",
    )
    add("--workers", type=int, default=0, help="tokeniser threads; 0 = all cores (default)")
    add(
        "--engine",
        choices=tuple(ENGINES),
        default="tokenizers",
        help="fastokens: several times as fast, checked against the other on a sample (pip install fastokens)",
    )
    add("--max_rows", type=int, default=0, help="sample this many rows of a longer file; 0 = all (default; v2: 80000)")
    add(
        "--task",
        action="append",
        default=[],
        metavar="[NAME=]TASK",
        help="retrieval, clustering or classification, of all files or of the file called NAME; may be repeated",
    )
    add(
        "--skip_bad_rows",
        type=_boolean,
        default=False,
        help="leave out empty texts and positives that are their own "
        "negative, instead of refusing the file (default false)",
    )
    add("--overwrite", type=_boolean, default=False, help="replace stores made from other inputs (default false)")
    return parser.parse_args(argv)


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty; . is the current folder")
    return Path(text).expanduser()


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def plan_jobs(flags: argparse.Namespace, tokenizer_print: str) -> tuple[list[Job], list[str]]:
    """What to do for each raw file, and everything that stands against it. Reads every file, writes nothing."""
    declared, declaration_problems = declared_tasks(flags.task)
    problems = flag_problems(flags) + declaration_problems + folder_problems(flags.output_dir)
    if not flags.input_dir.is_dir():
        return [], [*problems, f"--input_dir {flags.input_dir}: no such folder"]
    tasks, task_problems = token_store.known_tasks(flags.input_dir)
    problems += task_problems
    files = raw_files.raw_files(flags.input_dir)
    if not files:
        return [], [*problems, f"--input_dir {flags.input_dir}: no .parquet or .jsonl file in it"]
    problems += name_problems(flags.input_dir, [path.stem for path in files], declared)
    jobs = []
    for path in tqdm(files, desc="checking", unit="file", disable=None):
        task = declared.get(path.stem) or declared.get(ALL_FILES) or tasks.get(path.stem)
        job, job_problems = plan_job(path, flags, task, tokenizer_print)
        jobs.append(job)
        problems += job_problems
    return jobs, problems


def flag_problems(flags: argparse.Namespace) -> list[str]:
    """Numbers that are too small, and an engine that is not installed."""
    problems = []
    for name, least in (("max_seq_length", 2), ("workers", 0), ("max_rows", 0)):
        value = getattr(flags, name)
        if value < least:
            problems.append(f"--{name} must be at least {least}, not {value}")
    if not find_spec(flags.engine):
        problems.append(f"--engine {flags.engine} is not installed: pip install {flags.engine}")
    return problems


def declared_tasks(declarations: list[str]) -> tuple[dict[str, str], list[str]]:
    """--task flags as name -> task, ALL_FILES where none is named; and the ones that make no sense."""
    declared = {}
    problems = []
    for text in declarations:
        name, _, task = text.rpartition("=")
        if task not in token_store.TASKS:
            problems.append(f"--task {text}: {task!r} is none of {', '.join(token_store.TASKS)}")
        declared[name or ALL_FILES] = task
    return declared, problems


def folder_problems(folder: Path) -> list[str]:
    """Why nothing can be written below `folder`, one line, or nothing."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        return [f"--output_dir {folder}: {nearest} is a file"]
    if not os.access(nearest, os.W_OK):
        return [f"--output_dir {folder}: {nearest} may not be written to"]
    return []


def name_problems(folder: Path, names: list[str], declared: dict[str, str]) -> list[str]:
    """Names that two raw files share, and tasks declared for a name that no raw file has. `names` have no endings."""
    problems = []
    counts = Counter(names)
    for name in sorted(counts):
        if counts[name] > 1:
            problems.append(f"{folder}: two files are called {name!r}; one store can hold only one")
    for name, task in declared.items():
        is_known = name == ALL_FILES or name in counts
        if not is_known and task in token_store.TASKS:  # an unknown task was a problem before
            problems.append(
                f"--task {name}={task}: no file is called {name}.parquet or {name}.jsonl; there are {', '.join(names)}"
            )
    return problems


def plan_job(path: Path, flags: argparse.Namespace, task: str | None, tokenizer_print: str) -> tuple[Job, list[str]]:
    """The job of one raw file, and what stands against it."""
    name = path.stem
    problems = []
    name_problem = token_store.name_problem(name)
    if name_problem:
        problems.append(f"{path}: {name_problem}")
    if task is None:
        problems.append(
            f"{path}: no task is known for {name!r}: give --task {name}=retrieval (or clustering, classification), "
            f'or put {{"{name}": "retrieval"}} into {flags.input_dir}/tasks.json'
        )
    inputs = {
        "source": path.name,
        "source_sha256": file_digest(path),
        "tokenizer": tokenizer_print,
        "max_seq_length": flags.max_seq_length,
        "max_rows": flags.max_rows,
        "task": task,
        "skip_bad_rows": flags.skip_bad_rows,
    }
    folder = flags.output_dir / name
    done, folder_problem = is_done(folder, inputs, flags.overwrite)
    if done or folder_problem:
        return Job(path, folder, inputs, survey=None), problems + folder_problem
    survey = raw_files.survey(path)
    problems += survey.problems
    if flags.skip_bad_rows:
        if not survey.good:
            problems.append(f"{path}: no good row would be left")
    else:
        for line in survey.describe_bad_rows(path):
            problems.append(f"{line}: mend them, or leave them out with --skip_bad_rows true")
    return Job(path, folder, inputs, survey), problems


def tokenize_jobs(jobs: list[Job], tokenizer, engine: str) -> int:
    """Write the store of each job that is not done, with a line about each. Returns the exit status."""
    longest_name = max(len(job.folder.name) for job in jobs)
    for job in jobs:
        seconds = None
        if job.survey is not None:
            begin = time.perf_counter()
            try:
                tokenize_with_fallback(job, tokenizer, engine)
            except OSError as error:
                complain(f"{job.folder}: the disk refuses what is written: {error}")
                complain("make room; the same command continues")
                return DISK_FULL
            seconds = time.perf_counter() - begin
        print(report(job.folder, longest_name, seconds), flush=True)
    return DONE


def tokenize_with_fallback(job: Job, tokenizer, engine: str) -> None:
    """Write the store of one raw file; from its beginning by the reference tokenizer where a faster engine differs."""
    try:
        tokenize_file(job, tokenizer, engine)
    except EngineDiffers as error:
        complain(f"{job.path}: {error}: tokenised again by the reference")
        remove(aside_of(job.folder))
        tokenize_file(job, tokenizer)


def tokenize_file(job: Job, tokenizer, engine: str = "tokenizers") -> None:
    """Write the store of one raw file, from where an earlier run of the same job was interrupted."""
    inputs, survey = job.inputs, job.survey
    writer = StoreWriter(job.folder, survey.slots, inputs)
    encode = make_encoder(tokenizer, inputs["max_seq_length"], engine)
    is_sampled = raw_files.sample_rows(survey.rows, inputs["max_rows"])  # [rows of the file]
    position = writer.position
    batch_rows = math.ceil(BATCH_TEXTS / (2 + survey.slots))
    with tqdm(total=survey.rows, initial=position, desc=job.folder.name, unit="row", disable=None, leave=False) as bar:
        for table in raw_files.read(job.path, survey.columns, batch_rows, skip=position):
            tuples = raw_files.to_tuples(table, survey.columns, survey.slots)
            wanted = is_sampled[position + tuples.rows]  # [tuples of the table]
            good = wanted & (tuples.kinds() == 0)
            writer.stats["skipped"] = writer.stats.get("skipped", 0) + int(wanted.sum() - good.sum())
            add_tuples(writer, [column.filter(pa.array(good)).to_pylist() for column in tuples.texts], encode)
            position += len(table)
            bar.update(len(table))
            if position // COMMIT_ROWS > writer.position // COMMIT_ROWS:  # a multiple of COMMIT_ROWS was passed
                writer.commit(position)
    meta = {
        "name": job.folder.name,
        "task": inputs["task"],
        "max_seq_length": inputs["max_seq_length"],
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer": inputs["tokenizer"],
    }
    writer.finish(meta)


def add_tuples(writer: StoreWriter, columns: list[list[str | None]], encode: Callable) -> None:
    """Tokenise the texts that the store does not hold yet, then add the tuples as text numbers.

    Args:
        columns: queries, positives, and a list for each slot of negatives; all of one length.
    """
    keys = [[text_key(text.encode()) if text else None for text in column] for column in columns]
    texts = new_texts(columns, keys, writer.numbers)
    tokens, lengths, truncated = encode(list(texts.values()))
    writer.stats["truncated"] = writer.stats.get("truncated", 0) + truncated
    writer.add_texts(list(texts), tokens, lengths)
    numbers = [[writer.numbers[key] if key else -1 for key in column] for column in keys]
    writer.add_tuples(np.array(numbers, np.int32).T)


def new_texts(columns: list[list[str | None]], keys: list[list[bytes | None]], known: dict) -> dict[bytes, str]:
    """The texts by key whose keys are not `known`, in the order of first appearance, row by row.

    Row by row, so that the texts' numbers do not depend on where batches begin.
    """
    texts = {}
    for row, row_keys in zip(zip(*columns, strict=True), zip(*keys, strict=True), strict=True):
        for text, key in zip(row, row_keys, strict=True):
            if key and key not in known:
                texts[key] = text
    return texts


def report(folder: Path, width: int, seconds: float | None) -> str:
    """One line about a finished store.

    Args:
        width: of the column of names.
        seconds: what it took; None for a store that was there before.
    """
    store = token_store.open_store(folder)
    meta, stats = store.meta, store.meta["stats"]
    took = "was done already" if seconds is None else f"{seconds:.1f} s"
    parts = [
        f"{store.name:{width}}  {store.task:14}",
        f"{meta['rows']:>11,} rows  {meta['texts']:>11,} texts  {meta['tokens']:>14,} tokens",
        f"{stats.get('truncated', 0) / meta['texts']:6.1%} truncated  {stats.get('skipped', 0):,} skipped",
        f"{stats.get('own', 0):,} negatives cut to their positive",
        f"{store.nbytes / 1e6:,.1f} MB  {took}",
    ]
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
