"""Quality for the same compute: this project beside Sentence Transformers, same tuples, same seconds, same threads.

    python -m benchmarks.quality --data code --trial                first: each system's learning rate, by short trials
    python -m benchmarks.quality --data code --minutes 6 --seeds 0 1 2                 then: the rows that are compared
    python -m benchmarks.quality --data code --row here:0           one of them: two can run side by side on two cores
    python -m benchmarks.quality --data code --show                 the table and the plot of what was measured so far

`--data packages` takes Debian's package descriptions (benchmarks/packages.py) in place of Python functions. Rows stand
in benchmarks/measured/quality_DATA.jsonl; what stands there is not measured again, so any command can be interrupted
and repeated; of two commands that want the same row, one waits for the other. Rows of another machine or of other
versions are rows of their own. Data, backbone and model folders go below --folder; a row removes its model folders.

    here            run.py, one process
    st_in_batch     SentenceTransformerTrainer with MultipleNegativesRankingLoss
    st_cached       the same with CachedMultipleNegativesRankingLoss, 32 texts at once

Equal are: the backbone and the tuples as texts, instruction included; maximal length, batch, temperature 0.05, pooling
by the last token, which is EOS; bf16 autocast over fp32 weights (fp32 alone where the processor has no instructions for
bf16) without gradient checkpointing; AdamW (0.9, 0.98) with weight decay on all weights; clipping; warm-up over a tenth
of the steps, then a cosine to 0, both from a rate of 0; and the seconds of training. A short calibration says how many
steps a system makes in them, so that each schedule ends with the time; what was really used is measured and printed.
Loading, saving and evaluation count on no side.

What still differs, besides what is compared: each shuffles the tuples in its own way. run.py holds out 1 % of them for
validation. run.py reads texts that were tokenised before, Sentence Transformers tokenises each batch during the
training; and run.py prepares the next batch in a second thread. With --negatives, Sentence Transformers sets all
negatives of the batch against each query, run.py each query's own.

The curve is of one schedule: at 25, 50 and 75 % of the time the learning rate is still high, so "seconds until" is more
than a run would need that was planned for this end.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from benchmarks import packages, quality_report, search_task
from benchmarks.measured_rows import RowFile, conditions_here, row_lock, short_digest
from benchmarks.pairs import Pair
from benchmarks.search_task import Variant, backbone, backbone_folder
from benchmarks.training_commands import Trained, Training, train_by_sentence_transformers, train_here
from utils import RunError, plural, remove

SYSTEMS = ("here", "st_in_batch", "st_cached")
YARDSTICKS = ("BM25", "all-MiniLM-L6-v2", "untrained")
MEASURED = Path(__file__).parent / "measured"
TRIAL_SEED = 100  # none of the compared rows has it
CALIBRATION_STEPS = 8  # the first two are left out
POINTS = 4  # of a curve


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, and show it. Returns the exit status: 0, or 2 for what a person must change."""
    flags = parse(argv)
    rows = RowFile(flags.rows or MEASURED / f"quality_{flags.data}.jsonl")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(flags.threads)
    try:
        if not flags.show:
            measure(flags, rows)
        print("\n".join(quality_report.lines(flags.data, rows)))
        quality_report.draw(flags.data, rows, rows.path.with_suffix(".png"))
    except RunError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_common_flags(parser, pairs=20000)
    add("--rows", type=Path, help="file of rows (default benchmarks/measured/quality_DATA.jsonl)")
    add("--show", action="store_true", help="measure nothing")
    add("--trial", action="store_true", help="measure learning rates, not the rows that are compared")
    add("--row", metavar="SYSTEM:SEED", help="measure this row alone")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--minutes", type=float, default=6.0, help="of training (default %(default)s)")
    add("--trial_minutes", type=float, default=3.0, help="the same of a trial (default %(default)s)")
    add("--learning_rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3, 2e-3], help="those that are tried")
    add("--learning_rate", nargs="+", default=[], metavar="SYSTEM=RATE", help="take it in place of the best trial's")
    add("--negatives", type=int, default=0, help="hard negatives of each tuple, mined by BM25 (default 0)")
    flags = parser.parse_args(argv)
    flags.fixed_rates = {}
    for word in flags.learning_rate:
        system, _, rate = word.partition("=")
        if system not in SYSTEMS or not is_number(rate):
            parser.error(f"--learning_rate {word}: give SYSTEM=RATE, with one of {', '.join(SYSTEMS)}")
        flags.fixed_rates[system] = float(rate)
    if flags.row:
        system, _, seed = flags.row.partition(":")
        if system not in SYSTEMS or not seed.isdigit():
            parser.error(f"--row {flags.row}: give SYSTEM:SEED, with one of {', '.join(SYSTEMS)}")
        flags.systems = [system]
        flags.seeds = [int(seed)]
    return flags


def add_common_flags(parser: argparse.ArgumentParser, pairs: int) -> None:
    """What both benchmarks of quality are told about data, backbone and sizes.

    Args:
        pairs: how many are trained on by default.
    """
    add = parser.add_argument
    add("--data", choices=search_task.NAMES, default="code", help="default %(default)s")
    add("--folder", type=Path, default=Path("quality"), help="for data, backbone and models (default %(default)s)")
    add("--lists", type=Path, default=packages.LISTS, help="apt's lists, for --data packages (default %(default)s)")
    add("--model", type=Path, help="folder of another backbone than the first layers of SmolLM2")
    add("--layers", type=int, default=6, help="of SmolLM2's 30, from the first on (default %(default)s)")
    add("--pairs", type=int, default=pairs, help="to train on, drawn at random (default %(default)s)")
    add("--evaluated", type=int, default=1000, help="held-out pairs to be measured by (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--batch", type=int, default=64, help="tuples of a step (default %(default)s)")
    add("--max_seq_length", type=int, default=64, help="tokens of a text (default %(default)s)")
    add("--threads", type=int, default=1, help="of computing (default %(default)s)")


def is_number(word: str) -> bool:
    """Whether a word is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------------------- measuring


def measure(flags: argparse.Namespace, rows: RowFile) -> None:
    """Measure every row that the flags ask for and the file does not hold.

    Raises:
        RunError: data or backbone cannot be had, a learning rate is not known, or a training failed.
    """
    if not flags.trial:
        check_rates_are_known(flags, rows)
    bench = Bench(flags, rows)
    if flags.trial:
        for system in flags.systems:
            for rate in flags.learning_rates:
                bench.measure_trial(system, rate)
        return
    for system in flags.systems:
        bench.learning_rate(system)  # refuses before the first training
    if not flags.row:
        bench.measure_yardsticks()
    for seed in flags.seeds:
        for system in flags.systems:
            bench.measure_final(system, seed)


def check_rates_are_known(flags: argparse.Namespace, rows: RowFile) -> None:
    """Refuse before anything is loaded where a system was neither tried nor given a learning rate.

    Raises:
        RunError: with what to do.
    """
    for system in flags.systems:
        if system not in flags.fixed_rates and not rows.rows(kind="trial", data=flags.data, system=system):
            remedy = f"run --trial first, or give --learning_rate {system}=RATE"
            raise RunError(f"{system}: no learning rate is known; {remedy}")


class Bench:
    """Data and backbone of a benchmark, and the rows it fills."""

    def __init__(self, flags: argparse.Namespace, rows: RowFile):
        self.flags = flags
        self.rows = rows
        self.task = search_task.prepare(flags.data, flags.folder, flags.pairs, flags.lists)
        self.model = backbone(flags)
        mining = "bm25" if flags.negatives else "none"
        self.variant = Variant(mining, flags.negatives)
        conditions = conditions_here(self.task.digest, self.model)
        self.settings = settings_of(flags, conditions) | {"negatives": flags.negatives}
        self.bf16 = conditions["precision"] == "bf16"

    def measure_yardsticks(self) -> None:
        """BM25, all-MiniLM-L6-v2 where its package is installed, and the backbone before training."""
        for system in YARDSTICKS:
            row = self.identity("yardstick", system, 0, self.settings)
            if self.rows.find(row) is None:
                try:
                    self.rows.append(row | {"scores": self.evaluate_yardstick(system)})
                except RunError as error:
                    print(f"{system} is left out: {error}", file=sys.stderr)

    def evaluate_yardstick(self, system: str) -> dict:
        """The scores of what needs no training."""
        pairs = self.task.evaluated(self.flags.evaluated)
        if system == "BM25":
            return search_task.evaluate_bm25(pairs)
        if system == "all-MiniLM-L6-v2":
            return search_task.evaluate_minilm(pairs, self.task.minilm)
        return self.evaluate(self.model, pairs)

    def evaluate(self, folder: Path, pairs: list[Pair]) -> dict:
        """The scores of a model folder."""
        return search_task.evaluate(folder, pairs, self.task.instruction, self.flags.max_seq_length, self.bf16)

    def measure_trial(self, system: str, rate: float) -> None:
        """One learning rate of a system, by the pairs of trials."""
        settings = self.settings | {"minutes": self.flags.trial_minutes, "learning_rate": rate}
        self.measure_row(self.identity("trial", system, TRIAL_SEED, settings), saves=1)

    def measure_final(self, system: str, seed: int) -> None:
        """One row that is compared."""
        settings = self.settings | {"minutes": self.flags.minutes, "learning_rate": self.learning_rate(system)}
        self.measure_row(self.identity("final", system, seed, settings), saves=POINTS)

    def measure_row(self, row: dict, saves: int) -> None:
        """Measure the row; nothing if it is already there, or when another command has measured it meanwhile."""
        with row_lock(self.folder_of(row)):
            if self.rows.find(row) is None:
                self.train_and_evaluate(row, saves)

    def train_and_evaluate(self, row: dict, saves: int) -> None:
        """Train for the row's minutes, evaluate each saved model, add the row."""
        settings = row["settings"]
        seconds_per_step = self.seconds_per_step(row["system"], settings["learning_rate"])
        steps = saves * max(1, round(60 * settings["minutes"] / seconds_per_step / saves))
        training = self.training(row, steps, saves)
        name = f"{row['kind']} {row['system']} seed {row['seed']}"
        say(f"{name}, learning rate {settings['learning_rate']:g}: {plural(steps, 'step')}")
        trained = self.train(row["system"], training)
        pairs = self.task.evaluated(self.flags.evaluated, for_trials=row["kind"] == "trial")
        curve = []
        for step, folder in trained.folders.items():
            if step % training.steps_per_save == 0:  # the others are of epochs that ended in between
                curve.append({"step": step, "seconds": trained.seconds[step - 1]} | self.evaluate(folder, pairs))
        remove(Path(training.folder))
        measured = {"steps": steps, "seconds_per_step": trained.seconds_per_step(), "curve": curve}
        self.rows.append(row | measured)
        say(f"    nDCG@10 {curve[-1]['nDCG@10']:.3f} after {curve[-1]['seconds']:.0f} s of training")

    def learning_rate(self, system: str) -> float:
        """The one given, or the best of the trials.

        Raises:
            RunError: a rate of --learning_rates was not tried with these settings.
        """
        if system in self.flags.fixed_rates:
            return self.flags.fixed_rates[system]
        best = None
        for rate in sorted(self.flags.learning_rates):
            settings = self.settings | {"minutes": self.flags.trial_minutes, "learning_rate": rate}
            row = self.rows.find(self.identity("trial", system, TRIAL_SEED, settings))
            if row is None:
                raise RunError(f"{system}: learning rate {rate:g} was not tried with these settings; run --trial first")
            quality = row["curve"][-1]["nDCG@10"]
            if best is None or quality > best[0]:  # of equal ones the lower rate stays
                best = (quality, rate)
        return best[1]

    def seconds_per_step(self, system: str, learning_rate: float) -> float:
        """Of the system's newest row with these settings, or else of a short training at this learning rate."""
        row = self.identity("calibration", system, TRIAL_SEED, self.settings)
        with row_lock(self.folder_of(row)):  # a command that waited here finds the other's calibration
            known = self.known_seconds_per_step(system)
            if known is None:
                known = self.calibrate(row, learning_rate)
        return known

    def known_seconds_per_step(self, system: str) -> float | None:
        """Of the system's newest row with these settings, or None if there is none."""
        known = None
        for row in self.rows.rows(data=self.flags.data, system=system):
            if "seconds_per_step" in row and self.settings.items() <= row["settings"].items():
                known = row["seconds_per_step"]
        return known

    def calibrate(self, row: dict, learning_rate: float) -> float:
        """Seconds per step of a short training, which becomes a row."""
        training = replace(self.training(row, CALIBRATION_STEPS, saves=1), learning_rate=learning_rate)
        trained = self.train(row["system"], training)
        remove(Path(training.folder))
        self.rows.append(row | {"seconds_per_step": trained.seconds_per_step()})
        say(f"calibration {row['system']}: {trained.seconds_per_step():.2f} s per step")
        return trained.seconds_per_step()

    def training(self, row: dict, steps: int, saves: int) -> Training:
        """What trains a row."""
        flags = self.flags
        stores = search_task.token_stores(self.task, self.variant, self.model, flags.max_seq_length, flags.threads)
        return Training(
            model=str(self.model),
            raw=str(search_task.raw_file(self.task, self.variant)),
            stores=str(stores),
            folder=str(self.folder_of(row)),
            steps=steps,
            batch=flags.batch,
            max_seq_length=flags.max_seq_length,
            negatives=flags.negatives,
            learning_rate=row["settings"].get("learning_rate", 0.0),  # a calibration's row has none
            seed=row["seed"],
            threads=flags.threads,
            bf16=self.bf16,
            saves=saves,
        )

    def folder_of(self, row: dict) -> Path:
        """Where a row is trained, and nothing else: training begins by removing the folder."""
        return self.task.folder / "rows" / f"{row['kind']}-{row['system']}-{row['seed']}-{short_digest(row)}"

    def train(self, system: str, training: Training) -> Trained:
        """Train by a system."""
        if system == "here":
            return train_here(training)
        return train_by_sentence_transformers(training, system)

    def identity(self, kind: str, system: str, seed: int, settings: dict) -> dict:
        """What was measured, without what came out."""
        return {"kind": kind, "data": self.flags.data, "system": system, "seed": seed, "settings": settings}


def settings_of(flags: argparse.Namespace, conditions: dict) -> dict:
    """What all rows of a table share.

    Args:
        conditions: what `conditions_here` found, or those of an earlier row.
    """
    sizes = {
        "model": backbone_folder(flags).name,
        "evaluated": flags.evaluated,
        "batch": flags.batch,
        "max_seq_length": flags.max_seq_length,
        "threads": flags.threads,
    }
    return sizes | conditions


def say(line: str) -> None:
    """Print at once: a row takes minutes."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
