"""How states are written: each process its own part, in the background, and never a part under a state's name.

python -m pytest tests/runtime/test_states.py

What a kill or damage does to them is in test_resume.py and test_chaos.py, what a full disk does in test_faults.py.
"""

import gc
import hashlib
import json
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from chaos import final
from conftest import Killed, interrupted, tensors_of, toy_settings, train_here
from harness import PATIENCE, door_on_processes, on_processes, through_the_door
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import run
from benchmarks.common import qwen3_config
from export import model_folder, probe
from runtime import background, checkpoint, processes, resume, shards
from utils import RunError, file_digest, read_json, seal, write_json

KEYS = {"train_steps": 8, "log_interval": 3, "train_batch_size": 24, "checkpointing_steps": 4}
HALF = {"train_batch_size": 12}  # of two processes: the same global batch
LORA = {"use_lora": True, "lora_dropout": 0.2}


@pytest.fixture
def keys(settings):
    return settings | KEYS


@pytest.fixture(scope="module")
def whole(toy_world, tmp_path_factory):
    """What the run ends in when nothing happens, made once."""
    return final(train_here(toy_settings(toy_world, tmp_path_factory.mktemp("whole")) | KEYS))


def states_of(keys: dict) -> set[str]:
    """What lies in the folder of the states, under any name."""
    return {path.name for path in (Path(keys["output_dir"]) / "toy" / "state").iterdir()}


# ------------------------------------------------------------------------------------------ files


def test_a_file_is_one_of_the_safetensors_library_and_its_digest_is_that_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK", 48)  # so that most tensors are several blocks
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(7, 5, generator=generator)
    tensors = {
        "fp32": numbers,
        "fp64": numbers.double(),
        "bf16, of odd length": numbers.bfloat16()[:, :3],  # and not contiguous
        "fp16": numbers.half(),
        "a count": torch.tensor(12.0),
        "ids ʼ": torch.arange(3),
    }
    digest = shards.write_file(tmp_path / "file", tensors)
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with pytest.raises(FileExistsError):
        shards.write_file(tmp_path / "file", tensors)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_rows_cut_over_processes_are_the_tensor_again(tmp_path, count):
    tensors = {"weight": torch.arange(45.0).reshape(9, 5), "bias": torch.arange(3.0), "step": torch.tensor(4.0)}
    paths = []
    for number in range(count):
        parts = {name: shards.part_to_write(tensor, number, count) for name, tensor in tensors.items()}
        paths.append(tmp_path / f"{number:05d}")
        shards.write_file(paths[-1], {name: part for name, part in parts.items() if part is not None})
    found = shards.Shards(paths)
    assert found.names() == sorted(tensors)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())


def test_a_state_of_the_first_format_goes_on_to_the_same_bytes(keys, whole):
    """One file of each kind, with its digest under the kind's name."""
    folder = interrupted(keys, 7)
    path = folder / "state" / "step_4"
    state = checkpoint.read(path)
    tensors = tensors_of(state)
    for file in path.iterdir():
        file.unlink()
    for kind, named in tensors.items():
        save_file(named, path / f"{kind}.safetensors")
    digests = {kind: file_digest(path / f"{kind}.safetensors") for kind in tensors}
    write_json(path / "state.json", seal({"format": 1, "step": 4, "sha256": digests, "facts": state.facts}))
    del state
    train_here(keys)
    ours = final(folder)
    assert [name for name in whole if not name.startswith("state/step_4") and ours.get(name) != whole[name]] == []


# ---------------------------------------------------------------------------------- each its own part


def counting_collectives(rank: int, world: int, config: dict) -> dict:
    """Train, and count bytes: of what this process copied, and of what collectives moved while it was captured."""
    moved = []
    copied = []
    capture, copy_to_cpu = resume.capture, background.copy_to_cpu
    names = ["all_gather", "all_gather_into_tensor", "gather", "broadcast", "all_gather_object", "all_reduce", "reduce"]

    def watched_capture(*words):
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(dist, name, partial(count, getattr(dist, name), moved))
            return capture(*words)

    def watched_copy(tensors, earlier):
        copied.append(sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values()))
        return copy_to_cpu(tensors, earlier)

    resume.capture, background.copy_to_cpu = watched_capture, watched_copy
    assert through_the_door(rank, world, config) == 0
    return {"moved": moved, "copied": copied}


