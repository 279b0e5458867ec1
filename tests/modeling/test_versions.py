"""Old and new packages: what requirements promise is what is tested, and each reads what the other writes.

    make test-oldest

The last test needs both virtual environments, which this command makes.
"""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
import transformers
from harness import ROOT, run_command
from transformers import AutoModel, AutoTokenizer

from modeling import versions
from modeling.backbone import read_config
from tools import prune_model

TEXTS = ["The river number 3 is old.", "A castle was sold.", "Wo liegt die Quelle der Donau?"]
HERE = Path(sys.prefix).resolve()
OTHERS = [venv for venv in (ROOT / ".venv-oldest", ROOT / ".venv") if venv.exists() and venv.resolve() != HERE]


def bounds(name: str) -> dict[str, str]:
    """Package -> its version, of a file of requirements or constraints."""
    lines = re.findall(r"^([\w-]+)[>=]=([\d.]+)", (ROOT / name).read_text(), flags=re.MULTILINE)
    return dict(lines)


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_both_ends_of_each_range_are_installed_by_a_target(name):
    wanted, newest, oldest = bounds(name), bounds("constraints.txt"), bounds("requirements-oldest.txt")
    assert wanted.keys() <= newest.keys()
    for package, version in wanted.items():
        if package not in ("torch", "trackio"):  # one version of torch is tested; no trackio runs with the oldest
            assert versions.numbers(oldest[package]) == versions.numbers(version), package
            assert versions.numbers(newest[package]) >= versions.numbers(version), package


def test_what_is_too_old_is_named_with_the_remedy():
    assert versions.too_old() == []
    wanted = bounds("requirements.txt")
    for package, oldest in versions.OLDEST.items():
        assert versions.numbers(wanted[package]) == oldest
    (line,) = versions.too_old({"transformers": "4.50.3", "accelerate": "1.15.0", "peft": "0.15.2"}.get)
    assert line == "transformers 4.50.3: 4.51 or newer is needed: pip install -U -r requirements.txt"


@pytest.mark.parametrize(("read", "written", "refused"), [
    ((1e4, None), {"rope_theta": 1e6, "rope_type": "default"}, True),  # Transformers 4 has a base of its own
    ((1e6, None), {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}, True),
    ((1e6, None), {"rope_theta": 1e6, "rope_type": "default"}, False),
    ((1e6, {"rope_type": "yarn", "factor": 4.0}), {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}, False),
    ((1e6, {"type": "yarn", "factor": 4.0}), {}, False),
])  # fmt: skip
def test_rope_that_an_old_transformers_passes_over_is_known(read, written, refused):
    config = SimpleNamespace(rope_theta=read[0], rope_scaling=read[1], rope_parameters=written)
    assert (versions.rope_problem(config, (4, 51)) is not None) == refused
    assert versions.rope_problem(config, (5, 0)) is None


def test_a_folder_is_read_with_its_rope_or_not_at_all(tmp_path):
    settings = toy.config().to_dict() | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    settings.pop("rope_theta", None)  # as Transformers 5 writes it
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config, problems = read_config(str(tmp_path))
    if versions.numbers(transformers.__version__) < (5, 0):
        assert "ignores the rope_parameters there" in problems[0]
    else:
        assert (problems, config.rope_parameters["rope_theta"]) == ([], 1e6)


# -------------------------------------------------------------------------------- folders of the other


def prune(backbone: Path, folder: Path) -> Path:
    """A pruned folder, cut in depth and width by the installed packages."""
    texts = folder.with_suffix(".jsonl")
    texts.write_text("\n".join(map(json.dumps, TEXTS)))
    sizes = ["--num_layers", "1", "--hidden_size", "24", "--intermediate_size", "40", "--calibration", str(texts)]
    assert prune_model.main(["--input", str(backbone), "--output", str(folder), *sizes]) == 0
    return folder


@torch.no_grad()
def vectors(folder: Path) -> np.ndarray:
    """Unit vectors [n, d] of TEXTS by plain Transformers: the state of the last token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    found = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1].double() for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(found), dim=1).numpy()


def write_and_read(backbone: Path, own: Path, other: Path) -> None:
    """What the other environment does: prune into `own`, and print its vectors and those of `other`."""
    print(json.dumps([vectors(prune(backbone, own)).tolist(), vectors(other).tolist()]))


@pytest.mark.processes
@pytest.mark.skipif(not OTHERS, reason="needs a second environment, .venv-oldest: make test-oldest")
def test_old_and_new_transformers_read_the_same_vectors_from_each_others_folders(tmp_path):
    backbone = toy.make_backbone(tmp_path / "backbone")
    here = prune(backbone, tmp_path / "here")
    words = [__file__, str(backbone), str(tmp_path / "there"), str(here)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = run_command(*words, environment=environment, python=OTHERS[0] / "bin" / "python")
    assert done.returncode == 0, done.stderr
    their_own, theirs_of_ours = map(np.array, json.loads(done.stdout.splitlines()[-1]))
    ours = vectors(here)
    assert (ours * theirs_of_ours).sum(axis=1) == pytest.approx(1, abs=1e-6)
    assert (vectors(tmp_path / "there") * their_own).sum(axis=1) == pytest.approx(1, abs=1e-6)
    assert (ours * their_own).sum(axis=1) == pytest.approx(1, abs=1e-6)  # and both prune alike
    assert abs(ours[0] @ ours[1]) < 0.999


if __name__ == "__main__":
    write_and_read(*map(Path, sys.argv[1:]))
