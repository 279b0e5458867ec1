"""Which raw files are tokenised into which stores, or parts of them, and every problem that keeps them from it."""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import parts, raw_files, raw_formats, token_store
from data.joining import Join, plan_join
from data.parts import Part, Share
from data.raw_files import Survey
from data.raw_rows import RawError
from data.store_writer import is_done
from utils import file_digest


@dataclass(frozen=True)
class RawFile:
    """One raw file, and what was declared of its dataset."""

    path: Path
    task: str | None  # None if none is known, which is a problem
    instruction: str | None

    @property
    def name(self) -> str:
        """Its dataset's."""
        return raw_formats.dataset_name(self.path)

    def problems(self) -> list[str]:
        """A name that cannot be a dataset's, and a task that nobody has declared."""
        problems = []
        name_problem = token_store.name_problem(self.name)
        if name_problem:
            problems.append(f"{self.path}: {name_problem}")
        if self.task is None:
            problems.append(
                f"{self.path}: no task is known for {self.name!r}: give --task {self.name}=retrieval (or clustering, "
                f'classification), or put {{"{self.name}": "retrieval"}} into {self.path.with_name("tasks.json")}'
            )
        return problems


@dataclass(frozen=True)
class Order:
    """What is asked of every raw file."""

    output_dir: Path
    tokenizer: str  # fingerprint
    max_seq_length: int
    max_rows: int  # 0 for all
    skip_bad_rows: bool
    overwrite: bool  # stores made from other inputs
    part: Part | None  # None for all rows of all files

    def inputs(self, file: RawFile, digest: str | None) -> dict:
        """Everything that the bytes of a store depend on; `digest` is the raw file's."""
        inputs = {
            "source": file.path.name,
            "source_sha256": digest,
            "tokenizer": self.tokenizer,
            "max_seq_length": self.max_seq_length,
            "max_rows": self.max_rows,
            "task": file.task,
            "skip_bad_rows": self.skip_bad_rows,
        }
        if file.instruction:  # only then, so that stores of earlier versions still count as done
            inputs["instruction"] = file.instruction
        return inputs


@dataclass(frozen=True)
class Job:
    """One raw file to tokenise: where it goes, and everything that the bytes of its store depend on."""

    path: Path
    folder: Path
    inputs: dict
    survey: Survey | None  # None when the store is done already
    rows: range | None = None  # None for all rows of the file; else `folder` will be a part of its store


def plan(files: list[RawFile], order: Order) -> tuple[list[Job], list[str]]:
    """What to do for each raw file, and every problem. Reads the files (for a part, its own alone), writes nothing."""
    shares = [None] * len(files)
    if order.part:
        shares = parts.deal(sizes_to_deal(files, order), order.part)
        files = [file for file, share in zip(files, shares, strict=True) if share is not None]
        shares = [share for share in shares if share is not None]
    jobs = []
    problems = []
    for file, share in zip(tqdm(files, desc="checking", unit="file", disable=None), shares, strict=True):
        job, job_problems = plan_job(file, share, order)
        if job is not None:
            jobs.append(job)
        problems += job_problems
    return jobs, problems


def plan_joins(files: list[RawFile], order: Order, count: int) -> tuple[list[Join], list[str]]:
    """How the store of each raw file is joined from its `count` parts, and every problem with that."""
    joins = []
    problems = []
    for file, holders in zip(files, parts.holders(sizes_to_deal(files, order), count), strict=True):
        expected = order.inputs(file, digest=None)
        join, join_problems = plan_join(order.output_dir, holders, count, file.name, expected, order.overwrite)
        joins.append(join)
        problems += join_problems
    return joins, problems


def sizes_to_deal(files: list[RawFile], order: Order) -> list[int]:
    """The bytes that each file counts as when files are dealt to parts."""
    return [parts.size_to_deal(file.path, order.max_rows) for file in files]


def plan_job(file: RawFile, share: Share | None, order: Order) -> tuple[Job | None, list[str]]:
    """The job of one raw file, and every problem with it; no job where none of its rows falls to this part.

    Args:
        share: of the file, that falls to this part; None for the whole file.
    """
    path = file.path
    try:
        raw_formats.check_file(path)
    except RawError as error:
        return None, [f"{path}: {error}"]
    folder = order.output_dir / file.name
    inputs = order.inputs(file, file_digest(path))
    done, problems = is_done(folder, inputs, order.overwrite)
    if done or problems:
        return Job(path, folder, inputs, survey=None), problems
    if share is None:
        survey, problems = check_rows(file, order, None)
        return Job(path, folder, inputs, survey), problems
    count = raw_formats.rows_of_schema(path)
    survey, problems = check_rows(file, order, None if count is None else share.rows(count))
    rows = share.rows(survey.rows)
    if not len(rows):
        return None, problems
    folder = order.part.folder(order.output_dir) / file.name
    inputs |= {"part": str(order.part), "rows": [rows.start, rows.stop], "rows_of_file": survey.rows}
    done, part_problems = is_done(folder, inputs, order.overwrite)
    return Job(path, folder, inputs, None if done else survey, rows), problems + part_problems


def check_rows(file: RawFile, order: Order, rows: range | None) -> tuple[Survey, list[str]]:
    """What is in a raw file, and what is wrong with it.

    Args:
        rows: those to be looked at, of a Parquet file; None for all.
    """
    path = file.path
    survey = raw_files.survey(path, file.task, rows)
    problems = list(survey.problems)
    if not order.skip_bad_rows:
        for line in survey.describe_bad_rows(path):
            problems.append(f"{line}: mend the file, or leave such rows out with --skip_bad_rows true")
    elif rows is None and not survey.good and not survey.problems:
        problems.append(f"{path}: no good row would be left")
    return survey, problems