def count(function, moved: list, *words, **named):
    moved.append(max(t.numel() * t.element_size() for t in words if isinstance(t, torch.Tensor)))
    return function(*words, **named)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_process_writes_its_share_and_none_gathers_the_whole(keys, kind):
    keys |= {"validation_steps": 4}  # just before a state: FSDP2 then holds some weights whole
    found = on_processes(2, counting_collectives, keys | HALF, kind=kind)
    state = Path(keys["output_dir"]) / "toy" / "state" / "step_8"
    sizes = {path.name: path.stat().st_size for path in state.glob("*.safetensors")}
    weights = [sizes[f"weights-0000{number}-of-00002.safetensors"] for number in (1, 2)]
    moments = [sizes[f"moments-0000{number}-of-00002.safetensors"] for number in (1, 2)]
    assert all(0.4 < part / sum(weights) < 0.6 for part in weights)
    assert all(0.4 < part / sum(moments) < 0.6 for part in moments)
    tensors = checkpoint.read(state).tensors
    assert len(tensors["moments"].names()) == 3 * len(tensors["weights"].names()) > 0
    for process in found:
        assert len(process["copied"]) == 2  # steps 4 and 8
        assert max(process["copied"]) < 0.6 * sum(sizes.values())
        assert len(process["moved"]) == 2  # of each state only the sums of the log line
        assert max(process["moved"]) < 0.01 * sum(sizes.values())


def unseen_folder(rank: int) -> None:
    """The folder is on a disk of the main process's machine."""
    background._LOOKING = 0.0
    if rank == 1:
        background.appears = lambda *_: False


@pytest.mark.processes
def test_under_ddp_a_process_that_cannot_see_the_folder_leaves_its_part_to_the_others(keys):
    ends = door_on_processes(2, keys | HALF, unseen_folder)
    assert [end.status for end in ends] == [0, 0], ends
    state = Path(keys["output_dir"]) / "toy" / "state" / "step_8"
    assert {path.name for path in state.iterdir()} == {
        "weights-00001-of-00001.safetensors", "moments-00001-of-00001.safetensors",
        "processes-00001-of-00001.safetensors", "state.json",
    }  # fmt: skip
    assert checkpoint.read(state).tensors["processes"].read("meter").shape[0] == 2


@pytest.mark.processes
def test_under_fsdp2_a_process_that_cannot_see_the_folder_is_refused(keys):
    ends = door_on_processes(2, keys | HALF, unseen_folder, kind="fsdp")
    printed = "".join(end.printed for end in ends)
    assert [end.status for end in ends] == [processes.FAILED] * 2
    assert "output_dir: process 1 does not see " in printed
    assert "Traceback" not in printed


def silent_writer(rank: int) -> None:
    """One process has written its part and does not come to say so before the other is killed."""
    if rank == 1:
        write_part = checkpoint.write_part

        def write_and_wait(*words):
            write_part(*words)
            threading.Event().wait()

        checkpoint.write_part = write_and_wait
        run.train_step = partial(end_at_step_six, run.train_step)


def end_at_step_six(train_step, live, step: int):
    if step == 6:
        raise SystemExit(3)
    return train_step(live, step)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_state_without_the_word_of_every_process_never_gets_its_name(keys, kind):
    ends = door_on_processes(2, keys | HALF, partial(without_patience, silent_writer), kind=kind)
    assert [end.status for end in ends] == [processes.FAILED] * 2, ends
    [left] = states_of(keys)
    assert left.startswith(".step_4.")
    assert [end.status for end in door_on_processes(2, keys | HALF, kind=kind)] == [0, 0]
    assert states_of(keys) == {"step_4", "step_8"}


def without_patience(fault, rank: int) -> None:
    background._PATIENCE = 1.0
    fault(rank)


# ------------------------------------------------------------------------------------ in the background


class HeldWriter:
    """Holds up the thread that writes, until `release` or a step."""

    def __init__(self, monkeypatch, until_step: int = 0):
        self.released = threading.Event()
        self.steps_meanwhile = []
        self.writing = 0
        self.most_at_once = 0
        self.until_step = until_step
        write_part, train_step = checkpoint.write_part, run.train_step

        def held(*words):
            self.writing += 1
            self.most_at_once = max(self.most_at_once, self.writing)
            assert self.released.wait(PATIENCE)
            self.writing -= 1
            return write_part(*words)

        def watched(live, step: int):
            if self.writing:
                self.steps_meanwhile.append(step)
            if step == self.until_step:
                self.released.set()
            return train_step(live, step)

        monkeypatch.setattr(checkpoint, "write_part", held)
        monkeypatch.setattr(run, "train_step", watched)


