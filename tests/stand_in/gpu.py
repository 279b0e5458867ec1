"""A process on the stand-in for a GPU: what torch asks of CUDA's own library is answered here.

LD_PRELOAD=device.so                    what build_library made, before torch is imported
install(); with StandIn(): ...
"""

import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import accelerate.state
import peft
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_parameters
import torch.nn.functional as F
from stand_in.tensors import COPIES, GPU, SYNCHRONIZE, OnGpu, StandIn, note_wait, set_sync_debug_mode
from torch import Tensor
from torch.distributed import distributed_c10d

MEMORY = 80 * 2**30  # bytes, all of them free


def build_library(folder: Path) -> Path:
    """Compile device.cpp against the torch that is installed. Returns the library."""
    library = folder / "device.so"
    torch_folder = Path(torch.__file__).parent
    words = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", str(Path(__file__).with_name("device.cpp"))]
    words += [f"-I{torch_folder / 'include'}", f"-I{torch_folder / 'include/torch/csrc/api/include'}"]
    words += [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([*words, "-o", str(library)], check=True)
    return library


# --------------------------------------------------------------------------------- streams and events


class Event:
    """torch.cuda.Event: a point in the order of what the GPU was asked to do."""

    def __init__(self, *_, **__):
        self.copies = 0

    def record(self, _stream=None) -> None:
        self.copies = COPIES.begun

    def synchronize(self) -> None:
        COPIES.wait(self.copies)

    def wait(self, _stream=None) -> None:
        """One stream waits for another, not the host."""

    def query(self) -> bool:
        return True


class Stream:
    """torch.cuda.Stream: work is done in the order in which it is asked for."""

    def __init__(self, *_, **__):
        self.device = GPU

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def wait_stream(self, _other) -> None:
        """Nothing is late."""

    def wait_event(self, _event) -> None:
        """Nothing is late."""

    def synchronize(self) -> None:
        synchronize()


def synchronize(_device=None) -> None:
    note_wait(SYNCHRONIZE)


# --------------------------------------------------------------------------------------- the process


def install() -> None:
    """Have this process believe in its GPU: what torch asks of CUDA's own library is answered here."""
    answers = {
        "_lazy_init": None, "_exchange_device": GPU.index, "_maybe_exchange_device": GPU.index, "is_available": True,
        "device_count": 8, "current_device": GPU.index, "set_device": None, "current_stream": Stream(),
        "get_device_name": "stand-in", "get_device_properties": SimpleNamespace(total_memory=MEMORY),
        "get_device_capability": (9, 0), "is_bf16_supported": True, "mem_get_info": (MEMORY, MEMORY),
        "memory_reserved": 0, "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None,
        "manual_seed": None, "manual_seed_all": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answers_always(answer))
    torch.cuda.set_sync_debug_mode = set_sync_debug_mode
    torch.cuda.Event = Event
    torch.cuda.Stream = Stream
    torch.cuda.stream = lambda stream: stream
    torch.cuda.synchronize = torch.accelerator.synchronize = synchronize
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()  # numbers are drawn on the CPU
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.cuda.amp.common.amp_definitely_not_available = answers_always(False)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU and copied
    Tensor.tolist = to_list(Tensor.tolist)
    threading.Thread.run = on_stand_in(threading.Thread.run)
    install_collectives()
    # What reads or frees memory by its address.
    fsdp_parameters.free_storage = fsdp_parameters.alloc_storage = answers_always(None)
    for module in (safetensors.torch, peft.utils.other):
        module.storage_ptr = pointer_of(module.storage_ptr)
    kernels = ModuleType("flash_attn")
    kernels.flash_attn_varlen_func = flash_attn_varlen_func
    sys.modules["flash_attn"] = kernels


def install_collectives() -> None:
    """gloo in NCCL's place; objects travel in tensors on the GPU, as NCCL's do."""
    begin = dist.init_process_group

    def init_process_group(backend=None, device_id=None, **named) -> None:
        assert backend == "nccl"
        begin("gloo", **named)

    dist.init_process_group = init_process_group
    dist.is_nccl_available = accelerate.state.is_nccl_available = answers_always(True)
    distributed_c10d._get_object_coll_device = answers_always(str(GPU))


def answers_always(answer):
    return lambda *_, **__: answer


def to_list(real):
    """torch refuses it of wrapped tensors."""

    def tolist(tensor: Tensor) -> list:
        if not isinstance(tensor, OnGpu):
            return real(tensor)
        note_wait("tolist")
        return real(tensor.numbers)

    return tolist


def on_stand_in(real):
    """Modes belong to a thread."""

    def run(thread: threading.Thread) -> None:
        with StandIn():
            real(thread)

    return run


def pointer_of(real):
    return lambda tensor: real(tensor.numbers if isinstance(tensor, OnGpu) else tensor)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    softmax_scale=None, causal=False, deterministic=False,
):  # fmt: skip
    """FlashAttention's function, [T, heads, head_dim] in bf16; its kernel knows the lengths without waiting."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert cu_seqlens_q.dtype == torch.int32
    assert cu_seqlens_q.is_cuda
    assert causal
    lengths = cu_seqlens_q.numbers.diff().tolist()
    assert max(lengths) == max_seqlen_q
    out = []
    for rows in zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v)), strict=True):
        out.append(F.scaled_dot_product_attention(*rows, is_causal=True, scale=softmax_scale, enable_gqa=True))
    return torch.cat(out, dim=2)[0].transpose(0, 1)
