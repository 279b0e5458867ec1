"""Make tasks for tools/evaluate.py from the text that this machine has.

    python -m examples.local_tasks.make FOLDER [--documents 2000]
    python -m tools.evaluate --model MODEL --tasks FOLDER --output evaluation

FOLDER gets a folder for each task. The sources are Python's standard library, the packages that dpkg and apt know, and
gettext's translations; a task whose sources are missing is named and left out. kinds.py lists the tasks. The same
machine gives the same bytes. More long descriptions of packages than those of the installed ones can be fetched:

    mkdir -p LISTS/partial
    apt-get update -o Acquire::Languages=en -o Dir::State::Lists=LISTS

and LISTS is the folder for `--lists`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from examples.code_search import corpus
from utils import RunError, aside_of, exit_status, plural, publish, remove, write_json

from . import debian, kinds, translations
from .kinds import Task


def main(argv: list[str] | None = None) -> int:
    """Make the tasks.

    Returns:
        The exit status: 0; 2 if there is no source, or the folder exists; 1 if the disk refuses the tasks.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.local_tasks.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="what to write; must not exist yet")
    add("--documents", type=int, default=2000, help="rows of a task at most (default %(default)s)")
    add("--one_file_in", type=int, default=1, help="read one of every so many Python files (default %(default)s)")
    add("--status", type=Path, default=debian.STATUS, help="dpkg's packages (default %(default)s)")
    add("--lists", type=Path, default=debian.LISTS, help="folder of apt's lists (default %(default)s)")
    add("--locale", type=Path, default=translations.LOCALE, help="folder of translations (default %(default)s)")
    return exit_status(partial(make, parser.parse_args(argv)))


def make(flags: argparse.Namespace) -> None:
    """Write all tasks whose sources are there, and say which.

    Raises:
        RunError: the folder exists, a source is damaged, or no task can be made.
    """
    if flags.folder.exists():
        raise RunError(f"{flags.folder}: already exists; give another folder")
    aside = aside_of(flags.folder)
    remove(aside)
    made = 0
    for task in all_tasks(flags):
        if task.size < kinds.LEAST:
            print(f"{task.name:22}left out: {plural(task.size, 'row')} from this machine, {kinds.LEAST} are needed")
            continue
        write(task, aside / task.name)
        made += 1
        print(f"{task.name:22}{task.settings['type']:22}{plural(task.size, 'row')}")
    if not made:
        raise RunError("no task can be made: this machine has none of the sources")
    publish(flags.folder)
    print(flags.folder)


def all_tasks(flags: argparse.Namespace) -> Iterator[Task]:
    """Every task, those without rows too."""
    most = flags.documents
    functions = corpus.distinct(corpus.standard_library_functions(flags.one_file_in))
    yield kinds.code_search(functions, most)
    yield kinds.code_modules(functions, most)
    packages = debian.known_packages(flags.status, flags.lists)
    described = debian.described(packages)
    yield kinds.package_search(described, most)
    yield kinds.package_sections(packages, most)
    yield kinds.package_topics(packages, most)
    yield kinds.package_pairs(described, most)
    yield kinds.package_relatedness(packages, most)
    for folder, language in translations.LANGUAGES.items():
        yield kinds.translations(language, translations.pairs_of(folder, flags.locale), most)


def write(task: Task, folder: Path) -> None:
    """A task as tools/evaluate.py reads it."""
    folder.mkdir(parents=True)
    write_json(folder / "task.json", task.settings)
    for name, rows in task.rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    if task.relevant:
        (folder / "qrels").mkdir()
        lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in task.relevant)]
        (folder / "qrels" / "test.tsv").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
