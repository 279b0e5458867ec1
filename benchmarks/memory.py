"""GiB on a GPU for each size of Qwen3 under each engine, and what a token adds: computed, not measured.

    python -m benchmarks.memory [--gpus 8]

States are the bytes that each engine keeps by design (training/memory.py). What autograd keeps of a token is written
out below for bf16 and a kernel for packed texts; tests/training/test_memory.py compares it with what is counted on a
small model. What a GPU adds (CUDA context, allocator, NCCL buffers: a few GiB) is not in the table.
"""

import argparse

import torch
from torch import nn
from transformers import AutoModel, Qwen3Config

from benchmarks.common import QWEN3, qwen3_config
from training.memory import Cost, Layout, Weights, gradient_and_moment_bytes, weight_bytes, working_bytes

GIB, MIB, KIB = 2**30, 2**20, 2**10
LORA_RANK = 8  # of q_proj and v_proj, as configs/config_lora.json has it


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8)
    print(table(parser.parse_args().gpus))


def table(gpus: int) -> str:
    """The table, as Markdown."""
    titles = [
        "model", "backbone", "DDP", f"ZeRO-2, {gpus} GPUs", f"FSDP2, {gpus} GPUs", "LoRA, DDP",
        f"LoRA, FSDP2, {gpus} GPUs", "a token", "a token, checkpointing",
    ]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join(row(size, gpus))} |" for size in QWEN3]
    return "\n".join(lines)


def row(size: str, gpus: int) -> list[str]:
    """The cells of one size."""
    config = qwen3_config(size)
    weights = weights_of_config(config)
    adapters = with_adapters(weights, config)
    copies, parts = Layout(gpus, 1), Layout(gpus, gpus)
    states = [
        state_bytes(weights, copies),
        zero_2_bytes(weights, gpus),
        state_bytes(weights, parts),
        state_bytes(adapters, copies),
        state_bytes(adapters, parts),
    ]
    cost = token_cost(config)
    return [
        size,
        f"{weights.whole / 1e9:.2f} billion",
        *[f"{needed / GIB:.1f}" for needed in states],
        f"{cost.per_token(0) / MIB:.2f} MiB",
        f"{cost.per_token(1) / KIB:,.0f} KiB",
    ]


def state_bytes(weights: Weights, layout: Layout) -> float:
    """Bytes of weights, gradients, AdamW's moments, and of what stands beside them at the peak of a pass."""
    kept = weight_bytes(weights, layout) + gradient_and_moment_bytes(weights, layout)
    return kept + working_bytes(weights, layout)


def zero_2_bytes(weights: Weights, gpus: int) -> float:
    """The same under DeepSpeed: bf16 weights whole; bf16 gradients, fp32 masters and two moments in parts."""
    return 2 * weights.whole + (2 + 12) * weights.whole / gpus


# ------------------------------------------------------------------------------------------ weights


def weights_of_config(config: Qwen3Config) -> Weights:
    """The numbers of weights of a backbone: counted on the meta device, without memory."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    layer = _parameters(model.layers[0])
    whole = _parameters(model)
    return Weights(
        whole=whole,
        trained=whole,
        in_layers=layer * config.num_hidden_layers,
        largest_layer=layer,
        largest_other=_parameters(model.embed_tokens),
    )


def with_adapters(weights: Weights, config: Qwen3Config) -> Weights:
    """The same backbone frozen, with LoRA's adapters of q_proj and v_proj."""
    heads = (config.num_attention_heads, config.num_key_value_heads)
    adapters = sum(LORA_RANK * (config.hidden_size + count * config.head_dim) for count in heads)  # of a layer
    all_adapters = adapters * config.num_hidden_layers
    return Weights(
        whole=weights.whole + all_adapters,
        trained=all_adapters,
        in_layers=weights.in_layers + all_adapters,
        largest_layer=weights.largest_layer + adapters,
        largest_other=weights.largest_other,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------ a token


def token_cost(config: Qwen3Config) -> Cost:
    """What a token keeps where all weights are trained, under autocast; under FSDP2 and LoRA it is less.

    The states between layers are fp32, so a norm keeps its input and its result in fp32, and each of the products that
    follow it a bf16 copy of its own.
    """
    d = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim  # and values
    norm_of_states = (4 + 4) * d
    copies = (3 + 2) * 2 * d  # for queries, keys, values; for gate and up
    norm_of_heads = (4 + 2) * (queries + keys)  # bf16 comes in: an fp32 copy, and the result
    attention = 2 * (queries + 2 * keys + queries) + 4 * config.num_attention_heads  # q, k, v, result; a sum a head
    mlp = 4 * 2 * config.intermediate_size  # gate, its SiLU, up, their product
    reciprocal_roots = 4 * (2 + config.num_attention_heads + config.num_key_value_heads)
    per_layer = 2 * norm_of_states + copies + norm_of_heads + attention + mlp + reciprocal_roots
    rotary = 2 * 4 * config.head_dim  # cosine and sine, for all layers
    outside = norm_of_states + 4 + rotary  # the last norm
    return Cost(config.num_hidden_layers, per_layer, 4 * d, outside)


if __name__ == "__main__":
    main()