def test_training_goes_on_while_a_state_is_written_and_the_state_is_that_of_its_step(keys, monkeypatch):
    """Two steps change the weights before the first byte is written."""
    folder = train_here(keys | {"experiment_id": "quiet"})
    held = HeldWriter(monkeypatch, until_step=7)
    train_here(keys)
    assert held.steps_meanwhile[:2] == [5, 6]
    assert final(Path(keys["output_dir"]) / "toy") == final(folder)


def test_the_memory_of_the_first_copies_is_got_ahead_and_used(tmp_path):
    """On a GPU, which is a word here: page-locked memory takes seconds to get, and the first state waited for it."""
    gpu = SimpleNamespace(
        device=torch.device("cuda"), is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=int
    )
    tensors = {"weights": {"w": torch.arange(6.0).reshape(2, 3)}, "moments": {"w/exp_avg": torch.ones(2, 3)}}
    writer = background.StateWriter(gpu, tmp_path / "state", keep=1)
    writer.make_room(tensors)
    room = writer.room.result(PATIENCE)
    tensors["moments"]["w/step"] = torch.tensor(1.0)  # not foreseen
    writer.begin(1, tensors, {}, began=0.0)
    writer.wait()
    assert writer.copies["weights"]["w"] is room["weights"]["w"]
    assert writer.copies["moments"]["w/exp_avg"] is room["moments"]["w/exp_avg"]
    state = checkpoint.read(tmp_path / "state" / "step_1").tensors
    for kind, named in tensors.items():
        assert all(torch.equal(state[kind].read(name), tensor) for name, tensor in named.items())
    cpu = SimpleNamespace(**vars(gpu) | {"device": torch.device("cpu")})
    other = background.StateWriter(cpu, tmp_path / "other", keep=1)
    other.make_room(tensors)
    assert other.room is None


@pytest.mark.parametrize("processes", [1, 8])
def test_page_locked_memory_is_hardly_more_than_the_states_of_4b(monkeypatch, processes):
    """torch rounds each piece of it up to a power of two: with one for each tensor it was 1.41 times as much."""
    with torch.device("meta"):
        model = AutoModel.from_config(qwen3_config("4B"))
    parts = {name: shards.part_to_write(weight.detach(), 0, processes) for name, weight in model.named_parameters()}
    tensors = {"weights": parts, "moments": {f"{name}/{kind}": parts[name] for name in parts for kind in "mv"}}
    pieces = []

    def empty(length: int, dtype: torch.dtype, pin_memory: bool, real=torch.empty) -> torch.Tensor:
        pieces.append(length)
        return real(length, dtype=dtype, device="meta")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        rooms = background._rooms_for(tensors)
    needed = 0
    for kind, named in tensors.items():
        for name, tensor in named.items():
            needed += tensor.nbytes
            assert (rooms[kind][name].shape, rooms[kind][name].dtype) == (tensor.shape, tensor.dtype)
    taken = sum(1 << (length - 1).bit_length() for length in pieces)
    assert 1 <= taken / needed <= 1.08


def test_tensors_in_a_piece_of_memory_do_not_meet(monkeypatch):
    monkeypatch.setattr(background, "_PIECE", 2048)
    tensors = {"weights": {str(n): torch.arange(float(n)).reshape(1, n) for n in (300, 500, 1, 100, 130, 7, 900)}}
    tensors["weights"]["step"] = torch.tensor(5, dtype=torch.int64)
    tensors["weights"]["bf16"] = torch.full((3, 3), 2.0, dtype=torch.bfloat16)
    first = background.copy_to_cpu(tensors, {})
    again = background.copy_to_cpu(tensors, first)
    for name, tensor in tensors["weights"].items():
        assert torch.equal(again["weights"][name], tensor)
        assert again["weights"][name] is first["weights"][name]
    storages = {copy.untyped_storage().data_ptr() for copy in again["weights"].values()}
    assert 1 < len(storages) < len(tensors["weights"])


def test_a_run_that_is_finished_gets_no_memory_for_states(keys, monkeypatch):
    asked = []
    monkeypatch.setattr(background.StateWriter, "make_room", lambda self, tensors: asked.append(sorted(tensors)))
    for _ in range(2):
        train_here(keys | {"train_steps": 1})
    assert asked == [["moments", "weights"]]


