"""What is said of a run that has changed: the model by its path, and how to train longer; and what is said is true.

python -m pytest tests/runtime/test_changed_runs.py
"""

import json
import shutil

import pytest
import toy
from conftest import read_metrics, tensors_of, write_state

from runtime import checkpoint
from runtime.resume import differences
from utils import RunError


def test_another_model_is_named_by_its_path(train, settings, toy_world, tmp_path):
    train()
    wider = toy.make_backbone(tmp_path / "wider", layers=3)
    with pytest.raises(RunError) as refused:
        train(model_path=str(wider))
    assert f"model: '{toy_world.backbone}' (shapes " in str(refused.value)
    assert f") then, '{wider}' (shapes " in str(refused.value)


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


def test_a_state_stands_for_the_defaults_of_keys_that_came_later(train, settings):
    folder = train()
    state = checkpoint.newest(folder / "state", pytest.fail)
    for name in ("mask_same_text", "weights"):
        del state.facts["ground"][name]
    write_state(folder / "state", state.step, tensors_of(state), state.facts, keep=2)
    train()  # continues
    with pytest.raises(RunError, match="mask_same_text: False then, True now"):
        train(mask_same_text=True)


def test_the_configuration_of_a_resumed_run_is_written_down(train):
    folder = train()
    train(log_interval=1)
    assert json.loads((folder / "args.json").read_text())["log_interval"] == 1


def test_states_of_before_the_path_was_kept_are_readable(train, toy_world, tmp_path):
    folder = train()
    state = checkpoint.newest(folder / "state", pytest.fail)
    del state.facts["model_path"]
    write_state(folder / "state", state.step, tensors_of(state), state.facts, keep=2)
    train()
    wider = toy.make_backbone(tmp_path / "wider", layers=3)
    with pytest.raises(RunError) as refused:
        train(model_path=str(wider))
    assert f"model: '{state.facts['ground']['model']}' then, '{wider}' (shapes " in str(refused.value)


def test_a_longer_cosine_is_refused_with_the_way_that_works_and_it_works(train):
    folder = train()
    with pytest.raises(RunError) as refused:
        train(train_steps=6)
    said = str(refused.value)
    assert "steps: 4 then, 6 now" in said
    assert "model_path set to this run's last model folder" in said
    longer = train(experiment_id="longer", model_path=str(folder / "step_4"))
    assert read_metrics(longer, "train")[-1]["step"] == 4
    assert said.count("\n") == 1 + 3 + 1  # the change, the way, what to do


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


def test_a_shorter_run_is_given_no_way_to_train_longer():
    assert differences({"steps": 3}, {"steps": 4}) == ["steps: 4 then, 3 now"]
    assert differences({"steps": None}, {"steps": 4}) == ["steps: 4 then, None now"]
