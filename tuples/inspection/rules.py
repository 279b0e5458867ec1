"""The rules of an inspection: what each forbids, up to which share, and what to do where it is broken."""

from dataclasses import dataclass

from data.token_store import TASKS
from tuples.inspection.checks import Found

_NOT_CLASSIFICATION = ("retrieval", "clustering")


@dataclass(frozen=True)
class Rule:
    """One rule. It is broken where what it counts is more than `limit` as a share."""

    name: str
    limit: float  # the default, 0 to 1
    counts: str  # what is counted, and of what
    remedy: str
    tasks: tuple[str, ...] = TASKS  # to which it applies


RULES = (
    Rule("unreadable_rows", 0.0, "rows that cannot be read, of all rows", "fix these rows, or write the file again"),
    Rule(
        "empty_queries",
        0.0,
        "tuples with no query or a blank one, of all tuples",
        "fix these rows, or leave them out by tokenising with --skip_bad_rows true",
    ),
    Rule(
        "empty_positives",
        0.0,
        "tuples with no positive or a blank one, of all tuples",
        "fix these rows, or leave them out by tokenising with --skip_bad_rows true",
    ),
    Rule(
        "instruction_only",
        0.0,
        "queries with nothing behind their instruction, of all queries",
        "give these rows a query, or leave them out",
    ),
    Rule(
        "duplicate_queries",
        0.05,
        "tuples whose query stood in an earlier tuple, of all tuples",
        "keep one tuple for each query, or raise the limit if queries have several positives on purpose",
    ),
    Rule(
        "duplicate_tuples",
        0.01,
        "tuples whose query and positive stood together in an earlier tuple, of all tuples",
        "keep one of equal tuples: in a batch they are each other's false negatives",
    ),
    Rule(
        "positive_is_negative",
        0.0,
        "negatives that are their tuple's own positive, of all negatives",
        "mine the negatives again, or leave these out; tokenising leaves them out by itself",
    ),
    Rule(
        "false_negatives",
        0.0,
        "negatives that are the positive of another tuple with the same query, of all negatives",
        "take these negatives out: the same query is told that the text is right, and that it is wrong",
    ),
    Rule(
        "without_negatives",
        0.0,
        "tuples without a negative, of all tuples",
        "mine negatives for these tuples, or leave them out: they train nothing",
        ("clustering", "classification"),
    ),
    Rule(
        "query_in_passage",
        0.2,
        "tuples whose passage holds the whole query, of all tuples",
        "take the query's text out of the passage: a model learns to find the copy and not the meaning",
        _NOT_CLASSIFICATION,
    ),
    Rule(
        "passage_in_query",
        0.2,
        "tuples whose query holds the whole passage, of all tuples",
        "take the passage's text out of the query: a model learns to find the copy and not the meaning",
        _NOT_CLASSIFICATION,
    ),
    Rule(
        "label_in_query",
        0.1,
        "tuples whose query holds the text of its label, of all tuples",
        "take the label out of the text, or word the labels otherwise",
        ("classification",),
    ),
    Rule(
        "evaluation_queries",
        0.0,
        "tuples with a query of the evaluation set as query or positive, of all tuples",
        "leave these tuples out: the evaluation would measure memory",
    ),
    Rule(
        "evaluation_passages",
        0.0,
        "tuples with a passage of the evaluation set as query or positive, of all tuples",
        "leave these tuples out, or raise the limit if training and evaluation share a corpus on purpose",
    ),
    Rule(
        "truncated",
        0.5,
        "texts of tuples that training cuts at max_seq_length, of all texts of tuples",
        "raise max_seq_length, or cut the texts into passages",
    ),
)
NAMES = tuple(rule.name for rule in RULES)


@dataclass(frozen=True)
class Broken:
    """A rule that a dataset breaks."""

    rule: Rule
    limit: float
    found: Found


def broken_rules(found: dict[str, Found], task: str, limits: dict[str, float]) -> list[Broken]:
    """The rules that what was found in a dataset breaks, in the order of RULES; what is not known breaks none.

    Args:
        limits: rule -> the share that is allowed, where it is not the default.
    """
    broken = []
    for rule in RULES:
        limit = limits.get(rule.name, rule.limit)
        applies = task in rule.tasks and rule.name in found
        if applies and found[rule.name].share > limit:
            broken.append(Broken(rule, limit, found[rule.name]))
    return broken


def read_limits(words: list[str]) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """NAME=SHARE words as rule -> limit.

    Returns:
        (limits, (word, what is wrong with it) of those that make no sense).
    """
    limits = {}
    problems = []
    for word in words:
        name, _, text = word.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if name not in NAMES:
            problems.append((word, f"no rule is called {name!r}"))
        elif not 0 <= share <= 1:
            problems.append((word, "give a share from 0 to 1, such as 0.05; 1 allows everything"))
        limits[name] = share
    return limits, problems
