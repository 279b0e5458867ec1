"""What each ingredient of the recipe is worth on a pretrained backbone: one thing is changed at a time.

    python -m benchmarks.ingredients --groups losses negatives --seeds 0 1 2
    python -m benchmarks.ingredients --data packages --groups lora
    python -m benchmarks.ingredients --show                         the tables of what was measured so far

The plain row is the in-batch loss alone on one process: --batch, --steps and --learning_rate are its own, and all
others take them over where they say nothing else (benchmarks/ingredient_rows.py). Rows train for equally many steps;
those called "time of ..." for that row's training time; those of the group batch for equally many tuples. Each is
measured by nDCG@10, MRR@10 and recall@10 on held-out pairs, and by nDCG@10 of the first dimensions alone.

Rows stand in benchmarks/measured/ingredients_DATA.jsonl; what stands there is not measured again, and groups share what
they have in common. `--row GROUP:NUMBER:SEED` measures one row, so that two can run side by side; of two commands that
need the same row, one waits for the other. Rows of another machine or of other versions are rows of their own. Before
the row "3 by minilm" all-MiniLM-L6-v2 mines all pairs, and before "3 by trained", a second round, the model of the
plain row with seed 0, which is trained for it: both by the mining command with the published rules, once.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
import transformers

from benchmarks import search_task
from benchmarks.ingredient_rows import Row, groups
from benchmarks.measured_rows import (
    CONDITIONS,
    RowFile,
    conditions_here,
    conditions_line,
    mean_and_spread,
    row_lock,
    short_digest,
)
from benchmarks.quality import MEASURED, add_common_flags, say, settings_of
from benchmarks.search_task import Task, backbone, backbone_folder
from benchmarks.training_commands import Training, train_here
from examples.models import minilm
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
        if flags.show:
            conditions = newest_conditions(flags, rows)
        else:
            bench = Ingredients(flags, rows)
            bench.measure_all()
            conditions = bench.conditions
    except RunError as error:
        print(f"ingredients: {error}", file=sys.stderr)
        return 2
    if conditions:
        print(conditions_line(conditions))
    for group in flags.groups:
        print("\n".join(table(flags, rows, group, conditions)))
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
    add("--steps", type=int, default=50, help="of a row (default %(default)s)")
    add("--learning_rate", type=float, default=1e-3, help="of all rows that name none (default %(default)s)")
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
        self.conditions = conditions_here(self.task.digest, self.model)

    def measure_all(self) -> None:
        """Every row of the groups, seed by seed, so that early tables hold all rows."""
        for seed in self.flags.seeds:
            for group in self.flags.groups:
                for row in GROUPS[group]:
                    if self.flags.only in (None, row.name):
                        self.measure(group, row, seed)

    def measure(self, group: str, row: Row, seed: int) -> dict:
        """Train and evaluate a row, unless it stands in the file. Returns it as it stands there."""
        what = identity(self.flags, self.conditions, row, seed)
        folder = self.task.folder / "rows" / f"{KIND}-{seed}-{short_digest(what)}"  # of this row and no other
        with row_lock(folder):  # a command that waited here finds the other's row
            found = self.rows.find(what)
            if found is None:
                found = self.train_and_evaluate(group, row, what, folder)
        return found

    def train_and_evaluate(self, group: str, row: Row, what: dict, folder: Path) -> dict:
        """Train a row in a folder, evaluate and add it. Returns it.

        Args:
            what: the row's identity.
        """
        seed = what["seed"]
        steps = self.steps(group, row, seed)
        say(f"{group}: {row.name}, seed {seed}: {plural(steps, 'step')}")
        training = self.training(row, seed, steps, folder, self.miner(row))
        trained = train_here(training, row.changes, row.processes)
        instruction = self.task.instruction if row.variant.instructed else ""
        pairs = self.task.evaluated(self.flags.evaluated)
        max_seq_length = self.flags.max_seq_length
        scores = search_task.evaluate(trained.folders[steps], pairs, instruction, max_seq_length, training.bf16)
        remove(folder)
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

    def miner(self, row: Row) -> Path | None:
        """The model folder that mines a row's negatives, None if no model does."""
        if row.variant.mining == "minilm":
            minilm.unpack(self.task.minilm)
            return self.task.minilm
        if row.variant.mining == "trained":
            return self.first_round()
        return None

    def first_round(self) -> Path:
        """The model of the plain row with seed 0, trained at the first call and kept."""
        plain = GROUPS["negatives"][0]
        what = identity(self.flags, self.conditions, plain, seed=0)
        kept = self.task.folder / f"miner-{short_digest(what)}"
        with row_lock(kept):
            if not kept.exists():
                say(f"the model that mines: {plain.name}, seed 0: {plural(self.flags.steps, 'step')}")
                folder = kept.with_name(f"{kept.name}-training")
                training = self.training(plain, 0, self.flags.steps, folder, miner=None)
                train_here(training, plain.changes).folders[self.flags.steps].rename(kept)
                remove(folder)
        return kept

    def training(self, row: Row, seed: int, steps: int, folder: Path, miner: Path | None) -> Training:
        """What trains a row, before its changes. `miner`: finds the negatives."""
        flags = self.flags
        length = flags.max_seq_length
        stores = search_task.token_stores(self.task, row.variant, self.model, length, flags.threads, miner)
        return Training(
            model=str(self.model),
            raw="",
            stores=str(stores),
            folder=str(folder),
            steps=steps,
            batch=row.batch or flags.batch,
            max_seq_length=flags.max_seq_length,
            negatives=0,
            learning_rate=flags.learning_rate,
            seed=seed,
            threads=flags.threads,
            bf16=self.conditions["precision"] == "bf16",
        )


