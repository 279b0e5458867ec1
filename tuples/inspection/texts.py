"""What an inspection asks of texts, column by column: a key for each, a plain form, whether one holds another.

Arrow columns in, numpy arrays out. Nothing here keeps a text, and both libraries leave Python's lock while they work.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling.prompts import query_prompt

MISSING = 0  # the key of no text
_WORD = 8  # bytes hashed at a time
_BLOCK = 2**17  # bytes of texts whose words are in the processor's cache together: half the time of ten times as many
# MurmurHash3's 64-bit finaliser (Appleby 2011): (shift, factor) twice, then the shift once more.
_SHIFT = np.uint64(33)
_FACTORS = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: keeps the words of a text apart
_BEGIN, _MIDDLE = query_prompt("\0").split("\0")  # what stands before and after an instruction


def keys_of(texts: pa.Array) -> np.ndarray:
    """A 64-bit key for each text, uint64 [n], MISSING where it is null. Equal texts have equal keys.

    Two different texts share one with probability 2^-64, so that n distinct texts give n^2 / 2^65 false equals: one
    in 40,000 for 30 million texts. A key decides about a line in a report, never about what is trained on.

    Each run of 8 bytes is mixed with its place, and a text's key is its sum, mixed again with its length. Numpy does
    that to many texts at once and without Python's lock; blake2b takes a call for each text, and holds it.
    """
    texts = texts.cast(pa.large_string())
    keys = keys_of_bytes(*_bytes_of(texts))
    keys[is_null(texts)] = MISSING
    return keys


def keys_of_bytes(data: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What `keys_of` gives, uint64 [n], of any runs of bytes.

    Args:
        data: uint8 [bytes + 8]; the last eight are not looked at.
        begins, lengths: int64 [n], in bytes.
    """
    keys = np.zeros(len(lengths), np.uint64)
    ends = np.cumsum(lengths)
    cuts = np.searchsorted(ends, np.arange(_BLOCK, int(lengths.sum()), _BLOCK))
    for block in np.split(np.arange(len(lengths)), np.unique(cuts)):
        if len(block):
            texts = slice(block[0], block[-1] + 1)
            keys[texts] = _keys_of_block(data, begins[texts], lengths[texts])
    keys[keys == MISSING] = 1
    return keys


def _keys_of_block(data: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What `keys_of_bytes` gives, for a few texts, at least one."""
    words_per_text = lengths // _WORD + 1  # the last word is cut, or empty
    ends = np.cumsum(words_per_text)
    first_words = ends - words_per_text  # [n] of each text among all words
    nth = np.arange(ends[-1]) - np.repeat(first_words, words_per_text)  # [words] in its text
    places = np.repeat(begins, words_per_text) + _WORD * nth  # [words] in `data`
    at_every_byte = np.ndarray((len(data) - _WORD + 1,), "<u8", data, strides=(1,))
    words = at_every_byte[places]
    words[ends - 1] &= _low_bytes(lengths % _WORD)
    marks = mixed(np.arange(words_per_text.max(), dtype=np.uint64) * _STEP)  # one for each place in a text
    sums = np.add.reduceat(mixed(words + marks[nth]), first_words)
    return mixed(sums + lengths.astype(np.uint64) * _STEP)


def _bytes_of(texts: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All texts' bytes [bytes + 8] with zeros behind them, and where each text begins [n] and how long it is [n]."""
    _, offset_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    begin, end = (int(offsets[0]), int(offsets[-1])) if len(texts) else (0, 0)
    data = np.zeros(end - begin + _WORD, np.uint8)
    if end > begin:
        data[: end - begin] = np.frombuffer(data_buffer, np.uint8)[begin:end]
    return data, offsets[:-1] - begin, np.diff(offsets)


def _low_bytes(counts: np.ndarray) -> np.ndarray:
    """A mask of the lowest `counts` bytes of a word, uint64, each 0 to 7."""
    return (np.uint64(1) << (counts.astype(np.uint64) * np.uint64(8))) - np.uint64(1)


def mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of each uint64 spread over all its bits, in place."""
    shifted = values >> _SHIFT
    values ^= shifted
    for factor in _FACTORS:
        values *= factor
        np.right_shift(values, _SHIFT, out=shifted)
        values ^= shifted
    return values


def is_null(texts: pa.Array) -> np.ndarray:
    """Which texts are null, bool [n]."""
    return texts.is_null().to_numpy(zero_copy_only=False)


# -------------------------------------------------------------------------------------- texts to compare


def without_instruction(queries: pa.Array) -> pa.Array:
    """The queries as modeling.prompts.split_prompt gives their texts: without the instruction that they carry."""
    names_none = pc.starts_with(queries, _BEGIN + _MIDDLE)
    pattern = rf"(?s)\A{_BEGIN}.*?{_MIDDLE}"
    bare = pc.replace_substring_regex(queries, pattern, "", max_replacements=1)
    return pc.if_else(names_none, queries, bare)


def plain(texts: pa.Array) -> pa.Array:
    """Texts as they are compared: lower case, one space for each run of white space, composed Unicode (NFC)."""
    if not pc.all(pc.string_is_ascii(texts)).as_py():  # as Qwen's tokenizer does, so that stores compare alike
        texts = pc.utf8_normalize(texts, "NFC")
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(texts)))
    return pc.binary_join(words, pa.scalar(" ", words.type.value_type))


def is_blank(texts: pa.Array) -> np.ndarray:
    """Which texts are null or nothing but white space, bool [n]."""
    blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
    return pc.fill_null(blank, True).to_numpy(zero_copy_only=False)


def holds(texts: list[str | None], parts: list[str | None]) -> np.ndarray:
    """Which texts have their part somewhere in them, bool [n]; False where either is null or empty.

    A loop, because Arrow and numpy look for one part in many texts, not for each text's own: 0.1 us a pair.
    """
    pairs = zip(texts, parts, strict=True)
    return np.fromiter((bool(text and part and part in text) for text, part in pairs), bool, len(texts))
