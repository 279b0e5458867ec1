"""Encoding texts by a model folder.

python -m pytest tests/retrieval/test_encode.py
"""

import json

import numpy as np
import pytest
import toy

from retrieval import encode as module
from retrieval.encode import encode

TEXTS = [
    "The river is old.",
    "Instruct: Find it.\nQuery: castle",
    "a",
    "The garden was sold and the bridge is old.",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.make_backbone(tmp_path_factory.mktemp("model") / "toy")


def test_a_text_has_one_unit_vector_in_any_company(folder, monkeypatch):
    vectors = encode(folder, TEXTS, 32)
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert len(np.unique(vectors.round(3), axis=0)) == 5
    monkeypatch.setattr(module, "TEXTS", 3)
    monkeypatch.setattr(module, "TOKENS", 12)
    assert np.allclose(encode(folder, TEXTS[::-1], 32)[::-1], vectors, atol=1e-6)
    assert encode(folder, [], 32).shape == (0, 32)


def test_bf16_gives_nearly_the_same_vectors(folder):
    exact = encode(folder, TEXTS, 32)
    rounded = encode(folder, TEXTS, 32, bf16=True)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.05  # it did compute otherwise
    assert ((rounded * exact).sum(axis=1) > 0.999).all()


def test_long_texts_are_cut(folder):
    first, second = encode(folder, ["The river is old. " * 20, "The river is old. " * 30], 16)
    assert np.allclose(first, second, atol=1e-6)


def test_a_pooling_that_is_not_known_is_refused(tmp_path):
    folder = toy.make_backbone(tmp_path / "toy")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "weightedmean"}))
    with pytest.raises(ValueError, match="weightedmean"):
        encode(folder, TEXTS, 32)
