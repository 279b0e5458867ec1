"""What a resume needs: captured from the processes, found again on the disk, and put back into them.

The order of the data and the dropout are functions of the step, so nothing of them is kept. What is kept: the trained
weights and AdamW's moments, by name, whatever engine held them; and the sums of the next log line.
"""

import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from runtime import checkpoint, shards
from runtime.collectives import all_rows
from utils import RunError

IDENTITY_KEY = "ground"  # of a state's facts; so called since the first states, and those must stay readable
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight


# ---------------------------------------------------------------------------- to a state and back


def capture(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meter: Tensor,
    number: int | None,
    count: int,
) -> checkpoint.Tensors:
    """This process's part of everything that training changes: the live tensors on its device, not copies.

    A collective, for the sums of all processes; weights and moments are not gathered.

    Args:
        meter: [v] fp64, this process's sums since the last log line.
        number, count: this process among those that write; None = it writes nothing.
    """
    meters = all_rows(meter.to(accelerator.device), accelerator.num_processes)  # [processes, v]
    if number is None:
        return {}
    parts: checkpoint.Tensors = {}
    for kind, tensors in _live_tensors(accelerator, model, optimizer).items():
        parts[kind] = {}
        for name, tensor in tensors.items():
            part = shards.part_to_write(tensor.detach(), number, count)
            if part is not None:
                parts[kind][name] = part
    parts["processes"] = {"meter": meters} if accelerator.is_main_process else {}
    return parts


def like_part(accelerator: Accelerator, model: nn.Module, number: int | None, count: int) -> checkpoint.Tensors:
    """Tensors with the names and sizes of what `capture` will give, before there are moments: weights stand for them.

    Counts of steps and sums of a log line, which take next to nothing, are left out.

    Args:
        number, count: this process among those that write; None = it writes nothing.
    """
    parts: checkpoint.Tensors = {"weights": {}, "moments": {}}
    if number is None:
        return parts
    for name, weight in _trained_weights(accelerator, model).items():
        part = shards.part_to_write(weight.detach(), number, count)
        if part is None:
            continue
        parts["weights"][name] = part
        for kind in ("exp_avg", "exp_avg_sq"):
            parts["moments"][f"{name}/{kind}"] = part
    return parts


@torch.no_grad()
def broken(parts: checkpoint.Tensors) -> str | None:
    """The name of the first captured tensor that is not finite, or None: such a state must never replace a sound one.

    A tensor's smallest and largest numbers are finite where all are, and need no memory of the tensor's size; on a CPU
    they take a tenth of the time of the largest magnitude. All are computed before the first is read, so that a GPU is
    waited for once.
    """
    names = []
    finite = []
    for kind in ("weights", "moments"):
        for name, tensor in parts.get(kind, {}).items():
            names.append(name)
            smallest, largest = torch.aminmax(tensor)
            finite.append(smallest.isfinite() & largest.isfinite())
    if not finite:
        return None
    found = torch.stack(finite).tolist()
    return None if all(found) else names[found.index(False)]


@torch.no_grad()
def restore(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, shards.Shards] | None,
) -> Tensor:
    """Put a state back, under any engine and any number of processes; a collective.

    The main process reads one tensor after another and sends it to all, and each keeps its rows: so no process holds
    more than one tensor besides its own part, and no other one needs to see the folder.

    Args:
        tensors: of the state, on the main process; None on the others.

    Returns:
        [v], this process's sums of the next log line. With another number of processes than at the capture, the
        main process gets the sums of all.

    Raises:
        RunError: on the main process: the state lacks a weight of this model, or has one of another shape.
    """
    names = tensors["moments"].names() if tensors and "moments" in tensors else []
    moments = from_main(accelerator, names)  # none before the first update that was not left out
    _begin_moments(_trained_weights(accelerator, model), optimizer, set(moments))
    for kind, live in _live_tensors(accelerator, model, optimizer).items():
        for name, tensor in live.items():
            whole = _read(tensors[kind], name, tensor) if tensors else None
            shards.put(tensor, _tensor_from_main(accelerator, whole, tensor))
    meters = tensors["processes"].read("meter") if tensors else None
    return _meter_of_process(accelerator, from_main(accelerator, meters))


