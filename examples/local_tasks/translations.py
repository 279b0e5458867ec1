"""The texts of gettext's .mo files: what programs say in English, and in other languages."""

import re
import struct
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LOCALE = Path("/usr/share/locale")
LANGUAGES = {"de": "deu-Latn", "fr": "fra-Latn", "es": "spa-Latn", "ru": "rus-Cyrl", "ja": "jpn-Jpan"}  # by folder
LEAST_WORDS = 5  # of an English text
MAX_CHARS = 400
_MAGIC = 0x950412DE
_LETTERS = re.compile(r"[A-Za-z]")


def pairs_of(language: str, locale: Path = LOCALE) -> list[tuple[str, str]]:
    """(English, translated) texts of a language, sorted; no text stands in two pairs.

    Read are the machine's programs and Python's packages.

    Args:
        language: a folder of `locale`, as "de".
    """
    roots = [locale, Path(sysconfig.get_paths()["purelib"])]
    files = [path for root in roots for path in root.glob(f"**/{language}/LC_MESSAGES/*.mo")]
    found = {pair for path in sorted(files) for pair in read_catalog(path) if is_sentence(*pair)}
    pairs = []
    seen = set()
    for english, translated in sorted(found):
        texts = {english.lower(), translated.lower()}
        if seen.isdisjoint(texts):
            pairs.append((english, translated))
            seen |= texts
    return pairs


def is_sentence(english: str, translated: str) -> bool:
    """Whether a message has words, and its translation something else."""
    letters = len(_LETTERS.findall(english))
    is_long_enough = len(english.split()) >= LEAST_WORDS and letters > 0.6 * len(english)
    return is_long_enough and max(len(english), len(translated)) <= MAX_CHARS and english != translated


def read_catalog(path: Path) -> Iterator[tuple[str, str]]:
    """(English, translated) messages of a .mo file, blanks and line ends made one space; none of a damaged file.

    Messages with a plural or a context are left out: they are more than a text. The format is gettext's: a magic
    number, a version, the number of messages, and where the two tables of (length, offset) begin.
    """
    data = path.read_bytes()
    for order in "<", ">":
        if len(data) >= 20 and struct.unpack_from(f"{order}I", data)[0] == _MAGIC:
            break
    else:
        return
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)
    for number in range(count):
        try:
            english = _text(data, order, originals + 8 * number)
            translated = _text(data, order, translations + 8 * number)
        except (struct.error, UnicodeDecodeError):
            continue
        if english and translated and not {"\0", "\4"} & set(english + translated):
            yield english, translated


def _text(data: bytes, order: str, entry: int) -> str:
    """The text that an entry of a table points to."""
    length, offset = struct.unpack_from(f"{order}2I", data, entry)
    text = data[offset : offset + length].decode("utf-8")
    return " ".join(text.split())
