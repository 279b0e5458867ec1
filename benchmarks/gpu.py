"""What a GPU makes of it: one command on any CUDA machine, without a network and without `datasets`.

    python -m benchmarks.gpu                            Qwen3-0.6B and 4B from their configs, random weights
    python -m benchmarks.gpu --liger true               all rows with Liger's kernels
    python -m benchmarks.gpu --sizes toy --steps 2      the same on a CPU, in seconds; for the tests

First the backends must agree. Then the published layout (padded, activation checkpointing; its best legal kernel
without flash-attn: causal SDPA without a mask) and ours, plain, compiled and in parts, step in turn on the same tuples
with the same losses and optimizer; what ours recomputes is chosen from memory (memory.py). tuples/s, real tokens/s, MFU
of real tokens (padding is waste) against the datasheet and against a matrix product measured here.
"""

import argparse
import gc
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, Qwen3Config

from benchmarks.lengths import SHAPES, packed, padding_ratio, tuples
from benchmarks.step import Alone, frozen
from data.batch import Batch, split_by_budget
from model import Embedder, backend_candidates, choose_backend
from modeling.backbone import add_lora
from training import kernels, memory, two_pass
from training.objective import Objective

SIZES = {  # name -> (vocabulary, width, MLP width, layers, heads, key-value heads, head width)
    "toy": (512, 64, 128, 2, 4, 2, 16),
    "0.6B": (151936, 1024, 3072, 28, 16, 8, 128),
    "4B": (151936, 2560, 9728, 36, 32, 8, 128),
}
DATASHEET = 989e12  # dense bf16 FLOP/s of H100 and H200


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    name: str
    backend: str
    every: int  # recompute every so many layers; 0 = none
    budget: int = 0  # tokens of a forward pass; 0 = all at once
    compiled: bool = False


def main() -> None:
    """Check the backends, then measure every size, with and without LoRA, on every distribution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.6B,4B", help=f"of {', '.join(SIZES)} (default %(default)s)")
    parser.add_argument("--tuples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--budget", type=int, default=16384, help="tokens of a forward pass, ours (default %(default)s)"
    )
    parser.add_argument("--compile", type=json.loads, default=True, help="a row with compiled layers")
    parser.add_argument("--liger", type=json.loads, default=False)
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = matmul_ceiling(device)
    named = torch.cuda.get_device_name() if device.type == "cuda" else "CPU: figures are of no interest"
    print(
        f"{named}, torch {torch.__version__}; bf16 matrix product {ceiling / 1e12:,.1f} TFLOP/s, the datasheet has 989"
    )
    print(f"steps of {flags.tuples} tuples; 'in parts' has at most {flags.budget:,} tokens a forward pass")
    for size in flags.sizes.split(","):
        for lora in (False, True):
            measure(size, lora, device, ceiling, flags)


def measure(size: str, lora: bool, device: torch.device, ceiling: float, flags: argparse.Namespace) -> None:
    """One model: agreement of the backends, then the table."""
    OPTIMIZERS.clear(), COMPILED.clear()  # and with them the model before
    gc.collect()
    config = config_of(size)
    model = build(config, lora, device)
    candidates = backend_candidates("auto", device.type == "cpu", False, one_call=False, half=device.type == "cuda")
    with autocast(device):
        problems = choose_backend(model, candidates)
        problems += kernels.use_liger(model) if flags.liger else []
    assert not problems, problems
    best, difference = model.backend, disagreement(model, device)
    print(f"\nQwen3-{size}, {'LoRA' if lora else 'full'}: {best}, difference to padded {difference:.1e}")
    assert difference < 5e-2, "the backends disagree"
    with autocast(device):
        cost = memory.cost_of(model)
        free = memory.for_activations(memory.free_bytes(device, 1), model, model.layers(), sharded=False)
        if flags.compile:
            compiled = kernels.compile_layers(model)
            assert not compiled, compiled
            COMPILED[id(model)] = [layer._compiled_call_impl for layer in model.layers()]
    for shape in SHAPES:
        lengths = tuples(shape, flags.tuples)
        policy = memory.choose(cost, free, int(lengths.sum()), int(lengths.max()), None, None)
        variants = [
            Variant("published layout", "padded", 1),
            Variant("ours", best, policy.every, policy.limit),
            *([Variant("ours, compiled", best, policy.every, policy.limit, True)] if flags.compile else []),
            Variant("ours, in parts", best, 0, min(flags.budget, policy.limit)),
        ]
        print(f"{shape}: {lengths.sum():,} tokens a step, padding ratio {padding_ratio(lengths):.2f}; "
              f"ours: activations {memory.spoken(policy.every)}, at most {policy.limit:,} tokens a pass")  # fmt: skip
        print(f"  {'':18}{'tuples/s':>10}{'tokens/s':>12}{'MFU 989':>9}{'MFU here':>10}{'peak GiB':>10}{'loss':>9}")
        report(model, shape, variants, config, lora, device, ceiling, flags)


def report(model, shape, variants, config, lora, device, ceiling, flags) -> None:
    """Steps of all variants in turn, and a line for each."""
    batch = frozen(shape, flags.tuples)
    batch = Batch(**vars(batch) | {"tokens": batch.tokens % config.vocab_size}).to(device)
    spent, peaks, losses = ({variant: [] for variant in variants} for _ in range(3))
    lost = set()
    for round_ in range(flags.steps + 2):  # two to warm up
        for variant in variants:
            if variant in lost:
                continue
            try:
                seconds, peak, loss = step(model, batch, variant, device)
            except torch.OutOfMemoryError:
                lost.add(variant)
                model.zero_grad()
                torch.cuda.empty_cache()
                continue
            if round_ >= 2:
                spent[variant].append(seconds), peaks[variant].append(peak), losses[variant].append(loss)
    flops, tokens = step_flops(config, tuples(shape, flags.tuples), lora), int(batch.lengths.sum())
    for variant in variants:
        if variant in lost:
            print(f"  {variant.name:18}out of memory")
            continue
        best = sorted(spent[variant])[len(spent[variant]) // 2]
        print(f"  {variant.name:18}{flags.tuples / best:10.1f}{tokens / best:12,.0f}{flops / best / DATASHEET:9.1%}"
              f"{flops / best / ceiling:10.1%}{max(peaks[variant]):10.1f}{losses[variant][0]:9.4f}")  # fmt: skip


def step(model: Embedder, batch: Batch, variant: Variant, device: torch.device) -> tuple[float, float, float]:
    """Seconds, peak GiB and loss of one step; the update has a learning rate of 0, so that all steps are alike."""
    model.backend = variant.backend
    model.recompute(variant.every)
    model.multiple = kernels.MULTIPLE if variant.compiled else 1
    for layer, calls in zip(model.layers(), COMPILED.get(id(model), []), strict=False):
        layer._compiled_call_impl = calls if variant.compiled else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS.setdefault(id(model), torch.optim.AdamW(trained, 0.0, fused=True))
    goal = Objective(0.05, {model.hidden_size: 1.0})
    batch = Batch(**vars(batch) | {"cuts": tuple(split_by_budget(batch.lengths, variant.budget))})
    embed = Unmasked(model) if variant.backend == "padded" else model

    def forward(*texts) -> Tensor:
        with autocast(device):  # for each pass: casts cached without gradients must not meet one that wants them
            return embed(*texts)

    def loss_of(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = goal.terms(batch, embeddings, True)
        return goal.total(terms, embeddings), terms

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(device)
    began = time.perf_counter()
    terms = two_pass.backward(Alone, forward, batch, 0, loss_of)
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    wait(device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return time.perf_counter() - began, peak, float(sum(terms.values()))


OPTIMIZERS: dict[int, torch.optim.Optimizer] = {}  # of a model
COMPILED: dict[int, list] = {}  # of a model, what torch.compile made of each of its layers


class Unmasked(nn.Module):
    """The padded layout at its best: right-padded rows without a mask, which a causal decoder does not need."""

    def __init__(self, model: Embedder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, lengths) -> Tensor:
        """[n, d], as the Embedder's."""
        from model import last_token_pool, rectangle

        ids, _ = rectangle(tokens, cu_seqlens.diff(), int(lengths.max()))
        return last_token_pool(self.model.states("sdpa", input_ids=ids), cu_seqlens.diff()).float()


