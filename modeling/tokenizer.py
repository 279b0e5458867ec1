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

from modeling.hub import where

SAMPLE = 256  # one text in so many is tokenised by the reference as well
_FLAT = (np.uint32, np.uint64)  # ids and offsets of fastokens

_PROBE = "Naïve cafe\u0301 — 12,345 x² = y;\n\tdef f(a_b):  return {'ключ': [價值, 'مفتاح']}  😀 <|im_end|>"


def load_tokenizer(path: str) -> tuple[object | None, list[str]]:
    """A fast tokenizer with an EOS from a folder or hub id, or the reasons why there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **where(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if Path(path).is_dir() else "no such folder, nor fetched from a hub"
        return None, [f"{path!r}: no tokenizer there ({reason})"]
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


class EngineDiffers(ValueError):
    """A fast engine gave other ids than the reference tokenizer."""


def make_encoder(
    tokenizer, max_seq_length: int, engine: str = "tokenizers"
) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray, int]]:
    """A function texts -> (ids int32 [T] end to end, lengths int64 [n], how many texts were cut), on all threads.

    Args:
        engine: "tokenizers", the reference; or "fastokens", several times as fast, whose ids are
            compared with the reference's on the first texts and on one in SAMPLE of all others.

    Raises:
        EngineDiffers: also by the function, when they are not the same.
    """
    backend, eos = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), tokenizer.eos_token_id
    backend.no_padding()
    backend.no_truncation()
    flat = {"tokenizers": _reference, "fastokens": _fastokens}[engine](backend)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
        ids, lengths = flat(texts)  # [all ids], [n]
        return *ended(ids, lengths, max_seq_length, eos), int((lengths > max_seq_length - 1).sum())

    return encode


def ended(ids: np.ndarray, lengths: np.ndarray, max_seq_length: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts cut to max_seq_length - 1 tokens and ended by exactly one EOS, also where a text ends in a literal one.

    Args:
        ids: [N] of all texts, end to end.
        lengths: [n] of each.

    Returns:
        ids int32 [T], lengths int64 [n].
    """
    starts = np.cumsum(lengths) - lengths
    kept = np.minimum(lengths, max_seq_length - 1)
    while (literal := (kept > 0) & (ids[np.maximum(starts + kept - 1, 0)] == eos if len(ids) else False)).any():
        kept = kept - literal
    within = np.arange(len(ids)) - np.repeat(starts, lengths)  # [N] place in its own text
    ends = np.cumsum(kept + 1) - 1
    out = np.full(int((kept + 1).sum()), eos, np.int32)
    out[np.delete(np.arange(len(out)), ends)] = ids[within < np.repeat(kept, lengths)]
    return out, (kept + 1).astype(np.int64)


def _reference(backend: Tokenizer) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    def flat(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(itertools.chain.from_iterable(encoded), np.int32, lengths.sum()), lengths

    return flat


def _fastokens(backend: Tokenizer) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    import fastokens

    reference, seen = _reference(backend), []
    try:
        fast = fastokens.Tokenizer.from_json_str(backend.to_str())
    except (ValueError, RuntimeError) as error:
        raise EngineDiffers(f"fastokens does not know this kind of tokenizer ({error})") from None

    def flat(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            parts = zip(fast.encode_batch_flat(texts), _FLAT, strict=True)
        except (ValueError, RuntimeError) as error:
            raise EngineDiffers(f"fastokens cannot ({error})") from None
        ids, offsets = (np.frombuffer(part, kind) for part, kind in parts)
        sample = range(0, len(texts), SAMPLE if seen else 1)[: None if seen else SAMPLE]
        seen.append(1)
        expected, lengths = reference([texts[place] for place in sample])
        found = [ids[offsets[place] : offsets[place + 1]] for place in sample]
        if [len(part) for part in found] != lengths.tolist() or (np.concatenate([*found, []]) != expected).any():
            raise EngineDiffers("fastokens gives other ids than the tokenizer")
        return ids.astype(np.int32), np.diff(offsets.astype(np.int64))

    return flat


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
