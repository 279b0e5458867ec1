"""Evaluation during training: judged by others, the same on any number of processes, and without a trace in training.

python -m pytest tests/training/test_evaluation.py
"""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import toy
from conftest import Killed, interrupted, read_metrics, train_here

from training import best, console


@pytest.fixture
def config(settings, tmp_path) -> dict:
    """A run that evaluates twice, at three widths."""
    toy.write_retrieval_set(tmp_path / "sets" / "first")
    toy.write_retrieval_set(tmp_path / "sets" / "second", documents=400, seed=1)
    return settings | {
        "train_steps": 6,
        "evaluation_data_path": str(tmp_path / "sets"),
        "evaluation_steps": 4,
        "evaluation_dims": [8, 16],
    }


def test_smoke(config, capsys):
    folder = train_here(config)
    print(read_metrics(folder, "evaluation"))
    print(capsys.readouterr().out)
    assert 0
