"""Look at training data before it is trained on: counts, lengths, doubtful tuples, overlap with an evaluation set.

    python -m tools.inspect_data training_data
    python -m tools.inspect_data training_data/data_tokenized_qwen --page inspection.md \\
        --config configs/config.json --tokens_per_second 100000
    python -m tools.inspect_data training_data --evaluation beir/scifact --limit duplicate_queries=0.2

PATH is a folder of raw tuples, of token stores, or of what the published scripts tokenised; or one of these.
Exit status: 0; 1 a rule is broken; 2 refused input, and nothing was written; 130 Ctrl-C.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

import arguments
from configuration import dataset_settings
from configuration.flag_parser import FlagParser
from configuration.keys import did_you_mean
from data.declarations import declared_tasks
from data.raw_rows import RawError
from data.store_report import write_lines
from data.token_store import StoreError
from training.recipes import recipes_for
from tuples.inspection.evaluation import Evaluation, read_evaluation
from tuples.inspection.look import USUAL_TASK, Inspection, Options, Source, find, inspect, together
from tuples.inspection.page import Report, as_json, page_lines, screen_lines
from tuples.inspection.picture import draw
from tuples.inspection.rules import NAMES, RULES, read_limits
from tuples.inspection.training import Course, Forecast, Use, forecast
from utils import RunError, plural, write_json

SOUND, BROKEN, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit status
USED_KEYS = (  # of a configuration
    "train_batch_size",
    "max_seq_length",
    "num_hard_neg",
    "num_hard_neg_clustering",
    "train_epochs",
    "train_steps",
    "seed",
    "dataset_settings",
)


def main(argv: list[str]) -> int:
    """Inspect. Returns the exit status."""
    flags = parse(argv)
    try:
        return check_and_inspect(flags)
    except RunError as error:
        problems = str(error).splitlines()
        print(f"inspect_data: {plural(len(problems), 'problem')}, nothing was written", file=sys.stderr)
        print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("inspect_data: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    rules = "\n".join(f"  {rule.name:22} {rule.limit:<5g} {rule.counts}" for rule in RULES)
    parser = FlagParser(
        __doc__,
        prog="python -m tools.inspect_data",
        epilog=f"rules, and the share above which each is broken:\n{rules}",
    )
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="a folder of raw files or of tokenised data, a file, or a token store")
    add("--page", type=Path, help="write a page of Markdown here, with its JSON and a picture beside it")
    add("--json", type=Path, help="write the JSON here (default: beside the page, if one is written)")
    add("--tokenizer_path", help="folder or hub id; measures raw texts in tokens, and reads the texts of token stores")
    add("--tokenizer_revision", help="commit, tag or branch of a hub id (default: its main branch)")
    add("--evaluation", type=Path, help="raw tuples or a BEIR folder, whose texts must not be in the data")
    add("--config", type=Path, help="a training configuration; says how many steps, epochs and tokens it will take")
    add("--processes", type=int, default=1, help="processes that will train (default %(default)s)")
    add("--tokens_per_second", type=float, help="speed of all processes together; with --config, says how many hours")
    add("--limit", nargs="+", action="extend", default=[], metavar="NAME=SHARE", help="change the limits of rules")
    add(
        "--task",
        action="append",
        default=[],
        metavar="[NAME=]TASK",
        help="retrieval, clustering or classification, of all raw files or of the one called NAME; may be repeated",
    )
    add("--workers", type=int, default=0, help="threads that look at texts; 0 = all cores (default)")
    add("--cache_dir", type=Path, help="keep converted files of the published scripts here (default: nowhere)")
    return parser.parse_args(argv)


def check_and_inspect(flags: argparse.Namespace) -> int:
    """Check the flags, look at every dataset, write and print what was found. Returns the exit status.

    Raises:
        RunError: flags or data cannot be used; a line for each reason.
    """
    limits, limit_problems = read_limits(flags.limit)
    problems = [f"--limit {word}: {why}{did_you_mean(word.partition('=')[0], NAMES)}" for word, why in limit_problems]
    tasks, task_problems = declared_tasks(flags.task)
    sources, source_problems = find(flags.path, tasks)
    course, course_problems = read_course(flags, sources)
    problems += task_problems + source_problems + course_problems + number_problems(flags) + output_problems(flags)
    tokenizer, tokenizer_problems = read_tokenizer(flags, sources)
    evaluation, evaluation_problems = read_evaluation_set(flags)
    problems += tokenizer_problems + evaluation_problems
    refuse(problems)
    if flags.cache_dir:
        flags.cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="inspect_data.") as thrown_away:
        options = Options(
            flags.tokenizer_path,
            tokenizer,
            evaluation,
            course,
            limits,
            flags.workers or os.cpu_count() or 1,
            flags.cache_dir or Path(thrown_away),
        )
        inspections = inspect_all(sources, options)
    expected = expected_of(inspections, course)
    all_limits = {rule.name: rule.limit for rule in RULES} | limits
    report = Report(inspections, together(inspections, flags.path), all_limits, evaluation, expected)
    write(report, flags)
    print("\n".join(screen_lines(report)))
    return BROKEN if report.broken else SOUND


def read_tokenizer(flags: argparse.Namespace, sources: list[Source]) -> tuple[object | None, list[str]]:
    """The tokenizer that was asked for, if any; and why it cannot be loaded, or why one is needed."""
    if flags.tokenizer_path:
        from modeling.tokenizer import load_tokenizer  # here, because it needs transformers: seconds

        tokenizer, problems = load_tokenizer(flags.tokenizer_path, flags.tokenizer_revision)
        return tokenizer, [f"--tokenizer_path {problem}" for problem in problems]
    if flags.evaluation and any(source.tokenised for source in sources):
        return None, ["--evaluation: token stores hold no texts to compare: give --tokenizer_path as well"]
    return None, []


def read_evaluation_set(flags: argparse.Namespace) -> tuple[Evaluation | None, list[str]]:
    """The texts that training must not have seen, if any are named; and why they cannot be read."""
    if not flags.evaluation:
        return None, []
    try:
        return read_evaluation(flags.evaluation), []
    except (RawError, OSError) as error:
        return None, [f"--evaluation {line}" for line in str(error).splitlines()]


def expected_of(inspections: list[Inspection], course: Course | None) -> Forecast | None:
    """Steps, tokens and time of the training that --config describes."""
    if course is None:
        return None
    tuples = {inspection.name: inspection.tuples for inspection in inspections}
    tokens = {inspection.name: inspection.tokens for inspection in inspections}
    return forecast(tuples, tokens, course)


def refuse(problems: list[str]) -> None:
    """Raise RunError if there are problems."""
    if problems:
        raise RunError("\n".join(problems))


def inspect_all(sources: list[Source], options: Options) -> list[Inspection]:
    """Every dataset, in order. Raises RunError with the problems of all that cannot be used."""
    inspections = []
    problems = []
    for source in tqdm(sources, desc="inspecting", unit="dataset", disable=None):
        try:
            inspections.append(inspect(source, options))
        except (RawError, StoreError) as error:
            for line in str(error).splitlines():
                is_named = str(source.path) in line or line.startswith("--")
                problems.append(line if is_named else f"{source.path}: {line}")
    refuse(problems)
    return inspections


@dataclass(frozen=True)
class Described:
    """What `recipes_for` reads of a dataset."""

    name: str
    task: str
    meta: dict[str, int]


def read_course(flags: argparse.Namespace, sources: list[Source]) -> tuple[Course | None, list[str]]:
    """What --config says about steps and tokens, and what is wrong with that; of other keys nothing is said."""
    if flags.config is None:
        if flags.tokens_per_second is not None:
            return None, ["--tokens_per_second: needs --config, the run to compute the hours of"]
        return None, []
    args, problems, unknown = arguments.parse(["--config", str(flags.config)])
    if unknown >= set(USED_KEYS):  # the file cannot be read
        return None, [problem for problem in problems if ": missing; " not in problem]
    problems = [problem for problem in problems if problem.partition(":")[0] in USED_KEYS]
    is_whole = flags.path.is_dir() and not (flags.path / "meta.json").exists()
    folder = flags.path if is_whole else flags.path.absolute().parent
    settings, settings_problems = dataset_settings.read(dataset_settings.find(folder, args.dataset_settings))
    if is_whole:  # of one file or store, the others are not known
        settings_problems += dataset_settings.unknown_names(settings, [source.name for source in sources])
    datasets = [Described(source.name, source.task or USUAL_TASK, {"negatives": sys.maxsize}) for source in sources]
    uses = {}
    for recipe in recipes_for(args, datasets, settings):
        uses[recipe.name] = Use(recipe.negatives, recipe.max_length, recipe.sampling_weight)
    course = Course(
        global_batch=args.train_batch_size * flags.processes,
        uses=uses,
        epochs=args.train_epochs,
        steps=args.train_steps,
        seed=args.seed,
        tokens_per_second=flags.tokens_per_second,
    )
    return course, problems + settings_problems


def number_problems(flags: argparse.Namespace) -> list[str]:
    """Numbers that are too small."""
    problems = []
    if flags.processes < 1:
        problems.append(f"--processes must be at least 1, not {flags.processes}")
    if flags.workers < 0:
        problems.append(f"--workers must be at least 0, not {flags.workers}")
    if flags.tokens_per_second is not None and not flags.tokens_per_second > 0:
        problems.append(f"--tokens_per_second must be above 0, not {flags.tokens_per_second:g}")
    return problems


def output_problems(flags: argparse.Namespace) -> list[str]:
    """Files that cannot be written."""
    problems = []
    for name, path in (("page", flags.page), ("json", flags.json)):
        if path is None:
            continue
        if path.is_dir():
            problems.append(f"--{name} {path}: is a folder: give the name of a file")
        elif not path.absolute().parent.is_dir():
            problems.append(f"--{name} {path}: there is no folder {path.parent}")
    if flags.page is not None and flags.page.suffix.lower() != ".md":
        problems.append(f"--page {flags.page}: must end in .md")
    return problems


def write(report: Report, flags: argparse.Namespace) -> None:
    """Write the picture, the JSON and the page, as far as they were asked for."""
    json_path = flags.json
    if flags.page is not None and json_path is None:
        json_path = flags.page.with_suffix(".json")
    if json_path is not None:
        write_json(json_path, as_json(report))
    if flags.page is None:
        return
    picture = flags.page.with_suffix(".png")
    name = picture.name
    if not draw(report.total, picture):
        name = None
        print("inspect_data: no picture without matplotlib: pip install matplotlib", file=sys.stderr)
    json_name = os.path.relpath(json_path, flags.page.absolute().parent)
    write_lines(flags.page, page_lines(report, json_name, name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
