"""Average the weights of model folders, as F2LLM-v2 merges checkpoints.

    python -m tools.merge_checkpoints --inputs run/step_100 run/step_200 run/step_300 --output merged
    python -m tools.merge_checkpoints --inputs A B --weights 3 1 --output merged

The folders must agree in tensors, shapes, configuration and tokenizer. Tokenizer, pooling, prompts and card of the
result are those of the first folder.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configuration.flag_parser import FlagParser
from export.card_update import forget_results
from modeling.merging import merge, merge_problems
from utils import RunError, exit_status


def main(argv: list[str]) -> int:
    """Merge. Returns the exit status: 0; 2 for refused input; 1 if the disk is full or forbids it."""
    parser = FlagParser(__doc__, prog="python -m tools.merge_checkpoints")
    parser.add_argument("--inputs", type=Path, nargs="+", required=True, help="model folders, two or more")
    parser.add_argument("--weights", type=float, nargs="+", help="one each; divided by their sum (default: all equal)")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write; must not exist yet")
    given = parser.parse_args(argv)
    weights = given.weights or [1.0] * len(given.inputs)
    return exit_status(partial(check_and_merge, given.inputs, weights, given.output))


def check_and_merge(inputs: list[Path], weights: list[float], output: Path) -> None:
    """Average folders, and say where the result is. Raises RunError if they do not fit, or it already exists."""
    problems = merge_problems(inputs, weights)
    if output.exists():
        problems.append(f"{output}: already exists")
    if problems:
        raise RunError("\n".join(problems))
    merge(inputs, weights, output)
    forget_results(output)  # they are the first folder's
    print(f"averaged {len(inputs)} folders into {output}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
