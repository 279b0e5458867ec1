"""Which models can teach: a live teacher is computed as it was trained, or refused.

python -m pytest tests/training/test_teachers.py
"""

from pathlib import Path

import pytest
import torch
import toy
from accelerate.state import AcceleratorState, GradientState
from conftest import door_here
from harness import live_run
from transformers import AutoModel, BertConfig, MistralConfig

from tools import embed_store

SIZES = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def teacher(folder: Path, config) -> str:
    """A model of random weights with the toy tokenizer; returns its path."""
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    toy.make_tokenizer(folder)
    return str(folder)


def test_a_model_that_is_not_causal_teaches_nothing(settings, toy_world, tmp_path, capsys):
    """Packed texts would be embedded with causal attention, and every number would look like one."""
    path = teacher(tmp_path / "bert", BertConfig(**SIZES, initializer_range=0.2))
    assert door_here(settings | {"teacher_model_path": path}) == 1
    said = f"{path}: it cannot be a teacher: not causal: the state of a token depends on what follows it"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
    words = ["--model", path, "--stores", str(toy_world.stores), "--output", str(tmp_path / "embeddings")]
    try:
        assert embed_store.main([*words, "--max_seq_length", "64"]) == 1
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "embeddings").exists()


@torch.no_grad()
def test_a_teacher_whose_layers_have_windows_is_not_packed_as_its_student_is(settings, tmp_path):
    """The trials' texts are shorter than most windows: only the config tells."""
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16, initializer_range=0.2)
    path = teacher(tmp_path / "windowed", config)
    live = live_run(settings | {"teacher_model_path": path})
    assert (live.model.backend, live.teacher.backend) == ("segments", "buckets")
    store = live.feed.stores[-1]
    ids = torch.from_numpy(store.tokens[: store.offsets[1]].astype("int64"))
    assert len(ids) > 20
    whole = torch.tensor([0, len(ids)], dtype=torch.int32)
    found = live.teacher(ids, whole, whole.diff().numpy())[0]
    expected = AutoModel.from_pretrained(path)(input_ids=ids[None]).last_hidden_state[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    live.teacher.backend = "segments"
    assert (live.teacher(ids, whole, whole.diff().numpy())[0] - expected).abs().max() > 1e-2
    live.lock.release()


@pytest.mark.parametrize(("changes", "line"), [
    ({"max_seq_length": 256}, "max_seq_length 256 is above the model's max_position_embeddings 128"),
    ({"attn_backend": "segments"}, "its tokens see no further than 4 tokens back: set attn_backend to auto or buckets"),
])  # fmt: skip
def test_a_teacher_that_cannot_read_the_texts_is_refused_before_it_is_loaded(settings, tmp_path, capsys, changes, line):
    path = teacher(tmp_path / "short", MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4))
    assert door_here(settings | {"teacher_model_path": path} | changes) == 2
    assert f"teacher_model_path: {line}" in capsys.readouterr().err
