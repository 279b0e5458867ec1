"""Fewer and larger kernels in a decoder's layers: torch.compile, layer by layer, and Liger's on CUDA.

Both round otherwise and change nothing else: a model is run before and after, and refused where it embeds otherwise.

    python -m pytest tests/training/test_kernels.py
"""

import inspect
from collections.abc import Callable
from importlib import import_module

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from model import Embedder
from modeling import attention
from modeling.packing import MULTIPLE

CLOSE = 2e-2  # relative; bf16 rounds to 4e-3
_LIGER = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(model: Embedder) -> list[str]:
    """RMSNorm, rotary positions and SwiGLU by Liger's kernels. Returns why that cannot be, one line each."""
    decoder = model.decoder()
    try:
        known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        return [f"liger: {error}: pip install liger-kernel"]
    if decoder.config.model_type not in known:
        return [f"liger: has no kernels for a {decoder.config.model_type}: set it to false"]
    apply = known[decoder.config.model_type]
    # Its default replaces the forward pass by one with a language-model head.
    known_options = inspect.signature(apply).parameters
    options = {name: value for name, value in _LIGER.items() if name in known_options}
    return _try_change(model, "liger", lambda: apply(model=decoder, **options))


def compile_layers(model: Embedder, backend: str = "inductor") -> list[str]:
    """Compile each of the decoder's layers around its attention. Returns why that cannot be, one line each.

    All layers share a compilation, and the second one serves every number of tokens; the rows are rounded up to
    MULTIPLE tokens by a text that nobody reads. Training or not, gradients or not, recomputed or not have theirs.
    Attention stays as it is: it depends on the lengths of the texts, and would be compiled anew for each batch.
    """
    if not attention.is_packed(model.backend):
        return [f"compile: with attn_backend segments or varlen, not {model.backend}: set it to false"]
    return _try_change(model, "compile", lambda: _compile(model, backend))


def _compile(model: Embedder, backend: str) -> None:
    if backend == "inductor":  # dropout as without it, so that a step in parts draws the same masks in both passes
        import_module("torch._inductor.config").fallback_random = True
    # Above its limit torch runs layers uncompiled, without a word: training, validation, parts and recomputing take 8.
    import_module("torch._dynamo").config.recompile_limit = 64
    uncompiled = torch.compiler.disable(attention.FUNCTIONS[model.backend])
    AttentionInterface.register(attention.NAMES[model.backend], uncompiled)
    for layer in model.layers():
        layer.compile(backend=backend)  # in place: names in checkpoints stay
    model.multiple = MULTIPLE


def _try_change(model: Embedder, name: str, change: Callable[[], None]) -> list[str]:
    """Change the model, and say why it must not stay so: it cannot run, or embeds otherwise."""
    before = _embeddings(model)
    try:
        change()
        after = _embeddings(model)
    except (RuntimeError, ImportError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        return [f"{name}: cannot run here ({reason}): set it to false"]
    difference = float((after - before).norm() / before.norm())
    if difference < CLOSE:
        return []
    return [f"{name}: embeddings come out {difference:.1%} away: set it to false"]


def _embeddings(model: Embedder) -> Tensor:
    """Embeddings of three short texts, [3, d], with a backward pass that leaves no gradient behind."""
    mode = model.training
    lengths = np.array([40, 17, 7])
    tokens = torch.arange(64, device=next(model.parameters()).device)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=tokens.device)
    model.eval()
    embeddings = model(tokens, starts, lengths)  # [3, d]
    torch.autograd.backward(embeddings, torch.ones_like(embeddings))
    model.zero_grad()
    model.train(mode)
    return embeddings.detach()
