"""Write the page of a run, or of several beside each other, as one HTML file that loads nothing.

    python -m tools.report output/EXPERIMENT_ID --output report.html
    python -m tools.report output/FIRST output/SECOND --output report.html --names "batch 256" "batch 512"
    python -m tools.report output/EXPERIMENT_ID --output report.html --neighbours 8

Curves of all losses and measures, learning rate, gradient norm, throughput, memory, lengths of the texts, quality by
Matryoshka dimension, configuration and manifest with the differences marked. An unfinished run can be shown as well.
It takes seconds: --neighbours alone loads models.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configuration.flag_parser import FlagParser
from tools.reporting import neighbours
from tools.reporting.page import OPENING, page
from tools.reporting.read import RunLog, open_runs
from tools.reporting.stores import datasets_of
from utils import RunError, exit_status


def main(argv: list[str]) -> int:
    """Write the page. Returns the exit status: 0; 2 for refused input; 1 if the disk is full or forbids it."""
    return exit_status(partial(report, parse(argv)))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(__doc__, prog="python -m tools.report")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, output_dir/experiment_id")
    add("--output", type=Path, required=True, help="the HTML file to write; an earlier report is replaced")
    add("--names", nargs="+", help="what to call the runs, in their order (default: their folders' names)")
    add("--neighbours", type=int, metavar="N", help="ask each run's last model with N sample queries (default: none)")
    add("--texts", type=Path, help="for --neighbours: a file of texts, one a line (default: held-out tuples)")
    return parser.parse_args(argv)


def report(flags: argparse.Namespace) -> None:
    """Read the runs and write their page.

    Raises:
        RunError: flags that cannot be met, or a folder that is not a run's.
    """
    refuse_flags(flags)
    runs = open_runs(flags.runs, flags.names)
    for run in runs:
        for note in run.notes:
            print(f"{run.folder}: {note}", file=sys.stderr)
    sample, answers = None, None
    if flags.neighbours:
        sample = choose_sample(runs, flags)
        answers = neighbours.answer(runs, sample)
    write(flags.output, page(runs, sample, answers))
    print(flags.output)


def refuse_flags(flags: argparse.Namespace) -> None:
    """Raises RunError for flags that cannot be met, all problems at once."""
    problems = []
    if flags.output.is_dir():
        problems.append(f"--output {flags.output}: is a folder; name a file in it")
    elif not flags.output.parent.is_dir():
        problems.append(f"--output {flags.output}: there is no folder {flags.output.parent}")
    elif flags.output.exists() and not is_page(flags.output):
        problems.append(
            f"--output {flags.output}: holds something other than a report; name another file, or delete it"
        )
    if flags.neighbours is not None and flags.neighbours < 1:
        problems.append(f"--neighbours {flags.neighbours}: must be 1 or more; leave it out to ask nothing")
    if flags.texts is not None and flags.neighbours is None:
        problems.append("--texts: is used only with --neighbours N, which loads the models: add it")
    if problems:
        raise RunError("\n".join(problems))


def choose_sample(runs: list[RunLog], flags: argparse.Namespace) -> neighbours.Sample:
    """Queries and what is searched for them. Raises RunError if there are none."""
    if flags.texts is not None:
        return neighbours.sample_of_file(flags.texts, flags.neighbours)
    return neighbours.sample_of_run(runs, datasets_of(runs), flags.neighbours)


def is_page(path: Path) -> bool:
    """Whether a file is a report, told by how every report begins, or empty: it may be replaced."""
    if not path.is_file():  # a device
        return False
    with open(path, "rb") as file:
        found = file.read(len(OPENING))
    return found in (b"", OPENING.encode())


def write(path: Path, text: str) -> None:
    """Replace the file in one step; what was there before stays if the disk refuses the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8", errors="replace")  # JSON may hold half a character
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
