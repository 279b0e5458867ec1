"""The page of all keys: docs/configuration.md is what this prints.

python -m tools.configuration_page > docs/configuration.md
"""

import sys
from dataclasses import fields

from arguments import Args, show_default


def markdown_table() -> str:
    """A table of all keys."""
    rows = ["| key | default | unit | effect |", "|---|---|---|---|"]
    for f in fields(Args):
        choices = ", ".join(f"`{choice}`" for choice in f.metadata["choices"] or ())
        effect = f.metadata["effect"] + (f" ({choices})" if choices else "")
        rows.append(f"| `{f.name}` | {show_default(f)} | {f.metadata['unit']} | {effect} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown_table())
    sys.exit(0)
