"""What each ingredient of the recipe is worth on a pretrained backbone: one thing is changed at a time.

    python -m benchmarks.ingredients --groups losses negatives --seeds 0 1 2
    python -m benchmarks.ingredients --data packages --groups lora
    python -m benchmarks.ingredients --show                         the tables of what was measured so far

The plain row is the in-batch loss alone on one process: --batch, --steps and --learning_rate are its own, and all
others take them over where they say nothing else (benchmarks/ingredient_rows.py). Rows train for equally many steps;
those called "time of ..." for that row's training time; those of the group batch for equally many tuples. Each is
measured by nDCG@10, MRR@10 and recall@10 on held-out pairs, and by nDCG@10 of the first dimensions alone.

Rows stand in benchmarks/measured/ingredients_DATA.jsonl; what stands there is not measured again, and groups share what
they have in common. `--row GROUP:NUMBER:SEED` measures one row, so that two can run side by side. Two such commands
should not both begin with a row that the file lacks and both need: the plain row, or one that gives another its time.
Before the row "3 by minilm" all pairs are embedded once by all-MiniLM-L6-v2, at some forty texts a second on one core.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
import transformers

from benchmarks import search_task
from benchmarks.ingredient_rows import Row, groups
from benchmarks.measured_rows import RowFile, mean_and_spread
from benchmarks.quality import MEASURED, add_common_flags, backbone, say, settings_of
from benchmarks.search_task import Task
from benchmarks.training_commands import Training, train_here
from utils import RunError, plural, remove

KIND = "ingredient"  # of the rows
METRICS = ("nDCG@10", "MRR@10", "recall@10")
GROUPS = groups()


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, and show it. Returns the exit status: 0, or 2 for what a person must change."""
    flags = parse(argv)
    rows = RowFile(flags.rows or MEASURED / f"ingredients_{flags.data}.jsonl")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(flags.threads)
    try:
        if not flags.show:
            Ingredients(flags, rows).measure_all()
    except RunError as error:
        print(f"ingredients: {error}", file=sys.stderr)
        return 2
    for group in flags.groups:
        print("\n".join(table(flags, rows, group)))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_common_flags(parser, pairs=10000)
    add("--rows", type=Path, help="file of rows (default benchmarks/measured/ingredients_DATA.jsonl)")
    add("--show", action="store_true", help="measure nothing")
    add("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS))
    add("--row", metavar="GROUP:NUMBER:SEED", help="measure this row alone, its number in the table from 1")
    add("--steps", type=int, default=80, help="of a row (default %(default)s)")
    add("--learning_rate", type=float, default=5e-4, help="of all rows that name none (default %(default)s)")
    flags = parser.parse_args(argv)
    flags.only = None
    if flags.row:
        group, _, rest = flags.row.partition(":")
        number, _, seed = rest.partition(":")
        is_row = group in GROUPS and number.isdigit() and 1 <= int(number) <= len(GROUPS[group])
        if not is_row or not seed.isdigit():
            parser.error(f"--row {flags.row}: give GROUP:NUMBER:SEED, with one of {', '.join(GROUPS)}")
        flags.groups = [group]
        flags.seeds = [int(seed)]
        flags.only = GROUPS[group][int(number) - 1].name
    return flags


class Ingredients:
    """Data and backbone of the rows, and the file they stand in."""

    def __init__(self, flags: argparse.Namespace, rows: RowFile):
        self.flags = flags
        self.rows = rows
        self.task: Task = search_task.prepare(flags.data, flags.folder, flags.pairs, flags.lists)
        self.model = backbone(flags)

    def measure_all(self) -> None:
        """Every row of the groups, seed by seed, so that early tables hold all rows."""
        for seed in self.flags.seeds:
            for group in self.flags.groups:
                for row in GROUPS[group]:
                    if self.flags.only in (None, row.name):
                        self.measure(group, row, seed)

    def measure(self, group: str, row: Row, seed: int) -> dict:
        """Train and evaluate a row, unless it stands in the file. Returns it as it stands there."""
        what = identity(self.flags, self.task.digest, row, seed)
        found = self.rows.find(what)
        if found is not None:
            return found
        steps = self.steps(group, row, seed)
        say(f"{group}: {row.name}, seed {seed}: {plural(steps, 'step')}")
        training = self.training(group, row, seed, steps)
        trained = train_here(training, row.changes, row.processes)
        instruction = self.task.instruction if row.variant.instructed else ""
        pairs = self.task.evaluated(self.flags.evaluated)
        scores = search_task.evaluate(trained.folders[steps], pairs, instruction, self.flags.max_seq_length)
        remove(Path(training.folder))
        measured = {
            "steps": steps,
            "seconds": trained.seconds[-1],
            "seconds_per_step": trained.seconds_per_step(),
            "scores": scores,
        }
        self.rows.append(what | measured)
        say(f"    nDCG@10 {scores['nDCG@10']:.3f} after {trained.seconds[-1]:.0f} s of training")
        return what | measured

    def steps(self, group: str, row: Row, seed: int) -> int:
        """How many steps a row trains; where its time is given, two other rows are measured for it first."""
        if row.same_time_as is None:
            return planned_steps(self.flags, row)
        by_name = {other.name: other for other in GROUPS[group]}
        seconds = self.measure(group, by_name[row.same_time_as], seed)["seconds"]
        seconds_per_step = self.measure(group, by_name[row.paced_by], seed)["seconds_per_step"]
        return max(1, round(seconds / seconds_per_step))

    def training(self, group: str, row: Row, seed: int, steps: int) -> Training:
        """What trains a row, before its changes."""
        flags = self.flags
        number = GROUPS[group].index(row)
        stores = search_task.token_stores(self.task, row.variant, self.model, flags.max_seq_length, flags.threads)
        return Training(
            model=str(self.model),
            raw="",
            stores=str(stores),
            folder=str(self.task.folder / "rows" / f"{group}-{number}-{seed}"),
            steps=steps,
            batch=row.batch or flags.batch,
            max_seq_length=flags.max_seq_length,
            negatives=0,
            learning_rate=flags.learning_rate,
            seed=seed,
            threads=flags.threads,
        )


def identity(flags: argparse.Namespace, pairs: str, row: Row, seed: int) -> dict:
    """What a row trains, whatever its name and group: two groups may hold the same.

    Args:
        pairs: the digest of the task's pairs.
    """
    settings = settings_of(flags, pairs) | {
        "steps": planned_steps(flags, row),
        "learning_rate": flags.learning_rate,
        "num_hard_neg": 0,
        "variant": row.variant.name,
        "processes": row.processes,
    }
    if row.batch is not None:
        settings["batch"] = row.batch
    if row.same_time_as is not None:
        settings["steps"] = f"in the time of {row.same_time_as} with {flags.steps}"
    settings |= row.changes
    return {"kind": KIND, "data": flags.data, "system": "here", "seed": seed, "settings": settings}


def planned_steps(flags: argparse.Namespace, row: Row) -> int:
    """The steps of a row whose time is not given: --steps, or as many as make equally many tuples."""
    if row.batch is None:
        return flags.steps
    return max(1, round(flags.steps * flags.batch / row.batch))


# ------------------------------------------------------------------------------------------ tables


def table(flags: argparse.Namespace, rows: RowFile, group: str) -> list[str]:
    """A group's rows with the mean over seeds, and the quality of prefixes where the group is about them."""
    head = "".join(f"{metric:>15}" for metric in METRICS)
    printed = ["", f"# {flags.data}, {group}", f"{'':30}{'seeds':>6}{'steps':>7}{'seconds':>9}{head}"]
    prefix_lines = []
    dims = []
    for row in GROUPS[group]:
        found = of_all_seeds(flags, rows, row)
        if found:
            printed.append(f"{row.name:30}{row_cells(found)}".rstrip())
            prefix_lines.append(f"{row.name:30}{prefix_cells(found)}")
            dims = list(found[0]["scores"]["prefixes"])
    if group == "matryoshka" and dims:
        head = "".join(f"{dim:>8}" for dim in dims)
        printed += [f"{'nDCG@10 of first dimensions':30}{head}", *prefix_lines]
    return printed


def of_all_seeds(flags: argparse.Namespace, rows: RowFile, row: Row) -> list[dict]:
    """What was measured of a row with any seed, on the pairs that were measured last."""
    measured = rows.rows(kind=KIND, data=flags.data)
    if not measured:
        return []
    pairs = measured[-1]["settings"]["pairs"]
    settings = identity(flags, pairs, row, seed=0)["settings"]
    return [candidate for candidate in measured if candidate["settings"] == settings]


def row_cells(found: list[dict]) -> str:
    """Seeds, steps, seconds and the metrics of a row."""
    steps = mean(row["steps"] for row in found)
    seconds = mean(row["seconds"] for row in found)
    metrics = ""
    for metric in METRICS:
        metrics += mean_and_spread([row["scores"][metric] for row in found]).rjust(15)
    return f"{len(found):6}{steps:7.0f}{seconds:9.0f}{metrics}"


def prefix_cells(found: list[dict]) -> str:
    """nDCG@10 by each number of first dimensions."""
    cells = ""
    for dim in found[0]["scores"]["prefixes"]:
        cells += f"{mean(row['scores']['prefixes'][dim] for row in found):8.3f}"
    return cells


if __name__ == "__main__":
    sys.exit(main())
