"""Tiny random models that are not decoders: a BERT with mean pooling as Sentence Transformers keeps one, and a
cross-encoder. Imported by tests only; seeded, nothing is downloaded.
"""

import json
from pathlib import Path

import torch
import toy
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

WIDTH = 32
LONGEST = 24  # tokens
_SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}


def make_encoder(folder: Path, prompts: dict[str, str] | None = None) -> Path:
    """A folder of Sentence Transformers: BERT, mean pooling, normalised."""
    torch.manual_seed(1)
    BertModel(_config(), add_pooling_layer=False).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return describe(folder, WIDTH, LONGEST, "pooling_mode_mean_tokens", prompts)


def describe(folder: Path, width: int, longest: int, pooling: str, prompts: dict[str, str] | None = None) -> Path:
    """Write what makes a model a folder of Sentence Transformers."""
    kinds = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    by_mean = {"pooling_mode_mean_tokens": pooling == "pooling_mode_mean_tokens"}  # 5.0 takes it where nothing is said
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width} | by_mean | {pooling: True})
    _write(folder / "config_sentence_transformers.json", {"prompts": prompts or {}})
    return folder


def make_cross_encoder(folder: Path) -> Path:
    """A folder that CrossEncoder loads: one score for a pair."""
    torch.manual_seed(2)
    BertForSequenceClassification(_config(num_labels=1)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _config(**more) -> BertConfig:
    return BertConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.3,
        **more,
    )


def _vocabulary() -> list[str]:
    words = " ".join(toy.SUBJECTS + toy.FACTS).split()
    letters = [chr(code) for code in range(33, 127)]
    return list(dict.fromkeys([*_SPECIAL.values(), *words, *letters, *[f"##{letter}" for letter in letters]]))


def _tokenizer() -> PreTrainedTokenizerFast:
    numbers = {word: number for number, word in enumerate(_vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **_SPECIAL)


def _write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
