"""Everything about tokenizers: loading one, its fingerprint, ending texts in EOS, saving one that does so itself.

One rule holds everywhere: a text is cut to max_seq_length - 1 tokens and ended by exactly one EOS, the token that
`tokenizer.eos_token` names (Qwen3: <|im_end|>, 151645). The embedding is EOS's state, so a lost or doubled EOS is
another model.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from modeling.hub import loading_options
from utils import first_line, short_digest

SAMPLE = 256  # one text in so many is tokenised by the reference as well

# Accents, digits, symbols, code, three scripts, an emoji, a literal EOS: what tokenizers differ in.
_PROBE_TEXT = "Naïve cafe\u0301 — 12,345 x² = y;\n\tdef f(a_b):  return {'ключ': [價值, 'مفتاح']}  😀 <|im_end|>"


def load_tokenizer(path: str, revision: str | None = None) -> tuple[object | None, list[str]]:
    """A fast tokenizer with an EOS from a folder or hub id, or the reasons why there is none.

    Args:
        revision: commit, tag or branch of a hub id; None = its main branch.
    """
    if revision is not None and Path(path).is_dir():
        return None, [f"{path!r}: is a folder, and only a hub id has a revision such as {revision!r}"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **loading_options(path, revision))
    except (OSError, ValueError, KeyError, TypeError) as error:  # TypeError: Transformers 4 opens the file None
        reason = "no such folder, nor fetched from a hub"
        if revision is not None:
            reason += f" at revision {revision!r}"
        if Path(path).is_dir():
            reason = first_line(error)
        return None, [f"{path!r}: no tokenizer there ({reason})"]
    if not tokenizer.is_fast:
        return None, [f"{path!r}: only a tokenizer with a tokenizer.json is supported"]
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:  # as Transformers makes one where no file is
        return None, [f"{path!r}: no tokenizer there (its vocabulary is empty)"]
    if tokenizer.eos_token_id is None:
        return None, [f"{path!r}: the tokenizer has no EOS token"]
    return tokenizer, []


def fitting_tokenizer(
    path: str, stores: list, remedy: str = "", revision: str | None = None
) -> tuple[object | None, list[str]]:
    """The tokenizer of a model, and a line for each of the token `stores` that another one wrote.

    Args:
        remedy: what to do then; by default tokenise again.
        revision: of a hub id; None = its main branch.
    """
    tokenizer, problems = load_tokenizer(path, revision)
    if tokenizer is None:
        return None, problems
    if not remedy:
        words = f"--tokenizer_path {path}"
        if revision is not None:
            words += f" --tokenizer_revision {revision}"
        remedy = f"tokenise again with {words} --overwrite true"
    expected = fingerprint(tokenizer)
    for store in stores:
        written_by = store.meta["tokenizer"]  # None: the published layouts do not say
        if written_by is not None and written_by != expected:
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
    ids = tokenizer(_PROBE_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, list(ids)]
    return short_digest(json.dumps(facts))


class EngineDiffers(ValueError):
    """A fast engine gave other ids than the reference tokenizer."""


def appended_token(tokenizer) -> int | None:
    """The one token that a tokenizer puts behind a text by itself, or its EOS where it adds nothing.

    Qwen3-Embedding ends texts in <|endoftext|>, though its EOS is <|im_end|>.

    Returns:
        None if it adds anything else, as a BOS in front.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    if ids == plain:
        return tokenizer.eos_token_id
    if ids[:-1] == plain:
        return ids[-1]
    return None


def make_encoder(
    tokenizer, max_seq_length: int, engine: str = "tokenizers", end: int | None = None
) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A function texts -> (ids int32 [T] end to end, lengths int64 [n], bool [n] which were cut), on all threads.

    Args:
        engine: "tokenizers", the reference; or "fastokens", several times as fast, whose ids are
            compared with the reference's on the first texts and on one in SAMPLE of all others.
        end: the token that ends each text; None = EOS.

    Raises:
        EngineDiffers: also by the function, when they are not the same.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    encoder = ENGINES[engine](backend)
    eos = tokenizer.eos_token_id if end is None else end

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, lengths = encoder.encode(texts)  # [N], [n]: whole texts, no EOS yet
        is_cut = lengths > max_seq_length - 1
        ended_ids, ended_lengths = ended(ids, lengths, max_seq_length, eos)
        return ended_ids, ended_lengths, is_cut

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
    while True:  # a text may end in several
        literal = _ends_in(eos, ids, starts, kept)
        if not literal.any():
            break
        kept = kept - literal
    is_kept = np.arange(len(ids)) - np.repeat(starts, lengths) < np.repeat(kept, lengths)  # [N] by place in its text
    new_lengths = kept + 1
    places_of_eos = np.cumsum(new_lengths) - 1
    out = np.full(int(new_lengths.sum()), eos, np.int32)
    out[np.delete(np.arange(len(out)), places_of_eos)] = ids[is_kept]
    return out, new_lengths.astype(np.int64)


