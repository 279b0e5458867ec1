"""What breaks outside: each fault ends in the exact continuation or in words, on every process, in 30 s.

python -m pytest -s tests/runtime/test_faults.py        prints the table

Faults of the state files of a run are in test_resume.py, those of a process among others in test_engines.py, kills in
test_chaos.py, malformed input in test_fuzz.py.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from chaos import final
from conftest import interrupted, tokenize, toy_settings
from harness import free_port, launcher_environment, server, through_the_door
from safetensors.torch import load_file, save_file

import run
import tokenize_data_qwen
from runtime import processes
from training import objective

SECONDS = 30  # from a fault to the end of all; a run without one may take longer on a busy machine
TABLE = []


# One epoch, 13 steps, with a state every four.
KEYS = {"train_steps": -1, "train_epochs": 1, "train_batch_size": 24, "log_interval": 3, "checkpointing_steps": 4,
        "validation_steps": 6, "process_timeout": 10}  # fmt: skip


@pytest.fixture
def keys(settings):
    return settings | KEYS


@pytest.fixture(scope="module")
def whole(toy_world, tmp_path_factory):
    """What the run ends in when nothing happens, made once."""
    root = tmp_path_factory.mktemp("whole")
    found = {}

    def of(keys: dict, world: int = 1) -> dict:
        if world not in found:
            config = keys | {"output_dir": str(root / f"{world}"), "cache_dir": str(root / "cache")}
            assert [code for code, _ in ends(config, world=world)] == [0] * world
            found[world] = final(root / f"{world}" / "toy")
        return found[world]

    return of


def _speak(end) -> None:
    """Print into a pipe, which no limit on files can fill."""
    os.dup2(end.fileno(), 1), os.dup2(end.fileno(), 2)
    torch.set_num_threads(1)


def _door(rank: int, world: int, port: int, config: dict, fault, end) -> None:
    _speak(end)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= launcher_environment(rank, world, port) if world > 1 else {"ACCELERATE_USE_CPU": "true"}
    fault(rank)
    status = through_the_door(rank, world, config)
    with contextlib.suppress(OSError):  # what multiprocessing would say of a full console is not ours
        sys.stdout.flush()
    os._exit(status)


def _tokenizing_door(words: list[str], limit: int, end) -> None:
    _speak(end)
    small_disk(limit, 0)
    raise SystemExit(tokenize_data_qwen.main(words))


def finish(function, cases: list[tuple], seconds: float = SECONDS) -> list[tuple[int | None, str]]:
    """(exit status, what it printed) of `function(*case, pipe)` in a process each; None for one not ended in time."""
    context, began = server(), time.monotonic()
    pipes = [context.Pipe(duplex=False) for _ in cases]
    processes = [
        context.Process(target=function, args=(*case, there)) for case, (_, there) in zip(cases, pipes, strict=True)
    ]
    for process, (_, there) in zip(processes, pipes, strict=True):
        process.start()
        there.close()
    for process in processes:
        process.join(max(0.0, began + seconds - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    printed = [open(here.fileno(), "rb", closefd=False).read().decode(errors="replace") for here, _ in pipes]
    return list(zip(codes, printed, strict=True))


def no_fault(rank: int) -> None:
    pass


def ends(config: dict, fault=no_fault, world: int = 1) -> list[tuple[int | None, str]]:
    """Run the training door on `world` processes with a fault in them."""
    Path(config["cache_dir"]).parent.mkdir(exist_ok=True)
    port = free_port()
    cases = [(rank, world, port, config, fault) for rank in range(world)]
    return finish(_door, cases, 8 * SECONDS if fault is no_fault else SECONDS)


def recovers(keys: dict, whole, fault, words: str, status: int, world: int = 1, name: str = "") -> None:
    """The fault ends every process in these words; the same command without it ends in what it should."""
    began = time.monotonic()
    found = ends(keys, fault, world)
    printed = "".join(text for _, text in found)
    TABLE.append(f"{name:58} status {status}, {time.monotonic() - began:4.1f} s, then exact")
    assert [code for code, _ in found] == [status] * world, printed
    assert words in printed
    assert "Traceback" not in printed
    assert [code for code, _ in ends(keys, world=world)] == [0] * world
    assert final(Path(keys["output_dir"]) / "toy") == whole(keys, world)


# ------------------------------------------------------------------------------------------ full disks


def small_disk(limit: int, rank: int) -> None:
    """No file may grow beyond this many bytes: as a full disk, but for one process alone."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def full_when(what: str, rank: int) -> None:
    """No byte can be written from the second time on that this is written."""
    where, attribute = MOMENTS[what]
    real, calls = getattr(where, attribute), []

    def call(*words, **named):
        calls.append(1)
        if len(calls) == 2:
            small_disk(0, rank)
        return real(*words, **named)

    setattr(where, attribute, call)


