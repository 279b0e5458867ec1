"""What a run is besides its configuration: captured from the processes, put back into them, and whether it fits.

The order of the data and the dropout are functions of the step, so nothing of them is kept. What is kept: the trained
weights and AdamW's moments, by name and whole, whatever engine held them; and the sums of the next log line.
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
from runtime.collectives import all_rows
from utils import RunError

Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor
_HOW_TO_TRAIN_LONGER = (
    "  a cosine ends where it was laid out to end. To train longer, begin another run: another experiment_id, and",
    "  model_path set to this run's last model folder (of an adapter, merged first: python -m tools.merge_adapter).",
    "  A run begun with scheduler_type constant_with_warmup can be made longer as it is",
)
IDENTITY_KEY = "ground"  # of a state's facts; so called since the first states, and those must stay readable
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight


# ---------------------------------------------------------------------------- to a state and back


def capture(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, meter: Tensor) -> Tensors:
    """Everything that training changes, complete on the main process; a collective.

    Args:
        meter: [v] fp64, this process's sums since the last log line.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(model, optimizer.optimizer, options=options)
    moments = {}
    for name, moments_of_weight in optimizer_state.get("state", {}).items():
        for kind in _MOMENTS:
            moments[f"{name}/{kind}"] = moments_of_weight[kind]
    meters = all_rows(meter.to(accelerator.device), accelerator.num_processes)  # [processes, v]
    return {"weights": weights, "moments": moments, "processes": {"meter": meters.cpu()}}


def restore(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors | None
) -> Tensor:
    """Put a captured state back, under any engine and any number of processes; a collective.

    Args:
        tensors: on the main process what `capture` gave; None on the others.

    Returns:
        [v], this process's sums of the next log line. With another number of processes than at the capture, the
        main process gets the sums of all.
    """
    trained_only = StateDictOptions(ignore_frozen_params=True)
    weights, optimizer_state = get_state_dict(model, optimizer.optimizer, options=trained_only)  # the live ones
    if tensors is None:
        # The live weights stand in for those that the main process will send: torch would take a process without any
        # for one that wants none, and it would broadcast less than the others do.
        optimizer_state = {}
        meters = None
    else:
        weights = tensors["weights"]
        moments = _moments_by_weight(tensors["moments"])
        optimizer_state = {"state": moments, "param_groups": optimizer_state["param_groups"]}
        meters = tensors["processes"]["meter"]
    options = StateDictOptions(
        full_state_dict=True,
        ignore_frozen_params=True,
        broadcast_from_rank0=accelerator.num_processes > 1,
        strict=False,  # frozen weights are not in a state
    )
    set_state_dict(
        model, optimizer.optimizer, model_state_dict=weights, optim_state_dict=optimizer_state, options=options
    )
    return _meter_of_process(accelerator, from_main(accelerator, meters))


def _moments_by_weight(moments: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """ "weight/kind" -> tensor, as it lies in the file, as weight -> kind -> tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in moments.items():
        name, _, kind = key.rpartition("/")
        found.setdefault(name, {})[kind] = tensor
    return found


def _meter_of_process(accelerator: Accelerator, meters: Tensor) -> Tensor:
    """This process's share, [v], of what the processes of the capture had summed, [processes then, v]."""
    if len(meters) == accelerator.num_processes:
        return meters[accelerator.process_index]
    if accelerator.is_main_process:
        return meters.sum(0)
    return torch.zeros_like(meters[0])


def broken(tensors: Tensors) -> str | None:
    """The first tensor of a captured state that is not finite: it must never take the place of a sound state."""
    for stem in ("weights", "moments"):
        for name, tensor in tensors[stem].items():
            if not tensor.isfinite().all():
                return name
    return None


# --------------------------------------------------------------------- which state, and whether it fits


def find(
    accelerator: Accelerator, choice: str, folder: Path, identity: dict, model_path: str, unsaid: dict
) -> tuple[int, dict, Tensors | None]:
    """The state to go on from. The main process reads it, and all processes learn what was found; a collective.

    Args:
        choice: "auto" for the newest whole state in `folder`, "never", or the folder of one state.
        identity: what a resume must find unchanged, as it is now.
        model_path: where this run's model is. It may have moved; it names the model where that is another one.
        unsaid: what a state that does not say a part of its identity stands for, by name.

    Returns:
        (updates done, facts, tensors); (0, {}, None) to begin. The tensors are on the main process alone.

    Raises:
        RunError: on every process: the state is damaged, or another identity than this run's stands in it.
    """
    found = (0, {}, "")  # updates done, facts, what is wrong
    tensors = None
    if accelerator.is_main_process:
        try:
            state = _read_state(choice, folder)
            if state is not None:
                found = (state.step, state.facts, "")
                tensors = state.tensors
        except ValueError as error:
            found = (0, {}, f"resume: {error}")
    step, facts, problem = from_main(accelerator, found)
    if problem:
        raise RunError(problem)
    if facts:
        earlier_path = facts.get("model_path")  # not in the first states that were written
        _refuse_changes(folder.parent, differences(identity, unsaid | facts[IDENTITY_KEY], model_path, earlier_path))
    return step, facts, tensors


def _read_state(choice: str, folder: Path) -> checkpoint.State | None:
    """The state of this choice; None to begin. Raises ValueError where it is damaged."""
    if choice == "never":
        return None
    if choice == "auto":
        return checkpoint.newest(folder, lambda line: print(f"run.py: {line}", file=sys.stderr))
    return checkpoint.read(Path(choice))


def differences(now: dict, earlier: dict, path: str | None = None, earlier_path: str | None = None) -> list[str]:
    """Which parts of a run's identity have changed, one line each.

    Args:
        now, earlier: the identities.
        path, earlier_path: of the models, where they are known: an identity holds only a digest of a model's shapes.
    """
    lines = []
    for name in sorted(set(now) | set(earlier)):
        value, earlier_value = now.get(name), earlier.get(name)
        if value == earlier_value:
            continue
        if name == "weights":
            if now.get("model") == earlier.get("model"):  # else the line about the model says it
                lines.append(f"weights: training began with those of {earlier_path!r}, and {path!r} holds others")
        elif name == "model":
            lines.append(f"model: {_named(earlier_value, earlier_path)} then, {_named(value, path)} now")
        else:
            lines.append(f"{name}: {earlier_value!r} then, {value!r} now")
        same_batch = now.get("global batch") == earlier.get("global batch")
        if name == "steps" and same_batch and value and earlier_value and value > earlier_value:
            lines += _HOW_TO_TRAIN_LONGER
    return lines


def _named(digest: str, path: str | None) -> str:
    """A model for people: by its path and the digest of its shapes."""
    return f"{path!r} (shapes {digest})" if path else repr(digest)


def _refuse_changes(run_folder: Path, changes: list[str]) -> None:
    if changes:
        lines = "\n  ".join([f"{run_folder}: cannot go on, because this has changed:", *changes])
        raise RunError(f"{lines}\nrun.py: put it back, or choose another experiment_id")


def from_main(accelerator: Accelerator, value):
    """A small value of the main process, on every process; a collective."""
    if accelerator.num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


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
