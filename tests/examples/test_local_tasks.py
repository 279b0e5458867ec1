"""Tasks of the text that a machine has: each source is read rightly, and what is missing is left out and said.

python -m pytest tests/examples/test_local_tasks.py
"""

import errno
import gettext
import gzip
import json
import struct
from dataclasses import asdict
from pathlib import Path

import pytest

from examples.local_tasks import compare, debian, kinds, make, translations
from examples.local_tasks.debian import Package
from export.model_card import Facts
from tools.evaluation import folders
from utils import write_json

STATUS = """Package: libfoo1
Status: install ok installed
Section: contrib/net
Description: library that talks
  to servers
 The first
 paragraph.
 .
 And the second one.
Homepage: https://example.org

Package: bare
Section: games
Description: a game about bridges

Package: broken
"""
SUBJECTS = ("river", "castle", "engine", "poem", "planet", "market", "violin", "garden")


def packages(count: int) -> list[Package]:
    """Two of each family, in all sections in turn."""
    made = []
    for number in range(count):
        name = f"{'abcdefghij'[number // 2 % 10]}{'abcdefghij'[number // 20 % 10]}{'xy'[number // 200]}"
        subject = SUBJECTS[number % len(SUBJECTS)]
        words = f"the {subject} number {number} of them all"
        text = f"About {words}, which is described here in more words than the summary has."
        made.append(Package(f"{name}-{number % 2}", kinds.SECTIONS[number // 2 % 3], words, text))
    return made


def write_catalog(path: Path, messages: dict[str, str], order: str = "<") -> None:
    """A .mo file."""
    path.parent.mkdir(parents=True)
    texts = [text.encode() for text in [*messages, *messages.values()]]
    offset = 28 + 8 * len(texts)
    entries = b""
    for text in texts:
        entries += struct.pack(f"{order}2I", len(text), offset)
        offset += len(text) + 1
    count = len(messages)
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, offset)
    path.write_bytes(head + entries + b"\0".join([*texts, b""]))


MESSAGES = {
    "The file %s cannot be read": "Die Datei %s kann nicht\ngelesen werden",
    "Too short": "Zu kurz",
    "This message is the same in both": "This message is the same in both",
    "context\4The file of this context is open": "Die Datei ist offen",
    "There is one file in it\0There are many files in it": "Eine Datei\0Viele Dateien",
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_translations_are_read_as_gettext_reads_them(order, tmp_path, monkeypatch):
    monkeypatch.setattr(translations.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "none")})
    path = tmp_path / "de" / "LC_MESSAGES" / "some.mo"
    write_catalog(path, dict(sorted(MESSAGES.items())), order)
    with open(path, "rb") as file:
        theirs = gettext.GNUTranslations(file)
    found = dict(translations.read_catalog(path))
    assert len(found) == 3  # neither the context nor the plural
    for english, translated in found.items():
        assert translated == " ".join(theirs.gettext(english).split())
    ((english, translated),) = translations.pairs_of("de", tmp_path)
    assert (english, translated) == ("The file %s cannot be read", "Die Datei %s kann nicht gelesen werden")


def test_a_damaged_catalog_has_no_texts(tmp_path):
    path = tmp_path / "de" / "LC_MESSAGES" / "some.mo"
    write_catalog(path, MESSAGES)
    whole = path.read_bytes()
    for content in (b"", b"no catalog at all, but some words", whole[:24], whole[:60]):
        path.write_bytes(content)
        assert list(translations.read_catalog(path)) == []


def test_packages_are_read_from_dpkg_and_from_apt(tmp_path):
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "some_Packages").write_text(STATUS.replace("libfoo1", "libbar").replace("a game", "another game"))
    with gzip.open(tmp_path / "some_i18n_Translation-en.gz", "wt") as file:
        file.write(
            "Package: bare\nDescription-en: a game\n Build them.\n\nPackage: libbar\nDescription-en: x\n Ignored.\n"
        )
    first, bare, other = debian.known_packages(tmp_path / "status", tmp_path)
    assert first == Package(
        "libfoo1", "net", "library that talks", "to servers The first paragraph. And the second one."
    )
    assert bare == Package("bare", "games", "a game about bridges", "")  # dpkg's own comes first
    assert other.name == "libbar"
    assert debian.known_packages(tmp_path / "none", tmp_path)[1].description == "Build them."
    assert debian.known_packages(tmp_path / "none", tmp_path / "none") == []


