"""Training with a teacher's embeddings from the disk is training with the live teacher, which then never runs.

    python -m pytest tests/training/test_teacher_embeddings.py

The toy has missing negatives, texts that are longer than max_seq_length, and a teacher wider than the student.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import toy
from conftest import door_here, read_metrics, tokenize, train_here
from harness import on_processes, train_steps
from test_distributed import largest_difference, relative_error

import model
from data import embedding_store
from data.token_store import open_store
from losses import distillation_loss
from tools import embed_store
from training import setup
from training.loss_memory import loss_bytes

LENGTH = 24  # tokens: a third of the texts is longer
STEPS = 6


@pytest.fixture(scope="module")
def world(toy_world, tmp_path_factory):
    """Data, a teacher, its embeddings in fp32 and in fp16."""
    root = tmp_path_factory.mktemp("taught")
    raw = toy.write_gappy(root / "raw", {"retrieval": 31, "clustering": 15})
    assert tokenize(raw, root / "stores", toy_world.backbone) == 0
    toy.make_backbone(root / "teacher", hidden_size=48, seed=7)
    assert embed(root, "float32") == 0
    assert embed(root, "float16", "--dtype", "float16") == 0
    for name in ("retrieval", "clustering"):
        lengths = np.diff(open_store(root / "stores" / name).offsets)
        assert 0.05 < (lengths > LENGTH).mean() < 0.95
    return root


def embed(root, name: str, *more: str) -> int:
    """Call the door; returns its exit status."""
    words = ["--model", str(root / "teacher"), "--stores", str(root / "stores"), "--output", str(root / name)]
    return embed_store.main([*words, "--max_seq_length", str(LENGTH), *more])


def configuration(root, toy_world, folder, processes: int = 1, **changes) -> dict:
    config = {
        "model_path": str(toy_world.backbone), "experiment_id": "taught", "output_dir": str(folder / "output"),
        "tb_dir": str(folder), "cache_dir": str(folder / "cache"), "train_data_path": str(root / "stores"),
        "train_batch_size": 12 // processes, "max_seq_length": LENGTH, "num_hard_neg": 3, "train_steps": STEPS,
        "train_epochs": 100, "warmup_steps": 0, "learning_rate": 1e-3, "report_to": "none", "kd_weight": 3.0,
        "log_interval": 1, "max_tokens_per_forward": 0, "gradient_checkpointing": False, "validation_steps": 0,
        "checkpointing_steps": 0,
    }  # fmt: skip
    return config | changes


def losses(folder) -> list[dict]:
    """Dataset -> loss -> value, step by step."""
    return [line["losses"] for line in read_metrics(folder, "train")]


def assert_near(ours: list[dict], theirs: list[dict], rel: float) -> None:
    assert len(ours) == len(theirs) == STEPS
    for own, other in zip(ours, theirs, strict=True):
        assert own.keys() == other.keys()
        for name, values in other.items():
            assert "distillation" in values
            assert own[name] == pytest.approx(values, rel=rel)


@pytest.fixture
def passes(monkeypatch) -> dict[str, int]:
    """How many forward passes each kind of model has had."""
    counts = {"teacher": 0, "student": 0}
    forward = model.Embedder.forward

    def counted(self, tokens, cu_seqlens, lengths):
        counts["teacher" if isinstance(self, model.FrozenEmbedder) else "student"] += 1
        return forward(self, tokens, cu_seqlens, lengths)

    monkeypatch.setattr(model.Embedder, "forward", counted)
    return counts


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """The teacher's width by which each run's memory is foreseen."""
    found = []
    monkeypatch.setattr(setup, "loss_bytes", lambda shape: found.append(shape.teacher_width) or loss_bytes(shape))
    return found


@pytest.mark.parametrize("changes", [{}, {"use_mrl": True, "max_tokens_per_forward": 120}], ids=["plain", "in parts"])
def test_the_array_trains_as_the_live_teacher_does_and_runs_none(world, toy_world, tmp_path, passes, widths, changes):
    live_config = configuration(world, toy_world, tmp_path, teacher_model_path=str(world / "teacher"), **changes)
    live = losses(train_here(live_config))
    assert passes["teacher"] >= STEPS
    students_passes = passes["student"]
    passes |= {"teacher": 0, "student": 0}
    array_config = configuration(
        world, toy_world, tmp_path, experiment_id="array", teacher_embeddings=str(world / "float32"), **changes
    )
    folder = train_here(array_config)
    assert passes == {"teacher": 0, "student": students_passes}
    assert_near(losses(folder), live, rel=2e-5)
    assert widths == [48, 32]  # of the array only the student's columns are read
    manifest = json.loads((folder / "manifest.json").read_text())
    meta = embedding_store.read_meta(world / "float32" / "retrieval")
    assert manifest["data"]["retrieval"]["teacher_embeddings"] == meta["sha256"]
    facts = json.loads((folder / f"step_{STEPS}" / "f2llm.json").read_text())["training"]
    assert facts["teacher_embeddings"] == str(world / "float32")
    assert facts["teacher_model_path"] == str(world / "teacher")


def test_float16_moves_the_distillation_loss_by_its_rounding(world):
    """Half a unit of the 11th bit, 2^-11 of each number at most; of the mean over pairs far less."""
    exact, half = (np.load(world / name / "retrieval" / "embeddings.npy")[:, :32] for name in ("float32", "float16"))
    apart = np.abs(half - exact) / np.abs(exact)
    assert 0 < apart[np.abs(exact) > 2**-14].max() <= 2**-11  # smaller numbers have fewer bits there
    student = torch.from_numpy(np.random.default_rng(0).standard_normal(exact.shape).astype(np.float32))
    of_exact, of_half = (
        float(distillation_loss(student, torch.from_numpy(rows.astype(np.float32)))) for rows in (exact, half)
    )
    print(f"float16: numbers {apart.max():.1e} off, the distillation loss {abs(of_half / of_exact - 1):.1e}")
    assert of_half != of_exact
    assert of_half == pytest.approx(of_exact, rel=1e-4)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_have_the_gradient_of_one_with_the_live_teacher(world, toy_world, tmp_path, kind):
    """Weights stand still, so all steps compare gradients at the same weights; kd_weight 0 shows whose they are."""

    def found(processes: int, changes: list[dict]):
        configs = []
        for number, change in enumerate(changes):
            folder = tmp_path / f"{processes}-{number}"
            folder.mkdir()
            configs.append(
                configuration(world, toy_world, folder, processes, learning_rate=1e-30, min_lr=0.0, **change)
            )
        return on_processes(processes, train_steps, configs, torch.float32, kind=kind)[0]

    array = {"teacher_embeddings": str(world / "float32")}
    live, silent = found(1, [{"teacher_model_path": str(world / "teacher")}, array | {"kd_weight": 0.0}])
    (ours,) = found(2, [array])
    assert ours["teacher"] is None
    for step in range(STEPS):
        assert relative_error(ours["gradients"][step], live["gradients"][step]) < 2e-6
        assert largest_difference(ours["gradients"][step], silent["gradients"][step]) > 1e-2
    for name, values in live["losses"].items():
        assert ours["losses"][name] == pytest.approx(values, rel=1e-5)


# ---------------------------------------------------------------------------------- what is refused


def refused(config: dict, capsys) -> str:
    assert door_here(config) == 2
    return capsys.readouterr().err


def test_everything_that_does_not_fit_is_refused_at_once(world, toy_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model.FrozenEmbedder, "__init__", None)
    toy.make_backbone(tmp_path / "wide", hidden_size=64)
    config = configuration(
        world, toy_world, tmp_path, model_path=str(tmp_path / "wide"), max_seq_length=32,
        teacher_embeddings=str(world / "float32"), teacher_model_path=str(tmp_path / "unused"),
    )  # fmt: skip
    said = refused(config, capsys)
    assert "given beside teacher_model_path: a run has one teacher: add --teacher_model_path null" in said
    assert "unused" not in said  # what shall not be used may be missing
    for name in ("retrieval", "clustering"):
        assert f"{world / 'float32' / name}: its texts were cut to 24 tokens, and this run cuts them to 32" in said
        assert f"{world / 'float32' / name}: 48 dimensions, but the student has 64" in said
    assert not (tmp_path / "output").exists()
    said = refused(config | {"teacher_embeddings": str(tmp_path / "none")}, capsys)
    assert "none: no such folder" in said


def test_a_resume_needs_the_embeddings_that_training_began_with(world, toy_world, tmp_path, capsys):
    config = configuration(
        world, toy_world, tmp_path, teacher_embeddings=str(world / "float32"), scheduler_type="constant_with_warmup"
    )
    train_here(config)
    moved = tmp_path / "moved"
    moved.symlink_to(world / "float32")
    train_here(config | {"train_steps": STEPS + 1, "teacher_embeddings": str(moved)})  # another path, the same array
    assert door_here(config | {"train_steps": STEPS + 2, "teacher_embeddings": str(world / "float16")}) == 2
    assert "teacher_embeddings: are others (checksum was " in capsys.readouterr().err


def test_missing_and_damaged_embeddings_are_refused(world, toy_world, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(world / "float32" / "retrieval", folder / "retrieval")
    config = configuration(world, toy_world, tmp_path, teacher_embeddings=str(folder))
    assert f"teacher_embeddings: {folder / 'clustering'}: no embeddings" in refused(config, capsys)
    shutil.copytree(world / "float32" / "clustering", folder / "clustering")
    path = folder / "retrieval" / "embeddings.npy"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert f"{path}: checksum differs" in refused(config, capsys)
    shutil.copyfile(world / "float32" / "retrieval" / "embeddings.npy", path)
    train_here(config | {"train_steps": 1})
    said = capsys.readouterr().out
    assert f"teacher: its embeddings in {folder}" in said
    assert said.count("verified the teacher's embeddings of") == 1  # clustering's were, before retrieval's were refused


def test_a_dataset_that_is_cut_elsewhere_by_its_settings_needs_other_embeddings(world, toy_world, tmp_path, capsys):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"retrieval": {"max_length": 16}}))
    config = configuration(world, toy_world, tmp_path, teacher_embeddings=str(world / "float32"))
    said = refused(config | {"dataset_settings": str(settings)}, capsys)
    assert f"{world / 'float32' / 'retrieval'}: its texts were cut to 24 tokens, and this run cuts them to 16" in said
    assert "clustering" not in said
