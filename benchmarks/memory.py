"""GiB on a GPU for each size of Qwen3 under each engine: parameters counted, activations measured, the rest computed.

    python -m benchmarks.memory [--gpus 8]

Activations are what autograd keeps of one real-size decoder layer in bf16 on packed texts, by saved-tensor hooks; that
needs no GPU. States are the bytes that each engine keeps by design. What a GPU adds (CUDA context, allocator, NCCL
buffers: a few GiB) is not in the table.
"""

import argparse

import torch
from transformers import AutoModel, Qwen3Config

from model import Embedder
from training import memory

SIZES = {  # name -> (width, MLP width, layers, heads)
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
    "14B": (5120, 17408, 40, 40),
}
VOCABULARY, TOKENS = 151936, 512
GIB, KIB = 2**30, 2**10


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    gpus = parser.parse_args().gpus
    print(f"| model | backbone | DDP | ZeRO-2, {gpus} GPUs | FSDP2, {gpus} GPUs | LoRA, DDP | LoRA, FSDP2, {gpus} GPUs "
          "| a token | a token, checkpointing |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, (width, mlp, layers, heads) in SIZES.items():
        config = Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        whole = sum(p.numel() for p in model.parameters())
        layer = sum(p.numel() for p in model.layers[0].parameters())
        table = model.embed_tokens.weight.numel()
        kept = saved_bytes(config) / TOKENS  # a token and layer
        full, boundary = kept * layers, width * 2 * layers + kept
        states = [gib / GIB for gib in engines(whole, layer, table, gpus)]
        print(f"| {name} | {whole / 1e9:.2f} billion | " + " | ".join(f"{gib:.1f}" for gib in states)
              + f" | {full / KIB**2:.2f} MiB | {boundary / KIB:.0f} KiB |")  # fmt: skip


def engines(whole: int, layer: int, table: int, gpus: int) -> list[float]:
    """Bytes of weights, gradients and AdamW moments on one GPU: DDP, ZeRO-2, FSDP2, LoRA under DDP, under FSDP2.

    Under FSDP2 two layers and the embedding table are whole at a time, in bf16 with their gradients, and one of them
    once more in fp32 while its gradient is summed.
    """
    at_work = (2 + 2) * (2 * layer + table) + 4 * max(layer, table)
    adapted = 2 * (2 * layer + table)  # bf16, no gradients; the adapters are a few MiB
    return [
        16 * whole,  # fp32 weights, gradients, two moments
        2 * whole + (2 + 12) * whole / gpus,  # bf16 weights; bf16 gradients, fp32 masters and moments in parts
        16 * whole / gpus + at_work,
        4 * whole,
        4 * whole / gpus + adapted,
    ]


def saved_bytes(config: Qwen3Config) -> int:
    """Bytes that autograd keeps of one layer for TOKENS tokens in four packed texts, parameters not counted."""
    config = Qwen3Config(**config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 64, "layer_types": None})
    model = Embedder(AutoModel.from_config(config, dtype=torch.bfloat16), "segments").train()
    return memory.kept_bytes(model, TOKENS // 4)


if __name__ == "__main__":
    main()
