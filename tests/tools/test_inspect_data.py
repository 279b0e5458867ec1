"""The door of inspections: its exit status, what it writes, and what it refuses.

python -m pytest tests/tools/test_inspect_data.py
"""

import json
import shutil

import pytest
import toy
from published import write_published

from arguments import Args
from configuration.dataset_settings import read as read_settings
from data.token_store import open_store
from tools.inspect_data import main
from training.recipes import recipes_for
from training.steps import lay_out_steps
from tuples.inspection import picture as inspection_picture
from tuples.inspection.rules import RULES


def rows(count: int = 40) -> list[dict]:
    return [{"query": f"query {n}", "passage": f"passage {n}", "negative_1": f"wrong {n}"} for n in range(count)]


@pytest.fixture
def clean(tmp_path):
    return toy.write_parquet(tmp_path / "data" / "clean.parquet", rows())


@pytest.fixture
def spoilt(tmp_path):
    table = rows()
    table[3]["query"] = table[5]["query"] = table[1]["query"]
    table[5]["negative_1"] = table[1]["passage"]
    table[7]["negative_1"] = table[7]["passage"]
    return toy.write_parquet(tmp_path / "data" / "spoilt.parquet", table)


def test_sound_data_end_in_0_and_broken_rules_in_1(clean, spoilt, capsys):
    assert main([str(clean)]) == 0
    said = capsys.readouterr().out
    assert "40 tuples" in said
    assert "120 texts" in said
    assert said.endswith("no rule is broken\n")
    assert main([str(spoilt)]) == 1
    said = capsys.readouterr().out
    assert f"{spoilt}: false_negatives: 1 of 39 (2.56%, limit 0.00%) negatives that are the positive" in said
    assert "(row 5, counted from 0): take these negatives out" in said
    assert "positive_is_negative: 1 of 40" in said
    assert said.endswith("2 rules broken in 1 dataset\n")
    assert main([str(spoilt), "--limit", "false_negatives=0.1", "positive_is_negative=0.1"]) == 0
    assert main([str(clean), "--limit", "truncated=0", "--limit", "duplicate_queries=0"]) == 0


