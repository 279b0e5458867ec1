"""Configurations and manifests beside each other: every key, every run's value, and where they differ."""

import json
from dataclasses import MISSING, dataclass, fields

from arguments import GROUPS, Args

ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """One key."""

    key: str
    values: list[str]  # of each run, as people read them
    stands_out: bool  # of several runs: they differ; of one: it is not the default
    default: str = ""
    effect: str = ""


def words(value) -> str:
    """A JSON value for people: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def configuration_groups(configurations: list[dict]) -> list[tuple[str, list[Row]]]:
    """(group, rows) in the order of `run.py --help`; keys that are known no more come last.

    A key that an older run does not have counts with its default of today.
    """
    known = {field.name: field for field in fields(Args)}
    groups = []
    for group in GROUPS:
        rows = []
        for name, field in known.items():
            if field.metadata["group"] == group and any(name in one for one in configurations):
                default = None if field.default is MISSING else field.default
                rows.append(_key_row(name, configurations, default, field.metadata["effect"], field.default is MISSING))
        groups.append((group, rows))
    others = dict.fromkeys(key for one in configurations for key in one if key not in known)
    groups.append(("Of other versions", [_plain_row(key, configurations) for key in others]))
    return [(group, rows) for group, rows in groups if rows]


def _key_row(name: str, configurations: list[dict], default, effect: str, required: bool) -> Row:
    shown = [words(one[name]) if name in one else ABSENT for one in configurations]
    counted = [words(one.get(name, default)) for one in configurations]
    if len(configurations) > 1:
        stands_out = len(set(counted)) > 1
    else:
        stands_out = not required and counted != [words(default)]
    return Row(name, shown, stands_out, "required" if required else words(default), effect)


def _plain_row(key: str, objects: list[dict]) -> Row:
    shown = [words(one[key]) if key in one else ABSENT for one in objects]
    return Row(key, shown, len(set(shown)) > 1)


def manifest_rows(manifests: list[dict]) -> list[Row]:
    """Every leaf of the manifests by its path, as versions.torch; checksums of data by their first 12 digits."""
    flat = [flatten(manifest) for manifest in manifests]
    keys = dict.fromkeys(key for one in flat for key in one)
    return [_plain_row(key, flat) for key in keys]


def flatten(value: dict, path: str = "") -> dict:
    """Leaf objects by their path.

    >>> flatten({"versions": {"torch": "2.13"}, "commit": None})
    {'versions.torch': '2.13', 'commit': None}
    """
    found = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= flatten(inner, f"{path}{key}.")
        elif isinstance(inner, str) and len(inner) == 64 and path.startswith("data."):
            found[f"{path}{key}"] = inner[:12]
        else:
            found[f"{path}{key}"] = inner
    return found
