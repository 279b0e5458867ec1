"""Attention over one packed row: causal within each text, nothing between texts.

    segments    F.scaled_dot_product_attention once a text; any device and precision
    varlen      one kernel for all texts, CUDA, bf16 or fp16: FlashAttention 3 or 2 where installed, else torch's own

Both are registered with Transformers, which hands them what `model.Embedder` gives its decoder: the texts' lengths.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

NAMES = {"segments": "f2llm_segments", "varlen": "f2llm_varlen"}  # backend -> its name in Transformers
KERNELS = (  # module, function; the first that is installed is taken
    ("flash_attn_interface", "flash_attn_varlen_func"),
    ("flash_attn", "flash_attn_varlen_func"),
    ("torch.nn.attention.varlen", "varlen_attn"),
)


def register() -> None:
    """Make both known to Transformers; what stands there already stays (fusion.py keeps them from being compiled)."""
    for backend, function in (("segments", segments), ("varlen", varlen)):
        if NAMES[backend] not in AttentionInterface():
            AttentionInterface.register(NAMES[backend], function)


def segments(module, query, key, value, attention_mask, scaling=None, dropout=0.0, text_lengths=None, **_):
    """query [1, heads, T, head_dim] -> [1, T, heads, head_dim].

    Raises:
        ValueError: a mask came, or no lengths: texts would see each other.
    """
    _only_packed(attention_mask, text_lengths)
    parts = zip(*(x.split(text_lengths.tolist(), dim=2) for x in (query, key, value)), strict=True)
    out = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in parts
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


def varlen(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, text_lengths=None, text_starts=None, **_
):
    """query [1, heads, T, head_dim] -> [1, T, heads, head_dim], in bf16 or fp16.

    Raises:
        ValueError: a mask came, no lengths, dropout, or numbers that no kernel takes.
    """
    _only_packed(attention_mask, text_lengths)
    if dropout:
        raise ValueError("varlen attention has no dropout, and this model wants some: set attn_backend to buckets")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"varlen attention takes bf16 or fp16, not {dtype}")
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # [T, heads, head_dim]
    scaling = 1 / math.sqrt(q.shape[-1]) if scaling is None else scaling
    return kernel()(q, k, v, text_starts, int(text_lengths.max()), scaling)[None], None


@cache  # every layer of every step asks
def kernel() -> Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor] | None:
    """A function (q, k, v [T, heads, head_dim], starts [n + 1], longest, scale) -> [T, heads, head_dim]; or None."""
    for module, name in KERNELS:
        try:
            function = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
        call = _adapted(function)
        call.__name__ = f"{module}.{name}"
        return call
    return None


def _adapted(function: Callable) -> Callable:
    """One way to call kernels whose signatures differ: torch 2.10 has `is_causal`, later ones a window and, from 2.12
    on, a flag for grouped queries that must then be given; FlashAttention says `causal` and may return a tuple."""
    known = inspect.signature(function).parameters
    options: dict = {"enable_gqa": True} if "enable_gqa" in known else {}
    causal = next((name for name in ("causal", "is_causal") if name in known), None)
    options |= {causal: True} if causal else {"window_size": (-1, 0)}
    scale_name = next((name for name in ("softmax_scale", "scale") if name in known), None)

    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float) -> Tensor:
        if scale_name:
            out = function(q, k, v, starts, starts, longest, longest, **options, **{scale_name: scale})
        else:  # the kernel divides by the root of the width
            out = function(q * (scale * math.sqrt(q.shape[-1])), k, v, starts, starts, longest, longest, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def _only_packed(mask: Tensor | None, lengths) -> None:
    if lengths is None or mask is not None:
        raise ValueError("packed attention needs text_lengths and no mask: without them texts would see each other")
