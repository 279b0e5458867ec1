"""F2LLM-v2's eight sizes: parameters, learning rates, epochs and teachers as the report has them.

python -m pytest tests/test_v2_sizes.py
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Qwen3Config

FOLDER = Path(__file__).parent.parent / "configs" / "v2"
SIZES = {  # parameters without a language-model head, learning rate, epochs of stage 2, teacher
    "80m": (80_084_288, 4e-5, 4, "0.6b"),
    "160m": (159_185_024, 3e-5, 3, "0.6b"),
    "330m": (334_349_184, 2e-5, 3, "0.6b"),
    "0.6b": (596_049_920, 1e-5, 2, "1.7b"),
    "1.7b": (1_720_574_976, 9e-6, 2, "4b"),
    "4b": (4_022_468_096, 7e-6, 2, None),
    "8b": (7_568_405_504, 6e-6, 2, None),
    "14b": (13_990_394_880, 5e-6, 2, None),
}
PRUNED = ("80m", "160m", "330m")  # from stage 1 of 0.6b


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


@pytest.mark.parametrize("size", SIZES)
def test_the_parameters_are_the_reports_to_the_unit(size):
    with torch.device("meta"):
        model = AutoModel.from_config(Qwen3Config.from_dict(read(f"models/{size}.json")))
    assert sum(weight.numel() for weight in model.parameters()) == SIZES[size][0]
    assert model.config.head_dim == 128


@pytest.mark.parametrize("size", SIZES)
def test_stage_2_trains_as_reported_from_the_folder_before_it(size):
    _, learning_rate, epochs, teacher = SIZES[size]
    config = read(f"stage2_{size}.json")
    assert config["learning_rate"] == learning_rate
    assert config["train_epochs"] == epochs
    assert config["use_mrl"] is True
    assert config["num_hard_neg_clustering"] == 9
    if teacher is None:
        assert "teacher_model_path" not in config
    else:
        assert config["teacher_model_path"] == last_folder(read(f"stage2_{teacher}.json"))
    if size in PRUNED:
        assert not (FOLDER / f"stage1_{size}.json").exists()
    else:
        stage_1 = read(f"stage1_{size}.json")
        assert config["model_path"] == last_folder(stage_1)
        assert stage_1["learning_rate"] == learning_rate


def last_folder(config: dict) -> str:
    """The model folder that a run ends with."""
    return f"{config['output_dir']}/{config['experiment_id']}/epoch_{config['train_epochs']}"
