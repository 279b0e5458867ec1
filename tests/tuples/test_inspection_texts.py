"""Keys are equal where texts are, and texts are compared as they are said to be.

python -m pytest tests/tuples/test_inspection_texts.py
"""

import itertools
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.prompts import query_prompt, split_prompt
from tuples.inspection.texts import MISSING, holds, is_blank, keys_of, plain, without_instruction

TEXTS = st.lists(st.one_of(st.none(), st.text(max_size=40), st.text("ab\0", max_size=26)), max_size=30)


def column(texts: list[str | None]) -> pa.Array:
    return pa.array(texts, pa.large_string())


@given(TEXTS)
def test_keys_are_equal_exactly_where_texts_are(texts):
    keys = keys_of(column(texts))
    assert keys.dtype == np.uint64
    assert (keys == MISSING).tolist() == [text is None for text in texts]
    distinct = set(texts) - {None}
    assert len(set(keys.tolist()) - {MISSING}) == len(distinct)
    by_text = dict(zip(texts, keys.tolist(), strict=True))
    assert [by_text[text] for text in texts] == keys.tolist()


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_key_depends_on_the_text_alone(kind):
    texts = ["", "a", "a\0", "ab" * 20, None, "ß" * 9, "12345678", "123456789"]
    alone = [int(keys_of(column([text]))[0]) for text in texts]
    padded = pa.array([*["x" * 11] * 3, *texts, "y"], pa.string()).cast(kind)
    assert keys_of(padded.slice(3, len(texts))).tolist() == alone
    assert len(set(alone)) == len(texts)


def test_keys_do_not_depend_on_how_many_texts_are_hashed_together():
    texts = column([f"{number} " + "word " * (number % 97) for number in range(2000)] + ["x" * 300_000, "", "end"])
    keys = keys_of(texts)  # half a million bytes
    by_piece = [keys_of(texts.slice(begin, 13)) for begin in range(0, len(texts), 13)]
    assert keys.tolist() == np.concatenate(by_piece).tolist()
    assert len(set(keys.tolist())) == 2003


def test_many_texts_that_differ_in_little_have_different_keys():
    texts = [f"{number:08} {place * 'x'}{number % 7}" for number in range(40_000) for place in (0, 8, 9)]
    swapped = [text[9:] + text[:9] for text in texts]
    assert len(np.unique(keys_of(column([*texts, *swapped])))) == len({*texts, *swapped}) > 200_000


def test_the_same_words_in_another_order_have_another_key():
    words = ["one word", "8 bytes!", "the last"]  # each as long as what is hashed at a time
    texts = ["".join(order) for order in itertools.permutations(words)]
    assert len(np.unique(keys_of(column(texts)))) == 6


def test_every_bit_of_a_key_is_used():
    keys = keys_of(column([str(number) for number in range(20_000)]))
    ones = (keys[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(axis=0)  # [64]
    assert np.abs(ones - 0.5).max() < 0.02  # five standard deviations


@pytest.mark.parametrize("query", [
    query_prompt("Find it.") + "a bridge", "a bridge", "", query_prompt("Find it."), "Instruct: \nQuery: x\nQuery: y",
    "Instruct: a\nQuery: b\nQuery: c", "Instruct: a\n\nb\nQuery: c", "Instruct: no more", "Instruct:a\nQuery: b",
    " Instruct: a\nQuery: b", "x\nInstruct: a\nQuery: b",
])  # fmt: skip
def test_instructions_are_taken_off_as_prompts_are_split(query):
    assert without_instruction(column([query, None])).to_pylist() == [split_prompt(query)[1], None]


@pytest.mark.parametrize("text", [
    "", "  ", "A  b\tC\n", "Straße\u00a0 ÄÖ", "cafe\u0301 au lait", "ПРИВЕТ  мир", "\u3000日本\u2003語", "ﬁx",
])  # fmt: skip
def test_plain_text_is_lower_case_composed_and_evenly_spaced(text):
    expected = " ".join(unicodedata.normalize("NFC", text).lower().split())
    assert plain(column([text, "ascii", None])).to_pylist() == [expected, "ascii", None]
    assert plain(column([text.encode().decode()])).to_pylist() == [expected]


def test_blank_and_holding():
    assert is_blank(column([None, "", " \n", "x"])).tolist() == [True, True, True, False]
    texts, parts = ["abc", "abc", None, "abc", ""], ["b", "d", "a", "", ""]
    assert holds(texts, parts).tolist() == [True, False, False, False, False]
