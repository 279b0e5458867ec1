"""TensorBoard, Weights & Biases, trackio and whatever else accelerate knows.

metrics.jsonl has every number, so a tracker that fails during a run is left out with a warning. Only
TensorBoard, which writes files as the run itself does, ends the run.
"""

import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from utils import RunError, first_line, read_json, write_json

PROJECT = "f2llm"  # of Weights & Biases and trackio, where runs of one project are compared


def tracker_problems(names: list[str]) -> list[str]:
    """Why numbers cannot be sent to these trackers, one line each."""
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    problems = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            problems.append(f"report_to: {name!r} is not one of {', '.join(LOGGER_TYPE_TO_CLASS)}, none")
        elif name not in installed:
            problems.append(f"report_to: {name} is not installed: pip install {name}, or take another")
    return problems


def start_trackers(
    accelerator: Accelerator, names: list[str], experiment_id: str, folder: Path, config: dict, steps_done: int
) -> None:
    """Start the trackers that the accelerator was made with; a resumed run continues the curves that it has.

    Args:
        names: of the trackers.
        folder: of the run; Weights & Biases writes there what it does not send at once.
        config: key -> value of the run, for trackers that show them.
        steps_done: by what this run continues from; 0 for a new one.

    Raises:
        RunError: a tracker cannot start; on the main process, which is the only one that has trackers.
    """
    if not names or not accelerator.is_main_process:
        return
    options = {}
    if steps_done and "tensorboard" in names:
        options["tensorboard"] = {"purge_step": steps_done + 1}  # what a killed run logged after its last state
    of_projects = {}
    if "wandb" in names:
        of_projects["wandb"] = wandb_options(experiment_id, folder, config, steps_done, accelerator.print)
    if "trackio" in names:
        of_projects["trackio"] = trackio_options(experiment_id, config, steps_done)
    # accelerate would make a project of every experiment_id, and no two runs of different projects are compared.
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    ready = [name for name in accelerator.log_with if str(name) not in of_projects]
    try:
        ready += [LOGGER_TYPE_TO_CLASS[name](project, **given) for name, given in of_projects.items()]
        accelerator.log_with = ready
        accelerator.init_trackers(experiment_id, init_kwargs=options)
    except OSError:
        raise
    except Exception as error:
        raise RunError(f"report_to: {', '.join(names)}: cannot start: {first_line(error)}") from error


def wandb_options(
    experiment_id: str, folder: Path, config: dict, steps_done: int, say: Callable[[str], None]
) -> dict[str, object]:
    """What `wandb.init` is told. Variables WANDB_MODE, WANDB_DIR and WANDB_RUN_ID of the environment win.

    A resumed run has the id of the run that it continues from, out of wandb.json in the run's folder.

    Args:
        say: called with a line where the run is written down here rather than sent.
    """
    options = {"name": experiment_id, "config": config, "resume": "allow"}
    if "WANDB_DIR" not in os.environ:
        options["dir"] = str(folder)
    if "WANDB_RUN_ID" not in os.environ:
        options["id"] = _wandb_id(folder / "wandb.json", is_new=not steps_done)
    if "WANDB_MODE" not in os.environ:
        reason = why_wandb_is_offline()
        if reason:
            options["mode"] = "offline"
            where = os.environ.get("WANDB_DIR", folder)
            say(f"wandb: {reason}: written to {where}/wandb; `wandb sync {where}/wandb/offline-run-*` sends it")
    return options


def why_wandb_is_offline() -> str | None:
    """Why nothing can be sent to Weights & Biases now, None if it can. Asks nobody for a key."""
    import wandb

    try:
        has_key = wandb.login(prompt=False, verify=True)
    except wandb.errors.Error:
        return "its server does not answer, or refuses the key"
    except TypeError:  # `prompt` is newer than this wandb, and without it a terminal would be asked for a key
        has_key = "WANDB_API_KEY" in os.environ
    return None if has_key else "no key is set (`wandb login` sets one)"


def _wandb_id(path: Path, is_new: bool) -> str:
    if is_new or not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return read_json(path)["id"]


def trackio_options(experiment_id: str, config: dict, steps_done: int) -> dict[str, object]:
    """What `trackio.init` is told: a new run of this name, or to continue the last one of it."""
    return {"name": experiment_id, "config": config, "resume": "allow" if steps_done else "never"}


def log(accelerator: Accelerator, tags: dict[str, float], step: int) -> None:
    """Send numbers to every tracker; call it on the main process.

    TensorBoard writes to this machine's disk, and what that refuses ends the run as any other file would.
    """
    _for_each(accelerator, lambda tracker: tracker.log(tags, step=step))


def finish(accelerator: Accelerator) -> None:
    """Let every tracker write what it still holds; call it on the main process."""
    _for_each(accelerator, lambda tracker: tracker.finish())


def _for_each(accelerator: Accelerator, act: Callable) -> None:
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:
            if tracker.name == "tensorboard":
                raise
            accelerator.trackers.remove(tracker)
            line = f"warning: {tracker.name} failed and is left out; metrics.jsonl has everything: {first_line(error)}"
            print(line, file=sys.stderr, flush=True)
