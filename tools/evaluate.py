"""Evaluate a model folder on MTEB tasks, by mteb: folders of your own, or the official ones by name.

    python -m tools.evaluate --model output/my_run/epoch_2 --tasks my_tasks --output evaluation
    python -m tools.evaluate --model output/my_run/epoch_2 --benchmark "MTEB(eng, v2)" --output evaluation

The first needs no network: `my_tasks` holds a folder for each task (docs/evaluation.md); a search is in BEIR's layout.
Official tasks are fetched from the hub. mteb writes its own files below OUTPUT/results. The scores go into
OUTPUT/results.json (task -> dimension -> metric) and OUTPUT/table.md, the instructions and versions behind them into
OUTPUT/evaluation.json.

A task that mteb has finished before, with the same model, texts and settings, is not run again.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # run as a file, from any folder: import from the repository, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from runtime import launcher

if __name__ == "__main__":
    launcher.use_expandable_segments()

from configuration.flag_parser import FlagParser
from configuration.flag_types import long_dtype
from configuration.keys import did_you_mean
from export.saved_in import saved_in
from tools.evaluation import folders, results
from utils import (
    RunError,
    exit_status,
    first_line,
    plural,
    read_json,
    read_strictly,
    short_digest,
    unwritable,
    write_json,
    write_text,
)

WAYS = ("auto", "published", "own", "none")
DTYPES = ("float32", "bfloat16", "float16")
PACKAGES = ("mteb", "sentence-transformers", "transformers", "torch", "scikit-learn", "pytrec-eval-terrier")


@dataclass(frozen=True)
class Asked:
    """The command line."""

    model: Path
    tasks: list[str]
    benchmark: str | None
    output: Path
    dims: list[int]
    prompts: str
    prompt_overrides: Path | None
    max_seq_length: int | None
    batch_size: int
    dtype: str
    device: str | None
    card: bool

    @property
    def is_local(self) -> bool:
        """Whether the tasks are folders."""
        return len(self.tasks) == 1 and (Path(self.tasks[0]).is_dir() or os.sep in self.tasks[0])


def main(argv: list[str]) -> int:
    """Check everything, then evaluate.

    Returns:
        The exit status: 0; 2 for refused input; 1 if the disk is full, with what was finished before kept.
    """
    asked = parse(argv)
    if asked.is_local:  # read on import by the packages that would ask the hub
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    return exit_status(partial(evaluate, asked))


def parse(argv: list[str]) -> Asked:
    """The command line."""
    parser = FlagParser(__doc__, prog="python -m tools.evaluate")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a model folder")
    add("--tasks", nargs="+", default=[], help="a folder that holds a folder for each task, or names of mteb's tasks")
    add("--benchmark", help='a benchmark of mteb, such as "MTEB(eng, v2)" or "MTEB(Multilingual, v2)"')
    add("--output", type=Path, required=True, help="folder to write to")
    add(
        "--dims", type=int, nargs="+", default=[], help="dimensions to cut vectors to; all of them are always evaluated"
    )
    add(
        "--prompts",
        choices=WAYS,
        default="auto",
        help="published: F2LLM-v2's instructions; own: the folder's prompts; "
        "auto (default): published for a folder that was trained here, own for others",
    )
    add("--prompt_overrides", type=Path, help="JSON file: task or type of task -> instruction")
    add("--max_seq_length", type=int, help="cut texts to this many tokens, EOS included (default: the folder's)")
    add("--batch_size", type=int, default=32, help="texts embedded at once (default %(default)s)")
    add("--dtype", type=long_dtype, choices=DTYPES, default="float32", help="type of the weights (default %(default)s)")
    add("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    add("--card", action="store_true", help="write the results into the model's card as well")
    given = parser.parse_args(argv)
    if bool(given.tasks) == bool(given.benchmark):
        parser.error("give either --tasks or --benchmark")
    for name, least in (("max_seq_length", 2), ("batch_size", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")
    return Asked(**vars(given))


def evaluate(asked: Asked) -> None:
    """Evaluate every task at every dimension, print the table, write the results.

    Raises:
        RunError: the input is refused, and nothing was written; or a task fails, and results.json is as it was.
        OSError: the disk refuses what is written; each file is the earlier one or the new one.
    """
    overrides, problems = read_overrides(asked.prompt_overrides)
    problems += model_problems(asked)
    if importlib.util.find_spec("mteb") is None:
        problems.append("the package mteb is missing: pip install -r requirements-dev.txt")
        refuse(problems)
    tasks, prompts_of_folders, found = find_tasks(asked)
    problems += found
    problems += override_problems(asked.prompt_overrides, overrides, tasks)
    refuse(problems)

    import transformers

    from export.card_update import add_evaluation
    from tools.evaluation.model import FolderModel, Prompts
    from tools.evaluation.runner import evaluate_all

    transformers.utils.logging.disable_progress_bar()
    way = way_of(asked)
    given = prompts_of_folders | overrides if way == "published" else overrides
    model = FolderModel(
        asked.model,
        Prompts(way, given),
        revision(asked, way, overrides),
        asked.max_seq_length,
        asked.dtype,
        asked.device,
    )
    refuse([f"--dims {dim}: the model's vectors have {model.width}" for dim in asked.dims if dim > model.width])
    for line in model.long_prompts(tasks):
        print(f"warning: {line}", file=sys.stderr)
    dims = sorted({model.width, *asked.dims}, reverse=True)
    asked.output.mkdir(parents=True, exist_ok=True)
    scores = evaluate_all(model, tasks, dims, asked.output, asked.batch_size)
    main_metrics = {task.metadata.name: task.metadata.main_score for task in tasks}
    table = results.table(scores, main_metrics)
    write_json(asked.output / "results.json", scores)
    write_json(asked.output / "evaluation.json", facts(asked, model, way, tasks))
    write_text(asked.output / "table.md", f"{table}\n")
    if asked.card:
        add_evaluation(asked.model, scores)
    print(table)


def refuse(problems: list[str]) -> None:
    """Raises RunError if there is any problem."""
    if problems:
        raise RunError("\n".join([*problems, f"{plural(len(problems), 'problem')}, nothing was evaluated"]))


def model_problems(asked: Asked) -> list[str]:
    """What is wrong with the folders and the dimensions, as far as it shows before a model is loaded."""
    problems = []
    if not asked.model.is_dir():
        problems.append(f"--model {asked.model}: no such folder; give one that training or Sentence Transformers wrote")
    elif not (asked.model / "modules.json").exists():
        problems.append(
            f"--model {asked.model}: no modules.json in it, so its pooling is not known; give a folder that training "
            f"or Sentence Transformers wrote, as {saved_in(asked.model)}"
        )
    width = fact_of(asked.model, "hidden_size")  # None for a folder of another program: known once it is loaded
    for dim in asked.dims:
        if dim < 1 or (width is not None and dim > width):
            problems.append(f"--dims {dim}: must be between 1 and {width or 'the width of the model'}")
    if asked.card and asked.model.is_dir() and not (asked.model / "f2llm.json").exists():
        problems.append(f"--card: {asked.model} was not trained here, and its card is somebody else's")
    reason = unwritable(asked.output)
    if reason:
        problems.append(f"--output {asked.output}: {reason}")
    return problems


def fact_of(model: Path, name: str):
    """What a folder that was trained here says about its model; None of any other folder."""
    try:
        return read_json(model / "f2llm.json")[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def way_of(asked: Asked) -> str:
    """Which instructions: as asked, or by whether the folder was trained here."""
    if asked.prompts != "auto":
        return asked.prompts
    return "published" if (asked.model / "f2llm.json").exists() else "own"


def find_tasks(asked: Asked) -> tuple[list, dict, list[str]]:
    """mteb's tasks; instructions for those that are folders, by task; and everything that is wrong with the tasks."""
    from tools.evaluation.model import published_instructions
    from tools.evaluation.tasks import local_task, missing_data, official_tasks

    if not asked.is_local:
        tasks, problems = official_tasks(asked.tasks, asked.benchmark)
        return tasks, {}, problems or missing_data(tasks)
    local, problems = folders.read_tasks(Path(asked.tasks[0]))
    tasks = []
    prompts = {}
    of_the_model = fact_of(asked.model, "query_instruction")
    for task in local:
        try:
            tasks.append(local_task(task))
        except ValueError as error:
            problems.append(f"{asked.tasks[0]}/{task.name}/task.json: mteb refuses it ({first_line(error)})")
        if task.prompt is not None:
            prompts[task.name] = task.prompt
        elif task.retrieval is not None and of_the_model is not None and task.name not in published_instructions():
            prompts[task.name] = of_the_model  # as in an evaluation during training
    return tasks, prompts, problems


