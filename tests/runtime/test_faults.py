"""What breaks outside: each fault ends in the exact continuation or in a message, on every process.

python -m pytest tests/runtime/test_faults.py

Faults of the state files of a run are in test_resume.py, those of a process among others in test_engines.py, kills in
test_chaos.py, malformed input in test_fuzz.py.
"""

import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from chaos import final
from conftest import door_here, interrupted, tokenize, toy_settings, train_here
from harness import Ended, Processes, door_on_processes
from safetensors.torch import load_file, save_file

import run
import tokenize_data_qwen
from export import model_folder
from runtime import checkpoint, processes, resume
from training import objective, records
from utils import RunError, seal, write_json

# One epoch, 13 steps, with a state every four.
KEYS = {"train_steps": -1, "train_epochs": 1, "train_batch_size": 24, "log_interval": 3, "checkpointing_steps": 4,
        "validation_steps": 6, "process_timeout": 60}  # fmt: skip
HALF = {"train_batch_size": 12}  # of two processes: the same global batch


@pytest.fixture
def keys(settings):
    return settings | KEYS


@pytest.fixture(scope="module")
def whole(toy_world, tmp_path_factory):
    """What the run ends in when nothing happens, made once."""
    settings = toy_settings(toy_world, tmp_path_factory.mktemp("whole"))
    return final(train_here(settings | KEYS))


@pytest.fixture(scope="module")
def whole_of_two(toy_world, tmp_path_factory):
    """The same of two processes."""
    settings = toy_settings(toy_world, tmp_path_factory.mktemp("whole_of_two"))
    return final(train_on_two(settings | KEYS | HALF))


def train_on_two(keys: dict) -> Path:
    """Train on two processes; returns the run's folder."""
    assert [end.status for end in door_on_processes(2, keys)] == [0, 0]
    return Path(keys["output_dir"]) / "toy"


def check_words(ends: list[Ended], words: str) -> None:
    """Every process ended with status 1, one of them with these words for the user, and none with a traceback."""
    printed = "".join(end.printed for end in ends)
    assert [end.status for end in ends] == [processes.FAILED] * len(ends), printed
    assert words in printed
    assert "Traceback" not in printed


# ------------------------------------------------------------------------------------------ full disks


def small_disk(limit: int, rank: int) -> None:
    """No file may grow beyond this many bytes: as a full disk, but for one process alone."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_when(what: str, rank: int) -> None:
    """No byte can be written from the second time on that this is written."""
    where, attribute = MOMENTS[what]
    write = getattr(where, attribute)
    calls = 0

    def write_or_fill_the_disk(*words, **named):
        nonlocal calls
        calls += 1
        if calls == 2:
            small_disk(0, rank)
        return write(*words, **named)

    setattr(where, attribute, write_or_fill_the_disk)


LIMITS = {
    "args.json": 1_500,
    "metrics.jsonl": 2_600,
    "a state's moments": 130_000,
    "a model folder's tokenizer": 15_000,
}
MOMENTS = {
    "a state": (checkpoint, "write_part"),
    "a state's name": (checkpoint, "finish"),
    "a model folder": (model_folder, "save"),
    "a log line": (records.Metrics, "write"),
}


@pytest.mark.processes
@pytest.mark.parametrize("what", LIMITS)
def test_a_file_that_cannot_grow(keys, whole, what):
    check_words(door_on_processes(1, keys, partial(small_disk, LIMITS[what])), "the disk refuses")
    assert final(train_here(keys)) == whole


@pytest.mark.processes
@pytest.mark.parametrize("what", MOMENTS)
def test_a_disk_that_fills_up(keys, whole, what):
    check_words(door_on_processes(1, keys, partial(full_when, what)), "the disk refuses")
    assert final(train_here(keys)) == whole


@pytest.mark.processes
@pytest.mark.parametrize("what", MOMENTS)
def test_a_disk_that_fills_up_ends_both_processes(keys, whole_of_two, what):
    keys |= HALF
    check_words(door_on_processes(2, keys, partial(full_when, what)), "the disk refuses")
    assert final(train_on_two(keys)) == whole_of_two


def tokenise_on_small_disk(rank: int, world: int, words: list[str], limit: int) -> None:
    small_disk(limit, rank)
    sys.exit(tokenize_data_qwen.main(words))


@pytest.mark.processes
@pytest.mark.parametrize("limit", [100, 3_000, 60_000])
def test_tokenising_on_a_full_disk(toy_world, tmp_path, limit):
    words = ["--input_dir", str(toy_world.raw), "--output_dir", str(tmp_path / "stores"), "--max_seq_length", "128"]
    words += ["--tokenizer_path", str(toy_world.backbone)]
    check_words(Processes(1, tokenise_on_small_disk, words, limit).end(), "the disk refuses what is written")
    assert tokenize(toy_world.raw, tmp_path / "stores", toy_world.backbone) == 0
    for path in toy_world.stores.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "stores" / path.relative_to(toy_world.stores)).read_bytes()


def full_console(rank: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.processes
def test_a_console_on_a_full_disk(keys, whole):
    assert door_here(keys | {"cache_only": True}) == processes.FINISHED
    check_words(door_on_processes(1, keys, full_console), "No space left on device")
    assert final(train_here(keys)) == whole


# ---------------------------------------------------------------------------------- what lies in the way


def as_nobody(rank: int) -> None:
    """Another user, who may read everything and write almost nowhere."""
    os.setreuid(65534, 65534)


@pytest.mark.processes
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which takes root")
@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_a_read_only_folder(toy_world, key):
    """Outside of pytest's own folders, which each session of pytest closes to other users."""
    with tempfile.TemporaryDirectory() as name:
        world = Path(name)
        world.chmod(0o777)
        shutil.copytree(toy_world.backbone, world / "backbone")
        shutil.copytree(toy_world.stores, world / "stores")
        (world / "locked").mkdir(mode=0o755)
        copied = replace(toy_world, root=world, backbone=world / "backbone", stores=world / "stores")
        keys = toy_settings(copied, world) | KEYS | {key: str(world / "locked")}
        [end] = door_on_processes(1, keys, as_nobody)
    assert end.status == processes.REFUSED, end.printed
    assert "may not be written to" in end.printed


