"""The benchmarks of quality at toy size: their rows are trained, evaluated, kept and chosen as their pages say.

python -m pytest tests/benchmarks/test_quality.py
"""

import json
import random
import shutil
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import toy
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from arguments import Args
from benchmarks import ingredients, measured_rows, quality, quality_report, search_task, training_commands
from benchmarks import sentence_transformers_training as st_training
from benchmarks.ingredient_rows import Row, groups
from benchmarks.measured_rows import RowFile
from benchmarks.pairs import Pair
from benchmarks.search_task import Variant
from benchmarks.training_commands import Trained, Training
from data.token_store import open_store
from retrieval.encode import encode
from training.schedule import Schedule
from utils import RunError, read_json

TRAINING = 64
HELD_OUT = 24
STEPS = 8
TOY_TRAINING = Training("", "", "", "", 20, 8, 32, 0, 4e-3, seed=0, threads=1, bf16=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A benchmark's folder with a toy task in the place of Python code."""
    folder = tmp_path_factory.mktemp("quality")
    rng = random.Random(0)
    made = []
    for number in range(TRAINING + HELD_OUT):
        subject = rng.choice(toy.SUBJECTS)
        made.append(asdict(Pair(toy.sentence(rng, subject, 4), toy.sentence(rng, subject, 10), f"g{number}")))
    content = {"source": "code", "instruction": "Find it.", "training": made[:TRAINING], "held_out": made[TRAINING:]}
    (folder / "code").mkdir()
    (folder / "code" / f"pairs-{TRAINING}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def words(folder, toy_world, tmp_path, monkeypatch) -> list[str]:
    """What both benchmarks are told: the toy task and backbone, and a file of rows of this test's own."""
    monkeypatch.setattr(measured_rows, "multiplies_in_bf16", lambda: True)  # the same on every processor
    sizes = f"--pairs {TRAINING} --evaluated 8 --batch 8 --max_seq_length 32".split()
    places = ["--folder", str(folder), "--model", str(toy_world.backbone), "--rows", str(tmp_path / "rows.jsonl")]
    return [*sizes, *places]


def rows_of(words: list[str]) -> RowFile:
    return RowFile(Path(words[-1]))


def add_trials(words: list[str], quality_by_rate: dict[float, float], system: str, **changed) -> None:
    """Trials as if they had been measured; `changed` settings make them those of another benchmark."""
    rows = rows_of(words)
    bench = quality.Bench(quality.parse(words), rows)
    for rate, ndcg in quality_by_rate.items():
        settings = bench.settings | {"minutes": 3.0, "learning_rate": rate} | changed
        measured = {"steps": 4, "seconds_per_step": 60 * 6 / STEPS, "curve": [{"seconds": 1.0, "nDCG@10": ndcg}]}
        rows.append(bench.identity("trial", system, quality.TRIAL_SEED, settings) | measured)


# -------------------------------------------------------------------------------------- compared rows


@pytest.mark.processes
def test_each_system_trains_a_row_which_is_not_measured_again(words, folder, toy_world, monkeypatch, capsys):
    words = [*words[:-2], "--seeds", "0", "--learning_rates", "1e-3", "4e-3", *words[-2:]]
    for system in quality.SYSTEMS:
        add_trials(words, {1e-3: 0.4, 4e-3: 0.5}, system)
    monkeypatch.setattr(quality, "YARDSTICKS", ("BM25", "untrained"))
    monkeypatch.setattr(quality, "remove", lambda path: None)  # what was trained is looked at below
    assert quality.main(words) == 0, capsys.readouterr().err
    finals = rows_of(words).rows(kind="final")
    assert [row["system"] for row in finals] == list(quality.SYSTEMS)
    for row in finals:
        assert row["settings"]["learning_rate"] == 4e-3
        assert row["steps"] == STEPS
        assert [point["step"] for point in row["curve"]] == [2, 4, 6, 8]
        seconds = [point["seconds"] for point in row["curve"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3]
        assert all(0 < point["nDCG@10"] <= 1 for point in row["curve"])
    check_what_was_trained(rows_folder(folder), toy_world.backbone)

    def refuse(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "train_here", refuse)
    monkeypatch.setattr(quality, "train_by_sentence_transformers", refuse)
    before = rows_of(words).rows()
    capsys.readouterr()
    assert quality.main(words) == 0
    assert rows_of(words).rows() == before
    printed = capsys.readouterr().out
    assert "here (0.004) to the last quality of st_cached (0.004)" in printed
    assert "st_cached (0.004) to the last quality of here (0.004)" in printed
    assert "BM25" in printed
    assert Path(words[-1]).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def rows_folder(folder: Path) -> Path:
    """Where the toy task's rows are trained."""
    (found,) = (folder / "code").glob(f"pairs-{TRAINING}-*/rows")
    return found


def check_what_was_trained(rows: Path, backbone: Path) -> None:
    """Every system made its steps on whole batches, and its folders hold other weights than the backbone's."""
    start = load_file(backbone / "model.safetensors")
    (here,) = rows.glob("final-here-0-*/run")
    lines = [json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all("in_batch" in line["losses"]["search"] and line["grad_norm"] > 0 for line in lines)
    assert read_json(here / "manifest.json")["mixed_precision"] == "bf16"
    for loss in ("st_in_batch", "st_cached"):
        (state_file,) = rows.glob(f"final-{loss}-0-*/checkpoint-{STEPS}/trainer_state.json")
        states = read_json(state_file)
        norms = [line["grad_norm"] for line in states["log_history"] if "grad_norm" in line]
        assert states["global_step"] == len(norms) == STEPS
        assert min(norms) > 0
    (theirs,) = rows.glob(f"final-st_in_batch-0-*/checkpoint-{STEPS}")
    folders = [theirs, *training_commands.model_folders(here).values()]
    assert len(folders) == 5
    for folder in folders:
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == start.keys()
        assert any(not torch.equal(weights[name].float(), start[name]) for name in start)
    check_vectors_agree(theirs)


def check_vectors_agree(folder: Path) -> None:
    """A folder that Sentence Transformers saved has the same vectors there and here."""
    texts = ["The river is old.", "Instruct: Find it.\nQuery: castle", "The garden was sold and the bridge. " * 20]
    theirs = SentenceTransformer(str(folder), device="cpu").encode(texts)
    ours = encode(folder, texts, 32)
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.fixture
def own_precision(monkeypatch):
    """The arguments of Transformers 4's trainer leave their precision in the environment, for all runs that follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.mark.usefixtures("own_precision")
def test_sentence_transformers_trains_in_bf16_by_the_same_schedule(tmp_path, toy_world, monkeypatch):
    raw = tmp_path / "search.parquet"
    toy.write_parquet(raw, toy.raw_rows(40, 0))
    training = replace(TOY_TRAINING, model=str(toy_world.backbone), raw=str(raw), folder=str(tmp_path))
    (tmp_path / "training.json").write_text(json.dumps(asdict(training) | {"loss": "st_in_batch"}))
    dtypes = set()
    rates = []

    class Listener(st_training.TrainingClock):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            super().on_train_begin(args, state, control)
            projection = next(part for name, part in model.named_modules() if name.endswith("q_proj"))
            projection.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))

        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])
            assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
            assert len(optimizer.param_groups) == 1

    monkeypatch.setattr(st_training, "TrainingClock", Listener)
    try:
        st_training.main(tmp_path / "training.json")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    schedule = Schedule(4e-3, 0.0, training.warmup_steps, 20)
    assert rates == pytest.approx([schedule.rate(step) for step in range(1, 21)])
    assert dtypes == {torch.bfloat16}
    seconds = read_json(tmp_path / "seconds.json")
    assert len(seconds) == 20
    assert seconds == sorted(seconds)


@pytest.mark.usefixtures("own_precision")
def test_without_instructions_for_bf16_every_system_computes_in_fp32(words, tmp_path, monkeypatch):
    here = measured_rows.conditions_here("pairs", Path(words[-3]))
    monkeypatch.setattr(measured_rows, "multiplies_in_bf16", lambda: False)
    bench = quality.Bench(quality.parse(words), rows_of(words))
    assert (here["precision"], bench.settings["precision"]) == ("bf16", "fp32")
    monkeypatch.setattr(search_task, "token_stores", lambda *arguments: Path())
    asked = []

    def encode(folder, texts, max_length, bf16):
        asked.append(bf16)
        return np.ones((len(texts), 8), np.float32)

    monkeypatch.setattr(search_task, "encode", encode)
    bench.evaluate(Path(), bench.task.evaluated(8))
    assert asked == [False]
    training = bench.training(bench.identity("final", "here", 6, bench.settings), 4, 1)
    assert not st_training.arguments_of(replace(training, folder=str(tmp_path))).bf16
    asked.clear()

    def run_command(words, threads, log, environment):
        asked.append((words, environment["ACCELERATE_MIXED_PRECISION"]))
        raise RunError("looked at")

    monkeypatch.setattr(training_commands, "run_command", run_command)
    for processes in (1, 2):
        with pytest.raises(RunError, match="looked at"):
            training_commands.train_here(training, processes=processes)
    assert [precision for _, precision in asked] == ["no", "no"]
    assert "--mixed_precision no" in " ".join(asked[1][0])


def test_the_best_trial_gives_the_learning_rate(words):
    words = [*words[:-2], "--learning_rates", "1e-4", "2e-4", "5e-4", *words[-2:]]
    add_trials(words, {5e-4: 0.6, 2e-4: 0.6, 1e-4: 0.5}, "here")
    add_trials(words, {1e-4: 0.9}, "here", batch=512)  # trials of another benchmark
    add_trials(words, {1e-4: 0.9, 2e-4: 0.1}, "st_cached")
    bench = quality.Bench(quality.parse(words), rows_of(words))
    assert bench.learning_rate("here") == 2e-4  # of equal ones the lower
    with pytest.raises(RunError, match=r"st_cached: learning rate 0\.0005 was not tried"):
        bench.learning_rate("st_cached")
    given = quality.parse([*words, "--learning_rate", "here=3e-4"])
    assert quality.Bench(given, rows_of(words)).learning_rate("here") == 3e-4


def test_without_a_learning_rate_nothing_begins(words, capsys):
    assert quality.main([*words, "--row", "st_cached:1"]) == 2
    problem = capsys.readouterr().err
    assert problem == (
        "quality: st_cached: no learning rate is known; run --trial first, or give --learning_rate st_cached=RATE\n"
    )


def test_steps_fill_the_minutes_at_the_newest_pace(words, monkeypatch):
    flags = [*words, "--row", "here:5", "--learning_rate", "here=1e-3", "--minutes", "2"]
    asked = []

    def train(training):
        asked.append(training)
        return Trained([3.0 * step for step in range(1, training.steps + 1)], {})

    monkeypatch.setattr(quality, "train_here", train)
    monkeypatch.setattr(search_task, "token_stores", lambda *arguments: Path())
    bench = quality.Bench(quality.parse(flags), rows_of(words))
    assert bench.seconds_per_step("here", 1e-3) == 3.0  # calibrated
    assert (asked[0].steps, asked[0].learning_rate) == (quality.CALIBRATION_STEPS, 1e-3)
    assert bench.seconds_per_step("here", 1e-3) == 3.0
    assert len(asked) == 1  # remembered
    with pytest.raises(IndexError):  # no folder came back to be evaluated
        bench.measure_final("here", 5)
    assert (asked[1].steps, asked[1].saves, asked[1].seed) == (40, 4, 5)


def test_a_command_that_waited_takes_over_what_the_other_measured(words, monkeypatch):
    rows = rows_of(words)
    bench = quality.Bench(quality.parse([*words, "--learning_rate", "here=1e-3"]), rows)
    calibration = bench.identity("calibration", "here", quality.TRIAL_SEED, bench.settings)
    final = bench.identity("final", "here", 1, bench.settings | {"minutes": 6.0, "learning_rate": 1e-3})
    meanwhile = [calibration | {"seconds_per_step": 5.0}, final]

    @contextmanager
    def row_lock(folder):
        rows.append(meanwhile.pop(0))  # by the other command, while this one waits
        yield

    monkeypatch.setattr(quality, "row_lock", row_lock)
    monkeypatch.setattr(quality, "train_here", None)  # would fail where it were called
    assert bench.seconds_per_step("here", 1e-3) == 5.0
    bench.measure_final("here", 1)
    assert meanwhile == []


def test_rows_of_another_model_or_machine_are_other_rows_with_folders_of_their_own(words, toy_world, tmp_path):
    flags = quality.parse(words)
    bench = quality.Bench(flags, rows_of(words))
    assert bench.settings.keys() > set(measured_rows.CONDITIONS)
    row = bench.identity("final", "here", 0, bench.settings | {"minutes": 6.0, "learning_rate": 1e-3})
    folders = {bench.folder_of(row)}
    for key in row["settings"]:
        folders.add(bench.folder_of(row | {"settings": row["settings"] | {key: "another"}}))
    assert len(folders) == 1 + len(row["settings"])
    other = tmp_path / "other" / toy_world.backbone.name
    shutil.copytree(toy_world.backbone, other)
    assert measured_rows.model_digest(other) == bench.settings["weights"]
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors")
    assert measured_rows.model_digest(other) != bench.settings["weights"]
    with pytest.raises(RunError, match=r"no config\.json with \*\.safetensors"):
        measured_rows.model_digest(tmp_path)


def final_row(system: str, seed: int, qualities: list[float], **changed) -> dict:
    settings = {"model": "toy", "batch": 8, "minutes": 6.0, "learning_rate": 1e-3, "machine": "old"} | changed
    curve = []
    for number, ndcg in enumerate(qualities):
        curve.append({"step": number + 1, "seconds": 10.0 * (number + 1), "nDCG@10": ndcg})
    row = {"kind": "final", "data": "code", "system": system, "seed": seed, "settings": settings}
    return row | {"steps": len(qualities), "curve": curve}


def test_the_speed_is_read_between_two_points():
    curve = final_row("here", 0, [0.3, 0.5, 0.4])["curve"]
    assert quality_report.seconds_until(0.4, curve) == pytest.approx(15)  # halfway from 0.3 to 0.5
    assert quality_report.seconds_until(0.1, curve) == 10
    assert quality_report.seconds_until(0.6, curve) is None


def test_the_speed_is_that_of_rows_of_one_seed_and_both_ways(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.append(final_row("here", 0, [0.9, 0.9, 0.9]))  # measured again below
    for seed, qualities in ((0, [0.2, 0.4, 0.6]), (1, [0.5, 0.6, 0.6]), (2, [0.1, 0.1, 0.1])):
        rows.append(final_row("here", seed, qualities))
        rows.append(final_row("st_cached", seed, [0.1, 0.2, 0.4]))
    rows.append(final_row("st_in_batch", 7, [0.1, 0.2, 0.4]))
    rows.append(final_row("st_cached", 0, [0.9, 0.9, 0.9], machine="new"))
    printed = "\n".join(quality_report.lines("code", rows))
    goal = "here (0.001) to the last quality of st_cached (0.001), 0.400 at 30 s"
    assert f"{goal}: after 15 s, 2.25 times as fast (1.50 to 3.00), with 2 of 3 seeds" in printed
    goal = "st_cached (0.001) to the last quality of here (0.001), 0.433 at 30 s"
    assert f"{goal}: after 10 s, 3.00 times as fast (3.00 to 3.00), with 1 of 3 seeds" in printed
    assert "here (0.001) to the last quality of st_in_batch (0.001): no seed in common" in printed
    assert f"{'here':20}{0.001:8g}{3:7}" in printed  # a row for each seed
    assert printed.count("# machine old") == printed.count("# machine new") == 1
    rows = RowFile(tmp_path / "slow.jsonl")
    rows.append(final_row("here", 0, [0.1, 0.2, 0.3]))
    rows.append(final_row("st_cached", 0, [0.1, 0.2, 0.4]))
    goal = "here (0.001) to the last quality of st_cached (0.001), 0.400 at 30 s"
    assert f"{goal}: not in its time, with 0 of 1 seeds" in quality_report.lines("code", rows)


def test_trials_stand_by_their_settings_and_a_best_rate_at_the_edge_is_named(words):
    add_trials(words, {1e-4: 0.5, 2e-4: 0.6, 5e-4: 0.4}, "here")
    add_trials(words, {5e-4: 0.6, 2e-4: 0.5}, "st_cached")
    add_trials(words, {1e-4: 0.9}, "here", batch=512)
    blocks = "\n".join(quality_report.lines("code", rows_of(words))).split("# code, trials of ")[1:]
    assert [block.count(quality_report.AT_THE_EDGE) for block in blocks] == [1, 1]
    assert f"\n{'st_cached':20}{quality_report.AT_THE_EDGE}" in blocks[0]
    assert f"\n{'here':20}{quality_report.AT_THE_EDGE}" in blocks[1]
    assert "batch 512" in blocks[1].splitlines()[0]
    assert [line.split()[1] for line in blocks[0].splitlines()[2:5]] == ["0.0001", "0.0002", "0.0005"]


def test_trials_and_rows_are_measured_by_different_pairs(folder):
    task = search_task.prepare("code", folder, TRAINING)
    own, of_trials = task.evaluated(8), task.evaluated(8, for_trials=True)
    assert len(own) == len(of_trials) == 8
    assert not {pair.query for pair in own} & {pair.query for pair in of_trials}
    assert not {pair.query for pair in own} & {pair.query for pair in task.training}
    assert task.evaluated(20, for_trials=True) == task.evaluated(20)  # too few for both


def test_rows_are_told_apart_by_what_was_measured(tmp_path):
    rows = RowFile(tmp_path / "new" / "rows.jsonl")
    assert rows.rows() == []
    row = {"kind": "final", "data": "code", "system": "here", "seed": 0, "settings": {"batch": 8}}
    rows.append(row | {"steps": 3})
    assert rows.find(row)["steps"] == 3
    for other in ({"seed": 1}, {"settings": {"batch": 9}}, {"kind": "trial"}, {"data": "packages"}, {"system": "x"}):
        assert rows.find(row | other) is None
    rows.append(row | {"steps": 4, "seed": 1})
    assert len(rows.path.read_text().splitlines()) == 2


def test_raw_tuples_have_their_negatives_and_instruction(folder):
    task = search_task.prepare("code", folder, TRAINING)
    plain = pq.read_table(search_task.raw_file(task, Variant())).to_pylist()
    first = task.training[0]
    assert plain[0] == {"query": f"Instruct: Find it.\nQuery: {first.query}", "passage": first.passage}
    variant = Variant("bm25", 2, instructed=False)
    raw = pq.read_table(search_task.raw_file(task, variant)).to_pylist()
    assert [row["query"] for row in raw] == [pair.query for pair in task.training]
    assert all(len({row["passage"], row["negative_1"], row["negative_2"]}) == 3 for row in raw)


# ------------------------------------------------------------------------------------------ ingredients


@pytest.mark.processes
def test_an_ingredient_is_trained_on_its_own_tuples_and_kept(words, folder, capsys, monkeypatch):
    monkeypatch.setattr(ingredients, "remove", lambda path: None)  # what was trained is looked at below
    words = [*words, "--steps", "4", "--row", "losses:2:0"]
    assert ingredients.main(words) == 0, capsys.readouterr().err
    assert "hard alone" in capsys.readouterr().out
    rows = rows_folder(folder)
    (store,) = rows.parent.glob("tokens-*/bm257-clustering/search/meta.json")
    opened = open_store(store.parent)
    assert opened.task == "clustering"
    assert opened.tuples.shape == (TRAINING, 2 + 7)
    (metrics,) = rows.glob("ingredient-0-*/run/metrics.jsonl")
    lines = metrics.read_text().splitlines()
    assert len(lines) == 4
    for line in lines:
        (losses,) = json.loads(line)["losses"].values()
        assert losses.keys() == {"hard"}
        assert losses["hard"] > 0
    monkeypatch.setattr(ingredients, "train_here", None)  # would fail where it were called
    assert ingredients.main(words) == 0


def test_the_plain_row_stands_in_every_group_of_one_process_and_prefixes_in_theirs(words, capsys):
    words = [*words[:-2], "--batch", "64", "--steps", "80", "--learning_rate", "5e-4", *words[-2:]]
    flags = ingredients.parse(words)
    conditions = dict.fromkeys(measured_rows.CONDITIONS, "old")
    scores = {"nDCG@10": 0.5, "MRR@10": 0.4, "recall@10": 0.75, "prefixes": {"8": 0.125, "32": 0.5}}
    measured = {"steps": 80, "seconds": 9.0, "scores": scores}
    for row in (groups()["losses"][0], groups()["matryoshka"][1]):
        rows_of(words).append(ingredients.identity(flags, conditions, row, 0) | measured)
        rows_of(words).append(ingredients.identity(flags, conditions | {"machine": "another"}, row, 1) | measured)
        rows_of(words).append(ingredients.identity(flags, conditions, row, 0) | measured)  # the same once more
    assert ingredients.main([*words, "--show"]) == 0
    table = capsys.readouterr().out
    plain = ["in-batch alone", "none", "full width alone", "all weights", "batch 64", "instruction"]
    assert len(plain) == len(groups()) - 1  # "gather" has two processes
    for name in (*plain, "all weights, 0.0005", "Matryoshka"):
        assert f"\n{name:30}     1     80        9" in table, name
    assert f"\n{'Matryoshka':30}   0.125   0.500" in table
    assert table.count("machine old") == 1
    for name in ("hard alone", "LoRA", "batch 32", "all weights, 0.001", "another"):
        assert name not in table


def test_a_row_for_the_same_time_makes_fewer_steps(words, monkeypatch):
    seconds = {0: 1.0, 7: 4.0}
    asked = []

    def train(training, changes, processes):
        asked.append((training.steps, changes.get("num_hard_neg", 0)))
        pace = seconds[asked[-1][1]]
        passed = [pace * step for step in range(1, training.steps + 1)]
        return Trained(passed, {training.steps: Path(training.model)})

    monkeypatch.setattr(ingredients, "train_here", train)
    monkeypatch.setattr(search_task, "token_stores", lambda *arguments: Path())
    monkeypatch.setattr(ingredients, "remove", lambda path: None)
    number = [row.name for row in groups()["negatives"]].index("7 by BM25, time of none") + 1
    assert ingredients.main([*words, "--steps", "20", "--row", f"negatives:{number}:3"]) == 0
    assert asked == [(20, 0), (20, 7), (5, 7)]  # 20 steps of 1 s are 5 of 4 s


def test_rows_change_what_run_py_knows_and_no_two_of_a_group_are_the_same(words):
    flags = ingredients.parse([*words, "--steps", "80", "--learning_rate", "3e-4"])
    known = {field.name for field in fields(Args)}
    for name, rows in groups().items():
        settings = [json.dumps(ingredients.identity(flags, {}, row, 0)) for row in rows]
        assert len(set(settings)) == len(rows) == len({row.name for row in rows}), name
        assert all(row.changes.keys() <= known for row in rows)
    sized = {row.batch: ingredients.planned_steps(flags, row) * row.batch for row in groups()["batch"]}
    assert sized == {32: 640, 64: 640, 128: 640, 512: 512}  # 80 steps of 8 tuples; 1.25 steps of 512 are one
    assert ingredients.planned_steps(flags, Row("plain")) == 80
    rates = {"all weights": [], "LoRA": []}
    for row in groups()["lora"][1:]:
        rates[row.name.partition(",")[0]].append(row.changes["learning_rate"])
    assert rates["all weights"] == rates["LoRA"] == [5e-4, 1e-3, 2e-3]


@pytest.mark.processes
def test_a_second_round_is_mined_once_by_the_model_of_the_first(words, folder, toy_world, monkeypatch):
    trained = []

    def train(training: Training, changes: dict, processes: int = 1) -> Trained:
        trained.append((training, changes))
        saved = Path(training.folder) / "step"
        shutil.copytree(toy_world.backbone, saved)
        return Trained([1.0, 2.0], {training.steps: saved})

    monkeypatch.setattr(ingredients, "train_here", train)
    for seed in (0, 1):
        assert ingredients.main([*words, "--steps", "4", "--row", f"negatives:9:{seed}"]) == 0
    first, second, of_another_seed = trained
    assert first[1] == {}
    assert Path(first[0].stores).name == "bm257-retrieval"
    assert second[1] == of_another_seed[1] == {"num_hard_neg": 3}
    assert second[0].stores == of_another_seed[0].stores  # mined once
    (raw,) = rows_folder(folder).parent.glob("raw/trained7-retrieval-miner-*/search.parquet")
    settings = read_json(raw.with_name("search.report.json"))["settings"]
    assert settings["model"]["folder"] == raw.parent.name.partition("retrieval-")[2]
    columns = pq.read_table(raw).column_names
    assert columns[:2] == ["query", "passage"]
    assert len(columns) >= 2 + 7
