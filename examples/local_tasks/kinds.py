"""From Python functions, packages and translations to the rows of tasks, at most so many of each.

code_search            retrieval             a docstring's first paragraph -> its function
code_modules           clustering            a function -> the module of the standard library that it is from
package_search         retrieval             a package's summary -> its description
package_sections       classification        a package's summary -> the section that Debian put it into
package_topics         clustering            a package's summary and description -> its section
package_pairs          pair_classification   a summary and a description -> whether of one package
package_relatedness    sts                   two summaries -> 2: of one family, 1: of one section, 0: of two
translations_LANGUAGE  bitext                what a program says in English -> in another language
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.packages import INSTRUCTION
from examples.code_search.corpus import Function
from examples.code_search.tuples import SEARCH

from .debian import Package

SECTIONS = (  # that say what a package is about, and not what it is written in
    "admin", "database", "editors", "electronics", "fonts", "games", "graphics", "hamradio", "mail", "math", "net",
    "science", "sound", "text", "vcs", "video", "web",
)  # fmt: skip
LEAST = 40  # rows of a task
LEAST_OF_LABEL = 10  # rows of a class
TRAINED_ON = 32  # rows of a class at most; mteb draws 8 for each of its ten classifiers
CHARS = 1000  # of a description


@dataclass(frozen=True)
class Task:
    """The files of a task's folder."""

    name: str
    settings: dict  # task.json
    rows: dict[str, list[dict]] = field(default_factory=dict)  # file -> rows
    relevant: list[tuple[str, str]] = ()  # (query, document) of a search

    @property
    def size(self) -> int:
        """Rows of what is evaluated."""
        return len(self.rows["corpus" if "corpus" in self.rows else "test"])


def code_search(functions: list[Function], most: int) -> Task:
    """Each function is to be found by its docstring."""
    pairs = [(function.query, function.passage) for function in draw(functions, most)]
    languages = ["eng-Latn", "python-Code"]
    return search("code_search", pairs, {"languages": languages, "prompt": SEARCH})


def code_modules(functions: list[Function], most: int) -> Task:
    """Functions of one package of the standard library belong together."""
    labelled = [(function.passage, function.package) for function in functions]
    rows = rows_of(evenly(labelled, most))
    return Task("code_modules", {"type": "clustering", "languages": ["python-Code"]}, {"test": rows})


def package_search(packages: list[Package], most: int) -> Task:
    """Each description is to be found by the package's summary."""
    pairs = [(package.summary, package.description) for package in draw(packages, most)]
    return search("package_search", pairs, {"prompt": INSTRUCTION})


def package_sections(packages: list[Package], most: int) -> Task:
    """The section of a package, told from its summary. Families do not stand on both sides."""
    train = defaultdict(list)
    test = []
    shown = set()
    for package in draw(packages, len(packages)):
        if package.section in SECTIONS and package.family not in shown:
            shown.add(package.family)
            of_section = train[package.section]
            if len(of_section) < TRAINED_ON:
                of_section.append((package.summary, package.section))
            else:
                test.append((package.summary, package.section))
    train = {label: rows for label, rows in train.items() if len(rows) == TRAINED_ON}
    test = evenly([row for row in test if row[1] in train], most)
    known = {label for _, label in test}
    trained = [row for label in sorted(known) for row in train[label]]
    return Task("package_sections", {"type": "classification"}, {"train": rows_of(trained), "test": rows_of(test)})


def package_topics(packages: list[Package], most: int) -> Task:
    """Packages of one section belong together."""
    labelled = [(text_of(package), package.section) for package in packages if package.section in SECTIONS]
    return Task("package_topics", {"type": "clustering"}, {"test": rows_of(evenly(labelled, most))})


def package_pairs(packages: list[Package], most: int) -> Task:
    """A summary and a description: of one package, or of two of one section but not of one family."""
    rng = random.Random(0)
    of_section = defaultdict(list)
    for package in packages:
        of_section[package.section].append(package)
    rows = []
    for number, package in enumerate(draw(packages, most)):
        other = rng.choice(of_section[package.section])
        is_same = number % 2 == 0
        if is_same or other.family != package.family:
            description = package.description if is_same else other.description
            rows.append({"sentence1": package.summary, "sentence2": description[:CHARS], "label": int(is_same)})
    return Task("package_pairs", {"type": "pair_classification"}, {"test": rows})


def package_relatedness(packages: list[Package], most: int) -> Task:
    """How near two packages stand in Debian: a third of the rows of one family, of one section, of two sections."""
    rng = random.Random(0)
    of_family = defaultdict(list)
    of_section = defaultdict(list)
    for package in packages:
        of_family[package.family].append(package)
        of_section[package.section].append(package)
    rows = []
    for number, package in enumerate(draw(packages, most)):
        wanted = number % 3
        among = (packages, of_section[package.section], of_family[package.family])[wanted]
        other = rng.choice(among)
        if other.summary != package.summary and relation(package, other) == wanted:
            rows.append({"sentence1": package.summary, "sentence2": other.summary, "score": wanted})
    return Task("package_relatedness", {"type": "sts"}, {"test": rows})


def relation(package: Package, other: Package) -> int:
    """2: of one family, 1: of one section, 0: of two sections."""
    if package.family == other.family:
        return 2
    return int(package.section == other.section)


def translations(language: str, pairs: list[tuple[str, str]], most: int) -> Task:
    """What programs say in English, and in another language.

    Args:
        language: as mteb names it, "deu-Latn".
    """
    rows = [{"sentence1": english, "sentence2": translated} for english, translated in draw(pairs, most)]
    settings = {"type": "bitext", "languages": ["eng-Latn", language]}
    return Task(f"translations_{language.partition('-')[0]}", settings, {"test": rows})


def search(name: str, pairs: list[tuple[str, str]], settings: dict) -> Task:
    """A search where document i, and no other, answers query i."""
    queries = [{"_id": f"q{number}", "text": query} for number, (query, _) in enumerate(pairs)]
    corpus = [{"_id": f"d{number}", "title": "", "text": passage} for number, (_, passage) in enumerate(pairs)]
    relevant = [(f"q{number}", f"d{number}") for number in range(len(pairs))]
    return Task(name, {"type": "retrieval"} | settings, {"queries": queries, "corpus": corpus}, relevant)


def rows_of(labelled: list[tuple[str, str]]) -> list[dict]:
    """(text, label) as rows."""
    return [{"text": text, "label": label} for text, label in labelled]


def text_of(package: Package) -> str:
    """What is known of what a package says of itself."""
    return f"{package.summary}. {package.description}"[:CHARS].strip()


def draw(items: list, most: int, seed: int = 0) -> list:
    """At most so many of the items, in random order; the same ones every time."""
    return random.Random(seed).sample(items, min(most, len(items)))


def evenly(labelled: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """At most so many in all, and no class more than its share; classes that are too small are left out."""
    by_label = defaultdict(list)
    for text, label in labelled:
        by_label[label].append((text, label))
    large = {label: rows for label, rows in by_label.items() if len(rows) >= LEAST_OF_LABEL}
    largest = sorted(large, key=lambda label: (-len(large[label]), label))[: max(1, most // LEAST_OF_LABEL)]
    share = max(1, most // max(1, len(largest)))
    return [row for label in sorted(largest) for row in draw(large[label], share)]
