"""Turn sources of texts into raw tuples, the files that tokenize_data_qwen.py reads.

    python -m tools.build_tuples --source description.json --output_dir raw
    python -m tools.build_tuples --source a.json b.json --output_dir raw --part 2/8     one of eight jobs reads a share
    python -m tools.build_tuples --source a.json b.json --output_dir raw --join 8       what they read becomes tuples

A description says where the texts lie and what they mean (docs/tuples.md). For each NAME.parquet there is a
NAME.build.json, which counts every row that was left out by the rule it broke. The same input gives the same bytes.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configuration.flag_parser import FlagParser
from configuration.flag_types import argument_type, number_of
from data.parts import Part, read_part
from tuples.sources import parts as sources_parts
from tuples.sources.description import Source, read_description
from tuples.sources.reading import Input, Piece, find_inputs, pieces_of
from tuples.sources.report import report_lines, summary
from tuples.sources.rows import Rows
from tuples.sources.writing import TASKS_FILE, prepare, report_path, task_problems, tuples_path, write
from utils import plural, refusal_of_file, remove, unwritable

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit status


@dataclass(frozen=True)
class Plan:
    """What is to be built."""

    sources: list[Source]
    inputs: list[list[Input]]  # of each source
    pieces: list[Piece]  # of all sources, in order
    output: Path


def main(argv: list[str] | None = None) -> int:
    """Check everything, then build.

    Returns:
        the exit status: 0; 1 a file cannot be read or written; 2 refused, and no dataset was written;
        130 interrupted by Ctrl-C.
    """
    flags = parse(argv)
    try:
        return build(flags)
    except OSError as error:
        complain(f"{flags.output_dir}: {refusal_of_file(error)}; the same command continues")
        return FAILED
    except KeyboardInterrupt:
        complain("interrupted; the same command continues")
        return INTERRUPTED


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__, prog="python -m tools.build_tuples")
    add = parser.add_argument
    add("--source", type=Path, nargs="+", action="extend", required=True, metavar="JSON", help="descriptions")
    add("--output_dir", type=Path, required=True, help="folder for the raw tuples; its other files stay")
    add("--overwrite", action="store_true", help="replace files that were not built by this tool, too")
    shares = parser.add_mutually_exclusive_group()
    part = argument_type(read_part)
    shares.add_argument("--part", type=part, metavar="I/N", help="only read the share of job I of N (I from 1)")
    shares.add_argument("--join", type=number_of("jobs"), metavar="N", help="only build, from what N jobs have read")
    return parser.parse_args(argv)


def complain(line: str) -> None:
    """Print a line to standard error, under this tool's name."""
    print(f"build_tuples: {line}", file=sys.stderr)


def refuse(problems: list[str]) -> int:
    """Print all problems; returns the exit status."""
    complain(f"{plural(len(problems), 'problem')}, no tuples were written")
    print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
    return REFUSED


def build(flags: argparse.Namespace) -> int:
    """Build, or print every reason why that is not possible. Returns the exit status."""
    plan, problems = plan_build(flags.source, flags.output_dir, flags.overwrite)
    if problems:
        return refuse(problems)
    if flags.part is not None:
        return read_one_part(plan, flags.part)
    if flags.join is not None:
        missing = sources_parts.missing_parts(plan.pieces, plan.sources, plan.output, flags.join)
        problems = [f"part {part}/{flags.join} is missing: run --part {part}/{flags.join}" for part in missing]
    else:
        problems = sources_parts.read_pieces(plan.pieces, plan.sources, plan.output)
    problems = problems or write_all(plan)
    if not problems or flags.join is None:  # parts that were read by many jobs are worth keeping
        forget_pieces(plan)
    return refuse(problems) if problems else DONE


def read_one_part(plan: Plan, part: Part) -> int:
    """Read and keep the pieces of one part. Returns the exit status."""
    dealt = sources_parts.part_of(plan.pieces, part.of)
    own = [piece for piece, number in zip(plan.pieces, dealt, strict=True) if number == part.number]
    problems = sources_parts.read_pieces(own, plan.sources, plan.output)
    if problems:
        return refuse(problems)
    pieces = plural(len(plan.pieces), "piece")
    print(f"part {part}: {len(own)} of {pieces} read; after all parts: --join {part.of}")
    return DONE


def plan_build(descriptions: list[Path], output: Path, overwrite: bool) -> tuple[Plan, list[str]]:
    """What to read and to write, and every reason why that is not possible. Reads little, writes nothing."""
    problems = []
    if unwritable(output):
        problems.append(f"--output_dir {output}: {unwritable(output)}")
    plan = Plan([], [], [], output)
    for path in descriptions:
        source, found = read_description(path)
        problems += found
        if source is None:
            continue
        inputs, found = find_inputs(source, path.parent)
        problems += [f"{path}: {problem}" for problem in found]
        if not found:
            plan.pieces.extend(pieces_of(inputs, len(plan.sources)))
        plan.sources.append(source)
        plan.inputs.append(inputs)
    counts = Counter(source.name for source in plan.sources)
    problems += [f"name: {plural(counts[name], 'description')} give {name}" for name in counts if counts[name] > 1]
    for name in counts:
        built = tuples_path(output, name)
        if built.exists() and not report_path(output, name).exists() and not overwrite:
            problems.append(f"{built}: was not built by this tool: move it away, or replace it with --overwrite")
    problems += task_problems(output, {source.name: source.task_of_tuples for source in plan.sources})
    return plan, problems


def write_all(plan: Plan) -> list[str]:
    """Write the tuples of all sources, or nothing where one of them has none; returns why, a line for each.

    Each source is opened twice, so that only one at a time is in memory.
    """
    problems = []
    for number, source in enumerate(plan.sources):
        made, report, problem = prepare(source, *rows_of(plan, number))
        if made is None:
            problems.append("; ".join([f"{source.name}: {problem}", *report_lines(report)]))
    if problems:
        return problems
    for number, source in enumerate(plan.sources):
        rows, names = rows_of(plan, number)
        made, report, _ = prepare(source, rows, names)
        described = [{"name": found.name, "bytes": found.size} for found in plan.inputs[number]]
        report = write(source, rows, made, report, described, plan.output)
        print(summary(report, tuples_path(plan.output, source.name)))
        for line in report_lines(report):
            print(f"  {line}")
    print(f"{plural(len(plan.sources), 'task')} in {plan.output / TASKS_FILE}", flush=True)
    return []


def rows_of(plan: Plan, number: int) -> tuple[Rows, list[str]]:
    """What was read of a source, and the names of its inputs."""
    own = [piece for piece in plan.pieces if piece.source == number]
    folders = [sources_parts.folder_of(plan.output, plan.sources[number], piece) for piece in own]
    return Rows(folders), [found.name for found in plan.inputs[number]]


def forget_pieces(plan: Plan) -> None:
    """Remove what was kept while the tuples were made."""
    for source in plan.sources:
        remove(plan.output / sources_parts.PIECES / source.name)
    folder = plan.output / sources_parts.PIECES
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
