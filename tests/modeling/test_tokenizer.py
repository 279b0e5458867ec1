"""Tokenizers: exactly one EOS, a name for what a tokenizer does, and a saved one that appends EOS itself.

python -m pytest tests/modeling/test_tokenizer.py
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import toy
import transformers
from conftest import tokenize
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from data import tokenising
from modeling import tokenizer as module


@pytest.fixture
def tokenizer(toy_world):
    return AutoTokenizer.from_pretrained(toy_world.backbone)


def encode(tokenizer, text: str, max_seq_length: int = 64) -> list[int]:
    tokens, lengths, _ = module.make_encoder(tokenizer, max_seq_length)([text])
    assert lengths.tolist() == [len(tokens)]
    return tokens.tolist()


def test_exactly_one_eos_whatever_the_text(toy_world):
    tokenizer, _ = module.load_tokenizer(str(toy_world.backbone))
    eos = tokenizer.eos_token_id
    plain = tokenizer("the river is old", add_special_tokens=False)["input_ids"]
    assert eos not in plain
    assert encode(tokenizer, "the river is old") == [*plain, eos]
    assert encode(tokenizer, "the river is old<|im_end|>") == [*plain, eos]
    assert encode(tokenizer, "the river is old", max_seq_length=3) == [*plain[:2], eos]
    assert encode(tokenizer, "<|im_end|>") == [eos]
    _, _, truncated = module.make_encoder(tokenizer, len(plain) + 1)(["the river is old", "the river is old old"])
    assert truncated.tolist() == [False, True]  # len(plain) + EOS still fits


def test_a_literal_pad_token_stays_in_the_text(toy_world):
    tokenizer, _ = module.load_tokenizer(str(toy_world.backbone))
    assert encode(tokenizer, "old<|endoftext|>river").count(tokenizer.pad_token_id) == 1


def test_a_saved_tokenizer_appends_eos_once_and_keeps_it_when_cutting(toy_world, tmp_path):
    tokenizer, _ = module.load_tokenizer(str(toy_world.backbone))
    module.save_tokenizer(tokenizer, tmp_path, 16)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    long = "the castle is old and the engine needs repair " * 10
    for text in ("the river is old", long, ""):
        assert saved(text, truncation=True, max_length=16)["input_ids"] == encode(tokenizer, text, 16)
    batch = saved(["old", long], padding=True, truncation=True, max_length=16)
    assert [row[-1] for row in batch["input_ids"]] == [tokenizer.pad_token_id, tokenizer.eos_token_id]  # right padding
    # Saving the saved one must not append a second EOS, nor change what training sees.
    (tmp_path / "again").mkdir()
    module.save_tokenizer(saved, tmp_path / "again", 16)
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("old")["input_ids"] == saved("old")["input_ids"]
    assert encode(again, "old") == encode(tokenizer, "old")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_that_adds_bos_is_saved_as_training_used_it(toy_world, tmp_path):
    tokenizer, _ = module.load_tokenizer(str(toy_world.backbone))
    bos = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    backend = tokenizer.backend_tokenizer
    for template in ("<|im_start|> $A", "<|im_start|> $A <|im_end|>"):
        eos = (tokenizer.eos_token, tokenizer.eos_token_id)
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[bos, eos])
        module.save_tokenizer(tokenizer, tmp_path, 16)
        saved = AutoTokenizer.from_pretrained(tmp_path)
        assert saved("the river is old")["input_ids"] == encode(tokenizer, "the river is old", 16)


def test_fingerprint_names_behaviour_not_files(toy_world, tmp_path):
    tokenizer, _ = module.load_tokenizer(str(toy_world.backbone))
    module.save_tokenizer(tokenizer, tmp_path, 16)
    saved, _ = module.load_tokenizer(str(tmp_path))
    assert module.fingerprint(saved) == module.fingerprint(tokenizer)
    other = toy.make_tokenizer(tmp_path / "other", vocab_size=330)
    assert module.fingerprint(other) != module.fingerprint(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert module.fingerprint(tokenizer) != module.fingerprint(saved)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    tokenizer, problems = module.load_tokenizer(str(tmp_path))
    assert tokenizer is None
    assert str(tmp_path) in problems[0]
    toy.config().save_pretrained(tmp_path)  # Transformers 5 makes a tokenizer of it, with an empty vocabulary
    tokenizer, problems = module.load_tokenizer(str(tmp_path))
    assert tokenizer is None
    (problem,) = problems
    assert problem.startswith(f"{str(tmp_path)!r}: no tokenizer there (")
    if transformers.__version__ >= "5":
        assert problem.endswith("(its vocabulary is empty)")


@pytest.fixture
def made_texts():
    special = ["a <|im_end|>", "<|im_end|><|im_end|>", "<|endoftext|> b", "", " ", "naïve cafe\u0301", "価値 مفتاح 😀"]
    return [*special, *(row["passage"] for row in toy.raw_rows(600, 1, seed=5))]


@pytest.mark.parametrize("limit", [2, 3, 9, 1000])
def test_endings_are_those_of_a_loop(tokenizer, made_texts, limit):
    eos, expected = tokenizer.eos_token_id, []
    for text in made_texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: limit - 1]
        while ids and ids[-1] == eos:
            ids.pop()
        expected.append([*ids, eos])
    ids, lengths, cut = module.make_encoder(tokenizer, limit)(made_texts)
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert cut.any() == (limit < 1000)
    assert module.make_encoder(tokenizer, limit)([])[0].tolist() == []


def test_fastokens_gives_the_same(tokenizer, made_texts):
    pytest.importorskip("fastokens")
    reference, fast = (module.make_encoder(tokenizer, 12, engine) for engine in ("tokenizers", "fastokens"))
    for texts in (made_texts, made_texts[::-1], []):
        for ours, theirs in zip(fast(texts), reference(texts), strict=True):
            assert np.array_equal(ours, theirs)


def test_an_engine_that_differs_is_left_loudly(toy_world, tmp_path, monkeypatch, capsys):
    """A stand-in that is right at first, and wrong on the text that the sample looks at in the second batch."""
    reference = json.loads((toy_world.backbone / "tokenizer.json").read_text())
    calls = []

    class StandIn:
        @staticmethod
        def from_json_str(text):
            assert json.loads(text)["model"]["vocab"] == reference["model"]["vocab"]
            return StandIn(Tokenizer.from_str(text))

        def __init__(self, inner):
            self.inner = inner

        def encode_batch_flat(self, texts):
            calls.append(len(texts))
            rows = [encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]
            if len(calls) == 2:
                rows[0] = [*rows[0][:-1], 1]
            offsets = np.cumsum([0, *map(len, rows)])
            return np.array(sum(rows, []), np.uint32).tobytes(), offsets.astype(np.uint64).tobytes()

    monkeypatch.setitem(sys.modules, "fastokens", SimpleNamespace(Tokenizer=StandIn, __spec__=object()))
    monkeypatch.setattr(tokenising, "BATCH_TEXTS", 1300)
    assert tokenize(toy_world.raw, tmp_path / "stores", toy_world.backbone, "--engine", "fastokens") == 0
    assert "fastokens gives other ids than the tokenizer: tokenised again by the reference" in capsys.readouterr().err
    for path in toy_world.stores.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "stores" / path.relative_to(toy_world.stores)).read_bytes()
