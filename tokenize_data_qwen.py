"""Tokenise raw training tuples: a folder of Parquet or JSONL files becomes a folder of token stores.

    python tokenize_data_qwen.py                                  the published paths
    python tokenize_data_qwen.py --tokenizer_path Qwen/Qwen3-0.6B --input_dir training_data \\
        --output_dir training_data/data_tokenized_qwen --max_seq_length 1024

Each distinct text is tokenised once, cut to max_seq_length - 1 tokens and ended by one EOS. A file that is
done is skipped, an interrupted one continues, and the same input always gives the same bytes.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

import utils
from data import raw_files, token_store
from data.raw_files import Survey
from data.store_writer import StoreWriter, text_key
from modeling.tokenizer import EngineDiffers, fingerprint, load_tokenizer, make_encoder

BATCH_TEXTS = 1024  # tokenised together: enough for all threads; more take memory and are no faster
COMMIT_ROWS = 65536  # rows between two points at which a killed run continues
SAMPLE_SEED = 42  # of --max_rows, as in F2LLM-v2


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
    tokenizer, problems = load_tokenizer(flags.tokenizer_path)
    problems = [f"--tokenizer_path {problem}" for problem in problems]
    jobs, more = plan_jobs(flags, fingerprint(tokenizer) if tokenizer else "")
    problems += more
    if problems:
        print(
            f"tokenize_data_qwen.py: {len(problems)} problem{'s'[: len(problems) > 1]}, nothing was written",
            file=sys.stderr,
        )
        print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        return 2
    width = max(len(job.folder.name) for job in jobs)
    for job in jobs:
        begin = time.perf_counter()
        try:
            if job.survey:
                tokenize_surely(job, tokenizer, flags.engine)
        except OSError as error:
            print(f"tokenize_data_qwen.py: {job.folder}: the disk refuses what is written: {error}", file=sys.stderr)
            print("tokenize_data_qwen.py: make room; the same command continues", file=sys.stderr)
            return 1
        print(report(job.folder, width, time.perf_counter() - begin if job.survey else None), flush=True)
    return 0


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
        choices=("tokenizers", "fastokens"),
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


def plan_jobs(flags: argparse.Namespace, tokenizer_print: str) -> tuple[list[Job], list[str]]:
    """What to do for each raw file, and everything that stands against it. Reads every file, writes nothing."""
    problems = [
        f"--{name} must be at least {low}, not {getattr(flags, name)}"
        for name, low in (("max_seq_length", 2), ("workers", 0), ("max_rows", 0))
        if getattr(flags, name) < low
    ]
    if not find_spec(flags.engine):
        problems.append(f"--engine {flags.engine} is not installed: pip install {flags.engine}")
    declared, wrong = declared_tasks(flags.task)
    problems += wrong + folder_problems(flags.output_dir)
    if not flags.input_dir.is_dir():
        return [], [*problems, f"--input_dir {flags.input_dir}: no such folder"]
    tasks, wrong = token_store.known_tasks(flags.input_dir)
    problems += wrong
    files = raw_files.raw_files(flags.input_dir)
    if not files:
        return [], [*problems, f"--input_dir {flags.input_dir}: no .parquet or .jsonl file in it"]
    stems = [path.stem for path in files]
    problems += [
        f"{flags.input_dir}: two files are called {stem!r}; one store can hold only one"
        for stem in sorted({stem for stem in stems if stems.count(stem) > 1})
    ]
    problems += [
        f"--task {name}={task}: no file is called {name}.parquet or {name}.jsonl; there are {', '.join(stems)}"
        for name, task in declared.items()
        if name not in ("*", *stems) and task in token_store.TASKS
    ]
    jobs = []
    for path in tqdm(files, desc="checking", unit="file", disable=None):
        task = declared.get(path.stem) or declared.get("*") or tasks.get(path.stem)
        job, wrong = plan_job(path, flags, task, tokenizer_print)
        problems += wrong
        jobs.append(job)
    return jobs, problems


def plan_job(path: Path, flags: argparse.Namespace, task: str | None, tokenizer_print: str) -> tuple[Job, list[str]]:
    """The job of one raw file, and what stands against it."""
    name = path.stem
    problems = [f"{path}: {wrong}" for wrong in [token_store.name_problem(name)] if wrong]
    if task is None:
        problems.append(
            f"{path}: no task is known for {name!r}: give --task {name}=retrieval (or clustering, classification), "
            f'or put {{"{name}": "retrieval"}} into {flags.input_dir}/tasks.json'
        )
    inputs = {
        "source": path.name,
        "source_sha256": token_store.file_digest(path),
        "tokenizer": tokenizer_print,
        "max_seq_length": flags.max_seq_length,
        "max_rows": flags.max_rows,
        "task": task,
        "skip_bad_rows": flags.skip_bad_rows,
    }
    done, wrong = is_done(flags.output_dir / name, inputs, flags.overwrite)
    if done or wrong:
        return Job(path, flags.output_dir / name, inputs, None), problems + wrong
    survey = raw_files.survey(path)
    problems += survey.problems
    if not flags.skip_bad_rows:
        problems += [
            f"{line}: mend them, or leave them out with --skip_bad_rows true" for line in survey.describe_bad_rows(path)
        ]
    elif not survey.good:
        problems.append(f"{path}: no good row would be left")
    return Job(path, flags.output_dir / name, inputs, survey), problems


def is_done(folder: Path, inputs: dict, overwrite: bool) -> tuple[bool, list[str]]:
    """Whether `folder` already holds the store of these inputs; and what stands against writing it, if not."""
    if not folder.exists():
        return False, []
    if not (folder / "meta.json").exists():
        return False, [
            f"{folder}: is no token store and would be replaced: move it away, or choose another --output_dir"
        ]
    problems = token_store.quick_check(folder)
    old = {} if problems else token_store.open_store(folder).meta["inputs"]
    if old == inputs:
        return True, []
    changes = [f"{key} {old.get(key)!r} -> {value!r}" for key, value in inputs.items() if old.get(key) != value]
    if not problems:
        problems = [
            f"{folder}: made from other inputs ({'; '.join(changes)}): choose another --output_dir, or --overwrite true"
        ]
    return False, [] if overwrite else problems


def folder_problems(folder: Path) -> list[str]:
    """Why nothing can be written below `folder`, one line, or nothing."""
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        return [f"--output_dir {folder}: {nearest} is a file"]
    return [] if os.access(nearest, os.W_OK) else [f"--output_dir {folder}: {nearest} may not be written to"]


def declared_tasks(declarations: list[str]) -> tuple[dict[str, str], list[str]]:
    """--task flags as name -> task, "*" for all files; and the ones that make no sense."""
    declared, problems = {}, []
    for text in declarations:
        name, _, task = text.rpartition("=")
        if task not in token_store.TASKS:
            problems.append(f"--task {text}: {task!r} is none of {', '.join(token_store.TASKS)}")
        declared[name or "*"] = task
    return declared, problems


def tokenize_surely(job: Job, tokenizer, engine: str) -> None:
    """Write the store of one raw file; from its beginning by the reference tokenizer where a faster engine differs."""
    try:
        tokenize_file(job, tokenizer, engine)
    except EngineDiffers as error:
        print(f"tokenize_data_qwen.py: {job.path}: {error}: tokenised again by the reference", file=sys.stderr)
        utils.remove(job.folder.with_name(f".{job.folder.name}.partial"))
        tokenize_file(job, tokenizer)


def tokenize_file(job: Job, tokenizer, engine: str = "tokenizers") -> None:
    """Write the store of one raw file, from where an earlier run of the same job was interrupted."""
    inputs, survey = job.inputs, job.survey
    writer = StoreWriter(job.folder, survey.slots, inputs)
    encode = make_encoder(tokenizer, inputs["max_seq_length"], engine)
    keep = sample_rows(survey.rows, inputs["max_rows"])
    position = writer.position
    batch_rows = -(-BATCH_TEXTS // (2 + survey.slots))
    with tqdm(total=survey.rows, initial=position, desc=job.folder.name, unit="row", disable=None, leave=False) as bar:
        for table in raw_files.read(job.path, survey.columns, batch_rows, skip=position):
            tuples = raw_files.to_tuples(table, survey.columns, survey.slots)
            kept = keep[position + tuples.rows]
            good = kept & (tuples.kinds() == 0)
            writer.stats["skipped"] = writer.stats.get("skipped", 0) + int(kept.sum() - good.sum())
            add_tuples(writer, [column.filter(pa.array(good)).to_pylist() for column in tuples.texts], encode)
            position += len(table)
            bar.update(len(table))
            if position // COMMIT_ROWS > writer.position // COMMIT_ROWS:
                writer.commit(position)
    meta = {"name": job.folder.name, "task": inputs["task"], "max_seq_length": inputs["max_seq_length"]}
    writer.finish(meta | {"eos_token_id": tokenizer.eos_token_id, "tokenizer": inputs["tokenizer"]})


def add_tuples(writer: StoreWriter, columns: list[list[str | None]], encode: Callable) -> None:
    """Tokenise the texts that the store does not hold yet, then add the tuples as text numbers.

    Args:
        columns: queries, positives, and a list for each slot of negatives; all of one length.
    """
    keys = [[text_key(text.encode()) if text else None for text in column] for column in columns]
    new = {
        key: text
        for row, row_keys in zip(zip(*columns, strict=True), zip(*keys, strict=True), strict=True)
        for text, key in zip(row, row_keys, strict=True)
        if key and key not in writer.numbers
    }  # a dict keeps the order of first appearance, so the numbers do not depend on where batches begin
    tokens, lengths, truncated = encode(list(new.values()))
    writer.stats["truncated"] = writer.stats.get("truncated", 0) + truncated
    writer.add_texts(list(new), tokens, lengths)
    numbers = [[writer.numbers[key] if key else -1 for key in column] for column in keys]
    writer.add_tuples(np.array(numbers, np.int32).T)


def sample_rows(rows: int, max_rows: int) -> np.ndarray:
    """Which raw rows to keep, bool [rows]; max_rows 0 keeps all. Kept rows stay in the order of the file.

    The same rows as pandas' `DataFrame.sample(n=max_rows, random_state=42)`.
    """
    if not max_rows or rows <= max_rows:
        return np.ones(rows, bool)
    keep = np.zeros(rows, bool)
    keep[np.random.RandomState(SAMPLE_SEED).permutation(rows)[:max_rows]] = True
    return keep


def report(folder: Path, width: int, seconds: float | None) -> str:
    """One line about a finished store."""
    store = token_store.open_store(folder)
    meta, stats = store.meta, store.meta["stats"]
    return "  ".join(
        [
            f"{store.name:{width}}  {store.task:14}",
            f"{meta['rows']:>11,} rows  {meta['texts']:>11,} texts  {meta['tokens']:>14,} tokens",
            f"{stats.get('truncated', 0) / meta['texts']:6.1%} truncated  {stats.get('skipped', 0):,} skipped",
            f"{stats.get('own', 0):,} negatives cut to their positive",
            f"{store.nbytes / 1e6:,.1f} MB  {'was done already' if seconds is None else f'{seconds:.1f} s'}",
        ]
    )


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty; . is the current folder")
    return Path(text).expanduser()


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


if __name__ == "__main__":
    sys.exit(main())
