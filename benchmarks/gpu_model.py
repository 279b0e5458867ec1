"""A decoder of a published size with random weights, set up as training would set it up; for benchmarks.gpu.

What is said of a GPU holds for a CPU too, where the toy size runs in the tests.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, Qwen3Config

from benchmarks.common import qwen3_config
from model import Embedder, choose_backend
from modeling.attention import backend_candidates, head_shape, try_kernels
from modeling.backbone import add_lora
from modeling.packing import places_in_rectangle, rectangle
from modeling.versions import in_dtype
from training import memory, policy
from training.loss_memory import LossShape, loss_bytes

TOY = "toy"  # a size that a CPU trains in no time
DATASHEETS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # part of a GPU's name -> dense bf16 FLOP/s
LORA_TARGETS = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class StepPlan:
    """How training would run a step on this device, and the memory that it expects of it."""

    recompute_every: int  # recompute every such layer; 0 = none
    max_tokens_per_forward: int
    expected_bytes: float  # of the device's memory at the peak of the step


def config_of(size: str) -> Qwen3Config:
    """The architecture of a published size, or of one that a CPU trains in no time."""
    if size != TOY:
        return qwen3_config(size)
    return Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def build(config: Qwen3Config, lora: bool, device: torch.device) -> Embedder:
    """Random weights in fp32, made on the device."""
    torch.manual_seed(0)
    with device:
        backbone = AutoModel.from_config(config, **in_dtype(torch.float32))
    if lora:
        backbone = add_lora(backbone, 8, 32, 0.0, LORA_TARGETS)
    return Embedder(backbone.to(device), "segments").train()


def settle_backend(model: Embedder, device: torch.device) -> list[str]:
    """Give the model the backend that training would choose. Returns a line about everything that was left out.

    Raises:
        RuntimeError: no backend embeds right.
    """
    on_gpu = device.type == "cuda"
    lines = []
    if on_gpu:
        lines = try_kernels(device, [head_shape(model.decoder().config)])
    candidates = backend_candidates("auto", on_cpu=not on_gpu, windowed=False, equal_calls=False, half=on_gpu)
    with autocast(device):
        problems = choose_backend(model, candidates, lines.append)
    if problems:
        raise RuntimeError("; ".join(problems))
    return lines


def plan_step(model: Embedder, cost: memory.Cost, free: float, lengths: np.ndarray, device: torch.device) -> StepPlan:
    """What training would recompute in a step, and in how many parts; by the arithmetic that it chooses by.

    Args:
        cost: of a token, from `training.memory.cost_of`.
        free: bytes of the device before the first step, the weights already there.
        lengths: tokens of each text of the step, [tuples, texts of a tuple].
    """
    rows, texts = lengths.shape
    width = model.hidden_size
    losses = loss_bytes(LossShape(rows, rows, texts - 2, width, (width,)))
    usual = policy.UsualStep(int(lengths.sum()), float(lengths.mean()))
    layout = memory.Layout()
    longest = int(lengths.max())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    situation = policy.situation_of(model, cost, layout, name, free, losses, usual, longest)
    chosen = policy.choose_policy(situation)
    weights = situation.weights
    states = memory.weight_bytes(weights, layout) + memory.gradient_and_moment_bytes(weights, layout)
    of_a_pass = min(usual.tokens, max(chosen.max_tokens_per_forward, longest))
    expected = states + memory.working_bytes(weights, layout) + losses
    expected += of_a_pass * cost.per_token(chosen.recompute_every)
    return StepPlan(chosen.recompute_every, chosen.max_tokens_per_forward, expected)


class PublishedLayout(nn.Module):
    """The padded layout at its best: right-padded rows without a mask, which a causal decoder does not need."""

    def __init__(self, model: Embedder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        """[n, d], as the Embedder's."""
        longest = int(lengths.max())
        ids, _ = rectangle(tokens, cu_seqlens.diff(), longest)  # [n, longest]
        states = self.model.states("sdpa", input_ids=ids)  # [n, longest, d]
        return self.model.pool(states.flatten(0, 1), *places_in_rectangle(cu_seqlens.diff(), longest)).float()


def step_flops(config: Qwen3Config, lengths: np.ndarray, lora: bool) -> float:
    """FLOPs that real tokens need: 2 a weight and token forward, twice that backward (LoRA: once), causal attention."""
    head_width = config.num_attention_heads * config.head_dim
    query_key_value = head_width + 2 * config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (query_key_value + 3 * config.intermediate_size) + head_width * config.hidden_size
    products = weights * lengths.sum() * (2 if lora else 3)
    attention = head_width * (lengths.astype(float).flatten() ** 2).sum() * 3  # half of a square: scores, and values
    return float(2 * config.num_hidden_layers * (products + attention))


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    fastest = float("inf")
    for _ in range(20):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest


def datasheet(device_name: str) -> float | None:
    """Dense bf16 FLOP/s that a GPU's datasheet promises; None for one that is not known here."""
    for part, flops in DATASHEETS.items():
        if part in device_name:
            return flops
    return None


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 compute on a GPU; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> None:
    """Give back what the allocator keeps of models that are gone."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
