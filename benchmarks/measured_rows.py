"""Measured rows in a JSONL file: what stands there is not measured again, so a long benchmark continues where it ended.

A row is a dictionary. IDENTITY names the keys that say what was measured; the others hold what came out. Among the
settings are CONDITIONS: rows of another machine, or of other versions, are other rows.
"""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev

from filelock import FileLock

from examples.code_search.job import multiplies_in_bf16
from utils import RunError, file_digest

IDENTITY = ("kind", "data", "system", "seed", "settings")
CONDITIONS = ("pairs", "weights", "precision", "machine", "versions")  # settings that no flag says
PROCESSOR_FLAGS = ("avx512_bf16", "amx_bf16")  # they decide how fast bf16 is
PACKAGES = ("torch", "transformers", "sentence-transformers")


class RowFile:
    """The rows of one file. Several processes may append to it: a row is one line, written at once.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def rows(self, **wanted) -> list[dict]:
        """The rows that have these values, in the order of measuring; read anew each time."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if all(row[key] == value for key, value in wanted.items()):
                rows.append(row)
        return rows

    def find(self, identity: dict) -> dict | None:
        """The row of this identity, or None if it was not measured yet."""
        found = self.rows(**{key: identity[key] for key in IDENTITY})
        return found[-1] if found else None

    def append(self, row: dict) -> None:
        """Add a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with open(self.path, "a", encoding="utf-8", buffering=max(len(line.encode()) + 1, 1 << 16)) as file:
            file.write(line)  # leaves the buffer in one write, which O_APPEND puts at the end
            file.flush()


def row_lock(folder: Path) -> FileLock:
    """Held while a row is measured whose training folder this is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{folder}.lock")


def mean_and_spread(values: list[float]) -> str:
    """The mean and the standard deviation over seeds, which a single seed has not.

    >>> mean_and_spread([0.5]), mean_and_spread([0.4, 0.6])
    ('0.500       ', '0.500 ±0.141')
    """
    if len(values) == 1:
        return f"{values[0]:.3f}" + 7 * " "
    return f"{mean(values):.3f} ±{stdev(values):.3f}"


# --------------------------------------------------------------------------------------- conditions


def conditions_here(pairs: str, model: Path) -> dict[str, str]:
    """What a row depends on and no flag says.

    Args:
        pairs: the digest of the task's pairs.
        model: folder of the backbone.

    Raises:
        RunError: the folder holds no model.
    """
    return {
        "pairs": pairs,
        "weights": model_digest(model),
        "precision": "bf16" if multiplies_in_bf16() else "fp32",
        "machine": processor(),
        "versions": versions(),
    }


def conditions_line(settings: dict) -> str:
    """The conditions among the settings, to be printed once above a table."""
    return "# " + "; ".join(f"{key} {settings[key]}" for key in CONDITIONS if key in settings)


def model_digest(folder: Path) -> str:
    """Names config, tokenizer and weights of a model folder: folders of one name may hold different models.

    Raises:
        RunError: the folder holds no model.
    """
    weights = sorted(folder.glob("*.safetensors"))
    config = folder / "config.json"
    if not weights or not config.is_file():
        raise RunError(f"{folder}: no model folder; it holds no config.json with *.safetensors")
    tokenizer = sorted(folder.glob("tokenizer.json"))
    return short_digest([[path.name, file_digest(path)] for path in [config, *tokenizer, *weights]])


def short_digest(content) -> str:
    """Names what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def processor() -> str:
    """The processor's name, and which instructions for bf16 it has."""
    name = ""
    flags = []
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:  # the last processor's stay; they are all alike
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = value.split()
    if not name:
        return platform.processor() or platform.machine()
    words = [name]
    for flag in PROCESSOR_FLAGS:
        words.append(f"{flag} {'yes' if flag in flags else 'no'}")
    return ", ".join(words)


def versions() -> str:
    """The packages that a row's quality and seconds depend on."""
    words = []
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        words.append(f"{package} {version}")
    return ", ".join(words)