@torch.no_grad()
def disagreement(model: Embedder, device: torch.device) -> float:
    """The largest relative difference of an embedding between the model's backend and the padded one."""
    batch, backend = packed(tuples("MS-MARCO-like", 2), model.backbone.config.vocab_size, str(device)), model.backend
    found = []
    for model.backend in (backend, "padded"):
        with autocast(device):
            found.append(model.eval()(*batch))
    model.backend = backend
    model.train()
    return float(((found[0] - found[1]).norm(dim=1) / found[1].norm(dim=1)).max())


def config_of(size: str) -> Qwen3Config:
    """The architecture of a published size."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    return Qwen3Config(**dict(zip(names, SIZES[size], strict=True)))


def build(config: Qwen3Config, lora: bool, device: torch.device) -> Embedder:
    """Random weights in fp32, made on the device."""
    torch.manual_seed(0)
    with device:
        backbone = AutoModel.from_config(config, dtype=torch.float32)
    if lora:
        backbone = add_lora(backbone, 8, 32, 0.0, ["q_proj", "v_proj"])
    return Embedder(backbone.to(device), "segments").train()


def step_flops(config: Qwen3Config, lengths, lora: bool) -> float:
    """FLOPs that real tokens need: 2 a weight and token forward, twice that backward (LoRA: once), causal attention."""
    c = config
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layer = c.hidden_size * (heads + 3 * c.intermediate_size) + c.num_attention_heads * c.head_dim * c.hidden_size
    attention = c.num_attention_heads * c.head_dim * (lengths.astype(float).flatten() ** 2).sum()  # half of a square
    return 2 * c.num_hidden_layers * (layer * lengths.sum() * (2 if lora else 3) + attention * 3)


def matmul_ceiling(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product, the best of several."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def autocast(device: torch.device):
    """bf16 compute on a GPU; nothing on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
