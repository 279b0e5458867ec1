"""F2LLM-v2 in small, on real weights: a Matryoshka teacher, students pruned from it, with and without distillation.

    make v2-demo                                        or, in an environment with the packages:
    python -m examples.v2_cascade.cascade               all of it; everything goes into the folder v2_demo/
    python -m examples.v2_cascade.cascade --teacher foundation/output/code_search/step_600

1. The first layers of SmolLM2-135M learn to find Python functions by what their docstrings say, with Matryoshka losses.
2. A student of a quarter of its parameters is pruned from the teacher in depth, width and MLP, and trained with the
   teacher's embeddings, without them, and from random weights, for equally many steps.
3. Depth alone, width alone and both, pruned to the same size: what each has lost before training, and after a little.

Every step leaves its result behind: the same command continues where it was interrupted.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from examples.code_search import job
from examples.code_search.corpus import Function
from examples.models import smollm2

from . import report, steps
from .plan import Cascade, Student
from .report import Measured


def main(argv: list[str] | None = None) -> int:
    """Run every step, print what it does and what came out.

    Returns:
        The exit status: 0; 2 where something is missing; that of a command that failed.
    """
    cascade, overrides = parse(argv)
    return job.exit_status(lambda: run(cascade, overrides))


def parse(argv: list[str] | None) -> tuple[Cascade, list[str]]:
    """The cascade that the command line asks for, and further words for run.py."""
    usual = Cascade()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help=f"for all that is made (default {usual.folder})")
    add("--teacher", type=Path, help="a trained model folder to use as the teacher (default: trains one)")
    add("--layers", type=int, help=f"of SmolLM2 that the teacher has (default {usual.layers})")
    add("--gguf", type=Path, help="a decoder as GGUF in place of SmolLM2")
    add("--teacher_steps", type=int, help=f"default {usual.teacher_steps}")
    add("--student_steps", type=int, help=f"default {usual.student_steps}")
    add("--cut_steps", type=int, help=f"of the three ways to prune (default {usual.cut_steps})")
    add("--seeds", type=int, nargs="+", help="of the students with and without a teacher (default 0 1 2)")
    add("--rows", type=int, help=f"training tuples for retrieval (default {usual.rows})")
    add("--others", type=int, help=f"of each other task (default {usual.others})")
    add("--one_file_in", type=int, help="read one of so many Python files (default all)")
    flags, overrides = parser.parse_known_args(argv)
    problems = job.override_problems(overrides)
    if problems:
        parser.error("; ".join(problems))
    said = {name: value for name, value in vars(flags).items() if value is not None}
    if "seeds" in said:
        said["seeds"] = tuple(said["seeds"])
    return replace(usual, **said), overrides


def run(cascade: Cascade, overrides: list[str]) -> None:
    """Train, measure and show all models.

    Raises:
        RunError: a package is missing, or the backbone cannot be had.
        CalledProcessError: a command failed.
    """
    if cascade.teacher is None:
        smollm2.find_gguf(cascade.gguf, cascade.layers)
    functions = report.sample_of(steps.data(cascade))
    foundation = steps.foundation(cascade)
    teacher = steps.teacher(cascade, overrides)
    job.title(f"a quarter of the teacher, searching in {len(functions):,} functions that training never saw")
    rows = {"foundation, untrained": [report.measure(foundation, functions)]}
    rows["teacher"] = [report.measure(teacher, functions)]
    for student in cascade.students():
        rows[student.name] = train_and_measure(cascade, student, teacher, cascade.student_steps, functions, overrides)
    print("\n".join(report.table(rows)))
    picture = report.draw(rows, cascade.folder / "matryoshka.png")
    if picture is not None:
        print(f"plot: {picture}")
    job.title(f"depth, width or both: before training and after {cascade.cut_steps} steps without a teacher")
    print("\n".join(report.table(cuts(cascade, teacher, functions, overrides))))


def train_and_measure(
    cascade: Cascade, student: Student, teacher: Path, count: int, functions: list[Function], overrides: list[str]
) -> list[Measured]:
    """A student's figures, one for each of its seeds."""
    measured = []
    for seed in cascade.seeds_of(student):
        folder = steps.student(cascade, student, seed, teacher, count, overrides)
        measured.append(report.measure(folder, functions))
    return measured


def cuts(cascade: Cascade, teacher: Path, functions: list[Function], overrides: list[str]) -> dict[str, list[Measured]]:
    """Three ways to prune the teacher to the same size: what is left of it, and what a few steps bring back."""
    rows = {}
    for cut in cascade.cuts():
        pruned = steps.cut(cascade, cut.sizes, teacher)
        rows[f"{cut.name}, before"] = [report.measure(pruned, functions)]
        trained = train_and_measure(cascade, cut, teacher, cascade.cut_steps, functions, overrides)
        rows[f"{cut.name}, after"] = trained
    return rows


if __name__ == "__main__":
    sys.exit(main())
