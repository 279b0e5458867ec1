"""A run's page shows what the run logged, harms nobody, and refuses what is not a run.

    python -m pytest tests/tools/test_report.py

The page in a real browser is looked at in test_report_browser.py.
"""

import errno
import json
import os
import random
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import run_folders
import toy
from conftest import read_metrics, toy_settings, train_here

from data.token_store import open_store
from retrieval.encode import encode
from tools import report
from tools.reporting import charts, compare, evaluation, neighbours, stores, summary
from tools.reporting.page import OPENING, page
from tools.reporting.read import last_model, open_run, open_runs, started_in
from tools.reporting.series import mean_curve, thin
from training import best
from training.objective import LOSSES, MEASURES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_folder(tmp_path) -> Path:
    return run_folders.write_run(tmp_path / "first")


@pytest.fixture(scope="module")
def toy_run(toy_world, tmp_path_factory) -> Path:
    """A run that was trained, with model folders, Matryoshka, and two evaluations of two sets."""
    folder = tmp_path_factory.mktemp("toy")
    toy.write_retrieval_set(folder / "sets" / "first", documents=20)
    toy.write_retrieval_set(folder / "sets" / "second", documents=30, seed=1)
    keys = {"evaluation_data_path": str(folder / "sets"), "evaluation_steps": 2, "evaluation_dims": [8, 16]}
    return train_here(toy_settings(toy_world, folder) | keys | {"validation_steps": 2, "use_mrl": True})


@pytest.fixture
def two_runs(tmp_path) -> list[Path]:
    return [run_folders.write_run(tmp_path / "first"), run_folders.write_run(tmp_path / "second", scale=0.5, steps=60)]


def embedded(text: str) -> dict:
    """The numbers that a page holds."""
    _, _, rest = text.partition('<script type="application/json" id="data">')
    content, end, _ = rest.partition("</script>")
    assert end
    return json.loads(content)


def chart_named(text: str, title: str, x: str = "step") -> dict:
    """The one chart of this title over this axis."""
    (chart,) = [chart for chart in embedded(text)["charts"] if (chart["title"], chart["x"]) == (title, x)]
    return chart


def points(series: dict) -> list[tuple]:
    return list(zip(series["x"], series["y"], strict=True))