@pytest.fixture(scope="module")
def once(toy_world, tmp_path_factory):
    return interrupted(toy_settings(toy_world, tmp_path_factory.mktemp("once")) | KEYS, 11)


@pytest.fixture
def begun(keys, once):
    """A run that was killed after step 8; returns its folder."""
    return shutil.copytree(once, Path(keys["output_dir"]) / "toy")


def junk_aside(folder: Path) -> None:
    for name in ("state/.step_12.partial", "state/.step_4.old", ".step_12.partial", ".epoch_1.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")


def linked_aside(folder: Path) -> None:
    precious = folder.parent.parent / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for name in ("state/.step_12.partial", ".step_12.partial", ".epoch_1.partial"):
        (folder / name).symlink_to(precious)


def clock_back(folder: Path) -> None:
    for age, path in enumerate(sorted((folder / "state").iterdir(), key=lambda path: int(path.name[5:]))):
        os.utime(path, (1e9 - age, 1e9 - age))  # the newest looks the oldest


def empty_newest(folder: Path) -> None:
    (folder / "state" / "step_99").mkdir()


def strange_names(folder: Path) -> None:
    for name in ("step_", "step_x", "step_-1", "step_٣", "notes"):
        (folder / "state" / name).mkdir()


def other_format(folder: Path) -> None:
    body = {"format": 99, "step": 12, "sha256": {}, "facts": {}}
    (folder / "state" / "step_12").mkdir()
    write_json(folder / "state" / "step_12" / "state.json", seal(body))


def lost_timings(folder: Path) -> None:
    (folder / "timings.jsonl").unlink()


def old_lock(folder: Path) -> None:
    (folder / ".lock").write_text("99999")


HARMLESS = [junk_aside, linked_aside, clock_back, empty_newest, strange_names, other_format, lost_timings, old_lock]


@pytest.mark.parametrize("fault", HARMLESS, ids=lambda fault: fault.__name__)
def test_what_lies_in_the_folder_changes_nothing(train, keys, whole, begun, fault):
    fault(begun)
    train(**keys)
    precious = begun.parent.parent / "precious" / "thesis.txt"
    assert fault is not linked_aside or precious.read_text() == "years of work"
    for name in ("step_", "step_x", "step_-1", "step_٣", "notes"):
        shutil.rmtree(begun / "state" / name, ignore_errors=True)
    assert final(begun) == whole


