"""Tokenise raw training tuples: a folder of Parquet, JSON, CSV or TSV files becomes a folder of token stores.

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
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import raw_files, raw_formats, token_store
from data.declarations import ALL_FILES, declared_instructions, declared_tasks, folder_problems, name_problems
from data.instructions import add_instructions, count_instructions, keep_most_frequent
from data.raw_files import Survey
from data.raw_rows import RawError
from data.store_report import FILES_SHOWN, last_lines, not_read_lines, some, store_line
from data.store_writer import StoreWriter, is_done, text_key
from modeling.tokenizer import ENGINES, EngineDiffers, fingerprint, load_tokenizer, make_encoder
from utils import aside_of, file_digest, plural, remove

BATCH_TEXTS = 1024  # tokenised together: enough for all threads; more take memory and are no faster
COMMIT_ROWS = 65536  # rows between two points at which a killed run continues
COLUMNS_NAMED = 20  # columns that were not read, in meta.json
REPORT = "report.txt"  # in output_dir: a line for every file, where they are more

DONE, DISK_FULL, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit status


@dataclass(frozen=True)
class Job:
    """One raw file to tokenise: where it goes, and everything that the bytes of its store depend on."""

    path: Path
    folder: Path
    inputs: dict
    survey: Survey | None  # None when the store is done already


def main(argv: list[str] | None = None) -> int:
    """Check everything, then tokenise file by file.

    Returns:
        the exit status: 0; 1 a full disk; 2 refused input; 130 interrupted by Ctrl-C.
    """
    flags = parse(argv)
    try:
        return check_and_tokenize(flags)
    except KeyboardInterrupt:
        complain("interrupted; the same command continues")
        return INTERRUPTED


def check_and_tokenize(flags: argparse.Namespace) -> int:
    """Find everything that stands against the job and print all of it at once; or tokenise. Returns the exit status."""
    if flags.workers:
        os.environ["RAYON_NUM_THREADS"] = str(flags.workers)  # read when the first batch is tokenised
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer, tokenizer_problems = load_tokenizer(flags.tokenizer_path, flags.tokenizer_revision)
    problems = [f"--tokenizer_path {problem}" for problem in tokenizer_problems]
    tokenizer_print = "" if tokenizer is None else fingerprint(tokenizer)
    jobs, job_problems = plan_jobs(flags, tokenizer_print)
    problems += job_problems
    columns_not_read = {job.path.name: job.survey.not_read for job in jobs if job.survey is not None}
    for line in not_read_lines(columns_not_read):
        complain(line)
    if problems:
        complain(f"{plural(len(problems), 'problem')}, nothing was written")
        print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        return REFUSED
    return tokenize_jobs(jobs, tokenizer, flags.engine, flags.output_dir / REPORT)


def complain(line: str) -> None:
    """Print a line to standard error, under this script's name."""
    print(f"tokenize_data_qwen.py: {line}", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Defaults are the published paths and lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokenizer_path", default="models/qwen3-0.6b", help="folder or hub id (default %(default)s)")
    add("--tokenizer_revision", help="commit, tag or branch of a hub id (default: its main branch)")
    files = f"folder of raw files, or one: {raw_files.ENDINGS} (default %(default)s)"
    add("--input_dir", type=_folder, default=Path("training_data"), help=files)
    add(
        "--output_dir",
        type=_folder,
        default=Path("training_data/data_tokenized_qwen"),
        help="where the stores go (default %(default)s)",
    )
    add("--max_seq_length", type=int, default=1024, help="tokens of a text with EOS (default %(default)s; v2: 2048)")
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
        "--instruction",
        action="append",
        default=[],
        metavar="[NAME=]TEXT",
        help="put before every query that carries none, of all files or of the file called NAME; may be repeated",
    )
    add(
        "--skip_bad_rows",
        type=_boolean,
        default=False,
        help="leave out rows with an empty query or positive, or nothing to learn from, "
        "instead of refusing the file (default false)",
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
    tasks, problems = declared_tasks(flags.task)
    problems = flag_problems(flags) + problems + folder_problems(flags.output_dir)
    files, source_problems = find_files(flags)
    if not files:
        return [], problems + source_problems
    known_tasks, task_problems = token_store.known_tasks(files[0].parent)
    names = [raw_formats.dataset_name(path) for path in files]
    instructions, instruction_problems = declared_instructions(flags.instruction, names)
    problems += task_problems + instruction_problems + name_problems(flags.input_dir, names, tasks)
    jobs = []
    for path, name in zip(tqdm(files, desc="checking", unit="file", disable=None), names, strict=True):
        task = tasks.get(name) or tasks.get(ALL_FILES) or known_tasks.get(name)
        instruction = instructions.get(name) or instructions.get(ALL_FILES)
        job, job_problems = plan_job(path, flags, task, instruction, tokenizer_print)
        jobs.append(job)
        problems += job_problems
    return jobs, problems


def find_files(flags: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The raw files, or why there are none. Says what else lies there and is not read."""
    source = flags.input_dir
    if not source.exists():
        return [], [f"--input_dir {source}: no such folder or file"]
    if source.is_file() and raw_formats.format_of(source) is None:
        return [], [f"--input_dir {source}: none of {raw_files.ENDINGS}"]
    files, others = raw_files.raw_files(source)
    if flags.output_dir.absolute().parent == source.absolute():
        others.pop(flags.output_dir.name, None)  # the stores may stand beside the raw files
    not_read = some(f"{name} ({reason})" for name, reason in others.items())
    if not files:
        there = f"; there are {not_read}" if not_read else ""
        return [], [f"--input_dir {source}: no file with one of the endings {raw_files.ENDINGS} in it{there}"]
    if not_read:
        complain(f"not read in {source}: {not_read}")
    return files, []


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


def plan_job(
    path: Path, flags: argparse.Namespace, task: str | None, instruction: str | None, tokenizer_print: str
) -> tuple[Job, list[str]]:
    """The job of one raw file, and what stands against it."""
    name = raw_formats.dataset_name(path)
    folder = flags.output_dir / name
    problems = []
    name_problem = token_store.name_problem(name)
    if name_problem:
        problems.append(f"{path}: {name_problem}")
    if task is None:
        problems.append(
            f"{path}: no task is known for {name!r}: give --task {name}=retrieval (or clustering, classification), "
            f'or put {{"{name}": "retrieval"}} into {path.with_name("tasks.json")}'
        )
    try:
        raw_formats.check_file(path)
    except RawError as error:
        return Job(path, folder, {}, survey=None), [*problems, f"{path}: {error}"]
    inputs = {
        "source": path.name,
        "source_sha256": file_digest(path),
        "tokenizer": tokenizer_print,
        "max_seq_length": flags.max_seq_length,
        "max_rows": flags.max_rows,
        "task": task,
        "skip_bad_rows": flags.skip_bad_rows,
    }
    if instruction:  # only then, so that stores of earlier versions still count as done
        inputs["instruction"] = instruction
    done, folder_problem = is_done(folder, inputs, flags.overwrite)
    if done or folder_problem:
        return Job(path, folder, inputs, survey=None), problems + folder_problem
    survey = raw_files.survey(path, task)
    problems += survey.problems
    if flags.skip_bad_rows:
        if not survey.good and not survey.problems:
            problems.append(f"{path}: no good row would be left")
    else:
        for line in survey.describe_bad_rows(path):
            problems.append(f"{line}: mend them, or leave them out with --skip_bad_rows true")
    return Job(path, folder, inputs, survey), problems


def tokenize_jobs(jobs: list[Job], tokenizer, engine: str, report: Path) -> int:
    """Write the store of each job that is not done, with a line about each. Returns the exit status."""
    longest_name = max(len(job.folder.name) for job in jobs)
    are_many = len(jobs) > FILES_SHOWN
    hide_bar = None if are_many else True  # None: shown on a terminal
    stores = []
    for job in tqdm(jobs, desc="tokenising", unit="file", disable=hide_bar):
        took = "was done already"
        if job.survey is not None:
            begin = time.perf_counter()
            try:
                tokenize_with_fallback(job, tokenizer, engine)
            except OSError as error:
                complain(f"{job.folder}: the disk refuses what is written: {error}")
                complain("make room; the same command continues")
                return DISK_FULL
            took = f"{time.perf_counter() - begin:.1f} s"
        stores.append(token_store.open_store(job.folder))
        if not are_many:
            print(f"{store_line(stores[-1], longest_name)}  {took}", flush=True)
    for line in last_lines(stores, report):
        print(line, flush=True)
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
    if survey.not_read:
        writer.stats["columns_not_read"] = list(survey.not_read)[:COLUMNS_NAMED]
    position = writer.position
    batch_rows = math.ceil(BATCH_TEXTS / (2 + survey.slots))
    with tqdm(total=survey.rows, initial=position, desc=job.folder.name, unit="row", disable=None, leave=False) as bar:
        for table in raw_files.read(job.path, survey.columns, batch_rows, skip=position):
            tuples = survey.columns.to_tuples(table, survey.slots)
            wanted = is_sampled[position + tuples.rows]  # [tuples of the table]
            good = wanted & (raw_files.kinds(tuples, inputs["task"]) == 0)
            writer.stats["skipped"] = writer.stats.get("skipped", 0) + int(wanted.sum() - good.sum())
            columns = tuples.texts_of(good)
            columns[0] = add_instructions(columns[0], tuples.prompts_of(good), inputs.get("instruction"))
            count_instructions(writer.stats, columns[0])
            add_tuples(writer, columns, encode)
            position += len(table)
            bar.update(len(table))
            if position // COMMIT_ROWS > writer.position // COMMIT_ROWS:  # a multiple of COMMIT_ROWS was passed
                writer.commit(position)
    keep_most_frequent(writer.stats)
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


if __name__ == "__main__":
    sys.exit(main())
