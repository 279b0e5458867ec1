"""Whether a file or a hub dataset has the columns that a description names, and can fill its roles with them."""

from collections.abc import Iterable

import pyarrow as pa

from configuration.keys import did_you_mean
from tuples.sources.description import FILE, ID, Source

_SINGLE = ("label", "score", ID)  # roles that hold one value, and no text


def column_problems(names: list[str], source: Source) -> list[str]:
    """Roles whose columns are not among `names`; of "a.b" a must be."""
    problems = []
    for role, columns in source.columns_of.items():
        for name in columns:
            if name == FILE and source.files is not None:
                continue
            if name not in names and name.partition(".")[0] not in names:
                there = f"the columns are {', '.join(names)}"
                problems.append(f"no column {name!r} for {role}{did_you_mean(name, names)}; {there}")
    return problems


def path_problems(rows: Iterable, source: Source) -> list[str]:
    """Roles whose columns "a.b" none of these rows has, where one shows that it has none.

    Args:
        rows: objects; anything else is skipped.
    """
    role_of = {name: role for role, columns in source.columns_of.items() for name in columns if "." in name}
    if not role_of:
        return []
    shown = {name: set() for name in role_of}
    for values in rows:
        if isinstance(values, dict):
            for name, found in shown.items():
                found.add(_has_path(values, name))
    missing = [name for name, found in shown.items() if False in found and True not in found]
    return [_no_path(name, role_of[name]) for name in missing]


def _has_path(values: dict, column: str) -> bool | None:
    """Whether a row has a column "a.b"; None if a null stands on the way, which shows nothing."""
    if column in values:
        return True
    value = values
    for name in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True


def _no_path(column: str, role: str) -> str:
    return f"no column {column!r} for {role}; {column.partition('.')[0]!r} has none of that name"


def schema_problems(schema: pa.Schema, source: Source) -> list[str]:
    """Roles whose columns a Parquet file lacks, or that hold something else there than the role needs."""
    problems = column_problems(schema.names, source)
    if problems:
        return problems
    for role, columns in source.columns_of.items():
        for name in columns:
            kind = _type_at(schema, name)
            if kind is None:
                problems.append(_no_path(name, role))
            elif not _can_fill(role, kind, takes_lists=_takes_lists(role, source)):
                problems.append(f"column {name!r} holds {kind}, which cannot be the {role}")
    return problems


def _type_at(schema: pa.Schema, column: str) -> pa.DataType | None:
    """The type of a column; of "a.b" that of b in the objects of a, None if these have no b."""
    if column == FILE:
        return pa.string()
    if column in schema.names:
        return schema.field(column).type
    first, *others = column.split(".")
    kind = schema.field(first).type
    for name in others:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _takes_lists(role: str, source: Source) -> bool:
    """Whether a column of lists can fill a role: one of texts, that makes several of them or joins them."""
    if role in _SINGLE:
        return False
    return role == "passage" or source.joins(role)


def _can_fill(role: str, kind: pa.DataType, takes_lists: bool) -> bool:
    """Whether a column of this type can hold the texts, labels, scores or ids of a role."""
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if role in _SINGLE and is_number:
        return True
    if takes_lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
