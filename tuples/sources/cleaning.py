"""One row of a source as the texts that it gives, or the rule by which it is left out. Pure functions."""

import math
from dataclasses import dataclass, field

from tuples.sources.description import DIFFERENT, ID, KINDS, Source

CUT = "a text cut to {:,} characters"
EMPTY_PASSAGE = "an empty passage beside others"
PASSAGE_IS_QUERY = "a passage that is its query"
NO_LABEL = "no label (null, empty or -1)"
OUTSIDE = "a label outside the table"
NO_SCORE = "a score that is no number"  # as reports and kept pieces have called it; a person reads other words
LABELLED_DIFFERENT = "labelled different"


class LeftOut(Exception):
    """A row that cannot be used, by this rule; `value` is what it held, where that helps."""

    def __init__(self, rule: str, value: str = ""):
        super().__init__(rule)
        self.rule, self.value = rule, value


@dataclass
class Clean:
    """What a row gives: pairs of texts, or one text with its class; the second text is then empty."""

    pairs: list[tuple[str, str]]
    label: str = ""  # what the label means
    id: str = ""
    notes: list[str] = field(default_factory=list)  # what was changed or left out of it


def clean(values: dict, source: Source) -> Clean:
    """A row of a source, checked.

    Raises:
        LeftOut: the row cannot be used.
    """
    found = Clean([])
    if ID in source.columns_of:
        found.id = label_word(value_at(values, source.columns_of[ID][0]))
    if "label" in source.columns_of:
        found.label = _label(values, source)
    if source.kind == "duplicates" and found.label == DIFFERENT:
        raise LeftOut(LABELLED_DIFFERENT)
    if source.kind == "sts":
        _check_score(values, source)
    if source.kind in ("classification", "clustering"):
        found.pairs = [(_text(values, "text", source, found.notes), "")]
    else:
        first, second = KINDS[source.kind].columns[:2]
        query = _text(values, first, source, found.notes)
        passages = _passages(values, second, source, found.notes)
        found.pairs = [(query, passage) for passage in passages if passage != query]
        if not found.pairs:
            raise LeftOut(PASSAGE_IS_QUERY)
        if len(found.pairs) < len(passages):
            found.notes.append(PASSAGE_IS_QUERY)
    return found


def value_at(values: dict, column: str) -> object:
    """What a row holds in a column; "a.b" is b of the object a, where no column is called so.

    >>> value_at({"a": {"b": 1}}, "a.b"), value_at({"a.b": 2}, "a.b"), value_at({"a": 3}, "a.b")
    (1, 2, None)
    """
    if column in values:
        return values[column]
    value = values
    for name in column.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def label_word(value: object) -> str:
    """A label, or an id, as the word that stands for it in a table: 1, 1.0 and " 1" are all "1"; null is "".

    >>> label_word(1.0), label_word(True), label_word(" yes "), label_word(None)
    ('1', 'true', 'yes', '')
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _label(values: dict, source: Source) -> str:
    """What the label of a row means."""
    word = label_word(value_at(values, source.columns_of["label"][0]))
    table = source.label_table
    if table is not None and word in table:
        return table[word]
    if word in ("", "-1"):
        raise LeftOut(NO_LABEL)
    if table is not None:
        raise LeftOut(OUTSIDE, repr(word[:40]))
    return word


def _check_score(values: dict, source: Source) -> None:
    value = value_at(values, source.columns_of["score"][0])
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        raise LeftOut(NO_SCORE, repr(value)[:40])
    if score < source.threshold:
        raise LeftOut(f"a score below {source.threshold:g}")


def _text(values: dict, role: str, source: Source, notes: list[str]) -> str:
    """The text of a role; of several columns, or of their lists, those texts that hold something, a line each."""
    parts = []
    for column in source.columns_of[role]:
        value = value_at(values, column)
        texts = value if source.joins(role) and isinstance(value, list) else [value]
        if not all(isinstance(text, str | None) for text in texts):
            raise LeftOut(f"{role} is no text", repr(value)[:40])
        parts += [text for text in texts if text and not text.isspace()]
    if not parts:
        raise LeftOut(f"{role} is empty")
    return _checked("\n".join(parts), role, source, notes)


def _passages(values: dict, role: str, source: Source, notes: list[str]) -> list[str]:
    """The passages of a row, each once: one text, or the texts of a list that are not to be joined."""
    value = value_at(values, source.columns_of[role][0])
    if source.joins(role) or not isinstance(value, list):
        return [_text(values, role, source, notes)]
    if not all(isinstance(text, str | None) for text in value):
        raise LeftOut(f"{role} is no text", repr(value)[:40])
    texts = [text for text in value if text and not text.isspace()]
    if not texts:
        raise LeftOut(f"{role} is empty")
    if len(texts) < len(value):
        notes.append(EMPTY_PASSAGE)
    return list(dict.fromkeys(_checked(text, role, source, notes) for text in texts))


def _checked(text: str, role: str, source: Source, notes: list[str]) -> str:
    """A text that can be written as UTF-8, cut where it is too long."""
    if len(text) > source.max_chars:
        text = text[: source.max_chars]
        notes.append(CUT.format(source.max_chars))
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise LeftOut(f"{role} is not UTF-8") from None
    return text
