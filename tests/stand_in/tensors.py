"""A GPU that is none: tensors that say they are on CUDA, and compute with their numbers on the CPU.

A program that runs on it takes every path that asks for CUDA, with real numbers. What CUDA and NCCL refuse is refused
here too: an operation on tensors of both devices, a collective on a tensor of the CPU. A copy to the CPU that nobody
waits for arrives when the host synchronises, and its place holds NaN until then. What the host waits for is noted.

It says nothing of kernels, memory, speed, or work on several streams.

    python -m pytest tests/runtime/test_stand_in.py
"""

import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.gpu_profile import what_waits

GPU = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
HERE = Path(__file__).parent
SYNCHRONIZE = "synchronize"  # the one wait that is asked for by name
sync_debug_mode = "default"
WAITS: Counter = Counter()  # what the host waited for -> how often

_aten = torch.ops.aten
_pinned: dict[int, StorageWeakRef] = {}  # by address, which the reference keeps from being given away
_owned: dict[int, StorageWeakRef] = {}  # numbers of tensors on the GPU


# ---------------------------------------------------------------------------------------- tensors


class OnGpu(Tensor):
    """A tensor that says it is on the GPU, around its numbers on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, layout=numbers.layout, device=GPU,
        )  # fmt: skip

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    def __repr__(self, **_):
        return f"OnGpu({self.numbers!r})"

    def __tensor_flatten__(self):  # by this and the next torch knows that there is a tensor within
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_):
        return OnGpu(inner["numbers"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """What is asked for on CUDA becomes an OnGpu tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes here again with the parts
        return compute(function, args, kwargs or {})


def compute(function, args: tuple, kwargs: dict):
    """One operation. Its result is where CUDA's would be."""
    if torch.is_inference_mode_enabled() and function._can_decompose():
        with StandIn():
            return function.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if function is _aten.copy_.default:
        return copy(*args, **kwargs)
    if function is _aten._pin_memory.default:
        return pin(args[0].clone())
    if function is _aten._to_copy.default and on_gpu and is_cpu(kwargs.get("device")):
        return copy_to_cpu(args[0].numbers, kwargs)
    refuse_other_devices(function, tensors, on_gpu)
    if on_gpu:
        note_wait(what_waits(function, args, kwargs))
    device = kwargs.get("device")
    becomes_on_gpu = is_gpu(device) or (device is None and bool(on_gpu))
    plain_args, plain_kwargs = tree_map_only(OnGpu, lambda tensor: tensor.numbers, (args, kwargs))
    if is_gpu(device):
        plain_kwargs["device"] = torch.device("cpu")
    asks_for_pinned = plain_kwargs.pop("pin_memory", None)
    found = function(*plain_args, **plain_kwargs)
    if function.namespace == "c10d":
        note_owned(plain_args)
    if asks_for_pinned:
        return pin(found)
    if not becomes_on_gpu:
        return found
    if function is _aten._to_copy.default and not on_gpu:
        note_copy_to_gpu(args[0], kwargs.get("non_blocking", False))
    came = {id(tensor.numbers): tensor for tensor in on_gpu}  # what is changed in place stays the tensor it was
    found = tree_map_only(Tensor, lambda tensor: came[id(tensor)] if id(tensor) in came else OnGpu(tensor), found)
    return return_and_correct_aliasing(function, args, kwargs, found)


def refuse_other_devices(function, tensors: list[Tensor], on_gpu: list[Tensor]) -> None:
    """As CUDA and NCCL do. A number in a tensor without dimensions may come from the CPU."""
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and not tensor.is_meta]
    if function.namespace == "c10d" and elsewhere:
        raise RuntimeError(f"{function}: NCCL takes tensors on the GPU alone, not {describe(elsewhere)}")
    if on_gpu and any(tensor.dim() for tensor in elsewhere):
        raise RuntimeError(f"{function}: on the GPU {describe(on_gpu)}, on the CPU {describe(elsewhere)}")


def describe(tensors: list[Tensor]) -> str:
    return ", ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def is_cpu(device) -> bool:
    return device is not None and torch.device(device).type == "cpu"


# ------------------------------------------------------------------------------------------ time


class Copies:
    """Copies to the CPU that nobody has waited for."""

    def __init__(self):
        self.begun = 0
        self.arriving: list[tuple[int, Tensor, Tensor]] = []  # (number, destination, what will stand there)

    def begin(self, destination: Tensor, numbers: Tensor) -> Tensor:
        self.begun += 1
        self.arriving.append((self.begun, destination, numbers.clone()))
        return destination.fill_(float("nan") if destination.is_floating_point() else -1)

    def wait(self, until: int | None = None) -> None:
        """For all copies, or those up to number `until`."""
        last = self.begun if until is None else until
        for number, destination, numbers in self.arriving:
            if number <= last:
                destination.copy_(numbers)
        self.arriving = [copy for copy in self.arriving if copy[0] > last]


COPIES = Copies()


def note_wait(what: str | None) -> None:
    """The host waits until the GPU has done all that was asked of it."""
    if what:
        WAITS[f"{what}, {caller()}"] += 1
        COPIES.wait()
        if sync_debug_mode == "warn" and what != SYNCHRONIZE:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)  # torch's words


def set_sync_debug_mode(mode: str) -> None:
    """torch.cuda.set_sync_debug_mode."""
    global sync_debug_mode
    sync_debug_mode = mode


def caller() -> str:
    """The line that asked for this operation, in our files or in a package's but torch's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent != HERE and "torch" not in path.parts:
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "nobody"


def copy(destination: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`destination.copy_(source)`, from any device to any."""
    if isinstance(destination, OnGpu):
        if isinstance(source, OnGpu):
            source = source.numbers
        else:
            note_copy_to_gpu(source, non_blocking)
        destination.numbers.copy_(source)
        return destination
    if not isinstance(source, OnGpu):
        return destination.copy_(source)
    if non_blocking and is_pinned(destination):
        return COPIES.begin(destination, source.numbers.to(destination.dtype))
    note_wait("a copy to the CPU")
    return destination.copy_(source.numbers)


def copy_to_cpu(numbers: Tensor, kwargs: dict) -> Tensor:
    """`numbers.to("cpu")`, with the options of `_to_copy`."""
    dtype = kwargs.get("dtype") or numbers.dtype
    copied = torch.empty_like(numbers, dtype=dtype, device="cpu")
    if kwargs.get("non_blocking"):  # torch pins the memory by itself
        return COPIES.begin(pin(copied), numbers.to(dtype))
    note_wait("a copy to the CPU")
    return copied.copy_(numbers)


def note_copy_to_gpu(source: Tensor, non_blocking: bool) -> None:
    if source.is_meta or source.untyped_storage()._cdata in _owned:
        return
    if not non_blocking:
        note_wait("a copy to the GPU")
    elif not is_pinned(source):
        note_wait("a copy to the GPU, of memory that is not pinned")


def pin(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    _pinned[storage._cdata] = StorageWeakRef(storage)
    return tensor


def note_owned(tree) -> None:
    """DDP takes what it has summed from the collective itself, which knows these tensors by their numbers alone."""
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            _owned[storage._cdata] = StorageWeakRef(storage)


def is_pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage()._cdata in _pinned
