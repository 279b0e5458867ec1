"""GiB on a GPU for each size of Qwen3 under each engine: parameters counted, activations measured, the rest computed.

    python -m benchmarks.memory [--gpus 8]

Activations are what autograd keeps of one real-size decoder layer in bf16 on packed texts, by saved-tensor hooks; that
needs no GPU. States are the bytes that each engine keeps by design. What a GPU adds (CUDA context, allocator, NCCL
buffers: a few GiB) is not in the table.
"""

import argparse

import torch
from torch import nn
from transformers import AutoModel, Qwen3Config

from benchmarks.common import QWEN3, qwen3_config
from model import Embedder
from training import memory

TEXTS, LENGTH = 4, 128  # of the batch whose activations are counted
GIB, MIB, KIB = 2**30, 2**20, 2**10


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    gpus = parser.parse_args().gpus
    titles = [
        "model", "backbone", "DDP", f"ZeRO-2, {gpus} GPUs", f"FSDP2, {gpus} GPUs", "LoRA, DDP",
        f"LoRA, FSDP2, {gpus} GPUs", "a token", "a token, checkpointing",
    ]  # fmt: skip
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for size in QWEN3:
        print(f"| {' | '.join(row(size, gpus))} |")


def row(size: str, gpus: int) -> list[str]:
    """The cells of one size."""
    config = qwen3_config(size)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    whole = parameters(model)
    states = state_bytes(whole, parameters(model.layers[0]), parameters(model.embed_tokens), gpus)
    per_layer = saved_bytes(config) / (TEXTS * LENGTH)  # per token
    per_token = per_layer * config.num_hidden_layers
    layer_input = 2 * config.hidden_size  # bf16; all that is kept of a layer whose activations are recomputed
    per_token_recomputed = layer_input * config.num_hidden_layers + per_layer
    return [
        size,
        f"{whole / 1e9:.2f} billion",
        *[f"{needed / GIB:.1f}" for needed in states],
        f"{per_token / MIB:.2f} MiB",
        f"{per_token_recomputed / KIB:.0f} KiB",
    ]


def parameters(module: nn.Module) -> int:
    """How many weights a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


def state_bytes(whole: int, layer: int, table: int, gpus: int) -> list[float]:
    """Bytes of weights, gradients and AdamW moments on one GPU: DDP, ZeRO-2, FSDP2, LoRA under DDP, under FSDP2.

    Under FSDP2 two layers and the embedding table are whole at a time, in bf16 with their gradients, and one of them
    once more in fp32 while its gradient is summed.

    Args:
        whole, layer, table: weights of the model, of one layer, of the embedding table.
    """
    at_work = (2 + 2) * (2 * layer + table) + 4 * max(layer, table)
    frozen_at_work = 2 * (2 * layer + table)  # bf16, no gradients; the adapters are a few MiB
    return [
        16 * whole,  # fp32 weights, gradients, two moments
        2 * whole + (2 + 12) * whole / gpus,  # bf16 weights; bf16 gradients, fp32 masters and moments in parts
        16 * whole / gpus + at_work,
        4 * whole,
        4 * whole / gpus + frozen_at_work,
    ]


def saved_bytes(config: Qwen3Config) -> int:
    """Bytes that autograd keeps of one layer for TEXTS packed texts of LENGTH tokens, parameters not counted."""
    changes = {"num_hidden_layers": 1, "vocab_size": 64, "layer_types": None}
    one_layer = Qwen3Config(**config.to_dict() | changes)
    model = Embedder(AutoModel.from_config(one_layer, dtype=torch.bfloat16), "segments").train()
    return memory.kept_bytes(model, LENGTH, TEXTS)


if __name__ == "__main__":
    main()
