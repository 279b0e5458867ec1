"""Tokenizers as Qwen's: how texts are split, which roles the special tokens have, and that training repeats itself.

python -m pytest tests/modeling/test_qwen_bpe.py
"""

import pytest
import toy
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from modeling.qwen_bpe import SPECIAL_TOKENS, tokenizer_from_ranks, train_tokenizer
from modeling.tokenizer import fingerprint

TEXTS = ["The river is old.", "The rivers aren't 2024.", "a  b\n\nc"] * 5


def pieces(tokenizer, text: str) -> list[str]:
    """What a text is cut into before bytes are merged; Ġ is a space, Ċ a line end."""
    backend = tokenizer.backend_tokenizer
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]


@pytest.fixture(scope="module")
def bytes_alone():
    """A vocabulary in tiktoken's form: all bytes, and two merges, of which `he` comes first."""
    if not hasattr(TikTokenConverter, "load_tiktoken_bpe"):
        pytest.skip("before Transformers 5 only the package tiktoken reads ranks, which a benchmark alone has")
    ranks = {bytes([number]): number for number in range(256)}
    return tokenizer_from_ranks(ranks | {b"he": 256, b"th": 257})


def test_texts_are_split_as_qwen_splits_them(bytes_alone):
    for tokenizer in (train_tokenizer(TEXTS, 300), bytes_alone):
        assert pieces(tokenizer, "It's def f(x):\n\n  x+=12") == [
            "It", "'s", "Ġdef", "Ġf", "(x", "):ĊĊ", "Ġ", "Ġx", "+=", "1", "2",
        ]  # fmt: skip
        assert pieces(tokenizer, "cafe\u0301") == pieces(tokenizer, "caf\u00e9")  # NFC


def test_special_tokens_have_qwens_roles_and_nothing_appends_eos(bytes_alone, tmp_path):
    for number, made in enumerate((train_tokenizer(TEXTS, 300), bytes_alone)):
        made.save_pretrained(tmp_path / str(number))
        for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path / str(number))):
            assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
            assert tokenizer.eos_token_id == len(tokenizer) - 1  # the last of three behind the vocabulary
            assert tokenizer.eos_token_id not in tokenizer("The river")["input_ids"]
            assert tokenizer("a<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id
            assert tokenizer.decode(tokenizer("Naïve ключ 價值 😀")["input_ids"]) == "Naïve ключ 價值 😀"


def test_merges_follow_the_ranks(bytes_alone):
    assert bytes_alone("the")["input_ids"] == [ord("t"), 256]  # `he` before `th`
    assert bytes_alone.convert_tokens_to_ids(SPECIAL_TOKENS) == [258, 259, 260]


def test_training_has_the_size_asked_for_and_repeats_itself(tmp_path):
    assert len(train_tokenizer(TEXTS, 270)) == 270
    assert fingerprint(train_tokenizer(TEXTS, 270)) == fingerprint(train_tokenizer(iter(TEXTS), 270))
    assert fingerprint(toy.make_tokenizer(tmp_path)) == "a78054d7c2128da6"  # golden files hold its ids
