"""A source's description: a small JSON file that says where texts lie and how their rows become raw tuples.

    {"name": "banking77", "kind": "clustering", "files": "train.csv",
     "columns": {"label": "category"}, "instruction": "Identify the intent of the given query."}

KINDS says what each kind of source needs; the fields of `Source` are the keys. docs/tuples.md is the page about them.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from configuration.keys import did_you_mean, key, normalised, value_problem
from data.token_store import TASKS, name_problem
from modeling.prompts import bare_instruction, query_prompt, split_prompt
from utils import read_strictly

ENTAILMENT, NEUTRAL, CONTRADICTION = "entailment", "neutral", "contradiction"
DUPLICATE, DIFFERENT = "duplicate", "different"
ID = "id"  # a column that every kind may have
BEIR = "beir"  # a layout: queries, documents and judgements in three tables (tuples/sources/judged.py)
JUDGED_COLUMNS = {"query": "query", "passage": ["title", "text"]}  # of a source of this layout that names none
FILE = "(file)"  # in place of a column: the name of the row's file, without its endings


@dataclass(frozen=True)
class Kind:
    """What a kind of source needs, and what its tuples are."""

    task: str
    columns: tuple[str, ...]  # roles that every row must fill
    optional: tuple[str, ...]  # roles that it may fill
    keys: tuple[str, ...]  # keys of a description that mean something for some kinds alone
    symmetric: bool  # query and passage are texts of one sort, so that documents may carry the instruction too


KINDS = {
    "pairs": Kind("retrieval", ("query", "passage"), (), ("both_directions",), symmetric=True),
    "nli": Kind("retrieval", ("premise", "hypothesis", "label"), (), ("labels", "negatives"), symmetric=False),
    "sts": Kind("retrieval", ("sentence1", "sentence2", "score"), (), ("threshold", "both_directions"), symmetric=True),
    "duplicates": Kind(
        "retrieval", ("sentence1", "sentence2"), ("label",), ("labels", "both_directions"), symmetric=True
    ),
    "classification": Kind("classification", ("text", "label"), (), ("labels",), symmetric=False),
    "clustering": Kind("clustering", ("text", "label"), (), ("labels", "negatives"), symmetric=True),
}
USUAL_LABELS = {  # kind -> the table of a description that gives none
    "nli": {"0": ENTAILMENT, "1": NEUTRAL, "2": CONTRADICTION}
    | {name: name for name in (ENTAILMENT, NEUTRAL, CONTRADICTION)},
    "duplicates": {"1": DUPLICATE, "0": DIFFERENT, "true": DUPLICATE, "false": DIFFERENT},
}
MEANINGS = {"nli": (ENTAILMENT, NEUTRAL, CONTRADICTION), "duplicates": (DUPLICATE, DIFFERENT)}

_WHERE, _WHAT, _HOW, _ABOUT = "where the rows lie", "what they mean", "how tuples are made", "for people"


@dataclass(frozen=True)
class Source:
    """A description that was read; its fields are the keys."""

    name: str = key(_WHERE, "", "of the dataset, and of its file NAME.parquet")
    kind: str = key(_WHAT, "", "how rows become tuples", choices=tuple(KINDS))
    files: str | list[str] | None = key(
        _WHERE, "", "a file or several, * allowed, beside the description; null = a hub dataset", default=None
    )
    hub: str | None = key(_WHERE, "", "a dataset's id on the hub, or a folder that `datasets` loads", default=None)
    config: str | None = key(_WHERE, "", "its configuration; null = the only one", default=None)
    split: str | list[str] = key(_WHERE, "", "its split, or several, read one after the other", default="train")
    revision: str | None = key(_WHERE, "", "its commit, tag or branch; null = the main branch", default=None)
    layout: str | None = key(
        _WHERE, "", "beir = queries, documents and judgements in three tables; null = one table",
        default=None, choices=(BEIR,),
    )  # fmt: skip
    columns: dict | None = key(
        _WHAT, "", "role -> column, or a list of columns, joined by newlines; null = called as the roles",
        default=None,
    )  # fmt: skip
    labels: dict | None = key(_WHAT, "", "value of the label -> what it means (below)", default=None)
    threshold: float = key(_WHAT, "", "sts: leaves out pairs with a lower score; the highest is 5", default=4.0)
    task: str | None = key(_HOW, "", "null = the kind's", default=None, choices=TASKS)
    instruction: str = key(_HOW, "text", "put before queries that carry none; empty = none", default="")
    document_instruction_rate: float = key(
        _HOW, "share", "of documents and negatives that get it too; only symmetric kinds (v2: 0.3)",
        default=0.0, low=0,
    )  # fmt: skip
    negatives: int = key(_HOW, "texts", "nli, clustering: the most negatives of a tuple", default=24, low=1)
    both_directions: bool | None = key(
        _HOW, "", "each pair gives a second tuple, in the other direction; null = only for sts", default=None
    )
    cap: int = key(_HOW, "tuples", "at most, drawn at random; 0 = all (v2: 80000)", default=0, low=0)
    seed: int = key(_HOW, "", "of all random draws", default=42, low=0)
    max_chars: int = key(_HOW, "characters", "longer texts are cut to this many, and counted", default=100_000, low=1)
    exercised: bool | None = key(_ABOUT, "", "whether its author ran it; nothing depends on it", default=None)
    note: str = key(_ABOUT, "text", "anything; nothing depends on it", default="")

    @cached_property  # for it is asked for in every row
    def columns_of(self) -> dict[str, list[str]]:
        """The columns that fill each role that is read: those of the kind, and optional ones that `columns` names."""
        known = KINDS[self.kind]
        given = self.columns or (JUDGED_COLUMNS if self.layout else {})
        found = {}
        for role in (*known.columns, *known.optional, ID):
            if role in known.columns or role in given:
                named = given.get(role, role)
                found[role] = [named] if isinstance(named, str) else list(named)
        return found

    def joins(self, role: str) -> bool:
        """Whether the texts of a role are joined: where `columns` gives the role a list, even of one column."""
        return isinstance((self.columns or {}).get(role), list)

    @property
    def splits(self) -> list[str]:
        """The splits of a hub dataset, or of the judgements in a folder."""
        return [self.split] if isinstance(self.split, str) else list(self.split)

    @property
    def label_table(self) -> dict[str, str] | None:
        """Value of the label -> what it means; None if every value is a class of its own name."""
        return self.labels or USUAL_LABELS.get(self.kind)

    @property
    def task_of_tuples(self) -> str:
        """The task that the description names, or else that of the kind."""
        return self.task or KINDS[self.kind].task

    @property
    def turns_pairs(self) -> bool:
        """Whether a pair gives a tuple in each direction."""
        return self.kind == "sts" if self.both_directions is None else self.both_directions


def read_description(path: Path) -> tuple[Source | None, list[str]]:
    """A description, or None; and everything that is wrong with it, a line each that begins with the path."""
    try:
        given, problems = read_strictly(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"not JSON ({error})"
        return None, [f"{path}: {reason}"]
    if not isinstance(given, dict):
        return None, [f"{path}: must be one object of keys and values"]
    keys = {f.name: f for f in fields(Source)}
    for name in sorted(given.keys() - keys.keys()):
        problems.append(f"{path}: {name}: no such key{did_you_mean(name, keys)}")
    for name in ("name", "kind"):
        if name not in given:
            problems.append(f"{path}: {name} is missing")
    values: dict[str, Any] = {}
    for name in keys.keys() & given.keys():
        problem = value_problem(keys[name], given[name])
        if problem:
            problems.append(f"{path}: {name}: {problem}")
        else:
            values[name] = normalised(keys[name], given[name])
    if problems:
        return None, sorted(problems)
    source = Source(**values)
    problems = [f"{path}: {problem}" for problem in _problems(source, given)]
    return (None if problems else source), problems


def _problems(source: Source, given: dict) -> list[str]:
    """What is wrong with a description whose keys and values are of the right kind."""
    known = KINDS[source.kind]
    problems = []
    if name_problem(source.name):
        problems.append(name_problem(source.name))
    if (source.files is None) == (source.hub is None):
        problems.append("files, hub: give one of the two")
    of_hub = ("config", "revision") if source.layout else ("config", "split", "revision")
    if source.files is not None:
        problems += [f"{name}: is for hub datasets, and this source has files" for name in of_hub if name in given]
    problems += _layout_problems(source)
    elsewhere = {name for other in KINDS.values() for name in other.keys} - set(known.keys)
    for name in sorted(elsewhere & given.keys()):
        kinds = ", ".join(kind for kind in KINDS if name in KINDS[kind].keys)
        problems.append(f"{name}: is for {kinds}, and this is {source.kind}")
    problems += _rate_problems(source)
    instruction = bare_instruction(source.instruction)
    if instruction != source.instruction or (instruction and split_prompt(query_prompt(instruction))[0] != instruction):
        problems.append(f"instruction: {source.instruction!r}: must be the instruction alone, as 'Find it.'")
    return problems + _column_problems(source) + _label_problems(source)


def _layout_problems(source: Source) -> list[str]:
    """What is wrong with a source of three tables."""
    if source.layout is None:
        return []
    problems = []
    if source.kind != "pairs":
        problems.append(f"layout: queries with judged documents are pairs, and this is {source.kind}")
    if source.config is not None:
        problems.append(f"config: the layout {BEIR} has a configuration for each table: leave this one out")
    if isinstance(source.files, list):
        problems.append(f"files: must be one folder for the layout {BEIR}, not a list")
    return problems


def _rate_problems(source: Source) -> list[str]:
    """What is wrong with the share of documents that carry the instruction."""
    rate = source.document_instruction_rate
    if rate > 1:
        return [f"document_instruction_rate: {rate} is above 1"]
    if rate and not KINDS[source.kind].symmetric:
        return [f"document_instruction_rate: documents of {source.kind} are of another sort than queries: leave it out"]
    if rate and not source.instruction:
        return ["document_instruction_rate: needs an instruction: give one"]
    return []


def _column_problems(source: Source) -> list[str]:
    """What is wrong with the roles and the columns that they name."""
    known = KINDS[source.kind]
    roles = [*known.columns, *known.optional, ID]
    problems = []
    for role, named in (source.columns or {}).items():
        if role not in roles:
            problems.append(
                f"columns: {role}: no such role{did_you_mean(role, roles)} ({source.kind}: {', '.join(roles)})"
            )
        names = named if isinstance(named, list) and named else [named]
        if not all(isinstance(name, str) and name for name in names):
            problems.append(f"columns: {role}: must be a column's name, or a list of names")
        elif len(names) > 1 and role in ("label", "score", ID):
            problems.append(f"columns: {role}: one column, not {len(names)}")
    if source.labels and "label" in known.optional and "label" not in (source.columns or {}):
        problems.append('labels: no column is read for them: add "label" to columns')
    return problems


def _label_problems(source: Source) -> list[str]:
    """What is wrong with the table of labels."""
    table = source.labels
    if table is None:
        if source.kind == "classification":
            return ['labels: the texts of the two classes are missing: {"0": "...", "1": "..."}']
        return []
    texts = list(table.values())
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return ["labels: every value must be a text"]
    meanings = MEANINGS.get(source.kind)
    if meanings is not None:
        problems = []
        for value, meaning in table.items():
            if meaning not in meanings:
                words = f"{meaning!r} is not one of {', '.join(meanings)}{did_you_mean(meaning, meanings)}"
                problems.append(f"labels: {value}: {words}")
        if meanings[0] not in texts:
            problems.append(f"labels: no value means {meanings[0]}, so there would be no tuple")
        return problems
    classes = len(set(texts))
    if source.kind == "classification" and classes != 2:
        return [f"labels: two-way classification needs two texts, not {classes}; for more classes there is clustering"]
    if classes < 2:
        return ["labels: all values mean the same class, so there is nothing to learn"]
    return []
