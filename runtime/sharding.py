"""Weights in parts over the processes: the main process reads a model, and each process gets its own rows of it.

Without this every process would read the whole model into its memory: 448 GB for eight processes with 14B weights. Here
the others describe the model without memory (torch's meta device), all shard it so, and then the main process hands
out one weight after the other and forgets it. So a process never holds more than its own rows, and the main process
never more than the model.

    weights = take_weights(model)       what the main process read; the model then holds nothing, as on the others
    agree_on_weights(model)             all processes describe the same model
    fully_shard(...)                    by the engine
    hand_out(model, weights, device)    every process has its rows

    python -m pytest tests/runtime/test_hand_out.py tests/training/test_startup_memory.py
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from runtime.shards import rows_of
from utils import RunError

_SENT_AT_ONCE = 2**28  # bytes that the main process puts on its device for sending


def take_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a module by name, taken out of it: afterwards it is on the meta device."""
    weights = dict(module.named_parameters()) | dict(module.named_buffers())
    module.to("meta")
    return {name: tensor.detach() for name, tensor in weights.items()}


def agree_on_weights(module: nn.Module) -> None:
    """Check that all processes describe the weights of the main process, and take over its dtypes; a collective.

    A decoder may keep some weights in fp32 when it is read in bf16, which its description does not say.

    Args:
        module: on the meta device.

    Raises:
        RunError: on every process: the model folder of one process holds another model.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    own = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    described = [None] * dist.get_world_size()
    dist.all_gather_object(described, own)
    expected = [(name, shape) for name, shape, _ in described[0]]
    for rank, theirs in enumerate(described):
        if [(name, shape) for name, shape, _ in theirs] != expected:
            raise RunError(f"process {rank} finds another model than the main process: give all the same folder")
    for name, _, dtype in described[0]:
        tensors[name].data = tensors[name].data.to(dtype)


@torch.no_grad()
def hand_out(module: nn.Module, weights: dict[str, Tensor], device: torch.device) -> None:
    """Give each process its rows of the main process's weights, and all of its buffers; a collective.

    Args:
        module: sharded by `fully_shard` along the rows, on the meta device.
        weights: on the main process what `take_weights` gave, by the names of this module; it is emptied.
        device: where the processes talk to each other, and hold their rows.
    """
    is_main = dist.get_rank() == 0
    parameters = dict(module.named_parameters())
    # Small weights first: then much of the model has left the main process when it needs room for the largest table.
    for name in sorted(parameters, key=lambda name: parameters[name].numel()):
        whole = weights.pop(name) if is_main else None
        rows = _own_rows(parameters[name], whole, device)
        del whole
        _put(module, name, rows)
    for name, buffer in list(module.named_buffers()):
        value = torch.empty_like(buffer, device=device)
        if is_main:
            value.copy_(weights.pop(name))
        dist.broadcast(value, src=0)
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, value)


def shard_frozen(
    module: nn.Module, layers: list[str], precision: MixedPrecisionPolicy, mesh: DeviceMesh | None
) -> None:
    """A teacher in parts over the processes: no optimizer state, never saved.

    Args:
        layers: class names of the modules that are gathered one at a time.
    """
    for part in list(module.modules()):  # a list, since sharding changes the modules
        if type(part).__name__ in layers:
            fully_shard(part, mesh=mesh, mp_policy=precision)
    # Without a backward pass torch would leave the root unsharded: for a teacher the largest table of all.
    fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def share_out(model: nn.Module) -> None:
    """Free what a sharded model has gathered for its last pass: each process has its own rows alone again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def rows_here(parameter: DTensor) -> tuple[int, int]:
    """The first row of a sharded weight that this process holds, and the one behind its last."""
    own = rows_of(len(parameter), parameter.device_mesh.get_coordinate()[-1], _parts(parameter))
    return own.start, own.stop


def _parts(parameter: DTensor) -> int:
    """Into how many parts a weight is cut. Where nodes hold copies, the parts of one copy are the last dimension."""
    return parameter.device_mesh.size(parameter.device_mesh.ndim - 1)


def _own_rows(parameter: DTensor, whole: Tensor | None, device: torch.device) -> DTensor:
    """A weight of which this process holds its rows.

    Args:
        parameter: the weight as it is sharded, on the meta device; [rows, ...].
        whole: on the main process its numbers.
    """
    mesh = parameter.device_mesh
    parts = _parts(parameter)
    height = math.ceil(len(parameter) / parts)
    ranks = mesh.mesh.flatten().tolist()
    part_of_rank = [ranks.index(rank) % parts for rank in range(dist.get_world_size())]
    bytes_of_row = parameter.numel() // len(parameter) * parameter.dtype.itemsize
    step = max(1, _SENT_AT_ONCE // (bytes_of_row * len(part_of_rank)))
    received = torch.empty(height, *parameter.shape[1:], dtype=parameter.dtype, device=device)
    for first in range(0, height, step):
        piece = received[first : first + step]
        to_send = None
        if whole is not None:
            to_send = [_rows(whole, part * height + first, len(piece), device) for part in part_of_rank]
        dist.scatter(piece, to_send, src=0)
    begin, end = rows_here(parameter)
    return DTensor.from_local(
        received[: end - begin],
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _rows(whole: Tensor, first: int, count: int, device: torch.device) -> Tensor:
    """`count` rows of a weight; zeros behind its end, since all processes must be sent equally many."""
    rows = whole[first : first + count].to(device)
    if len(rows) == count:
        return rows.contiguous()
    padded = rows.new_zeros(count, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


def _put(module: nn.Module, name: str, weight: DTensor) -> None:
    """Set a weight of a sharded module: FSDP2 notices what is loaded into the module that owns it."""
    owner, _, key = name.rpartition(".")
    module.get_submodule(owner).load_state_dict({key: weight}, strict=False, assign=True)
