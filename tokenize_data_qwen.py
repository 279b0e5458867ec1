"""Tokenise raw training tuples: a folder of Parquet, JSON, CSV or TSV files becomes a folder of token stores.

    python tokenize_data_qwen.py                                  the published paths
    python tokenize_data_qwen.py --tokenizer_path Qwen/Qwen3-0.6B --input_dir training_data \\
        --output_dir training_data/data_tokenized_qwen --max_seq_length 1024

    --part 1/8 ... --part 8/8, then --join 8                      the same on many machines, byte for byte

Each distinct text is tokenised once, cut to max_seq_length - 1 tokens and ended by one EOS. A file that is
done is skipped, an interrupted one continues, and the same input always gives the same bytes.
"""

import argparse
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from configuration import dataset_settings
from configuration.dataset_settings import DatasetSettings
from configuration.flag_parser import FlagParser
from configuration.flag_types import argument_type, boolean, number_of
from data import jobs, joining, parts, raw_files, raw_formats, token_store
from data.declarations import ALL_FILES, declared_instructions, declared_tasks, instruction_problem, name_problems
from data.jobs import Job, Order, RawFile
from data.joining import Join
from data.store_report import FILES_SHOWN, last_lines, not_read_lines, some, store_line
from data.token_store import StoreError
from data.tokenising import tokenize_with_fallback
from modeling.prompts import bare_instruction
from modeling.tokenizer import ENGINES, fingerprint, load_tokenizer
from utils import hide_bar_unless, plural, refusal_of_file, unwritable

REPORT = "report.txt"  # in output_dir: a line for every file, where they are more

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit status


def main(argv: list[str] | None = None) -> int:
    """Check everything, then tokenise file by file.

    Returns:
        the exit status: 0; 1 a file that cannot be read or written; 2 refused input; 130 interrupted by Ctrl-C.
    """
    flags = parse(argv)
    try:
        return check_and_tokenize(flags)
    except KeyboardInterrupt:
        complain("interrupted; the same command continues")
        return INTERRUPTED


def check_and_tokenize(flags: argparse.Namespace) -> int:
    """Print every problem that keeps the job from starting; if there is none, tokenise. Returns the exit status."""
    if flags.workers:
        os.environ["RAYON_NUM_THREADS"] = str(flags.workers)  # read when the first batch is tokenised
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer, tokenizer_problems = load_tokenizer(flags.tokenizer_path, flags.tokenizer_revision)
    problems = [f"--tokenizer_path {problem}" for problem in tokenizer_problems]
    tokenizer_fingerprint = "" if tokenizer is None else fingerprint(tokenizer)
    files, file_problems = find_raw_files(flags)
    problems += file_problems
    order = order_of(flags, tokenizer_fingerprint)
    if flags.join:
        joins, join_problems = jobs.plan_joins(files, order, flags.join)
        problems += join_problems
        return refuse(problems) if problems else say_what_is_next(join_stores(joins, flags.output_dir), flags)
    planned, job_problems = jobs.plan(files, order)
    problems += job_problems
    columns_not_read = {job.path.name: job.survey.not_read for job in planned if job.survey is not None}
    for line in not_read_lines(columns_not_read):
        complain(line)
    if problems:
        return refuse(problems)
    folder = flags.part.folder(flags.output_dir) if flags.part else flags.output_dir
    return say_what_is_next(tokenize_jobs(planned, tokenizer, flags.engine, folder / REPORT), flags)


def say_what_is_next(status: int, flags: argparse.Namespace) -> int:
    """If all is done, and not a part alone, say where training finds it. Returns the exit status as it came."""
    if status == DONE and flags.part is None:
        print(f"train with --train_data_path {flags.output_dir}")
    return status


def refuse(problems: list[str]) -> int:
    """Print all problems there are. Returns the exit status."""
    complain(f"{plural(len(problems), 'problem')}, nothing was written")
    print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
    return REFUSED