class Elements(HTMLParser):
    """Every element with its attributes, and all text outside scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data


# --------------------------------------------------------------------------------- what the page shows


def test_every_number_of_the_log_is_in_the_page(run_folder, tmp_path):
    assert report.main([str(run_folder), "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    trained = read_metrics(run_folder, "train")
    assert len(trained) == 10
    norms = chart_named(text, "Gradient norm")["series"]
    assert points(norms[0]) == [(line["step"], line["grad_norm"]) for line in trained]
    assert None in norms[0]["y"]  # an update that was left out is not a zero
    rates = chart_named(text, "Learning rate")["series"]
    assert points(rates[0]) == [(line["step"], line["lr"]) for line in trained]
    clustering, held_out = chart_named(text, "clustering · hard-negative loss")["series"]
    expected = [(line["step"], line["losses"]["topics"]["hard"]) for line in trained if "topics" in line["losses"]]
    assert points(clustering) == expected
    assert len(expected) == 5
    validated = read_metrics(run_folder, "validation")
    assert points(held_out) == [(line["step"], line["measures"]["topics"]["hard"]) for line in validated]
    retrieval = chart_named(text, "retrieval · in-batch loss")["series"][0]
    losses = [line["losses"] for line in trained]
    assert retrieval["y"] == [(one["pairs"]["in_batch"] + one["more_pairs"]["in_batch"]) / 2 for one in losses]
    one_dataset = chart_named(text, "more_pairs · hard-negative loss")["series"][0]
    assert one_dataset["y"] == [one["more_pairs"]["hard"] for one in losses]
    ranked = chart_named(text, "pairs · reciprocal rank of the positive")["series"][0]
    assert ranked["y"] == [line["measures"]["pairs"]["group_mrr"] for line in validated]
    timings = [json.loads(line) for line in (run_folder / "timings.jsonl").read_text().splitlines()]
    assert chart_named(text, "Throughput")["series"][0]["y"] == [line["tuples_per_second"] for line in timings]
    assert chart_named(text, "Peak memory")["series"][0]["y"] == [3.25] * 10
    assert "Imbalance" not in text  # a ten-thousandth
    assert chart_named(text, "Padding")["unit"] == "%"


def test_time_is_an_axis_where_all_runs_say_how_long_they_took(two_runs):
    text = page(open_runs(two_runs))
    ticking = embedded(text)["runs"][1]["clock"]
    assert ticking == {"step": [0, 10, 20, 30, 40, 50, 60], "seconds": [0, 60, 120, 180, 240, 300, 360]}
    assert 'data-value="time"' in text
    path = two_runs[0] / "timings.jsonl"
    path.write_text(path.read_text().replace('"seconds": 60.0, ', "", 1))
    assert 'data-value="time"' not in page(open_runs(two_runs))
    path.unlink()
    assert 'data-value="time"' not in page(open_runs(two_runs))


def test_evaluations_are_shown_over_steps_and_over_dimensions(run_folder):
    text = page(open_runs([run_folder]))
    lines = read_metrics(run_folder, "evaluation")
    over_steps = chart_named(text, "packages · recall@10")["series"][0]
    whole = [(line["step"], line["sets"]["packages"]["32"]["recall@10"]) for line in lines]
    assert points(over_steps) == whole
    assert len(whole) == 2
    matryoshka = chart_named(text, "code · nDCG@10", "dimension")
    last = lines[-1]["sets"]["code"]
    assert points(matryoshka["series"][0]) == [(int(dim), last[dim]["nDCG@10"]) for dim in ("8", "16", "32")]


def test_held_out_tuples_are_shown_by_prefix_where_the_width_is_known(run_folder):
    title = "clustering · hard-negative loss, held out"
    measures = read_metrics(run_folder, "validation")[-1]["measures"]["topics"]
    prefixes = [(8, measures["hard@8"]), (16, measures["hard@16"])]
    assert points(chart_named(page(open_runs([run_folder])), title, "dimension")["series"][0]) == prefixes
    (run_folder / "step_100").mkdir()
    (run_folder / "step_100" / "modules.json").write_text("[]")
    (run_folder / "step_100" / "config.json").write_text('{"hidden_size": 32}')
    text = page(open_runs([run_folder]))
    assert points(chart_named(text, title, "dimension")["series"][0]) == [*prefixes, (32, measures["hard"])]


def test_results_of_the_evaluation_tool_have_a_table(run_folder):
    scores = {"8": {"ndcg_at_10": 0.25, "main_score": 0.25}, "32": {"ndcg_at_10": 0.4321, "main_score": 0.4321}}
    (run_folder / "step_100").mkdir()
    (run_folder / "step_100" / "results.json").write_text(json.dumps({"Code": scores}))
    text = page(open_runs([run_folder]))
    assert "step_100: Code" in text
    assert '<td class="num">0.4321</td>' in text
    assert points(chart_named(text, "step_100: Code · main_score", "dimension")["series"][0]) == [
        (8, 0.25),
        (32, 0.4321),
    ]


def test_several_runs_share_charts_and_differences_are_marked(two_runs):
    runs = open_runs(two_runs)
    text = page(runs)
    chart = chart_named(text, "clustering · hard-negative loss")
    assert [(series["run"], series["heldOut"]) for series in chart["series"]] == [
        (0, False), (0, True), (1, False), (1, True)
    ]  # fmt: skip
    assert [run["name"] for run in embedded(text)["runs"]] == ["first", "second"]
    assert [run["lastStep"] for run in embedded(text)["runs"]] == [100, 60]
    groups = compare.configuration_groups([run.configuration for run in runs])
    rows = {row.key: row for _, of_group in groups for row in of_group}
    assert {key for key, row in rows.items() if row.stands_out} == {"experiment_id", "train_steps"}
    assert rows["train_steps"].values == ["100", "60"]
    assert text.count('<tr class="differs">') == 2


def test_of_one_run_what_is_not_the_default_is_marked():
    ((_, rows),) = compare.configuration_groups([{"seed": 7}])
    assert [(row.key, row.values, row.default, row.stands_out) for row in rows] == [("seed", ["7"], "0", True)]
    groups = dict(compare.configuration_groups([{"seed": 0, "no_key_of_today": [1]}, {}]))
    assert not any(row.stands_out for rows in list(groups.values())[:-1] for row in rows)  # none = the default
    assert [(row.key, row.values) for row in groups["Of other versions"]] == [("no_key_of_today", ["[1]", "–"])]


def test_a_run_without_anything_but_its_metrics_is_shown(tmp_path):
    run_folders.write_lines(tmp_path / "metrics.jsonl", [run_folders.training_line(10)])
    (run,) = open_runs([tmp_path])
    text = page([run])
    assert chart_named(text, "all · in-batch loss")["series"][0]["x"] == [10]
    assert run.notes == ["args.json: not there", "manifest.json: not there"]
    assert "args.json: not there" in text


def test_a_toy_run_is_shown_with_its_texts(toy_run, tmp_path):
    output = tmp_path / "report.html"
    assert report.main([str(toy_run), "--output", str(output)]) == 0
    text = output.read_text()
    titles = [chart["title"] for chart in embedded(text)["charts"]]
    for title in ("retrieval · in-batch loss", "toy_retrieval · queries", "retrieval · in-batch loss, held out"):
        assert title in titles
    line = read_metrics(toy_run, "train")[-1]
    assert chart_named(text, "Gradient norm")["series"][0]["y"][-1] == line["grad_norm"]
    evaluated = read_metrics(toy_run, "evaluation")
    of_second = [(line["step"], line["sets"]["second"]["32"]["nDCG@10"]) for line in evaluated]
    assert points(chart_named(text, "second · nDCG@10")["series"][0]) == of_second
    assert [step for step, _ in of_second] == [2, 4]
    assert "Left out: no model was to be loaded" in text
    assert summary.tiles(open_runs([toy_run]))[0].values == [("4", "of 4")]


def test_the_charts_know_every_loss_and_measure_of_training():
    assert tuple(charts.LOSSES) == LOSSES
    assert set(MEASURES) <= {*charts.LOSSES, *charts.RANKS}


# ------------------------------------------------------------------------------------ harm and bad input


LINE = json.dumps(run_folders.training_line(10)) + "\n"
HARM = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>\"&'"


def harmful_run(folder: Path) -> Path:
    """A run whose every text would run a script where it is not escaped."""
    run_folders.write_run(folder, model_path=HARM, best_metric=HARM)
    line = run_folders.training_line(110)
    line["losses"] = {HARM: {"in_batch": 1.0}, f"{HARM}2": {"in_batch": 2.0}}
    sets = {HARM: {"8": {HARM: 0.5}, "16": {HARM: 0.6}}}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"step": 110, "kind": "evaluation", "sets": sets}) + "\n")
    manifest = {"hardware": HARM, "tasks": {HARM: HARM, f"{HARM}2": HARM}, "versions": {HARM: HARM}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "results.json").write_text(json.dumps(sets))
    return folder


def test_texts_of_a_run_are_shown_and_never_run(tmp_path):
    runs = open_runs([harmful_run(tmp_path / "harm"), run_folders.write_run(tmp_path / "other")], [HARM, "other"])
    sample = neighbours.Sample(HARM, [HARM], [HARM, HARM], [0], [None], True)
    answers = [neighbours.Answers(0, HARM, [[(1, 0.5), (0, 0.4)]], [2]), neighbours.Answers(1, reason=HARM)]
    text = page(runs, sample, answers)
    elements = Elements(text)
    assert [attributes for tag, attributes in elements.found if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}
    ]  # fmt: skip
    assert "img" not in [tag for tag, _ in elements.found]
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert elements.text.count(HARM) > 10
    assert embedded(text)["runs"][0]["name"] == HARM


def test_the_page_asks_for_nothing(run_folder):
    text = page(open_runs([run_folder]))
    for _, attributes in Elements(text).found:
        assert not {"src", "srcset", "action"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(("files", "words"), [
    (None, "no such folder"),
    ({}, "not a run's folder: it has no metrics.jsonl"),
    ({"inner/metrics.jsonl": "{}"}, "below it are the runs inner"),
    ({"metrics.jsonl": ""}, "nothing was logged yet"),
    ({"metrics.jsonl": '{"step": 1, "ki'}, "nothing was logged yet"),
    ({"metrics.jsonl": '{"st\n{}\n'}, "metrics.jsonl, line 1: not JSON"),
    ({"metrics.jsonl": "[1]\n"}, "line 1: not an object with a step"),
    ({"metrics.jsonl": LINE, "args.json": "{"}, "args.json: not JSON"),
    ({"metrics.jsonl": LINE, "manifest.json": "[]"}, "manifest.json: must be one object"),
], ids=["none", "no run", "too high", "empty", "half", "broken", "no object", "args", "manifest"])  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path, capsys, files, words):
    if files is not None:
        (tmp_path / "run" / "inner").mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / "run" / name).write_text(text)
    output = tmp_path / "report.html"
    output.write_text(f"{OPENING} before")
    assert report.main([str(tmp_path / "run"), "--output", str(output)]) == 2
    assert words in capsys.readouterr().err
    assert output.read_text() == f"{OPENING} before"


@pytest.mark.parametrize("before", [b"# what I thought of it\n", b"<!doctype html>\n<html><p>mine", b"\xff\x00" * 200])
def test_only_a_report_is_replaced(run_folder, tmp_path, capsys, before):
    output = tmp_path / "file"
    output.write_bytes(before)
    assert report.main([str(run_folder), "--output", str(output)]) == 2
    assert "holds something other than a report; name another file, or delete it" in capsys.readouterr().err
    assert output.read_bytes() == before
    output.write_bytes(b"")
    for _ in range(2):
        assert report.main([str(run_folder), "--output", str(output)]) == 0
    assert report.main([str(run_folder), "--output", os.devnull]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "first"]


def test_a_full_disk_leaves_the_report_that_was_there_and_nothing_beside_it(run_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "report.html"
    assert report.main([str(run_folder), "--output", str(output)]) == 0
    before = output.read_bytes()

    def half(path: Path, text: str, **_) -> None:
        path.write_bytes(text[:100].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)
    assert report.main([str(run_folder), "--output", str(output)]) == 1
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "report.html"]


def test_flags_that_cannot_be_met_are_refused(two_runs, tmp_path, capsys):
    same = run_folders.write_run(tmp_path / "elsewhere" / "first")
    output = str(tmp_path / "report.html")
    first, second = map(str, two_runs)
    for words, message in [
        ([first, str(same)], "2 runs would be called first: tell them apart by --names"),
        ([first, first], "given 2 times"),
        ([first, second, "--names", "a"], "1 name for 2 runs"),
        ([first, second, "--names", "a", "a"], "2 runs would be called a"),
        ([first, "--texts", "file.txt"], "add it"),
        ([first, "--neighbours", "-1"], "must be 1 or more"),
        ([first, "--neighbours", "0"], "must be 1 or more; leave it out to ask nothing"),
        ([first, "--neighbours", "2"], "give texts by --texts FILE"),
        ([first, "--neighbours", "2", "--texts", "no/file.txt"], "--texts no/file.txt: cannot be read"),
    ]:
        assert report.main([*words, "--output", output]) == 2, words
        assert message in capsys.readouterr().err
    assert report.main([first, "--output", str(tmp_path / "no" / "report.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert report.main([first, "--output", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
    assert report.main([first, str(same), "--names", "a", "b", "--output", output]) == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EPIPE])
def test_only_what_a_disk_refuses_is_told_so(run_folder, tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(report, "write", refuse)
    words = [str(run_folder), "--output", str(tmp_path / "report.html")]
    if number == errno.EPIPE:  # a fault of the code, as far as anybody knows: it was told as refused input
        with pytest.raises(BrokenPipeError):
            report.main(words)
    else:
        assert report.main(words) == 1
        assert os.strerror(number) in capsys.readouterr().err


def test_the_half_line_of_a_run_that_goes_on_is_left_out_and_said(run_folder, tmp_path, capsys):
    whole = page(open_runs([run_folder]))
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "kind": "tr')
    assert report.main([str(run_folder), "--output", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    words = "metrics.jsonl: the last line is incomplete and is left out"
    assert words in capsys.readouterr().err
    assert words in text
    assert embedded(text) == embedded(whole)


def test_half_a_character_is_no_reason_to_fail(run_folder, tmp_path):
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "kind": "train", "losses": {"\\ud800": {"in_batch": 1.5}}}\n')
    assert report.main([str(run_folder), "--output", str(tmp_path / "report.html")]) == 0
    assert chart_named((tmp_path / "report.html").read_text(), "all · in-batch loss")["series"][0]["y"] == [1.5]


# --------------------------------------------------------------------------------------------- pure parts


def test_thinned_points_keep_every_peak_and_every_gap():
    rng = random.Random(0)
    every = [(step, rng.random()) for step in range(10_000)]
    every[1234] = (1234, 99.0)
    every[4321] = (4321, -99.0)
    every[7000] = (7000, None)
    kept = thin(every, 200)
    assert len(kept) <= 210
    assert set(kept) <= set(every)
    assert kept == sorted(kept)
    assert {every[0], every[1234], every[4321], every[7000], every[-1]} <= set(kept)
    assert thin(every[:200], 200) == every[:200]


def test_a_mean_is_over_the_datasets_that_a_line_has():
    lines = [
        {"step": 1, "losses": {"a": {"hard": 1.0}, "b": {"hard": 3.0}, "c": {"hard": 50.0}}},
        {"step": 2, "losses": {"b": {"hard": 4.0}, "a": {"in_batch": 9.0}}},
        {"step": 3, "losses": {"a": {"in_batch": 9.0}}},
        {"step": 4, "losses": {"a": {"hard": None}, "b": {"hard": "5"}, "c": 3}},
        {"step": 5},
    ]
    assert mean_curve(lines, "losses", ["a", "b"], "hard") == [(1, 2.0), (2, 4.0)]


def test_steps_that_were_planned_follow_from_the_configuration(run_folder):
    run = open_run(run_folder, "run")
    assert run.steps_per_epoch == 50
    assert summary.planned_steps(run) == 100  # train_steps, before 5 epochs
    run.configuration["train_steps"] = -1
    assert summary.planned_steps(run) == 250
    run.configuration.clear()
    assert summary.planned_steps(run) is None


def test_relative_paths_begin_where_the_run_was_started(tmp_path):
    folder = run_folders.write_run(tmp_path / "here" / "output" / "one", output_dir="output")
    assert started_in(open_run(folder, "one")) == (tmp_path / "here").resolve()
    moved = folder.rename(tmp_path / "two")
    assert started_in(open_run(moved, "two")) == Path()


def test_the_last_model_is_that_of_the_last_step(run_folder):
    assert last_model(open_run(run_folder, "run")) is None
    for name in ("step_90", "epoch_1", "epoch_2", "step_95", "best", ".epoch_3.partial"):
        (run_folder / name).mkdir()
        (run_folder / name / "modules.json").write_text("[]")
    (run_folder / "step_1000").mkdir()  # holds no model
    assert last_model(open_run(run_folder, "run")).name == "epoch_2"  # 100 steps


def test_runs_are_judged_as_training_judges_them(toy_run):
    run = open_run(toy_run, "run")
    lines = read_metrics(toy_run, "evaluation")
    sets = ["first", "second"]
    for best_metric in ("ndcg_at_10", "MRR@10", "first/recall@10", "16/nDCG@10", "second/8/MAP@100"):
        choice, problem = best.parse_choice(best_metric, sets, [8, 16])
        assert problem is None
        words, found = evaluation.chosen(run, best_metric)
        assert words == best_metric
        assert found == [(line["step"], best.value_of(line["sets"], choice, sets)) for line in lines]
        assert len({value for _, value in found}) == 2
    assert evaluation.chosen(run, None)[0] == "first · nDCG@10"
    assert evaluation.chosen(run, "no_metric") == ("no_metric", [])


# ---------------------------------------------------------------------------------- lengths and neighbours


def test_the_histogram_counts_every_text_once():
    lengths = np.array([1, 2, 3, 3, 4, 5, 6, 64, 95, 96])
    found = dict(stores.histogram(lengths))
    assert found[3] == 0.2
    assert found[4] == 0.2  # 4 and 5
    assert found[64] == 0.2
    assert found[96] == 0.1
    assert found[48] == 0.0
    assert sum(found.values()) == pytest.approx(1)
    assert stores.histogram(np.array([7, 7])) == [(4, 0.0), (6, 1.0), (8, 0.0)]
    assert stores.histogram(np.array([1])) == [(1, 1.0), (2, 0.0), (3, 0.0)]
    assert stores.histogram(np.array([10**6])) == [(16384, 0.0), (24576, 0.0), (32768, 1.0)]


def test_lengths_are_those_of_the_store_that_was_trained_on(toy_run, toy_world):
    runs = [open_run(toy_run, "toy")]
    datasets = {dataset.name: dataset for dataset in stores.datasets_of(runs)}
    store = open_store(toy_world.stores / "toy_retrieval")
    texts = [store.tokens[store.offsets[text] : store.offsets[text + 1]] for text in store.tuples[:, 0]]
    assert datasets["toy_retrieval"].lengths("queries").tolist() == [len(text) for text in texts]
    runs[0].manifest["data"]["toy_retrieval"]["tuples"] = "0" * 64
    section = stores.length_section(runs, stores.datasets_of(runs))
    assert "Left out of toy, toy_retrieval: its token store holds other data now." in section.note
    assert [chart.title for chart in section.charts if "toy_retrieval" in chart.title] == []
    assert len(section.charts) == 4


def test_neighbours_are_those_of_the_last_model(toy_run, tmp_path):
    output = tmp_path / "report.html"
    words = ["river", "castle", "poem", "planet"] * 3
    texts = [f"The {word} number {place} is old." for place, word in enumerate(words)]
    (tmp_path / "texts.txt").write_text("\n".join([*texts, "", texts[0]]))
    flags = ["--neighbours", "3", "--texts", str(tmp_path / "texts.txt"), "--output", str(output)]
    assert report.main([str(toy_run), *flags]) == 0
    shown = Elements(output.read_text()).text
    assert "Among 12 texts of texts.txt, by cosine." in shown
    sample = neighbours.sample_of_file(tmp_path / "texts.txt", 3)
    assert sample.queries == [texts[0], texts[5], texts[11]]
    (answer,) = neighbours.answer(open_runs([toy_run]), sample)
    prompts = json.loads((toy_run / answer.model / "config_sentence_transformers.json").read_text())["prompts"]
    queries = encode(toy_run / answer.model, [prompts["query"] + text for text in sample.queries], 64)
    cosines = queries @ encode(toy_run / answer.model, texts, 64).T
    for place, own in enumerate([0, 5, 11]):
        others = sorted((number for number in range(12) if number != own), key=lambda number: -cosines[place, number])
        assert [number for number, _ in answer.found[place]] == others[:3]
        assert f"{cosines[place, others[0]]:.3f}" in shown


def test_held_out_queries_ask_for_their_positives(toy_run):
    runs = open_runs([toy_run])
    sample = neighbours.sample_of_run(runs, stores.datasets_of(runs), 8)
    assert len(sample.queries) == 2  # a hundredth of 200 tuples
    assert all(query.startswith("Instruct: Find it.\nQuery: The ") for query in sample.queries)
    for query, right in zip(sample.queries, sample.right, strict=True):
        subject = query.rpartition("Query: The ")[2].split()[0]
        assert sample.passages[right].startswith(f"The {subject} ")
    (answer,) = neighbours.answer(runs, sample)
    assert sorted(place for place, _ in answer.found[0]) == [0, 1]
    for found, rank, right in zip(answer.found, answer.ranks, sample.right, strict=True):
        assert found[rank - 1][0] == right


@pytest.mark.processes
def test_no_model_is_loaded_unless_asked_for(run_folder, tmp_path):
    code = "import sys; from tools import report; status = report.main(sys.argv[1:]); "
    code += "sys.exit(status or 'torch' in sys.modules)"
    words = [str(run_folder), "--output", str(tmp_path / "report.html")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
