"""Merge a LoRA adapter folder into a plain model folder, for servers and readers that know no adapters.

    python -m tools.merge_adapter output/EXPERIMENT_ID/step_100 merged/

The base model is the one that the adapter names; merging is done, and saved, in fp32.
"""

import sys
from pathlib import Path

from export import model_folder


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 for refused input."""
    if len(argv) != 2:
        print("usage: python -m tools.merge_adapter ADAPTER_FOLDER NEW_FOLDER", file=sys.stderr)
        return 2
    adapter, folder = map(Path, argv)
    problems = [] if (adapter / "adapter_config.json").is_file() else [f"{adapter}: no adapter_config.json in it"]
    problems += [f"{folder}: exists already"] if folder.exists() else []
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    model_folder.merge_adapter(adapter, folder)
    print(f"merged into {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
