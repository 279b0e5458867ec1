"""A GGUF file as small as the tests need: a random Llama and a tokenizer for it, written with the package gguf."""

from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from modeling.qwen_bpe import train_tokenizer

LAYERS = 3
NAMES = {  # of a layer's weights: in Transformers -> in GGUF
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_model() -> LlamaModel:
    """A random Llama with grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,  # so large that no two texts have the same embedding
    )
    return LlamaModel(config).eval()


def write(path: Path, texts: list[str]) -> LlamaModel:
    """Write the file with a tokenizer trained on `texts`; returns the model that it holds."""
    model = make_model()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, texts, config.vocab_size)
    for name, weight in model.state_dict().items():
        writer.add_tensor(gguf_name(name), in_gguf_order(name, weight, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_tokenizer(writer: gguf.GGUFWriter, texts: list[str], vocab_size: int) -> None:
    """Byte-level BPE with SmolLM2's special tokens in SmolLM2's places: 0 unknown, 1 begin, 2 end and pad."""
    state = train_tokenizer(texts, vocab_size).backend_tokenizer
    vocabulary = sorted(state.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + [token for token, _ in vocabulary if token not in special]
    tokens += [f"<unused{number}>" for number in range(vocab_size - len(tokens))]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    merges = [" ".join(pair) for pair in merges_of(state)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)


def merges_of(tokenizer) -> list[tuple[str, str]]:
    """What a BPE tokenizer merges, first what it merges first."""
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def gguf_name(name: str) -> str:
    """A weight's name in GGUF."""
    if name == "embed_tokens.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, number, inner = name.removesuffix(".weight").split(".", 2)
    return f"blk.{number}.{NAMES[inner]}.weight"


def in_gguf_order(name: str, weight: Tensor, config: LlamaConfig) -> Tensor:
    """GGUF interleaves the two halves of each head that rotary positions turn together."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if kind not in heads:
        return weight
    rows, columns = weight.shape
    halves = weight.reshape(heads[kind], 2, rows // heads[kind] // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns).contiguous()
