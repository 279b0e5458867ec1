"""Model folders: when they are due, which are kept, and what is said where they take much room.

python -m pytest tests/training/test_folders.py
"""

from pathlib import Path

import pytest
from conftest import interrupted, read_metrics

from export import model_folder
from training.folders import folder_name, room_lines


def folders_in(run_folder: Path) -> set[str]:
    """The names of a run's model folders, and of what is left of some."""
    return {path.name for path in run_folder.iterdir() if path.is_dir()} - {"state"}


@pytest.fixture
def keys(settings):
    """Eleven steps, fewer than an epoch has; a folder after each second one and after the last."""
    return settings | {"train_steps": 11, "train_batch_size": 24, "checkpointing_steps": 2}


def test_all_are_kept_as_published(train, keys):
    assert folders_in(train(**keys)) == {"step_2", "step_4", "step_6", "step_8", "step_10", "step_11"}


@pytest.mark.parametrize("limit", [1, 2])
def test_only_the_newest_are_kept(train, keys, limit):
    folder = train(**keys | {"model_folders_limit": limit})
    newest = ["step_10", "step_11"]
    assert folders_in(folder) == set(newest[-limit:])


def test_a_folder_goes_only_when_a_newer_one_is_whole(train, keys, monkeypatch):
    seen = []
    retire = model_folder.retire

    def watched(folder: Path):
        seen.append((folder.name, max(int(name.rpartition("_")[2]) for name in folders_in(folder.parent))))
        retire(folder)

    monkeypatch.setattr(model_folder, "retire", watched)
    train(**keys | {"model_folders_limit": 1})
    assert seen == [("step_2", 4), ("step_4", 6), ("step_6", 8), ("step_8", 10), ("step_10", 11)]


def test_a_run_under_a_limit_that_was_killed_ends_with_the_same_folders(train, keys):
    keys |= {"model_folders_limit": 2}
    interrupted(keys, 8)
    folder = train(**keys)
    assert folders_in(folder) == {"step_10", "step_11"}
    assert read_metrics(folder, "train")[-1]["step"] == 11


def test_what_is_no_model_folder_of_the_run_is_left_alone(tmp_path):
    for name in ("step_1", "step_2", "epoch_1", "step_30", "step_x", "notes_1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f2llm.json").write_text("{}")
    (tmp_path / "step_0").mkdir()  # nobody's model
    model_folder.remove_old(tmp_path, limit=1, step=20, steps_per_epoch=10)
    assert folders_in(tmp_path) == {"epoch_1", "step_30", "step_x", "notes_1", "step_0"}


def test_names_of_folders():
    names = [folder_name(step, 2, 7, 4) for step in range(1, 8)]
    assert names == [None, "step_2", None, "epoch_1", None, "step_6", "step_7"]
    assert [folder_name(step, 0, 7, 4) for step in range(1, 8)] == [None, None, None, "epoch_1", None, None, "step_7"]


def test_folders_that_take_much_room_are_said_before_the_start():
    """4B in bf16, a folder every 100 of 23,000 steps: 230 and 8 GB each."""
    [line] = room_lines(8_044_000_000, limit=0, every=100, steps=23_000, steps_per_epoch=11_500)
    assert line.startswith("230 model folders of 8.0 GB will be written, and 1,850 GB of them kept: ")
    assert "checkpointing_steps 100" in line
    [line] = room_lines(8_044_000_000, limit=9, every=100, steps=23_000, steps_per_epoch=11_500)
    assert "80 GB of them kept" in line  # nine, and the newest while it is written
    assert room_lines(8_044_000_000, limit=2, every=100, steps=23_000, steps_per_epoch=11_500) == []
    assert room_lines(1_200_000_000, limit=0, every=0, steps=23_000, steps_per_epoch=11_500) == []


def test_the_line_counts_what_the_run_would_write(train, keys, capsys, monkeypatch):
    monkeypatch.setattr("training.folders._MUCH_ROOM", 1e5)
    folder = train(**keys)
    [size] = {path.stat().st_size for path in folder.glob("step_11/model.safetensors")}
    line = next(line for line in capsys.readouterr().out.splitlines() if "model folders of" in line)
    count = len(folders_in(folder))
    assert line.startswith(f"warning: {count} model folders of 0.0 GB will be written")
    assert size > 1e5 / count
