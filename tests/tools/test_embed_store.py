"""The door that embeds token stores with a teacher: what it writes, when it is killed, on several processes.

python -m pytest tests/tools/test_embed_store.py
"""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
import toy
from accelerate.state import AcceleratorState, GradientState
from harness import on_processes
from transformers import AutoModel

from data.embedding_store import read_meta
from data.embedding_writer import RowWriter, TextBatches
from data.token_store import open_store
from modeling.versions import in_dtype
from tools import embed_store
from utils import seal, write_json

LENGTH = 24
NAMES = ("toy_classification", "toy_clustering")


@pytest.fixture(scope="module")
def folders(toy_world, tmp_path_factory):
    """(teacher, stores, embeddings of them)."""
    root = tmp_path_factory.mktemp("embedded")
    toy.make_backbone(root / "teacher", hidden_size=48, seed=7)
    (root / "stores").mkdir()
    for name in NAMES:
        (root / "stores" / name).symlink_to(toy_world.stores / name)
    found = root / "teacher", root / "stores", root / "embeddings"
    assert embed(*found) == 0
    return found


def words(teacher, stores, output, *more: str) -> list[str]:
    named = ["--model", str(teacher), "--stores", str(stores), "--output", str(output)]
    return [*named, "--max_seq_length", str(LENGTH), "--max_tokens", "300", *more]


