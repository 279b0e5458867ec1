"""Part 1 of benchmarks.gpu: all ways to embed a text must agree, in their gradients too.

The gradient of one step in bf16 is computed by every backend that can run here, every attention kernel that is
installed, and compiled layers, each with all activations kept and with all recomputed. All are compared with the padded
layout in fp32. Even correct ways differ in bf16, by several percent in 36 layers. So a way counts as worse if it is
more than WORSE times as far from fp32 as the padded layout in bf16 is, recomputing as published.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.common import add_gradients, batch_of_shape
from benchmarks.gpu_model import build, config_of, free_memory, settle_backend
from data.batch import Batch
from model import Embedder
from modeling import attention
from training import kernels

WORSE = 1.5  # times the difference of the plain way
EXACT = 1e-3  # relative; below it nothing counts as a difference
TUPLES = 2  # 18 texts, between 4 and 1,000 tokens


@dataclass(frozen=True)
class Way:
    """One way to compute a step."""

    name: str
    backend: str
    recomputed: bool
    kernel: Callable | None = None  # of the backend varlen; None = the one that training would take


PLAIN = Way("padded, recomputed", "padded", recomputed=True)


def measure_equality(size: str, device: torch.device, compiler: str) -> dict:
    """The differences of all ways from fp32, for one size.

    Args:
        compiler: of torch.compile; "none" = no compiled layers.

    Returns:
        {"size", "backend": what training would choose, "notes": what that left out and why, "ways": [{"way",
        "embeddings", "gradients": relative differences from fp32, "worse"} or {"way", "left_out": why}]}
    """
    model = build(config_of(size), lora=False, device=device)
    notes = settle_backend(model, device)
    backend = model.backend
    batch = batch_of_shape("heavy-tailed", TUPLES, config_of(size).vocab_size).to(device)
    exact = _embeddings_and_gradients(model, batch, PLAIN, bf16=False)
    rows = [_compare(model, batch, PLAIN, exact)]
    for way in _ways(device):
        rows.append(_compare(model, batch, way, exact))
    rows += _rows_of_changed_layers(model, batch, backend, exact, compiler)
    for row in rows:
        if "left_out" not in row:
            row["worse"] = any(_is_worse(row[what], rows[0][what]) for what in ("embeddings", "gradients"))
    del model, exact
    free_memory(device)
    return {"size": size, "backend": backend, "notes": notes, "ways": rows}


def _ways(device: torch.device) -> Iterator[Way]:
    """Every way without changed layers, but the plain one."""
    yield Way("padded", "padded", recomputed=False)
    for backend in ("buckets", "segments"):
        yield Way(backend, backend, recomputed=False)
        yield Way(f"{backend}, recomputed", backend, recomputed=True)
    if device.type != "cuda":
        return
    for kernel in attention.installed_kernels():
        yield Way(f"varlen by {kernel.__name__}", "varlen", False, kernel)
        yield Way(f"varlen by {kernel.__name__}, recomputed", "varlen", True, kernel)


def _rows_of_changed_layers(model: Embedder, batch: Batch, backend: str, exact: tuple, compiler: str) -> list[dict]:
    """Rows of compiled layers and of Liger's; the model keeps the changes, so these come last."""
    changes = {}
    if compiler != "none":
        changes["compiled"] = lambda: kernels.compile_layers(model, compiler)
    if batch.tokens.is_cuda and find_spec("liger_kernel"):
        changes["Liger's kernels"] = lambda: kernels.use_liger(model)
    rows = []
    names = []
    for name, change in changes.items():
        model.backend = backend
        model.recompute(0)
        with _bf16(batch):
            problems = change()
        if problems:
            rows.append({"way": f"{backend}, {name}", "left_out": "; ".join(problems)})
            continue
        names.append(name)
        together = ", ".join([backend, *names])
        rows.append(_compare(model, batch, Way(together, backend, recomputed=False), exact))
        rows.append(_compare(model, batch, Way(f"{together}, recomputed", backend, recomputed=True), exact))
    return rows


def _compare(model: Embedder, batch: Batch, way: Way, exact: tuple[Tensor, dict[str, Tensor]]) -> dict:
    """One row: how far a way is from fp32, or why it cannot run here."""
    try:
        embeddings, gradients = _embeddings_and_gradients(model, batch, way, bf16=True)
    except Exception as error:  # whatever somebody else's kernel raises
        model.zero_grad()
        return {"way": way.name, "left_out": " ".join(f"{type(error).__name__} {error}".split())[:200]}
    exact_embeddings, exact_gradients = exact
    return {
        "way": way.name,
        "embeddings": _difference({"all": embeddings}, {"all": exact_embeddings}),
        "gradients": _difference(gradients, exact_gradients),
    }


def _embeddings_and_gradients(model: Embedder, batch: Batch, way: Way, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings [u, d] of a step's texts, and weight -> gradient of its losses."""
    model.backend = way.backend
    model.recompute(1 if way.recomputed else 0)
    seen = []

    def forward(*texts) -> Tensor:
        with _bf16(batch, bf16):
            embeddings = model(*texts)
        seen.append(embeddings.detach())
        return embeddings

    with _only_kernel(way.kernel):
        add_gradients(forward, batch, model.hidden_size)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()  # the gradients live on in the dictionary
    return torch.cat(seen), gradients


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative difference of all tensors together; one that was not found counts as 0.

    Raises:
        ValueError: there is nothing to compare: all that is expected is 0.
    """
    differences = []
    lengths = []
    for name, exact in expected.items():
        difference = found[name] - exact if name in found else exact
        differences.append(difference.double().square().sum())
        lengths.append(exact.double().square().sum())
    length = torch.stack(lengths).sum()
    if not length > 0:
        raise ValueError("nothing to compare: all of it is 0")
    return float((torch.stack(differences).sum() / length).sqrt())


def _is_worse(difference: float, plain: float) -> bool:
    """Whether a difference from fp32 is more than the plain way's by too much; one that is not a number always is."""
    return not difference <= max(WORSE * plain, EXACT)


def _bf16(batch: Batch, enabled: bool = True):
    """bf16 where the batch is, also on a CPU: without rounding there is nothing to compare."""
    return torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def _only_kernel(kernel: Callable | None) -> Iterator[None]:
    """Have the backend varlen call this kernel; None changes nothing."""
    usual = attention.kernel
    if kernel is not None:
        attention.kernel = lambda: kernel
    try:
        yield
    finally:
        attention.kernel = usual