def complain(line: str) -> None:
    """Print a line to standard error, under this script's name."""
    print(f"tokenize_data_qwen.py: {line}", file=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Defaults are the published paths and lengths."""
    parser = FlagParser(__doc__)
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
        "--dataset_settings",
        help=f"file of settings, whose instructions hold where no --instruction does (default: "
        f"{dataset_settings.FILE_NAME} in --output_dir, where training looks as well)",
    )
    add(
        "--skip_bad_rows",
        type=boolean,
        default=False,
        help="leave out rows with an empty query or positive, or nothing to learn from, "
        "instead of refusing the file (default false)",
    )
    add("--overwrite", type=boolean, default=False, help="replace stores made from other inputs (default false)")
    part = argument_type(parts.read_part)
    add("--part", type=part, metavar="I/N", help="tokenise the I-th of N parts of all files; then --join N")
    add("--join", type=number_of("parts"), metavar="N", help="make the stores of N parts, with the flags of the parts")
    return parser.parse_args(argv)


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty; . is the current folder")
    return Path(text).expanduser()


def order_of(flags: argparse.Namespace, tokenizer_fingerprint: str) -> Order:
    """What the flags ask of every file."""
    return Order(
        output_dir=flags.output_dir,
        tokenizer=tokenizer_fingerprint,
        max_seq_length=flags.max_seq_length,
        max_rows=flags.max_rows,
        skip_bad_rows=flags.skip_bad_rows,
        overwrite=flags.overwrite,
        part=flags.part,
    )


def find_raw_files(flags: argparse.Namespace) -> tuple[list[RawFile], list[str]]:
    """The raw files with what is declared of each, and what is wrong as far as flags and names tell."""
    tasks, problems = declared_tasks(flags.task)
    problems = flag_problems(flags) + problems
    paths, source_problems = paths_to_read(flags)
    if not paths:
        return [], problems + source_problems
    known_tasks, task_problems = token_store.known_tasks(paths[0].parent)
    names = [raw_formats.dataset_name(path) for path in paths]
    instructions, instruction_problems = declared_instructions(flags.instruction, names)
    settings, settings_problems = read_settings(flags, paths[0].parent)
    problems += task_problems + instruction_problems + settings_problems
    problems += name_problems(flags.input_dir, names, tasks)
    files = []
    for path, name in zip(paths, names, strict=True):
        task = tasks.get(name) or tasks.get(ALL_FILES) or known_tasks.get(name)
        instruction = instructions.get(name) or instructions.get(ALL_FILES)
        if instruction is None and settings.of(name).instruction is not None:
            instruction = bare_instruction(settings.of(name).instruction)
        files.append(RawFile(path, task, instruction))
        problems += files[-1].problems()
    return files, problems


def read_settings(flags: argparse.Namespace, raw_folder: Path) -> tuple[DatasetSettings, list[str]]:
    """The file of settings, of which instructions are read here, and what is wrong with it.

    Names of datasets are not looked at: one file may hold more of them than are tokenised at a time. Training does.
    """
    path = dataset_settings.find(flags.output_dir, flags.dataset_settings)
    settings, problems = dataset_settings.read(path)
    misplaced = raw_folder / dataset_settings.FILE_NAME
    if flags.dataset_settings is None and misplaced.exists() and raw_folder.absolute() != flags.output_dir.absolute():
        problems.append(
            f"{misplaced}: belongs beside the stores: move it to {flags.output_dir}, where training reads it, or "
            f"give it as --dataset_settings here, and as the key dataset_settings there"
        )
    for name, entry in settings.entries.items():
        problem = instruction_problem(entry["instruction"]) if entry.get("instruction") else None
        if problem:
            problems.append(f"{path}: {name}: instruction: {problem}")
    return settings, problems


def paths_to_read(flags: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """The raw files, or why there are none. Names the other files there, which are not read."""
    source = flags.input_dir
    if not source.exists():
        return [], [f"--input_dir {source}: no such folder or file"]
    if source.is_file() and raw_formats.format_of(source) is None:
        return [], [f"--input_dir {source}: not one of {raw_files.ENDINGS}"]
    files, others = raw_files.raw_files(source)
    if flags.output_dir.absolute().parent == source.absolute():
        others.pop(flags.output_dir.name, None)  # the stores may stand beside the raw files
    not_read = some(f"{name} ({reason})" for name, reason in others.items())
    if not files:
        there = f"; it holds {not_read}" if not_read else ""
        return [], [f"--input_dir {source}: no file with one of the endings {raw_files.ENDINGS} in it{there}"]
    if not_read:
        complain(f"not read in {source}: {not_read}")
    return files, []


def flag_problems(flags: argparse.Namespace) -> list[str]:
    """Numbers that are too small, an engine that is not installed, an output folder that cannot be written to."""
    problems = []
    for name, least in (("max_seq_length", 2), ("workers", 0), ("max_rows", 0)):
        value = getattr(flags, name)
        if value < least:
            problems.append(f"--{name} must be at least {least}, not {value}")
    if flags.part and flags.join:
        problems.append("--part and --join: first every part, then the join, in commands of their own")
    if not find_spec(flags.engine):
        problems.append(f"--engine {flags.engine} is not installed: pip install {flags.engine}")
    reason = unwritable(flags.output_dir)
    if reason:
        problems.append(f"--output_dir {flags.output_dir}: {reason}")
    return problems


# ---------------------------------------------------------------------------------------- the stores


def tokenize_jobs(planned: list[Job], tokenizer, engine: str, report: Path) -> int:
    """Write the store of each job that is not done, with a line about each. Returns the exit status."""
    longest_name = max((len(job.folder.name) for job in planned), default=0)
    are_many = len(planned) > FILES_SHOWN
    stores = []
    for job in tqdm(planned, desc="tokenising", unit="file", disable=hide_bar_unless(are_many)):
        took = "already done"
        if job.survey is not None:
            begin = time.perf_counter()
            try:
                tokenize_with_fallback(job, tokenizer, engine, complain)
            except OSError as error:
                return failed(job.folder, error)
            took = f"{time.perf_counter() - begin:.1f} s"
        stores.append(token_store.open_store(job.folder))
        if not are_many:
            print(f"{store_line(stores[-1], longest_name)}  {took}", flush=True)
    if not stores:
        print("no row of any file falls to this part")
        return DONE
    for line in last_lines(stores, report):
        print(line, flush=True)
    return DONE


# ----------------------------------------------------------------------------------------- the parts


def join_stores(joins: list[Join], output_dir: Path) -> int:
    """Make each store of its parts, with a line about it, and remove those. Returns the exit status."""
    longest_name = max(len(join.folder.name) for join in joins)
    are_many = len(joins) > FILES_SHOWN
    stores = []
    for join in tqdm(joins, desc="joining", unit="file", disable=hide_bar_unless(are_many)):
        try:
            joining.join(join)
        except StoreError as error:
            complain(f"{join.folder.name}: not joined:")
            print("\n".join(f"  {line}" for line in str(error).splitlines()), file=sys.stderr)
            return REFUSED
        except OSError as error:
            return failed(join.folder, error)
        stores.append(token_store.open_store(join.folder))
        joining.remove_parts(join)
        if not are_many:
            print(store_line(stores[-1], longest_name), flush=True)
    for line in last_lines(stores, output_dir / REPORT):
        print(line, flush=True)
    return DONE


def failed(folder: Path, error: OSError) -> int:
    """Say why a file of this store was refused. Returns the exit status."""
    complain(f"{folder}: {refusal_of_file(error)}; the same command continues")
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