def embed(*folders_and_words) -> int:
    """Call the door in this process; returns its exit status."""
    try:
        return embed_store.main(words(*folders_and_words))
    finally:  # the next call begins without an accelerator
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def files(folder) -> dict[str, bytes]:
    """All that lies in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@torch.no_grad()
def test_rows_are_the_last_tokens_states_of_each_text_alone(folders):
    """As Transformers computes them, one text at a time, without padding; cut texts end in EOS."""
    teacher = AutoModel.from_pretrained(folders[0], **in_dtype(torch.float32))
    lengths = set()
    for name in NAMES:
        store = open_store(folders[1] / name)
        rows = np.load(folders[2] / name / "embeddings.npy", mmap_mode="r")
        assert (rows.shape, rows.dtype) == ((len(store.offsets) - 1, 48), np.float32)
        for number in range(0, len(rows), 7):
            ids = store.tokens[store.offsets[number] : store.offsets[number + 1]].copy()
            if len(ids) > LENGTH:
                ids = np.append(ids[: LENGTH - 1], store.eos)
            lengths.add(len(ids))
            expected = teacher(input_ids=torch.from_numpy(ids).long()[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(torch.tensor(rows[number]), expected, rtol=1e-4, atol=1e-4)
            assert expected.norm() > 2  # not normalised
        meta = read_meta(folders[2] / name)
        assert (meta["max_seq_length"], meta["width"], meta["dtype"], meta["precision"]) == (
            LENGTH,
            48,
            "float32",
            "no",
        )
    assert len(lengths) > 5


def test_what_is_finished_is_left_alone_and_another_is_refused(folders, capsys, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folders[2].rglob("*")}
    assert embed(*folders) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    toy.make_backbone(tmp_path / "other", hidden_size=48, seed=8)
    assert embed(tmp_path / "other", *folders[1:], "--dtype", "float16") == 2
    said = capsys.readouterr().err
    for name in NAMES:
        assert f"{folders[2] / name}: made with other settings (teacher {{" in said
    assert "dtype 'float32' -> 'float16'" in said
    assert {path: path.stat().st_mtime_ns for path in folders[2].rglob("*")} == before


def test_another_config_of_the_same_weights_is_another_teacher(folders, tmp_path, capsys):
    other = shutil.copytree(folders[0], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config.get("rope_parameters", config)["rope_theta"] = 123.0
    (other / "config.json").write_text(json.dumps(config))
    assert embed(other, *folders[1:]) == 2
    assert "made with other settings (teacher_config '" in capsys.readouterr().err
    older = shutil.copytree(folders[2], tmp_path / "older")  # before configs were named
    for name in NAMES:
        meta = json.loads((older / name / "meta.json").read_text())
        del meta["teacher_config"], meta["check"]
        write_json(older / name / "meta.json", seal(meta))
    assert embed(*folders[:2], older) == 0
    assert capsys.readouterr().out.count("finished before") == 2


def batches(folders) -> dict[str, int]:
    """How many batches each dataset is embedded in."""
    return {name: len(TextBatches(open_store(folders[1] / name), LENGTH, 300)) for name in NAMES}


def test_the_first_dimensions_alone_may_be_kept(folders, tmp_path, capsys):
    assert embed(*folders[:2], tmp_path / "output", "--dimensions", "20") == 0
    for name in NAMES:
        whole, first = (np.load(folder / name / "embeddings.npy") for folder in (folders[2], tmp_path / "output"))
        assert first.shape[1] == 20
        assert (first == whole[:, :20]).all()
    assert embed(*folders[:2], tmp_path / "more", "--dimensions", "49") == 2
    assert "--dimensions 49: the teacher has 48" in capsys.readouterr().err


class Killed(BaseException):
    """As SIGKILL would: nothing is tidied up."""


def test_a_kill_costs_what_was_not_committed_and_no_byte(folders, tmp_path, monkeypatch, capsys):
    written = []
    write = RowWriter.write

    def dies(self, batch, texts, embeddings):
        if len(written) == 20:
            raise Killed
        written.append(batch)
        write(self, batch, texts, embeddings)

    monkeypatch.setattr(embed_store, "COMMIT_SECONDS", 0)
    monkeypatch.setattr(RowWriter, "write", dies)
    with pytest.raises(Killed):
        embed(*folders[:2], tmp_path / "output")
    assert not (tmp_path / "output" / "toy_clustering").exists()
    monkeypatch.setattr(RowWriter, "write", lambda *given: (written.append(given[1]), write(*given)))
    assert embed(*folders[:2], tmp_path / "output") == 0
    assert "continuing after batch" in capsys.readouterr().out
    assert files(tmp_path / "output") == files(folders[2])
    assert len(written) == sum(batches(folders).values())  # each was written once


@pytest.mark.parametrize(("error", "words"), [
    (torch.OutOfMemoryError("CUDA out of memory.\nSee"), "the memory of the GPU is full (CUDA out of memory.): "),
    (OSError(errno.ENOSPC, "No space left on device"), "the disk refuses what is written: [Errno 28] No space left"),
    (KeyboardInterrupt(), "interrupted; the same command continues from what is there"),
])  # fmt: skip
def test_its_last_words_name_no_other_command(folders, tmp_path, monkeypatch, capsys, error, words):
    """On several processes it began with `run.py:` and named a key of training; on one it was a traceback."""

    def fails(*_):
        raise error

    monkeypatch.setattr(embed_store, "embed", fails)
    assert embed(*folders[:2], tmp_path / "output") == 1
    said = capsys.readouterr().err
    assert words in said
    assert "run.py" not in said
    assert embed_store.message_of(KeyError("a fault of the code")) is None


def test_everything_that_stands_against_it_is_said_at_once(folders, toy_world, tmp_path, capsys):
    stores = tmp_path / "stores"
    stores.mkdir()
    (stores / "toy_clustering").symlink_to(toy_world.stores / "toy_clustering")
    (stores / ".half.partial").mkdir()
    assert embed(tmp_path / "nothing", stores, tmp_path / "output") == 2
    said = capsys.readouterr().err
    assert ".half.partial: half-written store" in said
    assert "--model: " in said
    assert "2 problems" in said
    assert embed(folders[0], tmp_path / "none", tmp_path / "output") == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_a_teacher_whose_numbers_are_not_finite_writes_nothing(folders, tmp_path, capsys):
    """Whether all its numbers are broken, which is seen at once, or those of one token that its trial does not have."""
    teacher = AutoModel.from_pretrained(folders[0], **in_dtype(torch.float32))
    used = int(open_store(folders[1] / NAMES[0]).tokens.max())
    damages = {
        "the weights are damaged": teacher.norm.weight.data[3:4],
        "the teacher's embedding is not finite": teacher.embed_tokens.weight.data[used],
    }
    for number, (said, weights) in enumerate(damages.items()):
        sound = weights.clone()
        weights.fill_(torch.nan)
        teacher.save_pretrained(tmp_path / f"broken{number}")
        weights.copy_(sound)
        toy.make_tokenizer(tmp_path / f"broken{number}")
        assert embed(tmp_path / f"broken{number}", folders[1], tmp_path / f"output{number}") == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / f"output{number}" / "toy_classification").exists()


def door(rank: int, world: int, teacher, stores, output) -> int:
    """The door on one of several processes."""
    return embed_store.main(words(teacher, stores, output))


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_write_what_one_writes(folders, tmp_path, kind):
    """Under FSDP2, of an odd number of batches, one process runs an empty text beside the last."""
    assert any(count % 2 for count in batches(folders).values())
    assert on_processes(2, door, *folders[:2], tmp_path / "output", kind=kind) == [0, 0]
    found, expected = files(tmp_path / "output"), files(folders[2])
    assert found.keys() == expected.keys()
    assert found == expected