def test_classes_keep_families_apart_and_every_class_is_trained_on():
    task = kinds.package_sections(packages(400), 60)
    train, test = task.rows["train"], task.rows["test"]
    assert len(test) == 60 or len(test) % 3 == 0
    assert {row["label"] for row in test} == {row["label"] for row in train} == set(kinds.SECTIONS[:3])
    assert len(train) == 3 * kinds.TRAINED_ON
    assert not {row["text"] for row in train} & {row["text"] for row in test}


def test_pairs_are_of_one_package_or_of_two_families_of_one_section():
    made = packages(200)
    by_summary = {package.summary: package for package in made}
    by_text = {package.description: package for package in made}
    rows = kinds.package_pairs(made, 150).rows["test"]
    assert 0.3 < sum(row["label"] for row in rows) / len(rows) < 0.7
    for row in rows:
        package, other = by_summary[row["sentence1"]], by_text[row["sentence2"]]
        assert package.section == other.section
        assert (package == other) == bool(row["label"])
        assert row["label"] or package.family != other.family


def test_relatedness_is_that_of_family_and_section():
    by_summary = {package.summary: package for package in packages(200)}
    rows = kinds.package_relatedness(list(by_summary.values()), 150).rows["test"]
    assert {row["score"] for row in rows} == {0, 1, 2}
    for row in rows:
        package, other = by_summary[row["sentence1"]], by_summary[row["sentence2"]]
        assert row["score"] == 2 * (package.family == other.family) or row["score"] == 1
        assert (package.section == other.section) == (row["score"] > 0)


def test_classes_have_equal_shares_and_small_ones_are_left_out():
    labelled = [(f"text {number}", "large") for number in range(100)]
    labelled += [(f"other {number}", "middle") for number in range(20)] + [("one", "small")]
    chosen = kinds.evenly(labelled, 60)
    assert [sum(label == name for _, label in chosen) for name in ("large", "middle", "small")] == [30, 20, 0]
    assert chosen == kinds.evenly(labelled, 60)
    assert kinds.evenly([], 60) == []


def test_the_command_makes_tasks_that_can_be_read_and_names_those_that_it_leaves_out(tmp_path, capsys, monkeypatch):
    write_catalog(tmp_path / "de" / "LC_MESSAGES" / "some.mo", MESSAGES)
    stanzas = [
        f"Package: {package.name}\nSection: {package.section}\nDescription: {package.summary}\n {package.description}\n"
        for package in packages(400)
    ]
    (tmp_path / "status").write_text("\n".join(stanzas))
    monkeypatch.setattr(translations.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "none")})
    monkeypatch.setattr(make.corpus, "standard_library_functions", lambda one_file_in: [])
    sources = ["--status", str(tmp_path / "status"), "--lists", str(tmp_path), "--locale", str(tmp_path)]
    for name in ("tasks", "again"):
        assert make.main([str(tmp_path / name), "--documents", "90", *sources]) == 0
    said = capsys.readouterr().out
    assert "translations_deu      left out: 1 row from this machine, 40 are needed" in said
    assert "code_search           left out: 0 rows" in said
    tasks, problems = folders.read_tasks(tmp_path / "tasks")
    assert problems == []
    assert {task.name: task.kind.mteb_type for task in tasks} == {
        "package_pairs": "PairClassification",
        "package_relatedness": "STS",
        "package_search": "Retrieval",
        "package_sections": "Classification",
        "package_topics": "Clustering",
    }
    files = [path.relative_to(tmp_path / "tasks") for path in (tmp_path / "tasks").rglob("*.*")]
    assert len(files) > 10
    assert all((tmp_path / "tasks" / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files)
    assert make.main([str(tmp_path / "tasks")]) == 2
    assert "tasks: already exists" in capsys.readouterr().err


def test_a_machine_without_any_source_is_told_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(translations.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "none")})
    monkeypatch.setattr(make.corpus, "standard_library_functions", lambda one_file_in: [])
    none = str(tmp_path / "none")
    assert make.main([str(tmp_path / "tasks"), "--status", none, "--lists", none, "--locale", none]) == 2
    assert capsys.readouterr().err == "no task can be made: this machine has none of the sources\n"
    assert not (tmp_path / "tasks").exists()


