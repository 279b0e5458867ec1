"""What a step does besides its work: how often the host waits for the device, and where the device's time goes.

On CUDA torch itself reports every wait, and its profiler the time of every kernel. On a CPU there is nothing to wait
for; there the operations are counted that would wait on a GPU, and the profiler gives the time of operations.
"""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_model import wait
from utils import first_line

# Operations whose result the host must see before it can continue: of the values, or of how many there are.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "masked_scatter", "masked_scatter_backward", "unique_dim",
    "_unique2", "unique_consecutive", "is_nonzero", "equal", "bincount",
}  # fmt: skip
_REPORTED = "synchronizing CUDA operation"  # in torch's warning about a wait
KINDS = {  # kind -> parts of the names of its kernels and operations; the first kind that fits is taken
    "communication": ("nccl", "c10d", "all_reduce", "all_gather", "reduce_scatter"),
    "attention": ("flash", "fmha", "sdpa", "scaled_dot_product", "varlen_attn", "attention"),
    "matmul": (
        *("gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma", "splitk", "triton_tem"),
        *("::mm", "::addmm", "::bmm"),
    ),
}
OTHER = "elementwise and other"
IDLE = "idle"


class CountWaits(TorchDispatchMode):
    """Counts operations for which the host would wait, were the tensors on a GPU."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self.operations = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        """Run an operation, and note it where it waits."""
        self.operations += 1
        wait = what_waits(function, arguments, options or {})
        if wait:
            self.waits[wait] += 1
        return function(*arguments, **(options or {}))


def what_waits(function: torch._ops.OpOverload, arguments: tuple, options: dict) -> str | None:
    """What in an operation the host would wait for, were its tensors on a GPU; None if nothing."""
    name = function.overloadpacket.__name__
    if name in WAITING:
        return name
    indices = arguments[1] if name in ("index", "index_put", "index_put_") else []
    if any(index is not None and index.dtype == torch.bool for index in indices):
        return "index by a mask"
    if name == "repeat_interleave" and not options.get("output_size"):
        return name
    return None


def count_waits(update: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Where in an update the host waits for the device, and how often: a line of source, or an operation -> times."""
    if device.type != "cuda":
        # Uncompiled: where a counter looks on, torch gives up compiling that code, for later models too.
        with torch.compiler.set_stance("force_eager"), CountWaits() as counter:
            update()
        return dict(counter.waits)
    wait(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if _REPORTED in str(warning.message)]
    return dict(Counter(f"{warning.filename}:{warning.lineno}" for warning in found))


def shares_of_time(update: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Kind -> share of the time that an update takes, idle included; under the profiler, which makes it longer.

    Empty where the profiler sees no kernel of the GPU: a container or a driver may forbid it.
    """
    if device.type != "cuda":
        events, seconds = _profiled(update, device, [ProfilerActivity.CPU])
        return _shares([(event.name, event.self_cpu_time_total / 1e6) for event in events], None, seconds)
    # Of kernels alone: to note each operation of the host as well would make the device wait for it.
    for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CUDA, ProfilerActivity.CPU]):
        try:
            events, seconds = _profiled(update, device, activities)
        except (RuntimeError, AssertionError) as error:
            print(f"the profiler: {first_line(error)}", file=sys.stderr)
            continue
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        if kernels:
            return shares_of_kernels(kernels, seconds)
    return {}


def _profiled(
    update: Callable[[], object], device: torch.device, activities: list[ProfilerActivity]
) -> tuple[list[FunctionEvent], float]:
    """What ran in an update, without the sections that the code names, and its seconds."""
    wait(device)
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        update()
        wait(device)
        seconds = time.perf_counter() - began
    return [event for event in profiler.events() if not getattr(event, "is_user_annotation", False)], seconds


def shares_of_kernels(kernels: list[FunctionEvent], seconds: float) -> dict[str, float]:
    """The same from a GPU's kernels, which may run beside each other: idle is when none of them runs.

    Args:
        kernels: with time_range in microseconds.
        seconds: of the whole update.
    """
    ranges = sorted((kernel.time_range.start, kernel.time_range.end) for kernel in kernels)
    busy = 0.0
    last_end = float("-inf")
    for start, end in ranges:
        busy += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    times = [(kernel.name, kernel.time_range.elapsed_us() / 1e6) for kernel in kernels]
    return _shares(times, busy / 1e6, seconds)


def _shares(times: list[tuple[str, float]], busy: float | None, seconds: float) -> dict[str, float]:
    """Shares of `seconds`, of (name, seconds) of everything that ran.

    Args:
        busy: seconds in which anything ran; None = the sum.
    """
    totals = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, spent in times:
        totals[kind_of(name)] += spent
    if busy is None:
        busy = sum(totals.values())
    shares = {kind: spent / seconds for kind, spent in totals.items()}
    shares[IDLE] = max(0.0, 1 - busy / seconds)
    return shares


def kind_of(name: str) -> str:
    """The kind of a kernel or an operation.

    >>> kind_of("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT"), kind_of("void cutlass::device_kernel<flash::Fwd>")
    ('matmul', 'attention')
    """
    lowered = name.lower()
    for kind, parts in KINDS.items():
        if any(part in lowered for part in parts):
            return kind
    return OTHER
