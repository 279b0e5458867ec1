"""A small random Qwen3 and a tokenizer for it: what `models/qwen3-0.6b` is to the published recipe."""

from pathlib import Path

import torch
from transformers import AutoModel, Qwen3Config

from modeling.qwen_bpe import train_tokenizer
from modeling.versions import in_dtype


def make_backbone(
    folder: Path, texts: list[str], vocab_size: int, hidden_size: int, layers: int, seed: int = 0
) -> None:
    """Write a folder that loads as any Qwen3 backbone does.

    Args:
        texts: what the tokenizer is trained on.
        vocab_size: entries of the model's embedding table; the tokenizer has as many where the texts are enough.
        hidden_size: d, the width of an embedding; a multiple of 64.
        seed: of the random weights.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    AutoModel.from_config(config, **in_dtype(torch.float32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