def test_models_stand_side_by_side_with_the_tasks_that_all_have(tmp_path, capsys):
    for name, scores in {"a": {"x": 0.5, "y": 0.25}, "b": {"x": 1.0, "y": None, "z": 1.0}}.items():
        results = {
            task: {"8": {} if score is None else {"main_score": score}, "4": {}} for task, score in scores.items()
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        settings = {"model": str(tmp_path), "tasks": {task: {"main_metric": f"of_{task}"} for task in scores}}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(settings))
    assert compare.main([f"one={tmp_path}/a", f"{tmp_path}/b"]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["task", "metric", "one", f"{tmp_path}/b"]
    assert rows[2:] == [
        ["x", "of_x", "0.5000", "1.0000"],
        ["y", "of_y", "0.2500", "-"],
        ["mean of tasks", "", "0.3750", "-"],
    ]
    assert compare.main([f"none={tmp_path}"]) == 2
    capsys.readouterr()
    assert compare.main([f"one={tmp_path}/a", f"one={tmp_path}/b"]) == 2  # the second took the place of the first
    assert capsys.readouterr().err == "one: two evaluations of this name; give each a name of its own\n"
    assert compare.main([f"one={tmp_path}/a", f"two={tmp_path}/b", "--card"]) == 2
    assert f"--card: {tmp_path} holds no model that was trained here" in capsys.readouterr().err


def test_the_table_goes_into_the_card_of_the_first_model(tmp_path, capsys):
    facts = Facts(
        hidden_size=8, max_seq_length=64, query_instruction="", base_model="toy", matryoshka_dims=[], training={},
        datasets={},
    )  # fmt: skip
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "f2llm.json", asdict(facts))
    for name, score in (("ours", 0.75), ("theirs", 0.5)):
        (tmp_path / name).mkdir()
        values = {"main_score": score, "ndcg_at_10": score}
        write_json(tmp_path / name / "results.json", {"search": {"8" if name == "ours" else "16": values}})
        settings = {"model": str(tmp_path / "model"), "tasks": {"search": {"main_metric": "ndcg_at_10"}}}
        write_json(tmp_path / name / "evaluation.json", settings)
    words = [f"{name}={tmp_path / name}" for name in ("ours", "theirs")]
    for _ in range(2):  # a second time it is replaced
        assert compare.main([*words, "--card"]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("| evaluation | metric | this model | theirs |") == 1
    assert "| search | ndcg_at_10 | 0.7500 | 0.5000 |" in card
    assert "0.7500" in capsys.readouterr().out


def test_a_full_disk_ends_in_a_sentence(tmp_path, monkeypatch, capsys):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(make, "publish", no_space)
    monkeypatch.setattr(make, "all_tasks", lambda flags: [kinds.search("one", [("a", "b")] * kinds.LEAST, {})])
    assert make.main([str(tmp_path / "tasks")]) == 1
    assert "the disk refuses what is written: [Errno 28] No space left on device: make room" in capsys.readouterr().err
    assert not (tmp_path / "tasks").exists()
