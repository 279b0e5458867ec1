"""Merge a LoRA adapter folder into a plain model folder, for servers and readers that know no adapters.

    python -m tools.merge_adapter output/EXPERIMENT_ID/step_100 merged

The base model is the one that the adapter names; merging is done, and saved, in fp32. Other types of weights, fewer
dimensions and other formats: python -m tools.export.
"""

import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configuration.flag_parser import FlagParser
from export.adapter import base_problems
from export.convert import keep_quiet, merge_adapter
from export.saved_in import saved_in
from utils import RunError, exit_status


def main(argv: list[str]) -> int:
    """Merge. Returns the exit status: 0; 2 for refused input; 1 if the disk is full or forbids it."""
    parser = FlagParser(__doc__, prog="python -m tools.merge_adapter")
    parser.add_argument("adapter", type=Path, help="an adapter folder that run.py saved")
    parser.add_argument("folder", type=Path, help="the model folder to write; must not exist yet")
    given = parser.parse_args(argv)
    return exit_status(partial(merge, given.adapter, given.folder))


def merge(adapter: Path, folder: Path) -> None:
    """Merge an adapter, and say where it is.

    Raises:
        RunError: it cannot be merged into this folder, or what was written is another model.
    """
    problems = find_problems(adapter, folder)
    if problems:
        raise RunError("\n".join(problems))
    keep_quiet()
    try:
        merge_adapter(adapter, folder)
    except ValueError as error:  # its files are damaged; or read back, the folder is another model
        raise RunError(str(error)) from error
    print(f"merged into {folder}")


def find_problems(adapter: Path, folder: Path) -> list[str]:
    """Why `adapter` cannot be merged into `folder`, one line each. Loads no weights."""
    problems = []
    missing = [name for name in ("adapter_config.json", "f2llm.json") if not (adapter / name).is_file()]
    remedy = f"give a folder that a LoRA run saved, as {saved_in(adapter)}"
    if missing == ["adapter_config.json"] and any(adapter.glob("model*.safetensors")):
        remedy = "it is a whole model, and there is nothing to merge"
    if missing:
        problems.append(f"{adapter}: no {missing[0]} in it; {remedy}")
    else:
        problems += base_problems(adapter)
    if folder.exists():
        problems.append(f"{folder}: already exists")
    return problems


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
