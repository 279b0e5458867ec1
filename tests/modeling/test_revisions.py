"""A hub model in one of its revisions: weights, config, tokenizer, teacher and the base of an adapter are all of it.

python -m pytest tests/modeling/test_revisions.py      in a cache as the hub's client lays it out, without a network
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import toy
from conftest import toy_settings
from harness import ROOT, run_command
from safetensors.torch import load_file

from modeling import hub, tokenizer

pytestmark = pytest.mark.processes  # the hub's client reads its environment when it is imported

FIRST, SECOND = "1" * 40, "2" * 40  # commits
LOADS = """
import json, sys, torch
from modeling.backbone import load_backbone
sums = {}
for revision in (None, *sys.argv[1:]):
    model = load_backbone("owner/student", torch.float32, revision=revision)
    sums[str(revision)] = float(model.embed_tokens.weight.double().sum())
print(json.dumps(sums))
"""


@dataclass
class Hub:
    """A cache with two models, each at two commits: main is the first, v2 the second."""

    cache: Path

    def snapshot(self, name: str, commit: str) -> Path:
        return self.cache / f"models--owner--{name}" / "snapshots" / commit

    def environment(self) -> dict:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.cache), "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="module")
def offline_hub(tmp_path_factory) -> Hub:
    """The student's main has no tokenizer and the teacher's main is too narrow: neither could be trained with."""
    made = Hub(tmp_path_factory.mktemp("hub"))
    sizes = {("student", FIRST): 32, ("student", SECOND): 32, ("teacher", FIRST): 16, ("teacher", SECOND): 48}
    for seed, ((name, commit), hidden_size) in enumerate(sizes.items()):
        toy.make_backbone(made.snapshot(name, commit), hidden_size, seed)
        refs = made.snapshot(name, commit).parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / {FIRST: "main", SECOND: "v2"}[commit]).write_text(commit)
    for path in made.snapshot("student", FIRST).glob("tokenizer*"):
        path.unlink()
    return made


def embeddings_of(folder: Path):
    return load_file(folder / "model.safetensors")["embed_tokens.weight"]


def test_branch_and_commit_name_the_weights_that_are_loaded(offline_hub):
    done = run_command("-c", LOADS, "main", "v2", FIRST, SECOND, environment=offline_hub.environment())
    assert done.returncode == 0, done.stderr
    sums = json.loads(done.stdout.splitlines()[-1])
    snapshots = [offline_hub.snapshot("student", commit) for commit in (FIRST, SECOND)]
    first, second = (float(embeddings_of(folder).double().sum()) for folder in snapshots)
    assert first != second
    assert sums == {"None": first, "main": first, FIRST: first, "v2": second, SECOND: second}


def flags(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def settings(toy_world, tmp_path) -> dict:
    return toy_settings(toy_world, tmp_path) | {
        "model_path": "owner/student", "model_revision": "v2", "teacher_model_path": "owner/teacher",
        "teacher_revision": SECOND, "use_lora": True, "train_steps": 1, "experiment_id": "lora",
    }  # fmt: skip


def test_a_run_takes_model_teacher_and_tokenizer_at_their_revisions_and_says_so(offline_hub, settings, tmp_path):
    done = run_command("run.py", *flags(settings), environment=offline_hub.environment())
    assert done.returncode == 0, done.stderr
    assert "training owner/student at revision v2: 1 step" in done.stdout
    assert f"teacher: owner/teacher at revision {SECOND}" in done.stdout
    run = tmp_path / "output" / "lora"
    args = json.loads((run / "args.json").read_text())
    assert (args["model_revision"], args["teacher_revision"]) == ("v2", SECOND)
    folder = run / "step_1"
    assert "| model_revision | v2 |" in (folder / "README.md").read_text()
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("owner/student", "v2")

    words = ("-m", "tools.merge_adapter", str(folder), str(tmp_path / "merged"))
    done = run_command(*words, environment=offline_hub.environment())
    assert done.returncode == 0, done.stderr
    merged = embeddings_of(tmp_path / "merged")
    assert merged.equal(embeddings_of(offline_hub.snapshot("student", SECOND)))  # the adapter leaves them as they are
    assert not merged.equal(embeddings_of(offline_hub.snapshot("student", FIRST)))


def test_a_revision_that_cannot_be_fetched_is_refused_by_name(offline_hub, settings):
    changed = settings | {"model_revision": "v3", "teacher_revision": "main"}
    done = run_command("run.py", *flags(changed), environment=offline_hub.environment())
    assert done.returncode == 2
    assert "model_path: 'owner/student': no such folder, and no hub model of that name and revision 'v3'" in done.stderr
    changed = settings | {"teacher_revision": "main"}
    done = run_command("run.py", *flags(changed), environment=offline_hub.environment())
    assert done.returncode == 2
    assert "teacher_model_path: hidden size 16, but the student's is 32" in done.stderr


def test_the_tokenising_command_takes_a_revision(offline_hub, toy_world, tmp_path):
    words = ["tokenize_data_qwen.py", "--tokenizer_path", "owner/student", "--input_dir", str(toy_world.raw)]
    words += ["--output_dir", str(tmp_path / "stores"), "--max_seq_length", "128", "--tokenizer_revision"]
    done = run_command(*words, "main", environment=offline_hub.environment())
    assert done.returncode == 2
    assert "--tokenizer_path 'owner/student': no tokenizer there" in done.stderr
    done = run_command(*words, "v2", environment=offline_hub.environment())
    assert done.returncode == 0, done.stderr
    for path in toy_world.stores.rglob("*.npy"):
        assert (tmp_path / "stores" / path.parent.name / path.name).read_bytes() == path.read_bytes()


def test_a_folder_has_no_revisions(toy_world):
    found, (problem,) = tokenizer.load_tokenizer(str(toy_world.backbone), "v2")
    assert found is None
    assert "is a folder, and only a hub id has a revision such as 'v2'" in problem


def test_an_adapter_names_the_revision_of_its_base_and_where_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_hub_is_reachable", lambda: True)
    config = {"base_model_name_or_path": "owner/student", "revision": "v2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert hub.loading_options(str(tmp_path)) == {
        "trust_remote_code": False,
        "local_files_only": False,
        "revision": "v2",
    }
    shutil.copytree(ROOT / "configs", tmp_path / "base")
    config = {"base_model_name_or_path": str(tmp_path / "base"), "revision": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert hub.loading_options(str(tmp_path)) == {"trust_remote_code": False, "local_files_only": True}
