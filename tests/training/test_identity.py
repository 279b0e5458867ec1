"""What a resume notices, and what names a teacher.

python -m pytest tests/training/test_identity.py
"""

import json
from types import SimpleNamespace

import pytest
import toy
from conftest import door_here, tokenize, train_here
from transformers import AutoConfig

from data.token_store import open_store
from runtime.resume import IDENTITY_KEY
from training.identity import config_digest
from utils import seal, write_json


@pytest.fixture(scope="module")
def stores(toy_world, tmp_path_factory):
    """One dataset, tokenised three times: as it is, with another instruction, as another task."""
    root = tmp_path_factory.mktemp("again")
    rows = toy.raw_rows(30, 3)
    for row in rows:
        row["query"] = row["query"].rpartition("Query: ")[2]
    toy.write_parquet(root / "raw" / "questions.parquet", rows)
    words = {
        "first": ["--instruction", "Find it.", "--task", "retrieval"],
        "instruction": ["--instruction", "Seek it.", "--task", "retrieval"],
        "task": ["--instruction", "Find it.", "--task", "clustering"],
    }
    for name, said in words.items():
        assert tokenize(root / "raw", root / name, toy_world.backbone, *said) == 0
    sums = {name: open_store(root / name / "questions").meta["sha256"] for name in words}
    assert sums["first"]["tuples"] == sums["instruction"]["tuples"]
    assert sums["first"]["tokens"] != sums["instruction"]["tokens"]
    assert sums["first"] == sums["task"]
    return root


@pytest.fixture
def config(settings, stores) -> dict:
    longer = {"train_data_path": str(stores / "first"), "scheduler_type": "constant_with_warmup", "train_steps": 2}
    return settings | longer


@pytest.mark.parametrize(("name", "line"), [
    ("instruction", "dataset questions: its tokenised texts are others (checksum was "),
    ("task", "dataset questions: its task was retrieval, is now clustering"),
])  # fmt: skip
def test_data_whose_tuples_alone_are_the_same_are_refused(config, stores, capsys, name, line):
    folder = train_here(config)
    before = (folder / "metrics.jsonl").read_bytes()
    assert door_here(config | {"train_steps": 3, "train_data_path": str(stores / name)}) == 2
    said = capsys.readouterr().err
    assert "cannot continue, because this has changed" in said
    assert line in said
    assert "its tuples are others" not in said
    assert ("with the same instruction and the same --max_seq_length" in said) == (name == "instruction")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_state_from_before_texts_and_tasks_were_named_goes_on(config, capsys):
    path = train_here(config) / "state" / "step_2" / "state.json"
    state = json.loads(path.read_text())
    del state["check"]
    named = state["facts"][IDENTITY_KEY]
    newer = [name for name in named if name.startswith(("texts of ", "task of "))]
    assert newer == ["texts of questions", "task of questions"]
    for name in newer:
        del named[name]
    write_json(path, seal(state))
    train_here(config | {"train_steps": 3})
    assert "continuing after step 2" in capsys.readouterr().out


def test_a_config_is_named_by_what_it_does_to_an_embedding():
    def digest(**changes) -> str:
        config = toy.config()
        for name, value in changes.items():
            setattr(config, name, value)
        return config_digest(config)

    same = [{}, {"dtype": "bfloat16"}, {"use_cache": False}, {"architectures": ["Other"]}, {"vocab_size": 9}]
    assert len({digest(**changes) for changes in same}) == 1
    rope = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    if not hasattr(toy.config(), "rope_parameters"):  # Transformers 4
        rope = {"rope_theta": 5.0}
    window = {"use_sliding_window": True, "sliding_window": 16}
    other = [{}, {"rms_norm_eps": 1e-5}, rope, {"hidden_act": "gelu"}, {"num_attention_heads": 2}, window,
             window | {"sliding_window": 8}]  # fmt: skip
    assert len({digest(**changes) for changes in other}) == len(other)


QWEN = {
    "model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 4096, "use_sliding_window": False, "torch_dtype": "bfloat16",
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(("changes", "digest"), [
    ({}, "9edc32accab74679"),
    ({"rope_scaling": YARN}, "d9ed44c90eb7280a"),
    ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2}, "54c47caae633f69e"),
    ({"model_type": "qwen2"}, "33c1b688ccbe5d1b"),
    ({"model_type": "llama", "rope_theta": 100000}, "baaee9399754ffbd"),
])  # fmt: skip
def test_any_version_of_transformers_names_a_config_alike(changes, digest, tmp_path):
    """The digests are those of 5.23; 4.51 says the same settings in other words."""
    write_json(tmp_path / "config.json", QWEN | changes)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config_digest(config) == digest
    config.save_pretrained(tmp_path / "again")
    assert config_digest(AutoConfig.from_pretrained(tmp_path / "again")) == digest


def test_a_config_in_the_words_of_an_old_version_is_named_as_by_a_new_one():
    """What 4.51 says of the first config above, whichever version is installed here."""
    in_old_words = QWEN | {"attention_bias": False, "hidden_act": "silu"}
    config = SimpleNamespace(to_diff_dict=lambda: dict(in_old_words))
    assert config_digest(config) == "9edc32accab74679"
