"""Fewer and larger kernels in a decoder's layers: torch.compile, layer by layer, and Liger's on CUDA.

Both may round otherwise and must change nothing else: a model is run before and after, and refused where its embeddings
differ by more than rounding explains.

    python -m pytest tests/training/test_kernels.py
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from model import Embedder
from modeling import attention
from modeling.packing import MULTIPLE
from modeling.rounding import TEXTS, more_than_rounding

Compiler = Callable[[torch.fx.GraphModule, list[Tensor]], Callable]  # as torch.compile takes one

_EXACT = 1e-3  # relative, of fp32 itself
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
    device = next(decoder.parameters()).device

    def change() -> None:
        module = sys.modules[type(decoder).__module__]
        before = dict(vars(module))
        apply(model=decoder, **options)
        _keep_to_device(module, before, device.type)

    return _try_change(model, "liger", change)


def _keep_to_device(module: ModuleType, before: dict[str, object], device: str) -> None:
    """Undo what Liger changed for models on other devices than `device`.

    Besides the layers of the model it replaces names in Transformers' module. A decoder of the same kind that is
    loaded later on the CPU, as each saved folder is to be compared, would be made of Triton kernels and fail.

    Args:
        module: that the decoder's class comes from.
        before: its names as they were.
    """
    for name, original in before.items():
        replacement = getattr(module, name)
        if replacement is original:
            continue
        if isinstance(original, type):  # the layers that there are were changed one by one
            setattr(module, name, original)
        else:
            setattr(module, name, _by_device(original, replacement, device))


def _by_device(original: Callable, replacement: Callable, device: str) -> Callable:
    """A function of tensors that is `replacement` where the first of them is on `device`, else `original`."""

    @wraps(original)
    def call(first: Tensor, *rest, **options):
        chosen = replacement if first.device.type == device else original
        return chosen(first, *rest, **options)

    return call


def compile_layers(model: Embedder, backend: str | Compiler = "inductor") -> list[str]:
    """Compile each of the decoder's layers around its attention. Returns why that cannot be, one line each.

    All layers share a compilation, which serves every number of tokens; the rows are rounded up to MULTIPLE tokens by a
    text that nobody reads. Training or not, gradients or not, recomputed or not have theirs. Attention stays as it is:
    it depends on the lengths of the texts, and would be compiled anew for each batch.

    Args:
        backend: what turns a graph into a function: the name of one of torch's, or a function of its kind.
    """
    if not attention.is_packed(model.backend):
        return [f"compile: with attn_backend segments or varlen, not {model.backend}: set it to false"]
    counted = _Counted(backend)
    problems = _try_change(model, "compile", lambda: _compile(model, counted))
    if not problems and not counted.runs:
        problems = ["compile: torch compiles nothing of this decoder's layers: set it to false"]
    return problems


class _Counted:
    """A compiler that counts how often its functions run: torch leaves a layer as it is without a word."""

    def __init__(self, backend: str | Compiler):
        self.compiler = backend
        if isinstance(backend, str):
            self.compiler = import_module("torch._dynamo").lookup_backend(backend)
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        function = self.compiler(graph, inputs)

        def run(*tensors):
            self.runs += 1
            return function(*tensors)

        return run


def _compile(model: Embedder, backend: Compiler) -> None:
    # Inductor's dropout as without it, so that a step in parts draws the same masks in both passes.
    import_module("torch._inductor.config").fallback_random = True
    settings = import_module("torch._dynamo").config
    # Above its limit torch runs layers uncompiled, without a word: training, validation, parts and recomputing take 8.
    settings.recompile_limit = 64
    # It would cut the graphs at every 25 MB of gradients, so that DDP sends them early. Layers are cuts enough.
    settings.optimize_ddp = False
    uncompiled = torch.compiler.disable(attention.FUNCTIONS[model.backend])
    AttentionInterface.register(attention.NAMES[model.backend], uncompiled)
    compiled_kind = cache(lambda kind: _compiled_inside_checkpoint(kind, backend))
    for layer in model.layers():
        layer.__class__ = compiled_kind(type(layer))  # in place: names in checkpoints stay
    model.multiple = MULTIPLE


def _compiled_inside_checkpoint(kind: type[nn.Module], backend: Compiler) -> type[nn.Module]:
    """A class of layers whose forward pass is compiled, and recomputed from outside of what is compiled.

    Where a layer is recomputed, Transformers' class calls its forward pass by torch's checkpoint. torch.compile of the
    whole layer would meet that call, could not take attention into one graph with it, and would then leave all that is
    checkpointed uncompiled, in both passes. But Transformers puts the checkpoint around the forward pass of every
    subclass as well, and of the outermost alone (before 5.23 around `__call__`): so a subclass is compiled inside it.

    `dynamic` makes the first compilation serve any number of tokens. Otherwise torch would compile once for a fixed
    number, and again for all others. These two save different tensors, and where a layer ran by one of them and was
    recomputed by the other, torch would end the run.
    """
    compiled = torch.compile(kind.forward, backend=backend, dynamic=True)

    @wraps(kind.forward)
    def forward(self, *words, **named):
        # A function of its own: by torch's, tracing would take `kind` for the outermost class.
        return compiled(self, *words, **named)

    # Of the same name, because engines find the layers that they shard by the names of classes.
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "forward": forward})


def _try_change(model: Embedder, name: str, change: Callable[[], None]) -> list[str]:
    """Change the model, and say why it must not stay so: it cannot run, or embeds otherwise.

    In bf16 compiled layers round otherwise than plain ones, by 5 % in 36 layers. So both are compared with fp32.
    """
    exact = _exact_embeddings(model)
    plain = _embeddings(model)
    try:
        change()
        changed = _embeddings(model)
    except (RuntimeError, ImportError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:300]
        return [f"{name}: cannot run here ({reason}): set it to false"]
    distances = more_than_rounding(changed, plain, exact, _EXACT)
    if distances is None:
        return []
    after, before = distances
    return [f"{name}: embeddings come out {after:.1%} away from fp32, without it {before:.1%}: set it to false"]


@torch.no_grad()
def _exact_embeddings(model: Embedder) -> Tensor:
    """Embeddings of short texts in fp32, [n, d]; by rectangles, which every precision has."""
    backend, mode = model.backend, model.training
    model.backend = "buckets"
    model.eval()
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        embeddings = model(*_short_texts(model))
    model.backend = backend
    model.train(mode)
    return embeddings


def _embeddings(model: Embedder) -> Tensor:
    """The same texts' embeddings in the precision of the training, after a backward pass through all layers.

    The backward pass computes the gradient of one weight: those of all would take as much memory as the model.
    """
    mode = model.training
    model.eval()
    weight = _smallest_trained_weight(model)
    embeddings = model(*_short_texts(model))  # [n, d]
    torch.autograd.grad(embeddings.sum(), weight)
    model.train(mode)
    return embeddings.detach()


def _short_texts(model: Embedder) -> tuple[Tensor, Tensor, np.ndarray]:
    """Texts as `Embedder.forward` takes them."""
    lengths = np.array(TEXTS)
    tokens = torch.arange(lengths.sum(), device=next(model.parameters()).device)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=tokens.device)
    return tokens, starts, lengths


def _smallest_trained_weight(model: Embedder) -> Tensor:
    """The smallest trained weight of the first layer that has one: its gradient passes through all later layers."""
    for module in (*model.layers(), model):
        if hasattr(module, "unshard"):  # sharded: the weight that the forward pass uses is gathered from all processes
            module.unshard()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if trained:
            return min(trained, key=Tensor.numel)
    raise ValueError("nothing in this model is trained")
