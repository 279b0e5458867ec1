"""The ground floor: folders that are published whole, and words.

python -m pytest tests/test_utils.py
"""

import pytest

from utils import aside_of, first_line, plural, publish


def written_aside(folder, text: str):
    aside_of(folder).mkdir()
    (aside_of(folder) / "content").write_text(text)


@pytest.mark.parametrize("earlier", [None, "old"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_published_folder_takes_the_place_of_the_one_before(tmp_path, earlier, stale):
    folder = tmp_path / "store"
    if earlier:
        written_aside(folder, earlier)
        publish(folder)
    if stale:  # what a kill right after a rename leaves
        (tmp_path / ".store.old").mkdir()
        (tmp_path / ".store.old" / "content").write_text("older")
    written_aside(folder, "new")
    publish(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert (folder / "content").read_text() == "new"


def test_words():
    assert [plural(count, "step") for count in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