def test_page_json_and_picture_are_written(spoilt, tmp_path, monkeypatch, capsys):
    page = tmp_path / "look.md"
    assert main([str(spoilt.parent), "--page", str(page), "--task", "spoilt=retrieval"]) == 1
    found = json.loads((tmp_path / "look.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "look.json", "look.md", "look.png"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    for words in ("](look.png)", "[look.json]", "false_negatives: 1 of 39", "| spoilt | raw | retrieval | 40 | 40 |"):
        assert words in text
    for rule in RULES:
        assert f"`{rule.name}`" in text
    assert [broken["rule"] for broken in found["broken"]] == ["positive_is_negative", "false_negatives"]
    assert found["broken"][1]["first_rows"] == [5]
    assert (found["sum"]["tuples"], found["sum"]["negatives"]) == (40, 39)
    before = (text, (tmp_path / "look.json").read_bytes(), (tmp_path / "look.png").read_bytes())
    assert main([str(spoilt.parent), "--page", str(page), "--task", "retrieval"]) == 1
    assert before == (page.read_text(), (tmp_path / "look.json").read_bytes(), (tmp_path / "look.png").read_bytes())

    (tmp_path / "look.png").unlink()
    monkeypatch.setattr(inspection_picture, "find_spec", lambda name: None)
    capsys.readouterr()
    assert main([str(spoilt), "--page", str(page), "--json", str(tmp_path / "other.json")]) == 1
    assert "no picture without matplotlib" in capsys.readouterr().err
    assert "look.png" not in page.read_text()
    assert "[other.json]" in page.read_text()


def test_the_keys_of_the_json_stay(clean, toy_world, settings, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    out = tmp_path / "out.json"
    words = ["--json", str(out), "--config", str(config), "--tokens_per_second", "50"]
    words += ["--tokenizer_path", str(toy_world.backbone), "--evaluation", str(clean)]
    assert main([str(clean), *words]) == 1
    found = json.loads(out.read_text())
    dataset = found["datasets"][0]
    assert list(found) == ["format", "path", "limits", "broken", "sum", "datasets", "evaluation", "training"]
    assert " ".join(dataset) == (
        "name path kind task rows tuples texts negatives negatives_per_tuple_at_most unit lengths longer_than found "
        "tokens_of_first_pass"
    )
    assert list(dataset["found"]) == list(found["limits"]) == [rule.name for rule in RULES]
    assert list(dataset["found"]["truncated"]) == ["count", "of", "share", "first_rows"]
    assert list(dataset["lengths"]) == list(dataset["longer_than"]["64"]) == [
        "texts", "queries", "positives", "negatives",
    ]  # fmt: skip
    assert list(dataset["lengths"]["texts"]) == ["count", "total", "mean", "least", "most", "p50", "p90", "p99"]
    assert list(dataset["longer_than"]) == ["64", "128", "256", "512", "1024", "2048", "4096"]
    assert " ".join(found["training"]) == "steps_per_epoch steps epochs tokens_per_epoch tokens seconds"
    assert list(found["broken"][0]) == [
        "rule",
        "dataset",
        "path",
        "limit",
        "count",
        "of",
        "share",
        "first_rows",
        "remedy",
    ]
    assert found["evaluation"] == {
        "path": str(clean), "queries": 40, "queries_in_training": 40, "passages": 40, "passages_in_training": 40,
    }  # fmt: skip


@pytest.mark.parametrize("entries", [None, {"*": {"sampling_weight": 3, "num_hard_neg": 0}}], ids=["", "settings"])
def test_steps_are_those_of_the_run(toy_world, settings, tmp_path, capsys, entries):
    config = tmp_path / "config.json"
    given = None
    if entries:
        given = tmp_path / "settings.json"
        given.write_text(json.dumps(entries))
    settings |= {"train_steps": -1, "train_epochs": 3, "dataset_settings": given and str(given)}
    config.write_text(json.dumps(settings))
    words = [
        "--config",
        str(config),
        "--processes",
        "2",
        "--json",
        str(tmp_path / "out.json"),
        "--limit",
        "truncated=1",
    ]
    assert main([str(toy_world.stores), *words, "duplicate_tuples=1", "duplicate_queries=1"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["training"]
    stores = [open_store(toy_world.stores / f"toy_{task}") for task in ("classification", "clustering", "retrieval")]
    args = Args(**settings)
    plan, schedule = lay_out_steps(args, stores, recipes_for(args, stores, read_settings(given)[0]), processes=2)
    assert (found["steps"], found["steps_per_epoch"]) == (schedule.steps, plan.steps_per_epoch)
    assert f"{schedule.steps} steps ({plan.steps_per_epoch} an epoch), 3.00 epochs, " in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "words"), [
    (["--limit", "duplicate_querys=0"], "no rule is called 'duplicate_querys'; did you mean duplicate_queries?"),
    (["--limit", "truncated=7"], "--limit truncated=7: give a share from 0 to 1"),
    (["--processes", "0"], "--processes must be at least 1, not 0"),
    (["--workers", "-1"], "--workers must be at least 0, not -1"),
    (["--tokens_per_second", "0"], "--tokens_per_second must be above 0, not 0"),
    (["--tokens_per_second", "9"], "--tokens_per_second: needs --config"),
    (["--page", "page.txt"], "page.txt: must end in .md"),
    (["--json", "no/such/folder.json"], "there is no folder no/such"),
    (["--tokenizer_path", "no/tokenizer"], "--tokenizer_path 'no/tokenizer'"),
    (["--evaluation", "no/evaluation"], "--evaluation no/evaluation: no such file or folder"),
    (["--task", "labelling"], "--task labelling"),
    (["--config", "no/config.json"], "no/config.json"),
], ids=lambda value: value[0][2:] if isinstance(value, list) else "")  # fmt: skip
def test_flags_that_make_no_sense_are_refused(clean, tmp_path, capsys, flags, words):
    out = tmp_path / "out.json"
    out.write_text("as it was")
    given = flags if "--json" in flags else [*flags, "--json", str(out)]
    assert main([str(clean), *given]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "nothing was written" in said
    assert out.read_text() == "as it was"


def test_all_problems_are_said_at_once(tmp_path, settings, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings | {"train_batch_size": 0, "learning_rate": "high"}))
    assert main([str(tmp_path / "nothing"), "--config", str(config), "--limit", "x=0", "--processes", "0"]) == 2
    said = capsys.readouterr().err
    assert "4 problems, nothing was written" in said
    assert "train_batch_size: 0 is below 1" in said
    assert "learning_rate" not in said  # it has no part in steps


def test_settings_beside_the_data_are_checked_where_a_configuration_is_given(clean, tmp_path, settings, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    (clean.parent / "dataset_settings.json").write_text('{"clean": {"max_length": 1}, "cleen": {"num_hard_neg": 0}}')
    assert main([str(clean.parent)]) == 0
    assert main([str(clean.parent), "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "dataset_settings.json: clean: max_length: 1 is below 2" in said
    assert "cleen: no such dataset; did you mean clean?" in said
    (clean.parent / "dataset_settings.json").write_text('{"other": {"num_hard_neg": 0}}')
    assert main([str(clean), "--config", str(config)]) == 0


def test_damaged_files_are_refused_by_name(clean, toy_world, tmp_path, capsys):
    (clean.parent / "cut.parquet").write_bytes(clean.read_bytes()[:-9])
    (clean.parent / "empty.jsonl").write_text("")
    (clean.parent / "other.jsonl").write_text('{"text": "x"}\n')
    assert main([str(clean.parent), "--page", str(tmp_path / "page.md")]) == 2
    said = capsys.readouterr().err
    for words in ("cut.parquet: not a Parquet file", "empty.jsonl: the file is empty", "other.jsonl: columns text"):
        assert words in said
    assert not (tmp_path / "page.md").exists()


def test_a_store_needs_its_own_tokenizer_to_be_read(toy_world, tmp_path, capsys):
    held_out = toy.write_parquet(tmp_path / "held_out.parquet", rows(2))
    assert main([str(toy_world.stores), "--evaluation", str(held_out)]) == 2
    assert "token stores hold no texts to compare: give --tokenizer_path" in capsys.readouterr().err
    toy.make_tokenizer(tmp_path / "other", vocab_size=300)
    assert main([str(toy_world.stores), "--tokenizer_path", str(tmp_path / "other")]) == 2
    said = capsys.readouterr().err
    assert "toy_retrieval was written by another tokenizer" in said
    assert "give the one that wrote it" in said


def test_a_damaged_store_is_refused(toy_world, tmp_path, capsys):
    shutil.copytree(toy_world.stores / "toy_clustering", tmp_path / "toy_clustering")
    with open(tmp_path / "toy_clustering" / "tokens.npy", "r+b") as file:
        file.seek(200)
        file.write(b"\1\2\3\4")
    assert main([str(tmp_path / "toy_clustering")]) == 2
    assert "tokens.npy: checksum differs" in capsys.readouterr().err


def test_a_cache_folder_keeps_what_was_converted(toy_world, tmp_path):
    for layout in ("v1", "v2"):
        (tmp_path / layout).mkdir()
        (tmp_path / layout / "tasks.json").write_text('{"toy_clustering": "clustering"}')
    write_published(tmp_path, open_store(toy_world.stores / "toy_clustering"))
    cache = tmp_path / "cache"
    assert main([str(tmp_path / "v1"), "--cache_dir", str(cache)]) == 0
    assert [path.name.rpartition("-")[0] for path in (cache / "stores").iterdir()] == ["toy_clustering"]
