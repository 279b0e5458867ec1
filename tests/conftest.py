"""What all tests share: toy data made once a session, and a way to run the training door in this process."""

import gc
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("LOCAL_WORLD_SIZE", str(os.cpu_count()))  # one thread each: the toy is too small for more
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # the golden losses are a CPU's

import json
from dataclasses import dataclass

import harness
import hypothesis
import pytest
import toy
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoTokenizer

import run
import tokenize_data_qwen
from data.feed import Feed
from data.token_store import open_store
from modeling.tokenizer import load_tokenizer
from runtime import checkpoint

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)  # the same examples on every run
hypothesis.settings.load_profile("fixed")


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Only a test with the mark `processes` may start some: `make test-quick` leaves these tests out."""
    harness.may_start_processes = item.get_closest_marker("processes") is not None


@dataclass(frozen=True)
class ToyWorld:
    """Folders of the toy world, read-only for tests."""

    root: Path
    backbone: Path
    raw: Path
    stores: Path


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory) -> ToyWorld:
    root = tmp_path_factory.mktemp("toy_world")
    made = ToyWorld(root, toy.make_backbone(root / "backbone"), toy.write_raw(root / "raw"), root / "stores")
    assert tokenize(made.raw, made.stores, made.backbone) == 0
    return made


@pytest.fixture(scope="module")
def tokenizer(toy_world):
    """That of the toy's backbone, for tests that do not change it."""
    return AutoTokenizer.from_pretrained(toy_world.backbone)


def tokenize(raw: Path, stores: Path, tokenizer: Path, *more: str) -> int:
    """Call the tokenising door; returns its exit status."""
    folders = ["--input_dir", str(raw), "--output_dir", str(stores), "--tokenizer_path", str(tokenizer)]
    return tokenize_data_qwen.main([*folders, "--max_seq_length", "128", *more])


def toy_settings(toy_world: ToyWorld, folder: Path) -> dict:
    """A configuration that trains the toy in a second; tests change what they are about."""
    return {
        "model_path": str(toy_world.backbone),
        "experiment_id": "toy",
        "output_dir": str(folder / "output"),
        "tb_dir": str(folder / "tb"),
        "cache_dir": str(folder / "cache"),
        "train_data_path": str(toy_world.stores),
        "train_batch_size": 8,
        "max_seq_length": 64,
        "num_hard_neg": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "train_steps": 4,
        "train_epochs": 200,  # far behind train_steps, whatever a test makes of these: the earlier one ends a run
        "log_interval": 2,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "report_to": "none",
    }


def train_here(config: dict) -> Path:
    """Train in this process; returns the run's folder. Raises RunError if the run ends with one."""
    assert _call_here(run.check_and_train, config) == 0
    return Path(config["output_dir"]) / config["experiment_id"]


def door_here(config: dict) -> int:
    """Call the training door in this process; returns its exit status."""
    return _call_here(run.main, config)


def flags(config: dict, **changes) -> list[str]:
    """The words of a command line that sets these keys."""
    return [word for key, value in (config | changes).items() for word in (f"--{key}", str(value))]


def _call_here(door, config: dict) -> int:
    path = Path(config["output_dir"]).parent / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config))
    try:
        return door(["--config", str(path)])
    finally:  # the next run of this process begins without an accelerator
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture
def settings(toy_world, tmp_path) -> dict:
    return toy_settings(toy_world, tmp_path)


@pytest.fixture
def train(settings):
    """A function (**changed keys) -> the run's folder: trains in this process."""
    return lambda **changes: train_here(settings | changes)


def interrupted(config: dict, step: int) -> Path:
    """Train in this process until the data of `step` are asked for, and die; returns the run's folder."""

    def training(self, number: int, real=Feed.training):
        if number == step:
            raise Killed
        return real(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Feed, "training", training)
        train_here(config)
    gc.collect()  # the exception holds the run, and the run its folder's lock
    return Path(config["output_dir"]) / config["experiment_id"]


def write_state(folder: Path, step: int, tensors: checkpoint.Tensors, facts: dict, keep: int) -> Path:
    """A whole state of one process, as a start of a run would write it; returns its folder."""
    checkpoint.remove_leftovers(folder)
    aside = checkpoint.aside_of(folder, step, "start")
    digests = checkpoint.write_part(aside, tensors, 0, 1)
    return checkpoint.finish(aside, step, digests, facts, keep)


def tensors_of(state: checkpoint.State) -> checkpoint.Tensors:
    """All tensors of a state, read."""
    return {kind: {name: found.read(name) for name in found.names()} for kind, found in state.tensors.items()}


class Killed(BaseException):
    """As SIGKILL would: nothing is tidied up."""


def read_metrics(folder: Path, kind: str) -> list[dict]:
    """The lines of a run's metrics.jsonl of one kind."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# ------------------------------------------------------------------------------- raw files and stores

RETRIEVAL = ("--task", "retrieval")  # words of the tokenising command


@pytest.fixture
def raw(tmp_path) -> Path:
    """An empty folder for raw files."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def tuples(toy_world, raw, tmp_path):
    """A function (name, *flags) -> the tuples of a raw file as texts."""
    tokenizer, _ = load_tokenizer(str(toy_world.backbone))

    def read(name: str, *flags: str) -> list:
        assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *(flags or RETRIEVAL)) == 0
        return texts_of(open_store(tmp_path / "stores" / name), tokenizer)

    return read


def contents(folder) -> dict[str, bytes]:
    """The files of a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts_of(store, tokenizer) -> list[list[str | None]]:
    """The store's tuples as texts again, EOS checked and dropped."""
    decoded = []
    for begin, end in zip(store.offsets, store.offsets[1:], strict=False):
        assert store.tokens[end - 1] == tokenizer.eos_token_id
        decoded.append(tokenizer.decode(store.tokens[begin : end - 1]))
    return [[decoded[i] if i >= 0 else None for i in row] for row in store.tuples]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
