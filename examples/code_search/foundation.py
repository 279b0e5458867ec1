"""The quickstart with more depth and more time: SmolLM2 becomes a code search engine, beside all-MiniLM-L6-v2.

    make foundation                                     or, in an environment with the packages:
    python -m examples.code_search.foundation           fifty minutes on two cores; everything goes into foundation/

Steps and flags are those of quickstart.py.
"""

import sys
from pathlib import Path

from .job import Job
from .quickstart import main

FOUNDATION = Job(
    folder=Path("foundation"),
    config=Path("examples/code_search/foundation.json"),
    layers=8,
    rows=48000,
    others=1000,
    yardsticks=("BM25", "MiniLM"),
)

if __name__ == "__main__":
    sys.exit(main(preset=FOUNDATION))
