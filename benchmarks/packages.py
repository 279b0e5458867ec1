"""Debian packages as a search task beside Python code: from a package's one-line summary to its long description.

    python -m benchmarks.packages [--lists /var/lib/apt/lists]          how many pairs there are, and the first of them

The descriptions are those of apt's English translation lists, plain or compressed. Where a machine has none:

    mkdir -p FOLDER/partial
    apt-get update -o Acquire::Languages=en -o Dir::State::Lists=FOLDER

and FOLDER is the one for `--lists`. One family of packages in ten is held out: libfoo2, libfoo-dev, python3-foo and
foo-doc describe the same thing, so they stand on one side. The packages of a language (python3-..., golang-...) are no
family: each language is divided over both sides.
"""

import argparse
import bz2
import gzip
import hashlib
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from benchmarks.pairs import Pair
from utils import RunError, first_line, plural

LISTS = Path("/var/lib/apt/lists")
INSTRUCTION = "Given a short summary, retrieve the software package that it describes."
MAX_CHARS = 2000  # of a passage
LEAST_WORDS = 3  # of a query
LEAST_CHARS = 60  # of a passage
ONE_FAMILY_IN = 10  # is held out
ECOSYSTEMS = (  # what stands before the name proper; a longer prefix before the shorter one that it begins with
    "python3-",
    "python-",
    "pypy-",
    "libghc-",
    "haskell-",
    "golang-github-",
    "golang-gopkg-",
    "golang-golang-x-",
    "golang-",
    "librust-",
    "node-",
    "libjs-",
    "ruby-",
    "r-cran-",
    "r-bioc-",
    "r-other-",
    "r-",
    "php-",
    "lua-",
    "cl-",
    "erlang-",
    "octave-",
    "elpa-",
    "texlive-",
    "fonts-",
    "gir1.2-",
)
_LIST_NAME = re.compile(r".*_i18n_Translation-en(\.(lz4|xz|bz2|gz))?")
_OPENERS = {".xz": lzma.open, ".bz2": bz2.open, ".gz": gzip.open}
_NAME_OF_SYMBOLS = re.compile(r".*-(dbg|dbgsym)")
_EMPTY_PACKAGE = re.compile(r"transitional package|dummy package|transitional dummy", re.IGNORECASE)


def main(argv: list[str] | None = None) -> int:
    """Print what there is. Returns the exit status: 0, or 2 where there is no list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=Path, default=LISTS, help="folder of apt's lists (default %(default)s)")
    flags = parser.parse_args(argv)
    try:
        training, held_out = package_pairs(flags.lists)
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    families = {pair.group for pair in held_out}
    print(f"{plural(len(training), 'pair')} to train on, {len(held_out):,} of {len(families):,} families held out")
    for pair in held_out[:5]:
        print(f"  {pair.query}\n      {pair.passage[:100]}")
    return 0


def package_pairs(lists: Path = LISTS) -> tuple[list[Pair], list[Pair]]:
    """(pairs to train on, held-out pairs), both in the order of the lists; a pair's group is its family.

    Raises:
        RunError: the folder holds no English list, or one that cannot be read.
    """
    paths = sorted(path for path in lists.glob("*") if _LIST_NAME.fullmatch(path.name))
    if not paths:
        raise RunError(
            f"{lists}: no English package descriptions there. Fetch them with: mkdir -p FOLDER/partial; apt-get update "
            "-o Acquire::Languages=en -o Dir::State::Lists=FOLDER; then give --lists FOLDER"
        )
    training = []
    held_out = []
    seen = set()  # queries in lower case, and passages
    for path in paths:
        for name, query, passage in read_list(path):
            texts = {query.lower(), passage}
            if is_useful(name, query, passage) and seen.isdisjoint(texts):
                seen |= texts
                family = family_of(name)
                side = held_out if is_held_out(family) else training
                side.append(Pair(query, passage, family))
    return training, held_out


def stanzas(path: Path) -> list[str]:
    """The texts between the empty lines of a list, packed or not.

    Raises:
        RunError: the file is damaged.
    """
    try:
        with open_list(path) as file:
            return file.read().decode("utf-8").split("\n\n")
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise RunError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from None


def read_list(path: Path) -> Iterator[tuple[str, str, str]]:
    """(name, short description, long description) of each package of a translation list.

    Raises:
        RunError: the file is damaged.
    """
    for stanza in stanzas(path):
        name, query, passage = read_stanza(stanza)
        if name and query:
            yield name, query, passage


def open_list(path: Path) -> BinaryIO:
    """A list's bytes, decompressed by what its name ends in."""
    if path.suffix == ".lz4":
        return pa.input_stream(str(path), compression="lz4")
    return _OPENERS.get(path.suffix, open)(path, "rb")


def read_stanza(stanza: str) -> tuple[str, str, str]:
    """(name, short description, long description) of one package; "" for what is missing.

    The long description is what follows the line `Description-en:`, indented by a space; " ." is an empty line.
    """
    name = ""
    query = ""
    words = []
    for line in stanza.splitlines():
        if line.startswith("Package:"):
            name = line.removeprefix("Package:").strip()
        elif line.startswith("Description-en:"):
            query = line.removeprefix("Description-en:")
        elif line.startswith(" ") and query and line.strip() != ".":
            words += line.split()
    return name, " ".join(query.split()), " ".join(words)[:MAX_CHARS]


def is_useful(name: str, query: str, passage: str) -> bool:
    """Whether a package says what it is. Debug symbols, and packages that only pull in another one, do not."""
    if _NAME_OF_SYMBOLS.fullmatch(name) or _EMPTY_PACKAGE.search(f"{query} {passage}"):
        return False
    return len(query.split()) >= LEAST_WORDS and len(passage) >= LEAST_CHARS


def family_of(name: str) -> str:
    """What packages of one source usually share: the name without ecosystem, "lib" and digits, up to "-", "+" or ".".

    Perl's lib...-perl needs no rule of its own: "lib" goes as everywhere, and "-perl" stands behind a hyphen. Of the
    58,000 packages of Debian 12 that are read, the largest family, that of the kernel, has 0.5 %.

    >>> family_of("libfoo2"), family_of("libfoo-dev"), family_of("foo-doc"), family_of("python3-foo")
    ('foo', 'foo', 'foo', 'foo')
    >>> family_of("librust-foo+default-dev"), family_of("libfoo-bar-perl"), family_of("gir1.2-foo-1.0")
    ('foo', 'foo', 'foo')
    """
    for prefix in ECOSYSTEMS:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    first_part = re.split(r"[-+.]", name.removeprefix("lib"))[0]
    return re.sub(r"\d", "", first_part)


def is_held_out(family: str) -> bool:
    """One family in ten, the same on every machine."""
    digest = hashlib.sha256(family.encode()).digest()
    return int.from_bytes(digest[:8], "big") % ONE_FAMILY_IN == 0


if __name__ == "__main__":
    sys.exit(main())
