"""What cannot be merged is refused in words, before anything is loaded; the merge: tests/export/test_model_folder.py.

python -m pytest tests/tools/test_merge_adapter.py
"""

import json

import pytest

from tools import merge_adapter


@pytest.fixture
def adapter(toy_world, tmp_path):
    """What `merge_adapter` looks at of an adapter folder before it loads one."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": str(toy_world.backbone)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "f2llm.json").write_text("{}")
    return folder


def test_an_adapter_with_its_base_has_no_problems(adapter, tmp_path):
    assert merge_adapter.find_problems(adapter, tmp_path / "merged") == []


@pytest.mark.parametrize("name", ["adapter_config.json", "f2llm.json"])
def test_another_folder_is_refused(adapter, tmp_path, name, capsys):
    (adapter / name).unlink()
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 2
    assert f"{adapter}: no {name} in it" in capsys.readouterr().err


def test_an_adapter_without_its_base_is_refused_with_the_path(adapter, tmp_path, capsys):
    missing = str(tmp_path / "moved away")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": missing}))
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 2
    assert f"the base model of {adapter}: {missing!r}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_adapter_that_names_no_base_is_refused(adapter, tmp_path, capsys, text):
    (adapter / "adapter_config.json").write_text(text)
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 2
    assert "adapter_config.json: names no base model" in capsys.readouterr().err


def test_all_problems_are_named_at_once(tmp_path, capsys):
    assert merge_adapter.main([str(tmp_path / "nowhere"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'nowhere'}: no adapter_config.json in it", f"{tmp_path}: exists already"
    ]  # fmt: skip
