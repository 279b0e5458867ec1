"""What a GPU makes of it: one command on any CUDA machine, without a network and without `datasets`.

    python -m benchmarks.gpu                            Qwen3-0.6B and 4B from their configs, random weights
    python -m benchmarks.gpu --liger true               all rows with Liger's kernels
    python -m benchmarks.gpu --sizes toy --steps 2      the same on a CPU, in seconds; for the tests

First the backends must agree. Then the published layout (padded, activation checkpointing; its best legal kernel
without flash-attn: causal SDPA without a mask) and ours, plain, compiled and in parts, step in turn on the same tuples
with the same losses and optimizer; what ours recomputes is chosen from memory (training/memory.py). tuples/s, real
tokens/s, MFU of real tokens (padding is waste) against the datasheet and against a matrix product measured here.
"""

import argparse
import gc
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, Qwen3Config

from benchmarks.common import QWEN3, add_gradients, batch_of_shape, in_parts, qwen3_config
from benchmarks.lengths import SHAPES, packed, padding_ratio, tuples
from data.batch import Batch
from model import Embedder, choose_backend
from modeling.attention import backend_candidates
from modeling.backbone import add_lora
from modeling.packing import MULTIPLE, places_in_rectangle, rectangle
from training import kernels, memory
from training.loss_memory import LossShape, loss_bytes
from training.policy import Policy, UsualStep, choose_policy, format_recomputing, situation_of

DATASHEET = 989e12  # dense bf16 FLOP/s of H100 and H200
WARM_UP = 2  # steps of each variant that are not counted


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    name: str
    backend: str
    recompute_every: int  # recompute every so many layers; 0 = none
    budget: int = 0  # tokens of a forward pass; 0 = all at once
    compiled: bool = False


@dataclass(frozen=True)
class Step:
    """What one step took and gave."""

    seconds: float
    peak_gib: float  # of the GPU's memory; 0 on a CPU
    loss: float


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
        self.compiled_calls = []  # what torch.compile made of each layer; none until `compile_layers`

    def compile_layers(self) -> None:
        """Compile every layer, and keep the results, so that variants can turn them on and off."""
        problems = kernels.compile_layers(self.model)
        assert not problems, problems
        self.compiled_calls = [layer._compiled_call_impl for layer in self.model.layers()]

    def become(self, variant: Variant) -> None:
        """Set up the model for a variant."""
        self.model.backend = variant.backend
        self.model.recompute(variant.recompute_every)
        self.model.multiple = MULTIPLE if variant.compiled else 1
        if self.compiled_calls:
            for layer, call in zip(self.model.layers(), self.compiled_calls, strict=True):
                layer._compiled_call_impl = call if variant.compiled else None


def main() -> None:
    """Check the backends, then measure every size, with and without LoRA, on every distribution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.6B,4B", help=f"of toy, {', '.join(QWEN3)} (default %(default)s)")
    parser.add_argument("--tuples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--budget", type=int, default=16384, help="tokens of a forward pass, ours (default %(default)s)"
    )
    parser.add_argument("--compile", type=json.loads, default=True, help="a row with compiled layers")
    parser.add_argument("--liger", type=json.loads, default=False)
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: figures are of no interest"
    ceiling = matmul_ceiling(device)
    teraflops = f"{ceiling / 1e12:,.1f} TFLOP/s"
    print(f"{name}, torch {torch.__version__}; bf16 matrix product {teraflops}, the datasheet has 989")
    print(f"steps of {flags.tuples} tuples; 'in parts' has at most {flags.budget:,} tokens a forward pass")
    for size in flags.sizes.split(","):
        for lora in (False, True):
            measure(size, lora, device, ceiling, flags)


def measure(size: str, lora: bool, device: torch.device, ceiling: float, flags: argparse.Namespace) -> None:
    """One model: agreement of the backends, then a table for each distribution of lengths."""
    gc.collect()  # the model before refers to itself
    config = config_of(size)
    model = build(config, lora, device)
    settle_backend(model, device, flags.liger)
    difference = disagreement(model, device)
    kind = "LoRA" if lora else "full"
    print(f"\nQwen3-{size}, {kind}: {model.backend}, difference to padded {difference:.1e}")
    assert difference < 5e-2, "the backends disagree"
    best = model.backend
    trainee = Trainee(model, device)
    with autocast(device):
        cost = memory.cost_of(model)
        free = memory.free_bytes(device, 1)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        if flags.compile:
            trainee.compile_layers()
    for shape in SHAPES:
        lengths = tuples(shape, flags.tuples)
        losses = loss_bytes(LossShape(flags.tuples, flags.tuples, 7, model.hidden_size, (model.hidden_size,)))
        usual = UsualStep(int(lengths.sum()), float(lengths.mean()))
        found = situation_of(model, cost, memory.Layout(), name, free, losses, usual, int(lengths.max()))
        policy = choose_policy(found)
        print(
            f"{shape}: {lengths.sum():,} tokens a step, padding ratio {padding_ratio(lengths):.2f}; ours: activations "
            f"{format_recomputing(policy.recompute_every)}, at most {policy.token_limit:,} tokens a pass"
        )
        batch = batch_of_shape(shape, flags.tuples, config.vocab_size).to(device)
        variants = variants_of(best, policy, flags.budget, flags.compile)
        steps = take_turns(trainee, batch, variants, flags.steps)
        print_table(steps, flags.tuples, int(lengths.sum()), step_flops(config, lengths, lora), ceiling)


def settle_backend(model: Embedder, device: torch.device, liger: bool) -> None:
    """Give the model the backend that training would choose, and Liger's kernels where they are asked for."""
    on_gpu = device.type == "cuda"
    candidates = backend_candidates("auto", on_cpu=not on_gpu, windowed=False, one_call=False, half=on_gpu)
    with autocast(device):
        problems = choose_backend(model, candidates)
        if liger:
            problems += kernels.use_liger(model)
    assert not problems, problems


