"""Everything about tokenizers: loading one, naming what it does, ending texts in EOS, saving one that does so itself.

One rule holds everywhere: a text is cut to max_seq_length - 1 tokens and ended by exactly one EOS, the token that
`tokenizer.eos_token` names (Qwen3: <|im_end|>, 151645). The embedding is EOS's state, so a lost or doubled EOS is
another model.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from hub import where

_PROBE = "Naïve cafe\u0301 — 12,345 x² = y;\n\tdef f(a_b):  return {'ключ': [價值, 'مفتاح']}  😀 <|im_end|>"


def load_tokenizer(path: str) -> tuple[object | None, list[str]]:
    """A fast tokenizer with an EOS from a folder or hub id, or the reasons why there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **where(path))
    except (OSError, ValueError, KeyError) as error:
        return None, [f"{path!r}: no tokenizer there ({str(error).strip().splitlines()[0]})"]
    if not tokenizer.is_fast:
        return None, [f"{path!r}: only a tokenizer with a tokenizer.json is supported"]
    if tokenizer.eos_token_id is None:
        return None, [f"{path!r}: the tokenizer has no EOS token"]
    return tokenizer, []


def fitting_tokenizer(path: str, stores: list, remedy: str = "") -> tuple[object | None, list[str]]:
    """The tokenizer of a model, and a line for each of the token `stores` that another one wrote.

    Args:
        remedy: what to do then; by default tokenise again.
    """
    remedy = remedy or f"tokenise again with --tokenizer_path {path} --overwrite true"
    tokenizer, problems = load_tokenizer(path)
    mine = fingerprint(tokenizer) if tokenizer else None
    for store in stores if tokenizer else []:
        if store.meta["tokenizer"] not in (None, mine):  # the published layouts do not say
            problems.append(f"{store.folder} was written by another tokenizer than that of {path}: {remedy}")
        elif store.eos != tokenizer.eos_token_id:
            problems.append(
                f"{store.folder} ends texts in token {store.eos}, but EOS of {path} is {tokenizer.eos_token_id}"
            )
    return tokenizer, problems


def fingerprint(tokenizer) -> str:
    """Names what a fast tokenizer does to a text: 16 hex digits, the same for all sizes of one family.

    Taken from the vocabulary, the EOS and the ids of a probe text, not from files: those differ
    between library versions, and a saved model folder adds a post-processor that appends EOS.
    """
    ids = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, list(ids)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def make_encoder(tokenizer, max_seq_length: int) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray, int]]:
    """A function texts -> (ids int32 [T] end to end, lengths int64 [n], how many texts were cut), on all threads."""
    backend, eos = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), tokenizer.eos_token_id
    backend.no_padding()
    backend.no_truncation()

    def finish(ids: list[int]) -> list[int]:
        ids = ids[: max_seq_length - 1]
        while ids and ids[-1] == eos:  # the text itself ends in a literal EOS
            ids.pop()
        return [*ids, eos]

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        truncated = sum(len(ids) > max_seq_length - 1 for ids in encoded)
        ids = [finish(ids) for ids in encoded]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum()), lengths, truncated

    return encode


def save_tokenizer(tokenizer, folder: Path, max_seq_length: int) -> None:
    """Write tokenizer.json, with EOS appended by its post-processor, and tokenizer_config.json.

    The class is named PreTrainedTokenizerFast: Transformers 4 and 5 both load it, while 4 does not know
    the TokenizersBackend that 5 writes.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    eos = tokenizer.eos_token
    plain, added = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    if added != [*plain, tokenizer.eos_token_id]:
        append = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B:1 {eos}:1", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
        # A post-processor that adds tokens (Llama's BOS) goes: training saw none of them.
        keep = backend.post_processor if added == plain else None
        backend.post_processor = processors.Sequence([keep, append]) if keep else append
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": tokenizer.pad_token or eos,
        "padding_side": "right",
        "model_max_length": max_seq_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
