"""The main job on real data, in minutes, on a laptop: learn to find Python functions from what their docstrings say.

    make quickstart                                     or, in an environment with the packages:
    python -m examples.code_search.quickstart           all of it; everything goes into the folder quickstart/
    python -m examples.code_search.quickstart --backbone random     without the package that carries SmolLM2

It takes the first layers of SmolLM2-135M and builds raw tuples from the functions on this machine, then runs the same
commands that a user of this repository runs: tokenise, warm up the cache, launch the training. At the end it searches
in functions that training never saw.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from examples.models import smollm2, weights
from training.plot import draw
from utils import RunError

from . import comparison, job
from .job import Job

QUICKSTART = Job(
    folder=Path("quickstart"),
    config=Path("examples/code_search/quickstart.json"),
    layers=5,
    rows=12500,
    others=300,
    yardsticks=("BM25",),
)
RANDOM = replace(QUICKSTART, config=Path("examples/code_search/random.json"), layers=None, rows=48000, others=3000)


def main(argv: list[str] | None = None, preset: Job = QUICKSTART) -> int:
    """Run every step, print what it does and what came out.

    Args:
        preset: what is done where no flag says otherwise.

    Returns:
        The exit status: 0; 2 where something is missing; that of a command that failed.
    """
    chosen, overrides = read_flags(argv, preset)
    return job.exit_status(lambda: do(chosen, overrides))


def read_flags(argv: list[str] | None, preset: Job) -> tuple[Job, list[str]]:
    """The job that the command line asks for, and further words for run.py.

    Args:
        preset: what holds where the command line says nothing; with --backbone random it is RANDOM.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", choices=("smollm2", "random"), default="smollm2", help="what to train (default %(default)s)"
    )
    parser.add_argument("--layers", type=int, help=f"of SmolLM2, from the first on (default {preset.layers})")
    parser.add_argument("--gguf", type=Path, help="a decoder as GGUF in place of SmolLM2")
    parser.add_argument("--rows", type=int, help=f"training tuples for retrieval (default {preset.rows})")
    parser.add_argument("--others", type=int, help=f"of each other task (default {preset.others})")
    parser.add_argument("--one_file_in", type=int, help="read one of so many Python files (default all)")
    flags, overrides = parser.parse_known_args(argv)
    if flags.backbone == "random":
        if preset != QUICKSTART:
            parser.error("--backbone random: its settings are the quickstart's")
        if flags.layers is not None or flags.gguf is not None:
            parser.error("--backbone random: goes without --layers and --gguf")
        preset = RANDOM
    problems = job.override_problems(overrides)
    if problems:
        parser.error("; ".join(problems))
    said = {name: value for name, value in vars(flags).items() if name != "backbone" and value is not None}
    return replace(preset, **said), overrides


def do(chosen: Job, overrides: list[str]) -> None:
    """Build, train, compare, search.

    Raises:
        RunError: a package is missing, or the backbone cannot be made.
        CalledProcessError: a command failed.
    """
    check(chosen)
    job.keep_earlier_folder(chosen.folder)
    library = job.build(chosen)
    job.train(chosen, overrides)
    trained = job.newest_model_folder(chosen.run_folder)
    comparison.show(chosen, library, trained)
    print(f"\nmodel folder: {trained}\nplot of loss and learning rate: {draw(chosen.run_folder)}")
    command = f'{sys.executable} -m examples.code_search.search "{comparison.QUERIES[-1]}" FOLDER'
    print(f"use it: {command} --model {trained}")


def check(chosen: Job) -> None:
    """Refuse at once what would fail after minutes: a missing package, or more layers than the decoder has."""
    if chosen.layers is not None and chosen.gguf is None:
        try:
            weights.locate(weights.SMOLLM2)
        except RunError as error:
            instead = f"{sys.executable} -m examples.code_search.quickstart --backbone random"
            raise RunError(f"{error}\nor train a small random decoder: {instead}") from None
    if chosen.layers is not None:
        smollm2.find_gguf(chosen.gguf, chosen.layers)
    if "MiniLM" in chosen.yardsticks:
        weights.locate(weights.MINILM)


if __name__ == "__main__":
    sys.exit(main())
