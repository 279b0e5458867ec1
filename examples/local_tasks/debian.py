"""The packages that dpkg and apt know, of a Debian machine: name, section, one-line summary, long description."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.packages import family_of, is_useful, read_list, stanzas

STATUS = Path("/var/lib/dpkg/status")
LISTS = Path("/var/lib/apt/lists")
_KINDS = ("", ".lz4", ".xz", ".bz2", ".gz")  # what the name of a list may end in


@dataclass(frozen=True)
class Package:
    """One package."""

    name: str
    section: str  # without its area: net, not contrib/net
    summary: str
    description: str  # "" if only the summary is known

    @property
    def family(self) -> str:
        """What packages of one source usually share."""
        return family_of(self.name)


def known_packages(status: Path = STATUS, lists: Path = LISTS) -> list[Package]:
    """The installed packages, then those of apt's lists, each name once.

    A package of a list has its long description from apt's English translations, where they were fetched.

    Raises:
        RunError: a list is damaged.
    """
    packages = {}
    for package in _stanzas_of(status) if status.is_file() else ():
        packages.setdefault(package.name, package)
    descriptions = _long_descriptions(lists)
    for path in _lists_named(lists, "_Packages"):
        for package in _stanzas_of(path):
            text = package.description or descriptions.get(package.name, "")
            packages.setdefault(package.name, Package(package.name, package.section, package.summary, text))
    return list(packages.values())


def described(packages: list[Package]) -> list[Package]:
    """Packages that say what they are, in a summary and a long description, none of them twice."""
    kept = []
    seen = set()
    for package in packages:
        texts = {package.summary.lower(), package.description}
        if is_useful(package.name, package.summary, package.description) and seen.isdisjoint(texts):
            kept.append(package)
            seen |= texts
    return kept


def _lists_named(lists: Path, ending: str) -> list[Path]:
    """apt's lists of one kind, plain or compressed."""
    return sorted(path for kind in _KINDS for path in lists.glob(f"*{ending}{kind}"))


def _long_descriptions(lists: Path) -> dict[str, str]:
    """name -> long description, of apt's English translations; empty where there are none."""
    found = {}
    for path in _lists_named(lists, "_i18n_Translation-en"):
        for name, _, description in read_list(path):
            found.setdefault(name, description)
    return found


def _stanzas_of(path: Path) -> Iterator[Package]:
    """The packages of a file in Debian's control format.

    Raises:
        RunError: it is damaged.
    """
    for stanza in stanzas(path):
        package = package_of(stanza)
        if package.name and package.summary:
            yield package


def package_of(stanza: str) -> Package:
    """The package of a stanza; "" for what is missing. Continued lines begin with a space, " ." is an empty one."""
    fields = {"Package": [], "Section": [], "Description": []}
    field = ""
    for line in stanza.splitlines():
        if line[:1].isspace():
            words = [] if line.strip() == "." else line.split()
        else:
            field, _, rest = line.partition(":")
            words = [" ".join(rest.split())]
        if field in fields:
            fields[field] += words
    texts = [" ".join(fields["Description"][:1]), " ".join(fields["Description"][1:])]
    section = "".join(fields["Section"][:1]).rpartition("/")[2]
    return Package("".join(fields["Package"][:1]), section, *texts)
