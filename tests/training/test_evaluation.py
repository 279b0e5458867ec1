"""Evaluation during training: judged by others, the same on any number of processes, and without a trace in training.

python -m pytest tests/training/test_evaluation.py
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import toy
from chaos import final
from conftest import Killed, door_here, interrupted, read_metrics, train_here
from harness import on_processes, run_command, through_the_door
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run
from modeling.prompts import query_prompt
from retrieval.beir import RetrievalSet, read_set
from retrieval.encode import encode
from retrieval.metrics import METRICS, evaluate
from retrieval.search import search, unit_rows
from training import best
from training.best import Best, Choice, Evaluations

INSTRUCTION = "Find it."  # of the toy's queries
OURS = {  # Sentence Transformers' names -> ours
    "ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "map@100": "MAP@100", "recall@10": "recall@10",
    "recall@100": "recall@100",
}  # fmt: skip


@pytest.fixture
def sets(tmp_path) -> Path:
    toy.write_retrieval_set(tmp_path / "sets" / "first")
    toy.write_retrieval_set(tmp_path / "sets" / "second", documents=400, seed=1)
    return tmp_path / "sets"


@pytest.fixture
def config(settings, sets) -> dict:
    """A run that evaluates twice, at three widths."""
    return settings | {
        "train_steps": 6,
        "evaluation_data_path": str(sets),
        "evaluation_steps": 4,
        "evaluation_dims": [8, 16],
    }


# ------------------------------------------------------------------------------------------ other judges


def by_sentence_transformers(folder: Path, one: RetrievalSet, dim: int) -> dict[str, float]:
    """The metrics of a model folder, by the library's own evaluator."""
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    from sentence_transformers import SentenceTransformer

    relevant = {}
    for query, scores in zip(one.query_ids, one.relevance, strict=True):
        relevant[query] = {one.document_ids[number] for number, score in scores.items() if score > 0}
    judge = evaluation.InformationRetrievalEvaluator(
        dict(zip(one.query_ids, one.queries, strict=True)),
        dict(zip(one.document_ids, one.documents[:], strict=True)),
        relevant,
        mrr_at_k=[10],
        ndcg_at_k=[10],
        map_at_k=[100],
        precision_recall_at_k=[10, 100],
        truncate_dim=dim,
    )
    found = judge(SentenceTransformer(str(folder), device="cpu"))
    return {ours: found[f"cosine_{theirs}"] for theirs, ours in OURS.items()}


def as_yes_or_no(folder: Path) -> None:
    """Let all scores of a set be 1: Sentence Transformers knows no others."""
    path = folder / "qrels" / "test.tsv"
    path.write_text(path.read_text().replace("\t2\n", "\t1\n"))


def test_a_run_says_what_others_say_of_its_model_folder(config, sets, tmp_path):
    """Sentence Transformers loads the saved folder, prompts and all, and searches at each width by itself."""
    as_yes_or_no(sets / "first")
    as_yes_or_no(sets / "second")
    folder = train_here(config | {"report_to": "tensorboard"})
    lines = read_metrics(folder, "evaluation")
    assert [line["step"] for line in lines] == [4, 6]
    for name in ("first", "second"):
        found = lines[-1]["sets"][name]
        assert list(found) == ["8", "16", "32"]
        for dim, values in found.items():
            assert list(values) == list(METRICS)
            expected = by_sentence_transformers(folder / "step_6", read_set(sets / name), int(dim))
            assert values == pytest.approx(expected, rel=1e-9), (name, dim)
    assert 0 < lines[-1]["sets"]["second"]["8"]["nDCG@10"] < 1
    events = EventAccumulator(str(tmp_path / "tb" / "toy")).Reload()
    for tag, dim in (("second/eval_nDCG@10", "32"), ("second/eval_nDCG@10@8", "8")):
        values = [event.value for event in events.Scalars(tag)]
        assert values == pytest.approx([line["sets"]["second"][dim]["nDCG@10"] for line in lines])


def test_graded_scores_and_queries_that_carry_an_instruction(config, sets):
    """The model folder searched by our other way, document by document in one place; trec_eval judges the metrics."""
    path = sets / "first" / "queries.jsonl"
    head = json.dumps(query_prompt(INSTRUCTION))[1:-1]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([line.replace('"text": "', f'"text": "{head}') for line in lines[:10]] + lines[10:]))
    folder = train_here(config)
    found = read_metrics(folder, "evaluation")[-1]["sets"]["first"]
    one = read_set(sets / "first")
    assert sum(query.startswith("Instruct") for query in one.queries) == 10
    texts = [query_prompt(INSTRUCTION) + query.removeprefix(query_prompt(INSTRUCTION)) for query in one.queries]
    queries = encode(folder / "step_6", texts, config["max_seq_length"])
    documents = encode(folder / "step_6", one.documents[:], config["max_seq_length"])
    for dim, values in found.items():
        cut = int(dim)
        ranking = search(unit_rows(queries[:, :cut]), unit_rows(documents[:, :cut]), 100)
        assert values == pytest.approx(evaluate(ranking.passages, one.relevance), rel=1e-9)


