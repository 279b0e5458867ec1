"""What a run is besides its configuration: captured from the processes, put back into them, and whether it fits.

The order of the data and the dropout are functions of the step, so nothing of them is kept. What is: the trained
weights and AdamW's moments, by name and whole, whatever engine held them; and the sums of the log line to come.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from runtime import checkpoint
from utils import RunError, all_rows

Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def capture(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, meter: Tensor) -> Tensors:
    """Everything that training changes, complete on the main process; a collective.

    Args:
        meter: [v] fp64, this process's sums since the last log line.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer.optimizer, options=options)
    moments = {f"{name}/{kind}": row[kind] for name, row in moments.get("state", {}).items() for kind in _MOMENTS}
    return {
        "weights": weights,
        "moments": moments,
        "processes": {"meter": all_rows(meter.to(accelerator.device), accelerator.num_processes).cpu()},
    }


def restore(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors | None
) -> Tensor:
    """Put a captured state back, under any engine and any number of processes; a collective.

    With another number of processes than at the capture the sums of the log line go to the main process.

    Args:
        tensors: on the main process what `capture` gave; None on the others.

    Returns:
        This process's sums of the log line to come.
    """
    several = accelerator.num_processes > 1
    options = StateDictOptions(
        full_state_dict=True, ignore_frozen_params=True, broadcast_from_rank0=several, strict=False
    )
    weights, live = get_state_dict(model, optimizer.optimizer, options=StateDictOptions(ignore_frozen_params=True))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in (tensors or {"moments": {}})["moments"].items():
        name, _, kind = key.rpartition("/")
        moments.setdefault(name, {})[kind] = tensor
    # Without any weights torch would take this process for one that wants none: it would broadcast less than others do.
    set_state_dict(
        model, optimizer.optimizer, model_state_dict=tensors["weights"] if tensors else weights,
        optim_state_dict={"state": moments, "param_groups": live["param_groups"]} if tensors else {}, options=options,
    )  # fmt: skip
    meter = from_main(accelerator, tensors and tensors["processes"]["meter"])  # [processes, v]
    if len(meter) == accelerator.num_processes:
        return meter[accelerator.process_index]
    return meter.sum(0) if accelerator.is_main_process else torch.zeros_like(meter[0])


def broken(tensors: Tensors) -> str | None:
    """The first tensor of a captured state that is not finite: it must never take the place of a sound state."""
    rows = ((name, tensor) for stem in ("weights", "moments") for name, tensor in tensors[stem].items())
    return next((name for name, tensor in rows if not tensor.isfinite().all()), None)


def find(accelerator: Accelerator, choice: str, folder: Path, identity: dict) -> tuple[int, dict, Tensors | None]:
    """(updates done, facts, tensors) of the state to go on from; (0, {}, None) to begin. Tensors on the main process.

    Args:
        choice: "auto" for the newest whole state in `folder`, "never", or the folder of one state.
        ground: what the run stands on now.

    Raises:
        RunError: the state is damaged, or stands on something else than this run.
    """
    found, wrong = None, ""
    if accelerator.is_main_process and choice != "never":
        try:
            if choice == "auto":
                found = checkpoint.newest(folder, lambda line: print(f"run.py: {line}", file=sys.stderr))
            else:
                found = checkpoint.read(Path(choice))
        except ValueError as error:
            wrong = f"resume: {error}"
    step, facts, wrong = from_main(accelerator, (found[0], found[1], wrong) if found else (0, {}, wrong))
    if facts and (changes := differences(identity, facts["ground"])):
        wrong = "\n  ".join([f"{folder.parent}: cannot go on, because this has changed:", *changes])
        wrong += "\nrun.py: put it back, or choose another experiment_id"
    if wrong:
        raise RunError(wrong)
    return step, facts, found[2] if found else None


def from_main(accelerator: Accelerator, value):
    """A small value of the main process, on every process."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def differences(now: dict, earlier: dict) -> list[str]:
    """What a run stands on that has changed, one line each."""
    names = sorted(set(now) | set(earlier))
    return [
        f"{name}: {earlier.get(name)!r} then, {now.get(name)!r} now"
        for name in names
        if now.get(name) != earlier.get(name)
    ]


def lock_folder(folder: Path) -> FileLock:
    """Take a run's folder as long as this process lives; the lock ends with it, however it ends.

    Raises:
        RunError: another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{folder}: another run is at work there: choose another experiment_id") from None
    return lock
