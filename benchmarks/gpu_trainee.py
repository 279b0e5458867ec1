"""A model that several systems train in turn, step by step, on the same tuples; for benchmarks.gpu_speed.

The published layout pads all texts of a step to the longest and recomputes all activations; its best legal kernel
without flash-attn is causal attention without a mask. Sentence Transformers pads column by column.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common import TEMPERATURE, add_gradients, batch_of_shape, in_parts
from benchmarks.gpu_model import PublishedLayout, autocast, free_memory, wait
from benchmarks.step import columns
from data.batch import Batch
from model import Embedder
from modeling.packing import MULTIPLE
from training import kernels


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    name: str
    backend: str
    recompute_every: int = 0  # recompute every so many layers; 0 = none
    max_tokens_per_forward: int = 0  # 0 = all at once
    compiled: bool = False
    texts_at_once: int = 0  # of Sentence Transformers' cached loss; 0 = our own step


@dataclass(frozen=True)
class Step:
    """What one step took and gave."""

    seconds: float
    peak_bytes: int  # of the GPU's memory; 0 on a CPU
    loss: float


@dataclass(frozen=True)
class Work:
    """The tuples of a step on the device, as both systems take them."""

    batch: Batch
    columns: list[dict[str, Tensor]]  # queries, positives, each negative: right-padded ids and mask


def work_of(shape: str, count: int, vocab_size: int, device: torch.device) -> Work:
    """`count` tuples with the text lengths of a frozen distribution."""
    batch = batch_of_shape(shape, count, vocab_size)
    theirs = [{name: ids.to(device) for name, ids in column.items()} for column in columns(batch)]
    return Work(batch.to(device), theirs)


class Trainee:
    """A model that all variants train in turn.

    Args:
        model: with random weights; only what requires a gradient is trained.
    """

    def __init__(self, model: Embedder, device: torch.device):
        self.model = model
        self.device = device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 0.0, fused=True)  # no learning: all steps are alike
        self.plain_layers = self._layer_code()
        self.compiled_layers = None  # the same of compiled ones, once there are any
        self.cached_losses: dict[int, nn.Module] = {}  # Sentence Transformers', by texts at once

    def make_moments(self) -> None:
        """Have the optimizer keep what it keeps from its first step on, so that no variant has more room than others.

        Raises:
            torch.OutOfMemoryError: weights, gradients and moments alone do not fit.
        """
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def compile_layers(self, compiler: str | Callable) -> list[str]:
        """Compile every layer, and keep the results, so that variants can turn them on and off. Returns problems."""
        with autocast(self.device):
            problems = kernels.compile_layers(self.model, compiler)
        self.compiled_layers = self._layer_code()
        return problems

    def _layer_code(self) -> list[tuple[type, object]]:
        """What each layer runs: its class, and what torch.compile put in the place of its call."""
        return [(type(layer), layer._compiled_call_impl) for layer in self.model.layers()]

    def become(self, variant: Variant) -> None:
        """Set up the model for a variant."""
        self.model.backend = variant.backend
        self.model.recompute(variant.recompute_every)
        self.model.multiple = MULTIPLE if variant.compiled else 1
        code = self.compiled_layers if variant.compiled else self.plain_layers
        for layer, (kind, compiled_call) in zip(self.model.layers(), code, strict=True):
            layer.__class__ = kind
            layer._compiled_call_impl = compiled_call

    def cached_loss(self, texts_at_once: int) -> nn.Module:
        """Sentence Transformers' loss around this model, with as many texts in a forward pass."""
        if texts_at_once not in self.cached_losses:
            from sentence_transformers import SentenceTransformer, losses
            from sentence_transformers.models import Pooling

            pooling = Pooling(self.model.hidden_size, pooling_mode="lasttoken")
            modules = [Decoder(self.model, self.device), pooling]
            theirs = SentenceTransformer(modules=modules, device=str(self.device)).train()
            loss = losses.CachedMultipleNegativesRankingLoss(
                theirs, scale=1 / TEMPERATURE, mini_batch_size=texts_at_once
            )
            self.cached_losses[texts_at_once] = loss
        return self.cached_losses[texts_at_once]

    def try_step(self, work: Work, variant: Variant) -> Step | None:
        """A timed step; None if the memory is too small for it."""
        try:
            return self.timed_step(work, variant)
        except torch.OutOfMemoryError:
            pass  # below this the error is gone, and with it all that the step had made
        self.optimizer.zero_grad()
        gc.collect()
        free_memory(self.device)
        return None

    def timed_step(self, work: Work, variant: Variant) -> Step:
        """One step with its time and its peak of memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(self.device)
        began = time.perf_counter()
        loss = self.update(work, variant)
        wait(self.device)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return Step(seconds, peak, loss.item())

    def update(self, work: Work, variant: Variant) -> Tensor:
        """One step as training makes it: gradients, clipping, update. Returns the loss, [] on the device."""
        self.become(variant)
        if variant.texts_at_once:
            loss = self.cached_loss(variant.texts_at_once)(work.columns, None)
            loss.backward()
        else:
            loss = self._our_gradients(in_parts(work.batch, variant.max_tokens_per_forward), variant.backend)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _our_gradients(self, batch: Batch, backend: str) -> Tensor:
        """Add the gradient of a step to the weights; the padded layout at its best. Returns the loss."""
        embedder = PublishedLayout(self.model) if backend == "padded" else self.model

        def forward(*texts) -> Tensor:
            with autocast(self.device):  # of each pass: casts made without gradients must not meet one that wants them
                return embedder(*texts)

        return add_gradients(forward, batch, self.model.hidden_size)


class Decoder(nn.Module):
    """The model as Sentence Transformers' first module."""

    def __init__(self, model: Embedder, device: torch.device):
        super().__init__()
        self.model = model
        self.of_device = device

    def forward(self, features: dict) -> dict:
        """Adds token_embeddings [n, L, d]."""
        ids, mask = features["input_ids"], features["attention_mask"]  # [n, L] both
        with autocast(self.of_device):
            states = self.model.states("sdpa", input_ids=ids, attention_mask=mask)
        return features | {"token_embeddings": states}
