"""Print the page of all keys of run.py, in markdown.

python -m tools.configuration_page > docs/configuration.md
"""

import sys
from dataclasses import Field, fields
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from arguments import GROUPS, Args, show_default
from configuration.dataset_settings import Settings
from configuration.flag_parser import FlagParser

INTRODUCTION = """\
# Configuration

Every key of `run.py`, in the groups of `python run.py --help`.

A key stands in the JSON file that `--config` names, or on the command line as `--key value`, which wins:

```sh
python run.py --config configs/config.json --learning_rate 2e-5 --use_mrl true
```

Keys that are *required* have no default. Defaults are written as in JSON. Before anything is started, all keys are
checked, and every problem is named at once. `args.json` in a run's folder holds the value of each key, and can be given
to `--config` again.

This page is made by `python -m tools.configuration_page > docs/configuration.md`."""

SETTINGS = """\
What may stand in an entry of `dataset_settings.json` ([data](data.md#settings-of-single-datasets)); null, or no such
setting, leaves it to the keys above and to the dataset's task."""


def main(argv: list[str]) -> int:
    """Print the page. Returns the exit status, 0."""
    parser = FlagParser(__doc__, prog="python -m tools.configuration_page")
    parser.parse_args(argv)
    print(page())
    return 0


def page() -> str:
    """The introduction, and a table of keys for each group, without a newline at the end."""
    parts = [INTRODUCTION]
    for group in GROUPS:
        keys = [key for key in fields(Args) if key.metadata["group"] == group]
        parts += [f"## {group}", _table(keys)]
    parts += ["## Settings of single datasets", SETTINGS, _table(list(fields(Settings)))]
    return "\n\n".join(parts)


def _table(keys: list[Field]) -> str:
    lines = ["| key | default | unit | effect |", "|---|---|---|---|"]
    lines += [_row(key) for key in keys]
    return "\n".join(lines)


def _row(key: Field) -> str:
    effect = key.metadata["effect"]
    if key.metadata["choices"]:
        choices = ", ".join(f"`{choice}`" for choice in key.metadata["choices"])
        effect = f"{effect} ({choices})"
    return f"| `{key.name}` | {show_default(key)} | {key.metadata['unit']} | {effect} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
