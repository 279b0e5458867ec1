"""What is said of a run that has changed: the model by its path, and how to train longer; and what is said is true.

python -m pytest tests/runtime/test_changed_runs.py
"""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy
from conftest import door_here, read_metrics, tensors_of, train_here, write_state

from runtime import checkpoint, processes
from training import models
from training.continuing import differences
from utils import RunError


def refusal(config: dict, capsys) -> str:
    """What a run says that is refused before it begins."""
    capsys.readouterr()
    assert door_here(config) == processes.REFUSED
    return capsys.readouterr().err


def test_another_model_is_named_by_its_path(train, settings, toy_world, tmp_path, capsys):
    train()
    wider = toy.make_backbone(tmp_path / "wider", layers=3)
    said = refusal(settings | {"model_path": str(wider)}, capsys)
    assert f"model: was '{toy_world.backbone}' (shapes " in said
    assert f"), is now '{wider}' (shapes " in said


@pytest.mark.parametrize("lora", [False, True])
def test_another_model_of_the_same_shapes_is_another_model(train, toy_world, tmp_path, lora):
    """Under LoRA the frozen weights are in no state: the adapter would be trained on two bases."""
    train(use_lora=lora)
    moved = tmp_path / "moved"
    shutil.copytree(toy_world.backbone, moved)
    train(use_lora=lora, model_path=str(moved))  # the same model at another place
    other = toy.make_backbone(tmp_path / "other", seed=1)
    with pytest.raises(RunError) as refused:
        train(use_lora=lora, model_path=str(other))
    line = f"weights: training began with those of '{toy_world.backbone}', and '{other}' holds others"
    assert line in str(refused.value)


def test_a_run_goes_on_in_the_precision_that_it_began_in(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(
        RunError, match="mixed precision: was bf16, is now no: accelerate launch --mixed_precision bf16"
    ):
        train()


def test_a_state_stands_for_the_defaults_of_keys_that_came_later(train, settings, capsys):
    folder = train()
    state = checkpoint.newest(folder / "state", pytest.fail)
    for name in ("mask_same_text", "precision", "weights"):
        del state.facts["ground"][name]
    write_state(folder / "state", state.step, tensors_of(state), state.facts, keep=2)
    train()  # continues
    assert "mask_same_text: was false, is now true" in refusal(settings | {"mask_same_text": True}, capsys)


def test_the_configuration_of_a_resumed_run_is_written_down(train):
    folder = train()
    train(log_interval=1)
    assert json.loads((folder / "args.json").read_text())["log_interval"] == 1


def test_states_of_before_the_path_was_kept_are_readable(train, settings, tmp_path, capsys):
    folder = train()
    state = checkpoint.newest(folder / "state", pytest.fail)
    del state.facts["model_path"]
    write_state(folder / "state", state.step, tensors_of(state), state.facts, keep=2)
    train()
    wider = toy.make_backbone(tmp_path / "wider", layers=3)
    said = refusal(settings | {"model_path": str(wider)}, capsys)
    assert f"model: was one of the shapes {state.facts['ground']['model']}, is now '{wider}' (shapes " in said


def test_a_longer_cosine_is_refused_with_the_way_that_works_and_it_works(train, settings, capsys):
    folder = train()
    said = refusal(settings | {"train_steps": 6}, capsys)
    assert "steps of the run: were 4, are now 6" in said
    assert "model_path set to this run's last model folder" in said
    longer = train(experiment_id="longer", model_path=str(folder / "step_4"))
    assert read_metrics(longer, "train")[-1]["step"] == 4
    assert said.count("\n") == 1 + 1 + 3 + 1 + 1  # of what, the change, the way, what to do, the count


def test_a_run_of_a_constant_rate_goes_on_for_longer_as_is_said(train, capsys):
    train(scheduler_type="constant_with_warmup")
    folder = train(scheduler_type="constant_with_warmup", train_steps=6)
    assert "continuing after step 4 of 6" in capsys.readouterr().out
    assert (folder / "step_6").is_dir()


def test_the_last_line_of_a_finished_run_says_so(train, capsys):
    train()
    capsys.readouterr()
    train()
    assert "this run is finished: 4 steps were trained" in capsys.readouterr().out.splitlines()[-1]


def test_published_data_that_have_changed_are_refused_once_they_are_converted(
    settings, tokenizer, tmp_path, capsys, monkeypatch
):
    def write(words: list[int]) -> None:
        ids = [[word, tokenizer.eos_token_id] for word in words]
        columns = {"query_input_ids": ids, "passage_input_ids": [[9, *row] for row in ids]}
        pq.write_table(pa.table(columns), tmp_path / "data" / "x.parquet")

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tasks.json").write_text('{"x": "retrieval"}')
    write([10, 11, 12, 13])
    config = settings | {"train_data_path": str(tmp_path / "data"), "train_batch_size": 2, "train_steps": 1}
    train_here(config)
    write([10, 11, 12, 14])
    monkeypatch.setattr(models, "load_backbone", lambda *_, **__: pytest.fail("a model was loaded"))
    assert "dataset x: its tokenised texts are others (checksum was " in refusal(config, capsys)


def test_a_shorter_run_is_given_no_way_to_train_longer():
    assert differences({"steps": 3}, {"steps": 4}) == ["steps of the run: were 4, are now 3"]
    [line] = differences({"steps": None}, {"steps": 4})
    assert line == "steps of the run: were 4, are now not fixed (a constant rate)"