def read_overrides(path: Path | None) -> tuple[dict, list[str]]:
    """Task or type of task -> instruction, of the file that was given, and what makes it unreadable."""
    if path is None:
        return {}, []
    try:
        overrides, problems = read_strictly(path)
    except (OSError, ValueError) as error:
        return {}, [f"--prompt_overrides {path}: cannot be read as JSON ({first_line(error)})"]
    if not isinstance(overrides, dict):
        return {}, [f"--prompt_overrides {path}: must hold an object: task or type of task -> instruction"]
    return overrides, problems


def override_problems(path: Path | None, overrides: dict, tasks: list) -> list[str]:
    """Overrides for tasks that are not evaluated, and overrides that are not instructions."""
    kinds = {kind.mteb_type: kind for kind in folders.KINDS.values()}
    type_of = {task.metadata.name: task.metadata.type for task in tasks}
    type_of |= {kind: kind for kind in type_of.values()}
    problems = []
    for name, prompt in overrides.items():
        if name not in type_of:
            problems.append(f"{path}: {name}: neither a task nor a type of task here{did_you_mean(name, type_of)}")
            continue
        kind = kinds.get(type_of[name], folders.KINDS["retrieval"])
        problems += [f"{path}: {name}: {problem}" for problem in folders.prompt_problems(prompt, kind)]
    return problems


def revision(asked: Asked, way: str, overrides: dict) -> str:
    """What mteb files results under: changes with the model's files and with everything that changes its vectors.

    README.md and f2llm.json do not count, because --card writes the results into them; the instruction in f2llm.json
    does.
    """
    settings = [
        folders.digest(asked.model, without=("README.md", "f2llm.json")),
        fact_of(asked.model, "query_instruction"),
        way,
        overrides,
        asked.max_seq_length,
        asked.dtype,
    ]
    return short_digest(json.dumps(settings, sort_keys=True))


def facts(asked: Asked, model, way: str, tasks: list) -> dict:
    """What evaluation.json says: the model, the instructions and the versions behind the results."""
    of_tasks = {}
    for task in tasks:
        metadata = task.metadata
        of_tasks[metadata.name] = {
            "type": metadata.type,
            "main_metric": metadata.main_score,
            "texts": metadata.revision,
            "prompts": model.prompts_of(metadata),
        }
    return {
        "model": str(asked.model),
        "revision": model.full_meta.revision,
        "prompts": way,
        "max_seq_length": model.max_length,
        "dtype": asked.dtype,
        "dimensions": model.width,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "tasks": of_tasks,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