def test_only_one_state_is_written_at_a_time(keys, monkeypatch):
    held = HeldWriter(monkeypatch, until_step=2)
    wait = background.StateWriter.wait
    waited = []

    def watched(self):
        waited.append(held.writing)
        wait(self)
        assert held.writing == 0

    monkeypatch.setattr(background.StateWriter, "wait", watched)
    train_here(keys | {"save_every_minutes": 1e-9, "checkpointing_steps": 0})
    assert held.most_at_once == 1
    assert len(waited) == 8 + 1  # before each state, and at the end


def test_the_end_waits_for_the_last_state(keys, monkeypatch):
    held = HeldWriter(monkeypatch)
    wait = background.StateWriter.wait

    def released_by_who_waits(self):
        if self.published is not None:
            held.released.set()
        wait(self)

    monkeypatch.setattr(background.StateWriter, "wait", released_by_who_waits)
    train_here(keys | {"checkpointing_steps": 0})
    assert states_of(keys) == {"step_8"}


def test_an_error_waits_for_the_state_that_is_being_written(keys, whole, monkeypatch):
    with monkeypatch.context() as patch:
        held = HeldWriter(patch)
        train_step = run.train_step

        def breaks(live, step: int):
            if step == 6:
                threading.Timer(1.0, held.released.set).start()
                raise RunError("nothing goes on")
            return train_step(live, step)

        patch.setattr(run, "train_step", breaks)
        with pytest.raises(RunError, match="nothing goes on"):
            train_here(keys)
    gc.collect()  # the exception holds the run, and the run its folder's lock
    assert states_of(keys) == {"step_4"}
    assert final(train_here(keys)) == whole


# ---------------------------------------------------------------------------- the state before the folder


def test_a_model_folder_that_is_refused_loses_nothing_that_was_trained(keys, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(probe, "read_back", lambda *_, **__: ["the embeddings differ"])
        with pytest.raises((ValueError, RunError), match="the embeddings differ"):
            train_here(keys)
    gc.collect()
    assert states_of(keys) == {"step_4"}
    folder = Path(keys["output_dir"]) / "toy"
    assert not (folder / "step_4").exists()
    capsys.readouterr()
    assert final(train_here(keys)) == whole
    assert "continuing after step 4 of 8" in capsys.readouterr().out


@pytest.mark.parametrize("step", [4, 8])
def test_a_kill_between_a_state_and_its_folder_still_ends_with_both(keys, whole, monkeypatch, step):
    save = model_folder.save

    def dies(folder, *words, **named):
        if folder.name == f"step_{step}":
            raise Killed
        save(folder, *words, **named)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model_folder, "save", dies)
        train_here(keys)
    gc.collect()
    folder = Path(keys["output_dir"]) / "toy"
    assert (folder / "state" / f"step_{step}").is_dir()
    assert not (folder / f"step_{step}").exists()
    assert final(train_here(keys)) == whole


# ------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["weights", "moments"])
def test_a_number_that_is_not_finite_is_found_wherever_it_is_after_one_wait(monkeypatch, place, number):
    sound = {"weights": {"a": torch.full((3, 4), 3e38), "b": torch.zeros(2)}, "moments": {"a/step": torch.tensor(9.0)}}
    reads = Counter()
    for name in ("tolist", "item", "__bool__", "__float__", "cpu", "numpy"):  # what brings a number from a GPU
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), reads, name))
    assert resume.broken(sound) is None
    assert reads == {"tolist": 1}
    spoiled = {kind: {name: tensor.clone() for name, tensor in named.items()} for kind, named in sound.items()}
    name = list(spoiled[place])[-1]
    spoiled[place][name].view(-1)[-1] = number
    assert resume.broken(spoiled) == name


def counted(function, calls: Counter, name: str):
    """The function; its calls are counted."""

    def call(*words, **named):
        calls[name] += 1
        return function(*words, **named)

    return call


def test_the_sealed_list_names_every_file_and_its_digest(keys):
    state = train_here(keys) / "state" / "step_8"
    digests = read_json(state / "state.json")["sha256"]
    assert digests == {path.name: file_digest(path) for path in state.glob("*.safetensors")}
    assert len(digests) == 3
    assert json.loads((state / "state.json").read_text())["format"] == checkpoint.FORMAT == 2