def _ends_in(token: int, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether each text, of `lengths` ids from `starts` on, has `token` as its last, bool [n]."""
    if len(ids) == 0:
        return np.zeros(len(lengths), bool)
    last = np.maximum(starts + lengths - 1, 0)  # of an empty text the place means nothing
    return (lengths > 0) & (ids[last] == token)


class ReferenceEncoder:
    """Hugging Face's tokenizers: what training and everybody who loads the model uses."""

    def __init__(self, backend: Tokenizer):
        self.backend = backend

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, int32 [N], and the length of each, int64 [n]; no EOS is added."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum())
        return flat, lengths


class FastokensEncoder:
    """The package fastokens: several times as fast, and compared with the reference on the way.

    All of the first SAMPLE texts are compared, of later batches one text in SAMPLE.

    Raises:
        EngineDiffers: fastokens cannot read this tokenizer.
    """

    def __init__(self, backend: Tokenizer):
        import fastokens

        self.reference = ReferenceEncoder(backend)
        self.first_batch = True
        try:
            self.fast = fastokens.Tokenizer.from_json_str(backend.to_str())
        except (ValueError, RuntimeError) as error:
            raise EngineDiffers(f"fastokens does not know this kind of tokenizer ({error})") from None

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What `ReferenceEncoder.encode` gives. Raises EngineDiffers if a compared text has other ids."""
        try:
            parts = self.fast.encode_batch_flat(texts)
        except (ValueError, RuntimeError) as error:
            raise EngineDiffers(f"fastokens cannot ({error})") from None
        id_bytes, offset_bytes = parts
        ids = np.frombuffer(id_bytes, np.uint32)  # [N]
        offsets = np.frombuffer(offset_bytes, np.uint64)  # [n + 1]
        self._compare(texts, ids, offsets)
        return ids.astype(np.int32), np.diff(offsets.astype(np.int64))

    def _compare(self, texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> None:
        """Raise EngineDiffers if the reference gives other ids to a text of the sample."""
        places = range(0, len(texts), SAMPLE)
        if self.first_batch:
            places = range(min(len(texts), SAMPLE))
            self.first_batch = False
        expected, expected_lengths = self.reference.encode([texts[place] for place in places])
        found = [ids[offsets[place] : offsets[place + 1]] for place in places]
        same_lengths = [len(part) for part in found] == expected_lengths.tolist()
        if not same_lengths or (np.concatenate([*found, []]) != expected).any():  # [] for a batch without texts
            raise EngineDiffers("fastokens gives other ids than the tokenizer")


ENGINES = {"tokenizers": ReferenceEncoder, "fastokens": FastokensEncoder}


def save_tokenizer(tokenizer, folder: Path, max_seq_length: int) -> None:
    """Write tokenizer.json, with EOS appended by its post-processor, and tokenizer_config.json.

    The class is named PreTrainedTokenizerFast: Transformers 4 and 5 both load it, while 4 does not know
    the TokenizersBackend that 5 writes.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    eos = tokenizer.eos_token
    without_special = backend.encode("a", add_special_tokens=False).ids
    with_special = backend.encode("a", add_special_tokens=True).ids
    if with_special != [*without_special, tokenizer.eos_token_id]:
        append_eos = processors.TemplateProcessing(
            single=f"$A {eos}", pair=f"$A {eos} $B:1 {eos}:1", special_tokens=[(eos, tokenizer.eos_token_id)]
        )
        if backend.post_processor and with_special == without_special:
            backend.post_processor = processors.Sequence([backend.post_processor, append_eos])
        else:  # a post-processor that adds tokens (Llama's BOS) goes: training saw none of them
            backend.post_processor = append_eos
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