LIMITS = {
    "args.json": 1_500,
    "metrics.jsonl": 2_600,
    "a state's moments": 130_000,
    "a model folder's tokenizer": 15_000,
}
MOMENTS = {
    "a state": (run.checkpoint, "write"),
    "a model folder": (run.model_folder, "save"),
    "a log line": (run, "log"),
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_file_that_cannot_grow(keys, whole, what):
    recovers(keys, whole, partial(small_disk, LIMITS[what]), "the disk refuses", 1, name=f"disk full: {what}")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("what", MOMENTS)
def test_a_disk_that_fills_up(keys, whole, what, world):
    keys |= {"train_batch_size": 24 // world}
    name = f"disk full at the second {what[2:]}, {world} processes"
    recovers(keys, whole, partial(full_when, what), "the disk refuses", 1, world, name)


@pytest.mark.parametrize("limit", [100, 3_000, 60_000])
def test_tokenising_on_a_full_disk(toy_world, tmp_path, limit):
    words = ["--input_dir", str(toy_world.raw), "--output_dir", str(tmp_path / "stores"), "--max_seq_length", "128"]
    words += ["--tokenizer_path", str(toy_world.backbone)]
    [(status, printed)] = finish(_tokenizing_door, [(words, limit)])
    assert status == 1, printed
    assert "the disk refuses what is written" in printed
    assert "Traceback" not in printed
    assert tokenize(toy_world.raw, tmp_path / "stores", toy_world.backbone) == 0
    for path in toy_world.stores.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "stores" / path.relative_to(toy_world.stores)).read_bytes()
    TABLE.append(f"{f'disk full: tokenising, files of {limit} bytes':58} status 1, then the same bytes")


def full_console(rank: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_a_console_on_a_full_disk(keys, whole):
    assert ends(keys | {"cache_only": True})[0][0] == 0
    recovers(keys, whole, full_console, "No space left on device", 1, name="console on a full disk (/dev/full)")


# ---------------------------------------------------------------------------------- what lies in the way


def as_nobody(rank: int) -> None:
    """Another user, who may read everything and write almost nowhere."""
    os.setreuid(65534, 65534)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which takes root")
@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_a_read_only_folder(keys, toy_world, tmp_path, key):
    for path in (tmp_path, *tmp_path.parents, toy_world.root, *toy_world.root.rglob("*")):
        if str(path).startswith("/tmp/"):
            path.chmod(0o777 if path == tmp_path else 0o755)
    (tmp_path / "locked").mkdir(mode=0o755)
    [(status, printed)] = ends(keys | {key: str(tmp_path / "locked")}, as_nobody)
    assert status == 2, printed
    assert "may not be written to" in printed
    TABLE.append(f"{f'read-only {key}':58} status 2 before anything is loaded")


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
    from utils import seal, write_json

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
    assert final(begun) == whole(keys)
    TABLE.append(f"{'found on a resume: ' + fault.__name__.replace('_', ' '):58} exact")


def test_a_clock_that_goes_back(train, keys, whole, begun, monkeypatch):
    with monkeypatch.context() as patch:
        now = iter(range(10**7, 0, -1))
        patch.setattr(time, "time", lambda: float(next(now)))
        train(**keys)
    assert final(begun) == whole(keys)
    TABLE.append(f"{'a clock that goes back while training':58} exact")


def test_a_log_that_was_cut_is_said_and_goes_on(train, keys, begun, capsys):
    lines = (begun / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_bytes(lines[0])
    train(**keys)
    assert "metrics.jsonl: shorter than this run left it" in capsys.readouterr().out
    found = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert found[0] == json.loads(lines[0])
    assert found[-1]["step"] == 13
    TABLE.append(f"{'metrics.jsonl cut between two runs':58} said, and no line is broken")


# ------------------------------------------------------------------------------ stores, models, folders


@pytest.mark.parametrize("damage", ["a byte flipped", "cut"])
@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "tuples.npy", "meta.json"])
def test_a_damaged_store_is_refused_or_trains_the_same(keys, toy_world, tmp_path, name, damage):
    folder = shutil.copytree(toy_world.stores, tmp_path / "data") / "toy_retrieval"
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data if damage != "cut" else data[: len(data) * 2 // 3])
    [(status, printed)] = ends(keys | {"train_data_path": str(tmp_path / "data")})
    assert status == 2, printed
    assert str(folder) in printed
    assert "Traceback" not in printed
    TABLE.append(f"{f'store, {name}: {damage}':58} status 2, named")


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
def test_a_model_that_cannot_be_trusted(keys, toy_world, tmp_path, fault):
    folder = shutil.copytree(toy_world.backbone, tmp_path / "backbone")
    fault(folder)
    [(status, printed)] = ends(keys | {"model_path": str(folder)})
    assert status in (1, 2)
    assert MODELS[fault] in printed
    assert "Traceback" not in printed
    TABLE.append(f"{'model folder: ' + fault.__name__.replace('_', ' '):58} status {status}, named")


def test_a_linked_folder_is_not_emptied(toy_world, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / ".toy_retrieval.partial").symlink_to(precious)
    assert tokenize(toy_world.raw, tmp_path / "stores", toy_world.backbone) == 0
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    TABLE.append(f"{'a link where tokenising writes aside':58} left alone, the same bytes")


# ------------------------------------------------------------------------------------- one of several


def broken_evaluation(rank: int) -> None:
    if rank == 1:
        objective.Objective.measures = boom


def boom(*_) -> None:
    raise ValueError("the disk is on fire")


def broken_gather_of_state(rank: int) -> None:
    if rank == 1:
        run.resume.capture = boom


def interrupted_by_hand(rank: int) -> None:
    if rank == 1:
        run.train_step = stop


def stop(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "fault", [broken_evaluation, broken_gather_of_state, interrupted_by_hand], ids=lambda f: f.__name__
)
def test_one_process_of_two(keys, whole, fault):
    keys |= {"train_batch_size": 12}
    began = time.monotonic()
    found = ends(keys, fault, world=2)
    assert [code for code, _ in found] == [processes.FAILED] * 2, found
    assert ("on fire" in found[1][1]) or fault is interrupted_by_hand
    assert "ended, because of process 1" in found[0][1]
    TABLE.append(
        f"{'one of two: ' + fault.__name__.replace('_', ' '):58} status 1 on both, {time.monotonic() - began:.1f} s"
    )
    assert [code for code, _ in ends(keys, world=2)] == [0, 0]
    assert final(Path(keys["output_dir"]) / "toy") == whole(keys, 2)


def nan_weights(rank: int) -> None:
    """An update that leaves a NaN behind, as an overflow in the optimizer would."""
    real = run.train_step

    def step(live, number: int):
        found = real(live, number)
        if number == 6:
            with torch.no_grad():
                next(p for p in live.model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
        return found

    run.train_step = step
    save = run.save
    run.save = lambda live, name, done: save(live, name, done) if done < 7 else None
    run.skip_or_stop = lambda *_: None


def test_weights_that_are_not_finite_never_replace_a_state(keys, whole):
    [(status, printed)] = ends(keys, nan_weights)
    assert status == 1
    assert "is not finite: nothing is saved, and older states are kept" in printed
    states = Path(keys["output_dir"]) / "toy" / "state"
    assert [path.name for path in states.iterdir()] == ["step_4"]
    assert ends(keys)[0][0] == 0
    assert final(states.parent) == whole(keys)
    TABLE.append(f"{'NaN in the weights':58} status 1, then exact from the last finite state")


def test_there_were_enough_faults():
    print("\n" + "\n".join(TABLE))
    assert len(TABLE) >= 32