def _live_tensors(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Kind -> name -> tensor of all that training changes, as this process holds it; in the same order on each."""
    weights = _trained_weights(accelerator, model)
    moments = {}
    for name, weight in weights.items():
        kept = optimizer.optimizer.state.get(weight, {})
        for kind in _MOMENTS:
            if kind in kept:
                moments[f"{name}/{kind}"] = kept[kind]
    return {"weights": weights, "moments": moments}


def _trained_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names that they have under no engine, as the optimizer knows them."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a forward pass alone leaves the root gathered, in tensors that have no moments
    named = accelerator.unwrap_model(model).named_parameters()
    return {name.replace("_orig_mod.", ""): weight for name, weight in named if weight.requires_grad}


def _begin_moments(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Let AdamW have moments where a state has some, as its first update would: all zero."""
    for name, weight in weights.items():
        if f"{name}/step" in names:
            optimizer.optimizer.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }


def _read(tensors: shards.Shards, name: str, live: Tensor) -> Tensor:
    """A tensor of a state, of the shape of the live one."""
    if name not in tensors.files_of:
        raise RunError(f"resume: the state holds no {name}")
    whole = tensors.read(name)
    if whole.shape != live.shape:
        raise RunError(f"resume: {name} is {list(whole.shape)} in the state and {list(live.shape)} in the model")
    return whole


def _tensor_from_main(accelerator: Accelerator, whole: Tensor | None, live: Tensor) -> Tensor:
    """The main process's tensor, whole, on every process; of the live one's shape and dtype."""
    if accelerator.num_processes == 1:
        return whole
    if whole is None:
        whole = torch.empty(live.shape, dtype=live.dtype, device=accelerator.device)
    else:
        whole = whole.to(accelerator.device, live.dtype)
    dist.broadcast(whole, src=0)
    return whole


def _meter_of_process(accelerator: Accelerator, meters: Tensor) -> Tensor:
    """This process's share, [v], of what the processes of the capture had summed, [processes then, v]."""
    if len(meters) == accelerator.num_processes:
        return meters[accelerator.process_index]
    if accelerator.is_main_process:
        return meters.sum(0)
    return torch.zeros_like(meters[0])


# ------------------------------------------------------------------------------------- which state


def find(accelerator: Accelerator, choice: str, folder: Path) -> tuple[int, dict, dict[str, shards.Shards] | None]:
    """The state to continue from. The main process looks for it, and all processes learn what was found; a collective.

    Args:
        choice: "auto" for the newest whole state in `folder`, "never", or the folder of one state.

    Returns:
        (updates done, facts, tensors); (0, {}, None) to begin. The main process alone has tensors, not read yet.

    Raises:
        RunError: on every process: the state is damaged.
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
    return step, facts, tensors


def _read_state(choice: str, folder: Path) -> checkpoint.State | None:
    """The state of this choice; None to begin. Raises ValueError if it is damaged."""
    if choice == "never":
        return None
    if choice == "auto":
        return checkpoint.newest(folder, lambda line: print(f"run.py: {line}", file=sys.stderr))
    return checkpoint.read(Path(choice))


def known_facts(choice: str, folder: Path) -> dict:
    """The facts of the state that `find` would take, as far as its state.json tells; {} where none can be read.

    What identifies a run is the same in all of its states: it does not matter whether the tensors of the newest are
    damaged, which takes reading all of them to tell.
    """
    states = [Path(choice)]
    if choice == "never":
        states = []
    if choice == "auto":
        states = checkpoint.folders(folder)
    for state in states:
        with suppress(ValueError):
            return checkpoint.read_facts(state)
    return {}


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