# -------------------------------------------------------------------------------- any number of processes


@pytest.mark.processes
def test_one_two_and_four_processes_find_the_same(config, sets):
    """With weights that do not move all of them search with one model: in chunks and parts that are not shared alike.

    The 700 documents are three chunks: under FSDP2 one of two processes has more to do, of four one has nothing.
    """
    toy.write_retrieval_set(sets / "third", queries=30, documents=700, seed=2)
    config |= {"learning_rate": 1e-60, "min_lr": 0.0, "train_steps": 1, "max_tokens_per_forward": 2000,
               "best_metric": "nDCG@10"}  # fmt: skip
    alone = train_here(config | {"experiment_id": "alone"})
    (expected,) = read_metrics(alone, "evaluation")
    assert 0 < expected["sets"]["third"]["32"]["MAP@100"] < 1
    for world, kind in ((2, "fsdp"), (4, "ddp")):
        name = {"experiment_id": kind, "train_batch_size": 8 // world}
        assert on_processes(world, through_the_door, config | name, kind=kind) == [0] * world
        folder = Path(config["output_dir"]) / kind
        assert read_metrics(folder, "evaluation") == [expected]
        assert (folder / "best" / "model.safetensors").exists()


@pytest.mark.processes
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is an optional package")
def test_two_processes_under_deepspeed_find_what_one_finds(config, sets, tmp_path):
    """Through the shipped config: every digit before the weights move, and what the saved folder finds after that.

    The 700 documents are three chunks: one of two processes has more to do.
    """
    one = read_set(toy.write_retrieval_set(sets / "third", queries=30, documents=700, seed=2))
    config |= {"warmup_steps": 1, "train_steps": 2, "evaluation_steps": 1}  # a warm-up's first step moves nothing
    alone = read_metrics(train_here(config | {"experiment_id": "alone"}), "evaluation")
    folder = launched(config | {"experiment_id": "launched", "train_batch_size": 4}, tmp_path)
    before, after = read_metrics(folder, "evaluation")
    assert before == alone[0]
    assert 0 < before["sets"]["third"]["32"]["MAP@100"] < 1
    found = after["sets"]["third"]["32"]
    assert found == pytest.approx(by_the_saved_folder(folder / "step_2", one), rel=1e-9)
    assert found != before["sets"]["third"]["32"]
    assert found == pytest.approx(alone[1]["sets"]["third"]["32"], abs=0.01)  # rounding exchanges near neighbours


def by_the_saved_folder(folder: Path, one: RetrievalSet) -> dict[str, float]:
    """The metrics of a model folder, searched by our other way."""
    queries = encode(folder, [query_prompt(INSTRUCTION) + query for query in one.queries], 64)
    documents = encode(folder, one.documents[:], 64)
    ranking = search(unit_rows(queries), unit_rows(documents), 100)
    return evaluate(ranking.passages, one.relevance)


def launched(config: dict, folder: Path) -> Path:
    """A run through the shipped config of DeepSpeed, on two processes; returns its folder."""
    path = folder / "launched.json"
    path.write_text(json.dumps(config))
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    del environment["ACCELERATE_USE_CPU"]
    launch = ["accelerate.commands.launch", "--config_file", "configs/accelerate_deepspeed_cpu.yaml"]
    done = run_command("-m", *launch, "run.py", "--config", str(path), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes: 2" in done.stdout
    return Path(config["output_dir"]) / config["experiment_id"]


# ------------------------------------------------------------------------------------- no trace in training


def test_training_does_not_notice_that_it_is_evaluated(config):
    config |= {"use_lora": True, "lora_dropout": 0.3, "validation_steps": 3, "log_interval": 1, "evaluation_steps": 1}
    folder = train_here(config)
    plain = train_here(config | {"experiment_id": "plain", "evaluation_steps": 0})
    assert len(read_metrics(folder, "evaluation")) == 6
    assert read_metrics(plain, "evaluation") == []
    for kind in ("train", "validation"):
        assert read_metrics(folder, kind) == read_metrics(plain, kind)
    weights = "step_6/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (plain / weights).read_bytes()


# ------------------------------------------------------------------------------ the best model, early ends


@pytest.fixture
def scripted(monkeypatch):
    """A function (value by step): evaluations have these values of nDCG@10, whatever was found."""

    def script(values: list[float]) -> None:
        def note(self, step: int, _, real=Evaluations.note):
            return real(self, step, {"first": {"32": {"nDCG@10": values[step - 1]}}})

        monkeypatch.setattr(Evaluations, "note", note)

    return script


@pytest.fixture
def judged(config, sets) -> dict:
    """A run of eight steps with a state every two, evaluated after each."""
    shutil.rmtree(sets / "second")
    return config | {"train_steps": 8, "evaluation_steps": 1, "evaluation_dims": None, "checkpointing_steps": 2,
                     "best_metric": "first/nDCG@10", "log_interval": 3, "save_total_limit": 20}  # fmt: skip


def step_of(folder: Path) -> int:
    return json.loads((folder / "f2llm.json").read_text())["training"]["steps"]


def test_a_killed_run_has_the_best_model_of_the_run_that_was_not(judged, scripted, monkeypatch, capsys):
    """Killed after a step whose model was the best; between a state and the best folder; between its two renames."""
    scripted([0.1, 0.3, 0.2, 0.2, 0.5, 0.4, 0.5, 0.1])
    whole = train_here(judged | {"experiment_id": "whole"})
    assert step_of(whole / "best") == 5
    assert f"best:     {whole / 'best'}: first/nDCG@10 0.5000 at step 5" in capsys.readouterr().out
    interrupted(judged, 4)  # continues from step 2, which was the best
    dies_while_saving(judged, "best", 5, run.save, monkeypatch)
    folder = Path(judged["output_dir"]) / "toy"
    assert step_of(folder / "best") == 2
    os.replace(folder / "best", folder / ".best.old")  # as a kill would leave it
    interrupted(judged, 6)
    assert step_of(folder / "best") == 5
    train_here(judged)
    assert final(folder) == final(whole)
    assert not (folder / ".best.old").exists()


def dies_while_saving(config: dict, name: str, step: int, real, monkeypatch) -> None:
    """Train until the model folder `name` of `step` is to be written, when its state is on the disk, and die."""

    def save(live, wanted: str, now: int):
        if (wanted, now) == (name, step):
            live.states.wait()
            raise Killed
        return real(live, wanted, now)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "save", save)
        train_here(config)


def test_a_run_without_a_better_model_ends_early_and_is_finished(judged, scripted, capsys):
    scripted([0.1, 0.3, 0.2, 0.3, 0.1, 0.9, 0.1, 0.1])
    patient = judged | {"early_stopping_patience": 3, "checkpointing_steps": 0, "validation_steps": 100}
    folder = train_here(patient)  # exit status 0
    assert read_metrics(folder, "train")[-1]["step"] == read_metrics(folder, "validation")[-1]["step"] == 5
    assert (step_of(folder / "best"), step_of(folder / "step_5")) == (2, 5)
    printed = capsys.readouterr().out
    assert f"use it:   SentenceTransformer('{folder / 'step_5'}')" in printed
    before = final(folder)
    assert final(train_here(patient)) == before
    printed = capsys.readouterr().out
    assert "this run is finished: 5 steps were trained" in printed
    assert "| saved " not in printed
    shutil.rmtree(folder / "step_5")  # as if a kill had come before it
    assert final(train_here(patient)) == before
    os.rename(folder / "best", folder.parent / "taken")  # to be served from elsewhere, say
    train_here(patient)
    assert "this run is finished: 5 steps were trained" in capsys.readouterr().out
    os.rename(folder.parent / "taken", folder / "best")
    train_here(patient | {"early_stopping_patience": 0})
    assert (step_of(folder / "best"), step_of(folder / "step_8")) == (6, 8)


def test_by_another_metric_the_best_folder_is_the_model_to_beat(judged, monkeypatch, capsys):
    """What was better by that metric before is gone, and no line says that the folder holds it."""
    values = [(0.1, 0.9), (0.5, 0.1), (0.2, 0.4), (0.1, 0.2), (0.1, 0.3)]

    def note(self, step: int, _, real=Evaluations.note):
        found = dict(zip(("nDCG@10", "MRR@10"), values[step - 1], strict=True))
        return real(self, step, {"first": {"32": found}})

    monkeypatch.setattr(Evaluations, "note", note)
    judged |= {"train_steps": 5, "checkpointing_steps": 3}
    interrupted(judged, 4)
    folder = Path(judged["output_dir"]) / "toy"
    assert step_of(folder / "best") == 2
    train_here(judged | {"best_metric": "MRR@10"})
    assert step_of(folder / "best") == 5  # 0.3 against the 0.1 of step 2; 0.2 of step 4 comes between
    assert f"best:     {folder / 'best'}: MRR@10 0.3000 at step 5" in capsys.readouterr().out


def test_a_finished_run_by_another_metric_names_the_model_that_its_best_folder_holds(judged, monkeypatch):
    """Started again to be pushed, say: by that metric step 3 was better, whose model is gone."""
    values = [(0.1, 0.2), (0.5, 0.1), (0.2, 0.4), (0.1, 0.2)]

    def note(self, step: int, _, real=Evaluations.note):
        found = dict(zip(("nDCG@10", "MRR@10"), values[step - 1], strict=True))
        return real(self, step, {"first": {"32": found}})

    named = []  # what a push would take for the best; not the runs themselves, which hold their folder's lock
    monkeypatch.setattr(Evaluations, "note", note)
    monkeypatch.setattr(run, "push", lambda finished: named.append(finished.evaluations.best))
    judged |= {"train_steps": 4, "checkpointing_steps": 0}
    folder = train_here(judged)
    train_here(judged | {"best_metric": "MRR@10"})
    assert [best.step for best in named] == [2, 2]
    assert (step_of(folder / "best"), step_of(folder / "step_4")) == (2, 4)
    unjudged = judged | {"best_metric": None, "experiment_id": "unjudged"}
    folder = train_here(unjudged)
    train_here(unjudged | {"best_metric": "nDCG@10"})
    assert named[-1] is None  # as there is no folder: the last model is the one to push
    assert not (folder / "best").exists()


def test_evaluations_decide_by_what_was_found_before():
    values = [0.1, 0.3, 0.3, 0.2]
    found = Evaluations([RetrievalSet("a", [], [], [], [], [])], [8, 32], every=2, choice=Choice("nDCG@10"), patience=2)
    assert (found.best, found.is_over) == (None, False)
    decided = []
    for step, value in enumerate(values, start=1):
        is_best = found.note(step, {"a": {"8": {"nDCG@10": 1.0}, "32": {"nDCG@10": value}}})
        decided.append((is_best, found.is_over))
    assert decided == [(True, False), (True, False), (False, False), (False, True)]
    assert found.best == Best(step=2, value=0.3, worse_since=2)
    assert [step for step in range(1, 8) if found.is_due(step, 7)] == [2, 4, 6, 7]
    assert not found.note(5, {"b": {"32": {"nDCG@10": 1.0}}})  # an evaluation on other sets says nothing
    assert len(found.values) == 4


def test_a_metric_may_be_of_one_set_and_one_width():
    results = {
        "a": {"8": {"nDCG@10": 0.1}, "32": {"nDCG@10": 0.2}},
        "64": {"8": {"nDCG@10": 0.3}, "32": {"nDCG@10": 0.4}},
    }
    for text, value in {
        "nDCG@10": 0.3, "a/ndcg_at_10": 0.2, "8/NDCG@10": 0.2, "64/nDCG@10": 0.4, "64/8/nDCG@10": 0.3,
    }.items():  # fmt: skip
        choice, problem = best.parse_choice(text, ["a", "64"], [8, 32])
        assert problem is None
        assert best.value_of(results, choice, ["a", "64"]) == pytest.approx(value)


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_evaluated_is_refused_at_once(config, sets, capsys):
    (sets / "first" / "corpus.jsonl").unlink()
    with open(sets / "second" / "qrels" / "test.tsv", "a") as file:
        file.write("q0\tnobody\t1\n")
    assert door_here(config | {"evaluation_dims": "8,64", "early_stopping_patience": 2, "learning_rate": -1.0}) == 2
    printed = capsys.readouterr()
    for line in (
        "learning_rate: -1.0 must be above 0",
        f"evaluation_data_path: {sets / 'first' / 'corpus.jsonl'}: missing; a set has ",
        f"evaluation_data_path: {sets / 'second' / 'qrels' / 'test.tsv'}, line ",
        "evaluation_dims: 64 is more than the 32 dimensions that the model has",
        "early_stopping_patience: needs best_metric",
    ):
        assert line in printed.err, line
    assert not Path(config["output_dir"]).exists()


@pytest.mark.parametrize(("changes", "line"), [
    ({"best_metric": "nDCG@1"}, "best_metric: 'nDCG@1' is not one of nDCG@10, MRR@10, recall@10, recall@100, MAP@100; "
                                "did you mean nDCG@10?"),
    ({"best_metric": "frist/nDCG@10"}, "best_metric: there is no set 'frist', only first, second; did you mean first?"),
    ({"best_metric": "first/64/MAP@100"}, "best_metric: 64 is not one of the evaluated dimensions, 8, 16, 32"),
    ({"best_metric": "nDCG@10", "evaluation_steps": 0}, "best_metric: nothing is evaluated"),
    ({"evaluation_dims": "8;16"}, "evaluation_dims: '8;16' is not a number of dimensions: give some as 64,256"),
    ({"evaluation_data_path": "nowhere"}, "evaluation_data_path: nowhere: no such folder"),
], ids=str)  # fmt: skip
def test_each_refusal_names_key_value_and_remedy(config, changes, line, capsys):
    assert door_here(config | changes) == 2
    assert line in capsys.readouterr().err
