"""The pairs that benchmarks of quality train on: their negatives, and those of Debian's descriptions of packages.

python -m pytest tests/benchmarks/test_pairs.py
"""

import gzip

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import packages, pairs, search_task
from benchmarks.pairs import Pair
from retrieval.search import Ranking
from utils import RunError


def numbered(count: int) -> list[Pair]:
    return [Pair(f"query {number}", f"passage {number}", f"g{number // 2}") for number in range(count)]


def test_negatives_come_from_the_window_and_of_other_groups():
    made = numbered(20)
    order = np.arange(20)[None].repeat(20, axis=0)  # every query ranks 0, 1, 2, ...
    scores = np.linspace(1, 0.05, 20)[None].repeat(20, axis=0)
    mined = pairs.negatives_of_ranking(made, Ranking(order, scores), 3)
    assert mined[0] == ["passage 5", "passage 6", "passage 7"]  # ranks 6 to 8
    assert mined[6] == ["passage 5", "passage 8", "passage 9"]  # 6 and 7 are one group
    assert all(len(set(texts)) == 3 for texts in pairs.random_negatives(made, 3))


# --------------------------------------------------------------------------------------------- packages


LONG = "It reads what a microphone hears and writes words that a person can read"


def stanza(name: str, query: str, passage: str = LONG) -> str:
    return f"Package: {name}\nDescription-md5: 0\nDescription-en: {query}\n {passage} {name},\n .\n and  no more.\n"


def test_packages_are_read_from_lists_of_any_kind(tmp_path):
    plain = [stanza("speech2-tool", "turns speech into text"), stanza("x", "Turns SPEECH into text", "Other " * 20)]
    (tmp_path / "a_i18n_Translation-en").write_text("\n".join(plain))
    with gzip.open(tmp_path / "b_i18n_Translation-en.gz", "wt") as file:
        file.write(stanza("short", "two words") + "\n" + stanza("brief", "says far too little", "ok"))
    with pa.output_stream(str(tmp_path / "c_i18n_Translation-en.lz4"), compression="lz4") as file:
        file.write(stanza("ähnlich", "finds what is alike").encode())
    (tmp_path / "d_i18n_Translation-de").write_text(stanza("german", "not an English list"))
    training, held_out = packages.package_pairs(tmp_path)
    found = sorted(training + held_out, key=lambda pair: pair.group)
    assert [pair.group for pair in found] == ["speech", "ähnlich"]
    assert found[0] == Pair("turns speech into text", f"{LONG} speech2-tool, and no more.", "speech")


def test_a_family_stands_on_one_side_and_empty_packages_on_none(tmp_path):
    names = []
    for number in range(200):
        stem = f"{chr(97 + number % 20)}{chr(97 + number // 20)}oo"
        names += [f"lib{stem}2", f"lib{stem}-dev", f"{stem}-doc"]
    text = [stanza(name, f"makes the thing {name} work") for name in names]
    text += [stanza("old-name", "transitional package for new"), stanza("foo-dbgsym", "symbols for the foo")]
    text += [
        stanza("gone", "something that is gone", "This is a dummy package which can be removed at any time, as said")
    ]
    (tmp_path / "x_i18n_Translation-en").write_text("\n".join(text))
    training, held_out = packages.package_pairs(tmp_path)
    families = {pair.group for pair in training}
    assert not families & {pair.group for pair in held_out}
    assert len(training) + len(held_out) == 600
    assert len(families) + len({pair.group for pair in held_out}) == 200
    assert 30 <= len(held_out) <= 90  # one in ten
    assert len(held_out) % 3 == 0


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("python3-numpy", "numpy"),
        ("libghc-aeson-dev", "aeson"),
        ("golang-github-spf13-cobra-dev", "spf"),
        ("librust-serde+derive-dev", "serde"),
        ("r-cran-dplyr", "dplyr"),
        ("libmoose-perl", "moose"),
        ("gir1.2-gtk-4.0", "gtk"),
        ("libboost1.81-dev", "boost"),
        ("ruby", "ruby"),
    ],
)
def test_an_ecosystem_is_no_family(name, family):
    assert packages.family_of(name) == family


def test_without_a_list_the_remedy_is_named(tmp_path):
    with pytest.raises(RunError, match="apt-get update -o Acquire::Languages=en -o Dir::State::Lists=FOLDER"):
        packages.package_pairs(tmp_path)
    (tmp_path / "a_i18n_Translation-en.xz").write_bytes(b"damaged")
    with pytest.raises(RunError, match="cannot be read"):
        packages.package_pairs(tmp_path)


def test_pairs_made_anew_or_of_other_lists_never_meet_old_tuples(tmp_path):
    for stem in ("speech", "picture"):
        lists = tmp_path / stem
        lists.mkdir()
        text = "\n".join(stanza(f"{stem}{chr(97 + number)}", f"turns {stem} {number} into text") for number in range(9))
        (lists / "a_i18n_Translation-en").write_text(text)
    task = search_task.prepare("packages", tmp_path, 4, tmp_path / "speech")
    assert search_task.prepare("packages", tmp_path, 4, tmp_path / "speech") == task
    with pytest.raises(RunError, match=r"pairs-4\.json: made of packages of .*speech, not of packages of .*picture"):
        search_task.prepare("packages", tmp_path, 4, tmp_path / "picture")
    (tmp_path / "packages" / "pairs-4.json").unlink()
    other = search_task.prepare("packages", tmp_path, 4, tmp_path / "picture")
    assert other.folder != task.folder
    assert other.folder.name == f"pairs-4-{other.digest}"
