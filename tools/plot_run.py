"""Draw what a run did: losses and measures by task, learning rate and gradient norm over the steps, as a PNG.

python -m tools.plot_run output/EXPERIMENT_ID          writes output/EXPERIMENT_ID/training.png

A run draws this picture itself when it finishes; the command is for runs that are still training or were stopped.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configuration.flag_parser import FlagParser
from training.plot import draw
from utils import RunError, exit_status


def main(argv: list[str]) -> int:
    """Draw. Returns the exit status: 0; 2 for refused input; 1 if the disk is full or forbids it."""
    parser = FlagParser(__doc__, prog="python -m tools.plot_run")
    parser.add_argument("run", type=Path, help="the folder of a run; holds a metrics.jsonl")
    return exit_status(partial(plot, parser.parse_args(argv).run))


def plot(run: Path) -> None:
    """Draw a run, and say where the picture is.

    Raises:
        RunError: its log is missing or damaged, or matplotlib is not installed.
    """
    try:
        picture = draw(run)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise RunError(f"plot_run: {error}") from error
    if picture is None:
        raise RunError("plot_run: needs matplotlib: pip install matplotlib")
    print(picture)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