def variants_of(best: str, policy: Policy, budget: int, compiled: bool) -> list[Variant]:
    """The rows of a table.

    Args:
        best: the backend that training would choose, and `policy` what it would recompute.
        budget: tokens of a forward pass of the last row.
        compiled: whether there is a row with compiled layers.
    """
    every, limit = policy.recompute_every, policy.token_limit
    variants = [Variant("published layout", "padded", 1), Variant("ours", best, every, limit)]
    if compiled:
        variants.append(Variant("ours, compiled", best, every, limit, compiled=True))
    variants.append(Variant("ours, in parts", best, 0, min(budget, limit)))
    return variants


def take_turns(trainee: Trainee, batch: Batch, variants: list[Variant], count: int) -> dict[Variant, list[Step]]:
    """`count` steps of each variant, all in turn, after some that warm up; none of one that runs out of memory."""
    steps = {variant: [] for variant in variants}
    too_large = set()
    for round_number in range(WARM_UP + count):
        for variant in variants:
            if variant in too_large:
                continue
            try:
                measured = step(trainee, batch, variant)
            except torch.OutOfMemoryError:
                too_large.add(variant)
                steps[variant].clear()
                trainee.model.zero_grad()
                torch.cuda.empty_cache()
                continue
            if round_number >= WARM_UP:
                steps[variant].append(measured)
    return steps


def print_table(
    steps: dict[Variant, list[Step]], tuples_per_step: int, tokens_per_step: int, flops: float, ceiling: float
) -> None:
    """A line for each variant: its median step, its highest peak and its first loss.

    Args:
        flops: that the real tokens of a step need.
        ceiling: FLOP/s of a matrix product on this device.
    """
    print(f"  {'':18}{'tuples/s':>10}{'tokens/s':>12}{'MFU 989':>9}{'MFU here':>10}{'peak GiB':>10}{'loss':>9}")
    for variant, measured in steps.items():
        if not measured:
            print(f"  {variant.name:18}out of memory")
            continue
        seconds = statistics.median_high(step.seconds for step in measured)
        peak = max(step.peak_gib for step in measured)
        speeds = f"{tuples_per_step / seconds:10.1f}{tokens_per_step / seconds:12,.0f}"
        use = f"{flops / seconds / DATASHEET:9.1%}{flops / seconds / ceiling:10.1%}"
        print(f"  {variant.name:18}{speeds}{use}{peak:10.1f}{measured[0].loss:9.4f}")


def step(trainee: Trainee, batch: Batch, variant: Variant) -> Step:
    """One step as training makes it: gradients, clipping, update."""
    device, model = trainee.device, trainee.model
    trainee.become(variant)
    batch = in_parts(batch, variant.budget)
    embedder = Unmasked(model) if variant.backend == "padded" else model

    def forward(*texts) -> Tensor:
        with autocast(device):  # for each pass: casts cached without gradients must not meet one that wants them
            return embedder(*texts)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(device)
    began = time.perf_counter()
    loss = add_gradients(forward, batch, model.hidden_size)
    torch.nn.utils.clip_grad_norm_(trainee.trained, 1.0)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad()
    wait(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return Step(seconds, peak, loss.item())


class Unmasked(nn.Module):
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


@torch.no_grad()
def disagreement(model: Embedder, device: torch.device) -> float:
    """The largest relative difference of an embedding between the model's backend and the padded one."""
    texts = packed(tuples("MS-MARCO-like", 2), model.backbone.config.vocab_size, str(device))
    backend = model.backend
    model.eval()
    with autocast(device):
        own = model(*texts)  # [n, d]
        model.backend = "padded"
        padded = model(*texts)  # [n, d]
    model.backend = backend
    model.train()
    return float(((own - padded).norm(dim=1) / padded.norm(dim=1)).max())


def config_of(size: str) -> Qwen3Config:
    """The architecture of a published size, or of one that a CPU trains in no time."""
    if size != "toy":
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
        backbone = AutoModel.from_config(config, dtype=torch.float32)
    if lora:
        backbone = add_lora(backbone, 8, 32, 0.0, ["q_proj", "v_proj"])
    return Embedder(backbone.to(device), "segments").train()


def step_flops(config: Qwen3Config, lengths: np.ndarray, lora: bool) -> float:
    """FLOPs that real tokens need: 2 a weight and token forward, twice that backward (LoRA: once), causal attention."""
    head_width = config.num_attention_heads * config.head_dim
    query_key_value = head_width + 2 * config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (query_key_value + 3 * config.intermediate_size) + head_width * config.hidden_size
    products = weights * lengths.sum() * (2 if lora else 3)
    attention = head_width * (lengths.astype(float).flatten() ** 2).sum() * 3  # half of a square: scores, and values
    return 2 * config.num_hidden_layers * (products + attention)


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


def autocast(device: torch.device):
    """bf16 compute on a GPU; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