def test_a_clock_that_goes_back(train, keys, whole, begun, monkeypatch):
    with monkeypatch.context() as patch:
        now = iter(range(10**7, 0, -1))
        patch.setattr(time, "time", lambda: float(next(now)))
        train(**keys)
    assert final(begun) == whole


def test_a_log_that_was_cut_is_said_and_goes_on(train, keys, begun, capsys):
    lines = (begun / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_bytes(lines[0])
    train(**keys)
    assert "metrics.jsonl: shorter than this run left it" in capsys.readouterr().out
    found = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert found[0] == json.loads(lines[0])
    assert found[-1]["step"] == 13


# ------------------------------------------------------------------------------ stores, models, folders


@pytest.mark.parametrize("damage", ["a byte flipped", "cut"])
@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "tuples.npy", "meta.json"])
def test_a_damaged_store_is_refused(keys, toy_world, tmp_path, capsys, name, damage):
    folder = shutil.copytree(toy_world.stores, tmp_path / "data") / "toy_retrieval"
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data if damage != "cut" else data[: len(data) * 2 // 3])
    capsys.readouterr()
    assert door_here(keys | {"train_data_path": str(tmp_path / "data")}) == processes.REFUSED
    printed = capsys.readouterr().err
    assert str(folder) in printed
    assert "Traceback" not in printed


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[sorted(weights)[0]][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def outside_names(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


MODELS = {
    not_finite: "not finite",
    cut_weights: "damaged or cut short",
    outside_names: "is not the name of a file beside",
    pickled_weights: "weights must be safetensors",
}


@pytest.mark.parametrize("fault", MODELS, ids=lambda fault: fault.__name__)
def test_a_model_that_cannot_be_trusted(keys, toy_world, tmp_path, capsys, fault):
    folder = shutil.copytree(toy_world.backbone, tmp_path / "backbone")
    fault(folder)
    capsys.readouterr()
    assert door_here(keys | {"model_path": str(folder)}) in (processes.FAILED, processes.REFUSED)
    printed = capsys.readouterr().err
    assert MODELS[fault] in printed
    assert "Traceback" not in printed


def test_a_linked_folder_is_not_emptied(toy_world, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / ".toy_retrieval.partial").symlink_to(precious)
    assert tokenize(toy_world.raw, tmp_path / "stores", toy_world.backbone) == 0
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


# ------------------------------------------------------------------------------------- one of several


def broken_evaluation(rank: int) -> None:
    if rank == 1:
        objective.Objective.measures = boom


def boom(*_) -> None:
    raise ValueError("the disk is on fire")


def broken_gather_of_state(rank: int) -> None:
    if rank == 1:
        resume.capture = boom


def interrupted_by_hand(rank: int) -> None:
    if rank == 1:
        run.train_step = stop


def stop(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.processes
@pytest.mark.parametrize(
    "fault", [broken_evaluation, broken_gather_of_state, interrupted_by_hand], ids=lambda f: f.__name__
)
def test_one_process_of_two(keys, whole_of_two, fault):
    keys |= HALF
    ends = door_on_processes(2, keys, fault)
    assert [end.status for end in ends] == [processes.FAILED] * 2, ends
    assert "on fire" in ends[1].printed or fault is interrupted_by_hand
    assert "ended, because of process 1" in ends[0].printed
    assert final(train_on_two(keys)) == whole_of_two


def test_weights_that_are_not_finite_never_replace_a_state(keys, whole, monkeypatch):
    """An update leaves a NaN behind, as an overflow in the optimizer would; a state is due at every step."""
    train_step = run.train_step

    def step_that_leaves_a_nan(live, number: int):
        found = train_step(live, number)
        if number == 6:
            with torch.no_grad():
                next(p for p in live.model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_step", step_that_leaves_a_nan)
        with pytest.raises(RunError, match="is not finite: nothing is saved, and older states are kept"):
            train_here(keys | {"save_every_minutes": 1e-9})
    gc.collect()  # the exception holds the run, and the run its folder's lock
    folder = Path(keys["output_dir"]) / "toy"
    assert {path.name for path in (folder / "state").iterdir()} == {"step_4", "step_5"}
    assert final(train_here(keys)) == whole
