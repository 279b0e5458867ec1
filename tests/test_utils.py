"""The ground floor: folders that are published whole, and words.

python -m pytest tests/test_utils.py
"""

import errno
import os

import pytest

from utils import RunError, aside_of, exit_status, first_line, plural, publish, refusal_of_file


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


def failing(error: BaseException):
    def work():
        raise error

    return work


@pytest.mark.parametrize(("error", "status", "words"), [
    (RunError("--model: no such folder"), 2, "--model: no such folder"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "the disk refuses what is written: [Errno 28] No space left "
     "on device: make room, and give the same command again"),
    (OSError(errno.EACCES, "Permission denied", "a/b"), 1, "[Errno 13] Permission denied: 'a/b': change its "
     "permissions, or take another folder, and give the same command again"),
    (OSError(errno.EIO, "Input/output error", "a/b"), 1, "the disk fails: [Errno 5] Input/output error: 'a/b': take "
     "another one, and give the same command again"),
])  # fmt: skip
def test_what_a_person_can_act_on_ends_a_command_in_a_sentence(capsys, error, status, words):
    assert exit_status(failing(error)) == status
    assert capsys.readouterr().err == f"{words}\n"


@pytest.mark.parametrize("error", [OSError("no errno"), ConnectionResetError(errno.ECONNRESET, "reset"), KeyError("x")])
def test_a_fault_of_the_code_is_not_told_as_the_disks(error):
    with pytest.raises(type(error)):
        exit_status(failing(error))


@pytest.mark.parametrize(("number", "blamed"), [
    (errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, True), (errno.ENOENT, False), (errno.EMFILE, False),
    (errno.EACCES, False),
])  # fmt: skip
def test_the_disk_is_blamed_only_for_what_is_its_fault(number, blamed):
    said = refusal_of_file(OSError(number, os.strerror(number), "a/b"))
    assert f"{os.strerror(number)}: 'a/b'" in said
    assert ("disk" in said) == blamed


def test_words():
    assert [plural(count, "step") for count in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
