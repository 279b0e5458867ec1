"""Any model folder gives the vectors that Sentence Transformers gives, decoders without padding.

python -m pytest tests/retrieval/test_encoders.py
"""

import json
import shutil

import numpy as np
import pytest
import tiny_encoders
import toy
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, processors

from modeling.tokenizer import appended_token, load_tokenizer
from retrieval import encoders as module
from retrieval.encode import DecoderEncoder
from retrieval.encoders import LibraryEncoder, open_encoder, prompts_of
from utils import RunError

TEXTS = ["The river is old.", "a", "The garden was sold and the bridge is old.", "castle " * 59 + "castle", "engine"]


@pytest.fixture(scope="module")
def mean_encoder(tmp_path_factory):
    return tiny_encoders.make_encoder(tmp_path_factory.mktemp("model") / "mean")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return toy.make_backbone(tmp_path_factory.mktemp("model") / "decoder")


def test_a_mean_pooled_encoder_gives_the_vectors_of_sentence_transformers(mean_encoder, monkeypatch):
    expected = SentenceTransformer(str(mean_encoder), device="cpu").encode(TEXTS)
    encoder = open_encoder(mean_encoder)
    assert isinstance(encoder, LibraryEncoder)
    assert encoder.width == expected.shape[1] == tiny_encoders.WIDTH
    for tokens in (16384, 30):  # in one rectangle, and in several
        monkeypatch.setattr(module, "TOKENS", tokens)
        vectors, cut = encoder.encode(TEXTS)
        assert np.allclose(vectors, expected, atol=1e-5)
        assert cut == 1
    assert len(np.unique(vectors.round(3), axis=0)) == len(TEXTS)
    assert encoder.encode([])[0].shape == (0, tiny_encoders.WIDTH)


def test_fewer_tokens_may_be_read_than_the_model_can(mean_encoder):
    vectors, cut = open_encoder(mean_encoder, max_length=4).encode(TEXTS)
    whole, _ = open_encoder(mean_encoder).encode(TEXTS)
    assert cut == 3
    assert np.allclose(vectors[1], whole[1], atol=1e-5)
    assert not np.allclose(vectors[0], whole[0], atol=1e-2)
    assert open_encoder(mean_encoder, max_length=999).max_length == tiny_encoders.LONGEST


def test_a_decoder_runs_without_padding_and_counts_what_it_cuts(decoder):
    encoder = open_encoder(decoder, max_length=16)
    assert isinstance(encoder, DecoderEncoder)
    assert "without padding" in encoder.description
    vectors, cut = encoder.encode(TEXTS)
    assert cut == 1
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert open_encoder(decoder).max_length == module.LONGEST


def ends_in(folder, token: str) -> None:
    """Make a folder's tokenizer put this token behind every text."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(token, backend.token_to_id(token))]
    backend.post_processor = processors.TemplateProcessing(single=f"$A {token}", special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("token", ["<|im_end|>", "<|endoftext|>"])
def test_texts_end_as_the_folders_own_tokenizer_ends_them(decoder, tmp_path, token):
    """Qwen3-Embedding, the published miner, ends them in <|endoftext|>, which is not its EOS."""
    folder = tmp_path / "folder"
    shutil.copytree(decoder, folder)
    ends_in(folder, token)
    tiny_encoders.describe(folder, 32, 64, "pooling_mode_lasttoken", {"query": "Instruct: Find it.\nQuery: "})
    tokenizer, _ = load_tokenizer(str(folder))
    assert tokenizer.decode([appended_token(tokenizer)]) == token
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt="")
    encoder = open_encoder(folder)
    assert isinstance(encoder, DecoderEncoder)
    assert np.allclose(encoder.encode(TEXTS)[0], expected, atol=1e-5)
    assert prompts_of(folder) == ("Instruct: Find it.\nQuery: ", "")


def test_a_tokenizer_that_adds_more_is_left_to_the_library(decoder, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(decoder, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [(token, backend.token_to_id(token)) for token in ("<|im_end|>", "<|endoftext|>")]
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A <|im_end|>", special_tokens=special)
    backend.save(str(folder / "tokenizer.json"))
    tiny_encoders.describe(folder, 32, 64, "pooling_mode_lasttoken", {"query": "Instruct: Find it.\nQuery: "})
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt="")
    encoder = open_encoder(folder)
    assert isinstance(encoder, LibraryEncoder)
    assert np.allclose(encoder.encode(TEXTS)[0], expected, atol=1e-5)


def test_prompts_are_those_that_the_library_would_take(tmp_path):
    path = tmp_path / "config_sentence_transformers.json"
    for prompts, expected in (
        ({"query": "q: ", "passage": "p: "}, ("q: ", "p: ")),
        ({"document": "", "passage": "p: "}, ("", "")),
        ({}, ("", "")),
        (None, ("", "")),
    ):
        path.write_text(json.dumps({"prompts": prompts}))
        assert prompts_of(tmp_path) == expected
    assert prompts_of(tmp_path / "nowhere") == ("", "")


def test_a_folder_without_a_model_is_refused_with_both_reasons(tmp_path):
    with pytest.raises(RunError, match=r"as a decoder: .*; by Sentence Transformers: "):
        open_encoder(tmp_path)