def identity(flags: argparse.Namespace, conditions: dict, row: Row, seed: int) -> dict:
    """What a row trains, whatever its name and group: two groups may hold the same.

    Args:
        conditions: what `conditions_here` found, or those of an earlier row.
    """
    settings = settings_of(flags, conditions) | {
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


def newest_conditions(flags: argparse.Namespace, rows: RowFile) -> dict[str, str]:
    """The conditions of the row that was measured last with this backbone; none if there is no such row."""
    name = backbone_folder(flags).name
    conditions = {}
    for row in rows.rows(kind=KIND, data=flags.data):
        if row["settings"]["model"] == name:
            conditions = {key: row["settings"][key] for key in CONDITIONS}
    return conditions


def table(flags: argparse.Namespace, rows: RowFile, group: str, conditions: dict) -> list[str]:
    """A group's rows with the mean over seeds, and the quality of prefixes where the group is about them."""
    head = "".join(f"{metric:>15}" for metric in METRICS)
    printed = ["", f"# {flags.data}, {group}", f"{'':30}{'seeds':>6}{'steps':>7}{'seconds':>9}{head}"]
    prefix_lines = []
    dims = []
    for row in GROUPS[group]:
        found = of_all_seeds(flags, rows, row, conditions)
        if found:
            printed.append(f"{row.name:30}{row_cells(found)}".rstrip())
            prefix_lines.append(f"{row.name:30}{prefix_cells(found)}")
            dims = list(found[0]["scores"]["prefixes"])
    if group == "matryoshka" and dims:
        head = "".join(f"{dim:>8}" for dim in dims)
        printed += [f"{'nDCG@10 of first dimensions':30}{head}", *prefix_lines]
    return printed


def of_all_seeds(flags: argparse.Namespace, rows: RowFile, row: Row, conditions: dict) -> list[dict]:
    """What was measured of a row, one for each seed: the newest."""
    settings = identity(flags, conditions, row, seed=0)["settings"]
    by_seed = {}
    for measured in rows.rows(kind=KIND, data=flags.data, settings=settings):
        by_seed[measured["seed"]] = measured
    return list(by_seed.values())


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
