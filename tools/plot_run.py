"""Draw what a run did: losses and measures by task, learning rate and gradient norm over the steps, as a PNG.

python -m tools.plot_run output/EXPERIMENT_ID          writes output/EXPERIMENT_ID/training.png

A run draws itself when it ends; this is for one that goes on, or ended otherwise.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.plot import draw


def main(argv: list[str]) -> int:
    """Draw. Returns the exit status: 0, or 2 for refused input."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run; holds a metrics.jsonl")
    given = parser.parse_args(argv)
    try:
        picture = draw(given.run)
    except (OSError, ValueError) as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    if picture is None:
        print("plot_run: needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
