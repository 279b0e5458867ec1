"""What a run has written into its folder: metrics.jsonl, timings.jsonl, args.json, manifest.json, results.json."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from utils import RunError, plural, read_json

_FOLDER = re.compile(r"(step|epoch)_(\d+)")


@dataclass(frozen=True)
class RunLog:
    """One run as its folder tells it; what it does not tell is empty."""

    folder: Path
    name: str
    lines: dict[str, list[dict]]  # kind -> lines of metrics.jsonl, by step
    timings: list[dict] = field(default_factory=list)  # lines of timings.jsonl, by step
    configuration: dict = field(default_factory=dict)  # args.json
    manifest: dict = field(default_factory=dict)
    results: dict[str, dict] = field(default_factory=dict)  # results.json -> task -> dimension -> metric -> value
    notes: list[str] = field(default_factory=list)  # what people should know of how it was read

    @property
    def trained(self) -> list[dict]:
        """The lines about training steps."""
        return self.lines.get("train", [])

    @property
    def last_step(self) -> int:
        """The last step of which anything was logged."""
        return max(lines[-1]["step"] for lines in self.lines.values())

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer updates of an epoch, as the log tells; None if it does not."""
        for line in reversed(self.trained):
            epoch = line.get("epoch")
            if isinstance(epoch, int | float) and epoch > 0:
                return line["step"] / epoch
        return None


def open_runs(folders: list[Path], names: list[str] | None = None) -> list[RunLog]:
    """All runs, in this order, each under a name of its own.

    Args:
        names: one for each folder; None = the folders' names.

    Raises:
        RunError: what is wrong with any of them, a line each.
    """
    problems = _problems_with_names(folders, names)
    runs = []
    for number, folder in enumerate(folders):
        name = names[number] if names and number < len(names) else folder.resolve().name
        try:
            runs.append(open_run(folder, name))
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError("\n".join(problems))
    return runs


def _problems_with_names(folders: list[Path], names: list[str] | None) -> list[str]:
    problems = []
    for folder, count in Counter(folder.resolve() for folder in folders).items():
        if count > 1:
            problems.append(f"{folder}: given {count} times; give each run once")
    if names and len(names) != len(folders):
        problems.append(f"--names: {plural(len(names), 'name')} for {plural(len(folders), 'run')}; give one for each")
        return problems
    if problems:
        return problems
    shown = names or [folder.resolve().name for folder in folders]
    for name, count in Counter(shown).items():
        if count > 1:
            problems.append(f"{plural(count, 'run')} would be called {name}: tell them apart by --names, one for each")
    return problems


def open_run(folder: Path, name: str) -> RunLog:
    """One run.

    Raises:
        RunError: the folder holds no run, or a file that is not as a run writes it.
    """
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give a run's, output_dir/experiment_id")
    if not path.is_file():
        raise RunError(f"{folder}: not a run's folder: it has no metrics.jsonl{_runs_below(folder)}")
    notes = []
    lines = read_lines(path, notes)
    if not lines:
        raise RunError(f"{path}: nothing was logged yet; the first line comes after log_interval steps")
    timings = []
    if (folder / "timings.jsonl").is_file():
        timings = read_lines(folder / "timings.jsonl", notes)
    by_kind: dict[str, list[dict]] = {}
    for line in lines:
        by_kind.setdefault(line["kind"], []).append(line)
    return RunLog(
        folder=folder,
        name=name,
        lines={kind: _by_step(of_kind) for kind, of_kind in by_kind.items()},
        timings=_by_step(timings),
        configuration=_read_object(folder / "args.json", notes),
        manifest=_read_object(folder / "manifest.json", notes),
        results=_read_results(folder, notes),
        notes=notes,
    )


def _runs_below(folder: Path) -> str:
    """Words about runs that lie one folder deeper, where people often point a step too high."""
    below = sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))
    return f"; below it are the runs {', '.join(below)}" if below else ""


def read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The lines of a metrics.jsonl or timings.jsonl.

    A last line without its end comes from a run that is still going or was killed: it is left out, as a resume drops
    it, and `notes` say so.

    Raises:
        RunError: any other line is not a JSON object with a step and a kind; the message names it.
    """
    found = []
    content = path.read_text(encoding="utf-8", errors="replace")
    texts = content.split("\n")
    if texts[-1]:
        notes.append(f"{path.name}: the last line is incomplete and is left out: the run is still going, or was killed")
    for number, text in enumerate(texts[:-1], start=1):
        found.append(_read_line(path, number, text))
    return found


def _read_line(path: Path, number: int, text: str) -> dict:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise RunError(f"{path}, line {number}: not JSON ({error}); the file was damaged or edited") from None
    if not isinstance(line, dict):
        raise RunError(f"{path}, line {number}: not an object with a step and a kind")
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not isinstance(line.get("kind"), str):
        raise RunError(f"{path}, line {number}: not an object with a step and a kind")
    return line


def _by_step(lines: list[dict]) -> list[dict]:
    """In the order of steps; of two lines about one step, the later."""
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def _read_object(path: Path, notes: list[str]) -> dict:
    """A JSON object, or nothing and a note where there is none."""
    try:
        value = read_json(path)
    except OSError:
        notes.append(f"{path.name}: not there")
        return {}
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: must be one object")
    return value


def _read_results(folder: Path, notes: list[str]) -> dict[str, dict]:
    """What tools/evaluate.py has written into the run's folder or a folder in it, by the path of the file."""
    found = {}
    for path in sorted([*folder.glob("results.json"), *folder.glob("*/results.json")]):
        found[str(path.relative_to(folder))] = _read_object(path, notes)
    return found


def last_model(run: RunLog) -> Path | None:
    """The model folder of a run's last step that has one; None if none has."""
    found = {}
    for path in run.folder.glob("*/modules.json"):
        name = _FOLDER.fullmatch(path.parent.name)
        if name:
            steps = int(name[2])
            if name[1] == "epoch":
                steps *= run.steps_per_epoch or 1
            found[path.parent] = steps
    return max(found, key=found.get, default=None)


def started_in(run: RunLog) -> Path:
    """The folder in which the run was started: relative paths of its configuration begin there.

    Where output_dir is relative, the run's own folder ends in it; else, and where the run was moved, this folder.
    """
    tail = Path(str(run.configuration.get("output_dir", "")), str(run.configuration.get("experiment_id", "")))
    folder = run.folder.resolve()
    if not tail.parts or tail.is_absolute() or folder.parts[-len(tail.parts) :] != tail.parts:
        return Path()
    return Path(*folder.parts[: -len(tail.parts)])


def full_width(run: RunLog) -> int | None:
    """Dimensions of the whole embedding, as the run's last model folder or the model it began from says."""
    folders = [last_model(run), started_in(run) / str(run.configuration.get("model_path", ""))]
    for folder in folders:
        if folder is None:
            continue
        try:
            width = read_json(folder / "config.json").get("hidden_size")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(width, int):
            return width
    return None
