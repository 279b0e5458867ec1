"""Attention over one packed row: causal within each text, nothing between texts.

    segments    F.scaled_dot_product_attention once a text; any device and precision
    varlen      one kernel for all texts, CUDA, bf16 or fp16: FlashAttention 3 or 2 where installed, else torch's own

Both are registered with Transformers, which hands them what `model.Embedder` gives its decoder: the texts' lengths. The
other two backends, buckets and padded, run rectangles with Transformers' own attention (modeling/packing.py).

To add a backend for packed rows: write its function here, name it in NAMES and FUNCTIONS, and say in
`backend_candidates` when it is tried; its name joins the choices of `attn_backend` in arguments.py.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

NAMES = {"segments": "f2llm_segments", "varlen": "f2llm_varlen"}  # backend -> its name in Transformers
KERNELS = (  # module, function; the first that is installed and right is taken
    ("flash_attn_interface", "flash_attn_varlen_func"),  # FlashAttention 3
    ("flash_attn", "flash_attn_varlen_func"),  # FlashAttention 2
    ("torch.nn.attention.varlen", "varlen_attn"),
)
# (q, k, v [T, heads, head_dim], starts [n + 1], tokens of the longest text, scale) -> [T, heads, head_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
_CLOSE = 5e-2  # relative, of a kernel in bf16 to plain attention in fp32; a wrong one is off by half or more
_left_out: dict[str, str] = {}  # kernel -> why it cannot run on this machine


def segments(module, query, key, value, attention_mask, scaling=None, dropout=0.0, text_lengths=None, **_):
    """query [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    Raises:
        ValueError: a mask came, or no lengths: texts would see each other.
    """
    _only_packed(attention_mask, text_lengths)
    if query.device.type != "cpu":
        return _attend(query, key, value, text_lengths, scaling, dropout), None
    dtype = torch.promote_types(value.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):  # bf16's backward pass takes 2 to 4 times as long up to 128 tokens
        out = _attend(query.to(dtype), key.to(dtype), value.to(dtype), text_lengths, scaling, dropout)
        return out.to(value.dtype), None


def _attend(query: Tensor, key: Tensor, value: Tensor, lengths, scaling: float | None, dropout: float) -> Tensor:
    """Causal attention, text by text: query [1, heads, T, head_dim] -> [1, T, heads, head_dim]."""
    sizes = lengths.tolist()
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    out = []
    for q, k, v in zip(queries, keys, values, strict=True):  # [1, heads, length of one text, head_dim]
        out.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        )
    return torch.cat(out, dim=2).transpose(1, 2)


def varlen(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, text_lengths=None, text_starts=None, **_
):
    """query [1, heads, T, head_dim] -> [1, T, heads, head_dim], in bf16 or fp16.

    Raises:
        ValueError: a mask came, no lengths, dropout, or numbers that no kernel takes.
    """
    _only_packed(attention_mask, text_lengths)
    if dropout:
        raise ValueError("varlen attention has no dropout, but this model uses it: set attn_backend to buckets")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"varlen attention takes bf16 or fp16, not {dtype}")
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [T, heads, head_dim]
    scaling = 1 / math.sqrt(q.shape[-1]) if scaling is None else scaling
    return kernel()(q, k, v, text_starts, int(text_lengths.max()), scaling)[None], None


def kernel() -> Kernel | None:
    """The best kernel that is installed and was not left out by `try_kernels`; None if there is none."""
    for call in installed_kernels():
        if call.__name__ not in _left_out:
            return call
    return None


@cache  # every layer of every step asks
def installed_kernels() -> list[Kernel]:
    """The kernels that can be imported, best first."""
    found = []
    for module, name in KERNELS:
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
        call = _adapted(function)
        call.__name__ = f"{module}.{name}"
        found.append(call)
    return found


class HeadShape(NamedTuple):
    """The heads of a decoder's attention."""

    heads: int
    kv_heads: int
    head_dim: int


def head_shape(config: PretrainedConfig) -> HeadShape:
    """The heads that a decoder's config describes."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return HeadShape(heads, kv_heads, head_dim)


def try_kernels(device: torch.device, shapes: Iterable[HeadShape]) -> list[str]:
    """Leave out the kernels that cannot run on this device, or are wrong there, down to the first that is right.

    That a package is installed says little: FlashAttention 3 runs on Hopper cards alone, some kernels have no backward
    pass for wide heads. Three texts of 13 tokens in all are enough, so this needs no model and next to no memory.

    Args:
        shapes: of every model that will run here.

    Returns:
        Why each kernel before the one that stays was left out, one line each.
    """
    lines = []
    for call in installed_kernels():
        problem = _left_out.get(call.__name__)
        for shape in shapes:
            problem = problem or _kernel_problem(call, device, shape)
        if problem is None:
            break
        _left_out[call.__name__] = problem
        lines.append(f"{call.__name__}: {problem}")
    return lines


def _kernel_problem(call: Kernel, device: torch.device, shape: HeadShape) -> str | None:
    """Why a kernel is not taken; None if values and gradients are those of plain attention in fp32."""
    lengths = torch.tensor([5, 1, 7])
    starts = torch.tensor([0, 5, 6, 13], dtype=torch.int32, device=device)
    scale = 1 / math.sqrt(shape.head_dim)
    queries = _waves(shape.heads, shape.head_dim, 0.0, device)
    keys = _waves(shape.kv_heads, shape.head_dim, 1.0, device)
    values = _waves(shape.kv_heads, shape.head_dim, 2.0, device)

    def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q.bfloat16(), k.bfloat16(), v.bfloat16(), starts, int(lengths.max()), scale)

    def plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, heads, T, head_dim]
        return _attend(*rows, lengths, scale, 0.0)[0]

    expected = _value_and_gradients(plainly, [queries, keys, values])
    try:
        found = _value_and_gradients(by_kernel, [queries, keys, values])
    except Exception as error:  # whatever somebody else's kernel raises
        return " ".join(f"{type(error).__name__} {error}".split())[:200]
    for what, ours, theirs in zip(("values", "gradients"), found, expected, strict=True):
        difference = float((ours - theirs).norm() / theirs.norm())
        if not difference <= _CLOSE:  # NaN comes here too
            return f"its {what} are {difference:.0%} away from those of plain attention"
    return None


def _waves(heads: int, head_dim: int, phase: float, device: torch.device) -> Tensor:
    """Numbers that differ everywhere, [13, heads, head_dim], without drawing any: the random state stays."""
    count = 13 * heads * head_dim
    return torch.sin(torch.arange(count, device=device) * 0.7 + phase).view(13, heads, head_dim)


def _value_and_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What `attend` makes of q, k, v, and the gradients to all three: flat, fp32."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        out = attend(*leaves).float()  # [T, heads, head_dim]
        gradients = torch.autograd.grad((out * torch.cos(out.detach() * 3 + 1)).sum(), leaves)
    return out.detach().flatten(), torch.cat([gradient.flatten() for gradient in gradients])


def _adapted(function: Callable) -> Kernel:
    """One way to call kernels whose signatures differ: torch 2.10 has `is_causal`, later ones a window and, from 2.12
    on, a flag for grouped queries that must then be given; FlashAttention says `causal` and may return a tuple."""
    known = inspect.signature(function).parameters
    options: dict = {}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    if "causal" in known:
        options["causal"] = True
    elif "is_causal" in known:
        options["is_causal"] = True
    else:
        options["window_size"] = (-1, 0)  # everything before a token, nothing behind it
    takes_deterministic = "deterministic" in known  # FlashAttention's own; torch's kernel asks torch
    scale_name = next((name for name in ("softmax_scale", "scale") if name in known), None)

    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        if takes_deterministic:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if scale_name:
            out = function(q, k, v, starts, starts, longest, longest, **options, **{scale_name: scale})
        else:  # the kernel divides by the root of the width
            out = function(q * (scale * math.sqrt(q.shape[-1])), k, v, starts, starts, longest, longest, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def _only_packed(mask: Tensor | None, lengths) -> None:
    if lengths is None or mask is not None:
        raise ValueError("packed attention needs text_lengths and no mask: without them texts would see each other")


FUNCTIONS = {"segments": segments, "varlen": varlen}


def register() -> None:
    """Make the functions known to Transformers; what stands there already stays (kernels.py wraps them otherwise)."""
    for backend, function in FUNCTIONS.items():
        if NAMES[backend] not in AttentionInterface():
            AttentionInterface.register(NAMES[backend], function)


# ------------------------------------------------------------------------------------------ choice


def is_packed(backend: str) -> bool:
    """Whether a backend takes all texts of a batch as one packed row."""
    return backend in NAMES


def backend_candidates(backend: str, on_cpu: bool, windowed: bool, equal_calls: bool, half: bool = False) -> list[str]:
    """The backends to try, best first.

    Args:
        backend: what the user said; "auto" leaves it to this function.
        on_cpu: there is no GPU.
        windowed: some layers have a sliding window, which a packed row would not honour.
        equal_calls: every process must call the decoder equally often; buckets differ between processes.
        half: the decoder computes in bf16 or fp16.
    """
    if backend != "auto":
        return [backend]
    candidates = []
    if not windowed:
        if half and not on_cpu and kernel():
            candidates.append("varlen")
        if on_cpu or equal_calls:
            candidates.append("segments")
    candidates.append("padded" if equal_calls else "buckets")
    return candidates


def explain_backend(backend: str, asked: str, on_cpu: bool, windowed: bool, half: bool) -> str:
    """Why the model has this backend, for people; the arguments are those of `backend_candidates`."""
    if backend == asked:
        return "as asked"
    if backend == "varlen":
        return kernel().__name__
    if backend == "segments" and on_cpu:
        return "no GPU"
    if windowed:
        return "it has sliding-window layers"
    if not on_cpu and not half:
        return "kernels for packed texts take bf16 or fp16"
    if not on_cpu and kernel() is None:
        return f"no kernel for packed texts {'runs here' if installed_kernels() else 'is installed'}"
    if is_packed(backend):
        return "the first that was exact when tried"
    return "packed texts were not exact when tried"
